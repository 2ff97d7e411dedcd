"""What must hold of hidden states, masks and labels where a loss forms the logits itself."""

from __future__ import annotations

import torch
from torch import Tensor

from distill._checks import check_labels, check_numbers, is_integer, ordinary
from distill._reduction import Reduction, check_mask

IGNORED = -100  # a label that means "none"


def check_hidden(side: str, hidden: Tensor, weight: Tensor) -> None:
    """Raise ValueError if hidden states do not fit the weight of their head."""
    check_numbers(f"the {side}'s hidden states", hidden)
    if hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1] or hidden.numel() == 0:
        raise ValueError(
            f"the {side}'s hidden states must be (..., {weight.shape[1]}), as wide as its head, and not empty, "
            f"got shape {tuple(hidden.shape)}"
        )
    if not hidden.is_floating_point():
        raise ValueError(f"the {side}'s hidden states must be floating-point, got {hidden.dtype}")
    if hidden.device != weight.device:
        raise ValueError(
            f"the {side}'s hidden states must be on its head's device, {weight.device}, got {hidden.device}"
        )


def flat_mask(mask: Tensor | None, hidden: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The mask, checked, as `(N,)` in the dtype of the loss."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    check_mask(mask, hidden.shape[:-1], hidden.device)
    return ordinary(mask).reshape(-1).to(dtype)


def find_labels(
    target: Tensor | None, hidden: Tensor, classes: int, mask: Tensor | None, ignore_index: int = IGNORED
) -> Tensor:
    """Labels `(N, 1)`, checked, -1 where there is none or the mask hides it."""
    if target is None:
        raise ValueError("target must be the class of every sample, got None")
    if classes < 2:
        raise ValueError(f"a cross-entropy must have at least 2 classes, got a head of {classes}")
    if isinstance(target, Tensor) and target.shape == hidden.shape[:-1]:
        target = ordinary(target).reshape(-1)
        target = target.long() if is_integer(target) else target  # as unsigned bytes, 156 would equal -100
        none = target == ignore_index if mask is None else (target == ignore_index) | (mask.detach() == 0)
        checked = check_labels(target, target.new_empty(1).expand(len(target), classes), dim=-1, mask=~none)
        return checked.masked_fill(none.unsqueeze(-1), -1)
    return check_labels(target, hidden.new_empty(1).expand(*hidden.shape[:-1], classes), dim=-1)


def check_compared(labels: Tensor, mask: Tensor | None, size: int) -> None:
    """A loss that uses labels needs a class among the compared ones for every sample that counts."""
    counted = labels if mask is None else labels.masked_fill((mask.detach() == 0).unsqueeze(-1), 0)
    check_labels(counted.squeeze(-1), counted.new_empty(1).expand(len(labels), size), dim=-1)


def labelled_share(labels: Tensor, mask: Tensor | None, reduction: Reduction, dtype: torch.dtype) -> Tensor | float:
    """What turns a mean over all counted samples into one over those that have a label."""
    if reduction != "mean":
        return 1.0
    labelled = labels.squeeze(-1) >= 0
    counts = labelled.new_ones(len(labelled), dtype=dtype) if mask is None else mask  # which may learn
    having = (counts * labelled).sum()
    return counts.sum() / torch.where(having == 0, 1.0, having)
