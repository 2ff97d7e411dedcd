"""Rows whose numbers are not side by side, such as the classes of each pixel of a map, in slabs of their own layout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill._engine.blocks import values_and_gradient
from distill._reduction import hide

_LINE = 16  # rows side by side that a slab has at least: fewer would use a part of what memory gives at once


def can_cut(x: Tensor, dim: int) -> bool:
    """Whether `(..., C, ...)` can be seen as `(outer, C, inner)` without a copy."""
    dim %= x.ndim
    try:
        x.view(math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :]))
    except RuntimeError:
        return False
    return True


def run_slabs(
    formula: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    factors: Tensor | float | None,
    *,
    mask: Tensor | None,
    dim: int,
    dtype: torch.dtype,
    elements: int,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Give values and gradient, a slab at a time: no number changes its place, and autograd finds the gradient.

    Args:
        formula: As in `Rows`.
        student: `(..., C, ...)`; one that `can_cut`.
        teacher: Likewise.
        labels: `(..., 1, ...)`, one or some per row, or None.
        factors: What each row's gradient is multiplied by, `(..., ...)`, or one number for all; None for no gradient.
        mask: Which rows count, `(..., ...)`; what others hold shows nowhere. None: all.
        dim: The dimension of the `C` numbers of a row.
        dtype: Of the computation.
        elements: Of a block. A slab has a quarter, since autograd holds many of its size at a time.
        options: What else the formula takes.

    Returns:
        One value for each row, `(..., ...)`, and the gradient, in the student's dtype and layout.
    """
    dim %= student.ndim
    outer, columns, inner = math.prod(student.shape[:dim]), student.shape[dim], math.prod(student.shape[dim + 1 :])
    values = torch.empty(outer, inner, dtype=dtype, device=student.device)
    gradient = None if factors is None else _like(student, dim)
    slopes = None if gradient is None else gradient.view(outer, columns, inner)
    pieces = [x.reshape(outer, -1, inner) for x in (student.detach(), teacher, labels) if x is not None]
    per_row = [x.reshape(outer, inner) if isinstance(x, Tensor) else None for x in (factors, mask)]
    elements //= 4
    width = min(inner, max(elements // columns, _LINE))
    depth = max(1, elements // (columns * inner)) if width == inner else 1
    for start, left in itertools.product(range(0, outer, depth), range(0, inner, width)):
        rows, across = slice(start, start + depth), slice(left, left + width)
        ours, theirs, *operands = (x[rows, :, across] for x in pieces)
        counts, kept = (None if x is None else x[rows, across] for x in per_row)
        slab = [x.to(dtype) if kept is None else hide(x.to(dtype), kept, dim=1) for x in (ours, theirs)]
        if factors is None or slopes is None:
            part = formula(*slab, *operands, dim=1, **options)
        else:
            each = factors if counts is None else counts
            part, slope = values_and_gradient(formula, *slab, *operands, counts=each, dim=1, **options)
            slope = slope if counts is None else hide(slope, counts, dim=1)  # what does not count may be NaN
            slopes[rows, :, across] = slope
        values[rows, across] = part
    return values.view(student.movedim(dim, -1).shape[:-1]), gradient


def _like(x: Tensor, dim: int) -> Tensor:
    """Memory laid out as a tensor's, in one piece; where it holds some numbers more than once, as it comes."""
    same = torch.empty_like(x)
    return same if can_cut(same, dim) else torch.empty(x.shape, dtype=x.dtype, device=x.device)
