"""The one meaning of reduction and mask, for every loss: over samples."""

import math
import numbers
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from distill._checks import check_tensor, ordinary

Reduction: TypeAlias = Literal["mean", "sum", "none"]
"""How a loss makes one number of its per-sample values; the type of every `reduction`."""

REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction: Reduction) -> Reduction:
    """Return `reduction` if it is a known one, else raise ValueError."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    return reduction


def check_denominator(denominator: float | Tensor | None, reduction: Reduction) -> None:
    """Raise ValueError if a denominator is no positive number, or there is no mean whose place the sum over it takes.

    The value of a tensor is not looked at: that could wait for a device.
    """
    if denominator is None:
        return
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator must be one number, got a tensor of shape {tuple(denominator.shape)}")
    elif not isinstance(denominator, numbers.Real) or isinstance(denominator, bool):
        raise TypeError(f"denominator must be a number, got {type(denominator).__name__}")
    elif not 0 <= denominator < math.inf:
        raise ValueError(f"denominator must be zero or positive and finite, got {denominator!r}")
    if reduction != "mean":
        raise ValueError(f"denominator must come with reduction='mean', got reduction={reduction!r}")


def divide(value: Tensor, denominator: float | Tensor | None) -> Tensor:
    """Divide a sum by the denominator of a call; over 0, where nothing counted, it stays as it is, which is 0."""
    if denominator is None:
        return value
    if isinstance(denominator, Tensor):
        return value / torch.where(denominator == 0, 1, denominator).to(value.device).reshape(())
    return value / (denominator or 1.0)


def check_mask(mask: Tensor, shape: torch.Size, device: torch.device, *, name: str = "mask") -> None:
    """Raise ValueError if the mask has not the shape and device of the per-sample values, or is complex."""
    check_tensor(name, mask)
    if mask.shape != shape:
        raise ValueError(f"{name} must be shaped like the per-sample values, {tuple(shape)}, got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{name} must be on the device of the values, {device}, got {mask.device}")
    if mask.is_complex():
        raise ValueError(f"{name} must be bool or real weights, got {mask.dtype}")


def hide(tensor: Tensor, mask: Tensor, *, dim: int | None = None) -> Tensor:
    """Set samples whose mask is 0 to 0, with a gradient of 0, whatever they hold.

    Args:
        tensor: What a loss compares: samples first, or with a dimension `dim` that the mask does not have.
        mask: Bool or weights, one per sample, checked.
        dim: The dimension of the values of one sample; None: all after those of the mask.
    """
    hidden = mask.detach() == 0
    hidden = hidden.reshape(*mask.shape, *(1,) * (tensor.ndim - mask.ndim)) if dim is None else hidden.unsqueeze(dim)
    return tensor.masked_fill(hidden, 0.0)


def reduce(values: Tensor, reduction: Reduction, mask: Tensor | None = None) -> Tensor:
    """Reduce per-sample values, with optional weights.

    With weights w the mean is `sum(w * v) / sum(w)`, which is 0 where all weights are 0. A value whose weight is 0 does
    not count, not even if it is infinite or NaN; `hide` keeps it out of the gradient too.

    Args:
        values: Per-sample values, any shape.
        reduction: `"mean"`, `"sum"` or `"none"`; checked by `check_reduction` where the loss is built.
        mask: Bool, or weights, of the same shape as `values`.

    Returns:
        A scalar, or with `"none"` the (weighted) values.

    Raises:
        ValueError: If the mask has another shape or device, or is complex.
    """
    if mask is None:
        return values.mean() if reduction == "mean" else values.sum() if reduction == "sum" else values
    check_mask(mask, values.shape, values.device)
    weights = ordinary(mask).to(values.dtype)
    weighted = torch.where(weights == 0, 0.0, values * weights)
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    total = weights.sum()
    return weighted.sum() / torch.where(total == 0, 1.0, total)


def row_weights(values: Tensor, reduction: Reduction, mask: Tensor | None = None) -> Tensor:
    """Give what each value counts for in `reduce(values, reduction, mask)`: its derivative there.

    Args:
        values: Only their shape, dtype and device matter.
        reduction: As in `reduce`.
        mask: As in `reduce`, and checked.

    Returns:
        The weights, shaped like the values and in their dtype.
    """
    weights = torch.ones_like(values) if mask is None else mask.to(values.dtype)
    if reduction != "mean":
        return weights
    total = weights.sum()
    return weights / torch.where(total == 0, 1.0, total)
