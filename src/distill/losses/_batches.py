"""What losses of a whole batch share: which samples a mask selects, and means over pairs of them.

A mask changes no shape: what it hides is set to 0 and counts nowhere, and means divide by how many samples are left. So
a mask costs no look at its values, and `torch.compile` and `vmap` take it as they take the rest.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill._checks import check_samples
from distill._reduction import check_mask, hide


def select(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check two batches `(N, ...)` as `check_samples` does, and hide the samples that a mask does not select.

    Args:
        student: The student's batch, `(N, ...)`.
        teacher: The teacher's batch, `(N, ...)`.
        mask: Bool or integers, `(N,)`; None: every sample counts.

    Returns:
        The student and the detached teacher, `(N, D)` each, and what counts, bool `(N,)` or None.

    Raises:
        TypeError: If what must be a tensor is none.
        ValueError: As `check_samples` and `check_selection`.
    """
    student, teacher = check_samples(student, teacher)
    kept = check_selection(mask, student.shape[:1], student.device)
    if kept is None:
        return student, teacher, None
    return hide(student, kept), hide(teacher, kept), kept


def check_selection(mask: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor | None:
    """Return which samples count as bools, or None for all; raise ValueError if the mask does not say so."""
    if mask is None:
        return None
    check_mask(mask, shape, device)
    if mask.is_floating_point():
        raise ValueError(f"mask must select samples (bool or integers) in a loss of a whole batch, got {mask.dtype}")
    return mask != 0


def count(kept: Tensor, least: int = 1) -> Tensor:
    """How many samples are kept, but at least `least`, for what is divided by it."""
    number = kept.sum()
    return number.masked_fill(number < least, least)


def centre(values: Tensor, kept: Tensor | None, dim: int = 0) -> Tensor:
    """Subtract the mean along `dim`; with `kept`, along the samples, that of those that count. The others become 0."""
    if kept is None:
        return values - values.mean(dim, keepdim=True)
    hidden = ~kept.reshape(-1, *(1,) * (values.ndim - 1))
    mean = values.masked_fill(hidden, 0.0).sum(0) / count(kept)
    return (values - mean).masked_fill(hidden, 0.0)


def mean_of_pairs(values: Tensor, kept: Tensor | None) -> Tensor:
    """The mean over all pairs of samples that count, from values `(N, N)` that are 0 for the other pairs."""
    return values.mean() if kept is None else values.sum() / count(kept) ** 2


def mean_square_of_pairs(ours: Tensor, theirs: Tensor, kept: Tensor | None) -> Tensor:
    """The mean squared difference `mean_of_pairs` of values on both sides that agree for the other pairs."""
    if kept is None:
        return F.mse_loss(ours, theirs)
    return mean_of_pairs(F.mse_loss(ours, theirs, reduction="none"), kept)


def hide_pairs(values: Tensor, kept: Tensor | None) -> Tensor:
    """Set the values `(N, N)` of pairs of which a sample does not count to 0, with a gradient of 0."""
    return values if kept is None else values.masked_fill(~(kept[:, None] & kept), 0.0)
