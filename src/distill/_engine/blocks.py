"""Rows by autograd: for losses without a closed form, and for rows that a closed form cannot do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill._checks import ordinary


def block_by_autograd(
    formula: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    *rest: Any,  # labels, where the loss has them, then what every block function takes
    **options: Any,
) -> Tensor:
    """Do what `Rows.block` does with the formula alone: autograd finds the gradient."""
    *operands, factors, gradient, _ = rest
    if factors is None:
        return formula(student, teacher, *operands, dim=-1, **options)
    counts = factors.view(-1) if isinstance(factors, Tensor) else factors
    values, found = values_and_gradient(formula, student, teacher, *operands, counts=counts, dim=-1, **options)
    gradient.copy_(found)
    return values


def values_and_gradient(
    formula: Callable[..., Tensor],
    student: Tensor,
    *constants: Tensor,
    counts: Tensor | float,
    dim: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Compute a formula's values, and their gradient for the student by autograd.

    Args:
        formula: As in `Rows`.
        student: Its first argument.
        constants: Its others: the teacher, then the labels, where the loss has them. They may be inference tensors.
        counts: What the gradient of each value is multiplied by, shaped like the values, or one number for all.
        dim: The dimension of a row.
        options: What else the formula takes.
    """
    constants = tuple(map(ordinary, constants))
    if torch.is_anomaly_enabled() and isinstance(counts, Tensor):  # NaN in a row that does not count is no anomaly
        hidden, (teacher, *labels) = (counts == 0).unsqueeze(dim), constants
        student, constants = student.masked_fill(hidden, 0.0), (teacher.masked_fill(hidden, 0.0), *labels)
    # Hooks from outside (checkpointing, offloading) are for what outlives the forward; they would recompute it here.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(torch.detach, lambda saved: saved):
        student = student.detach().requires_grad_()
        values = formula(student, *constants, dim=dim, **options)
        counts = counts if isinstance(counts, Tensor) else torch.full_like(values, counts)
        (gradient,) = torch.autograd.grad(values, student, counts)
    return values.detach(), gradient


def redo(
    rows: Tensor | None,
    values: Tensor,
    formula: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    *rest: Any,
    **options: Any,
) -> Tensor:
    """Do some rows of a block once more with the formula, and return the values.

    Args:
        rows: The indices of the rows that the quick form of a block cannot do; None for none.
        values: The values of all rows, `(R,)`, which are mended in place.
        formula: As in `Rows`.
        student: As in `Rows.block`.
        teacher: The teacher's rows.
        rest: The labels, where the loss has them; what each row's gradient is multiplied by, or None; and where the
            block leaves the gradient, mended in place.
        options: What the formula takes.
    """
    *labels, factors, gradient = rest
    if rows is not None and len(rows):
        counts = factors[rows] if isinstance(factors, Tensor) else factors
        mended = torch.empty_like(gradient[rows])
        some = (x[rows] for x in (student, teacher, *labels))
        values[rows] = block_by_autograd(formula, *some, counts, mended, None, **options)
        if factors is not None:
            gradient[rows] = mended
    return values
