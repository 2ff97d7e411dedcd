"""What two or more losses share: option checks, shape checks and the reduction over samples."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Reduction: TypeAlias = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction: Reduction) -> Reduction:
    """Return `reduction` if it is a known one, else raise ValueError."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    return reduction


def check_positive(name: str, value: float) -> float:
    """Return `value` if it is positive and finite, else raise ValueError that names the option."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return value


def check_not_negative(name: str, value: float) -> float:
    """Return `value` if it is zero or positive and finite, else raise ValueError that names the option."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be zero or positive and finite, got {value!r}")
    return value


def check_count(name: str, value: int, *, least: int = 1) -> int:
    """Return `value` if it is an integer of at least `least`, else raise ValueError that names the option."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        must = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {must}, got {value!r}")
    return value


def check_fraction(name: str, value: float, *, zero: bool = False) -> float:
    """Return `value` if it is between 0 and 1, or with `zero` also 0, else raise ValueError that names the option."""
    if not (0 < value < 1 or (zero and value == 0)):
        must = "at least 0 and below 1" if zero else "above 0 and below 1"
        raise ValueError(f"{name} must be {must}, got {value!r}")
    return value


def check_kinds(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Check what does not depend on the shapes, and return the dtype in which the loss is computed."""
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(f"student and teacher must be floating-point, got {student.dtype} and {teacher.dtype}")
    if student.device != teacher.device:
        raise ValueError(f"student and teacher must be on the same device, got {student.device} and {teacher.device}")
    if student.numel() == 0 or teacher.numel() == 0:
        empty = student if student.numel() == 0 else teacher
        raise ValueError(f"student and teacher must not be empty, got shape {tuple(empty.shape)}")
    if student.dtype == teacher.dtype == torch.float32:  # the usual case, and half a microsecond cheaper
        return torch.float32
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def make_ready(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Check what does not depend on the shapes, detach the teacher and bring both to the dtype of the loss."""
    dtype = check_kinds(student, teacher)
    return widen(student, dtype), widen(teacher.detach(), dtype)


def widen(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring a tensor to the dtype of the loss; to ask first is cheaper than a call that changes nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def check_inputs(student: Tensor, teacher: Tensor, *, dim: int) -> torch.dtype:
    """Check that two tensors can be compared along `dim`, and say in which dtype.

    Args:
        student: The student's tensor, any shape with a dimension `dim`.
        teacher: The teacher's tensor, of the same shape.
        dim: The dimension that the loss sums over.

    Returns:
        The dtype in which the loss is computed: the wider one of the two, and at least float32.

    Raises:
        ValueError: If the shapes differ (they are never broadcast), an input is not floating-point, the devices
            differ, the tensors are empty, or `dim` is out of range.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            "student and teacher must have the same shape (nothing is broadcast), "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    dtype = check_kinds(student, teacher)
    if not -student.ndim <= dim < student.ndim:
        raise ValueError(f"dim must be a dimension of the inputs, got {dim} for shape {tuple(student.shape)}")
    return dtype


def check_pair(student: Tensor, teacher: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    """Check that two tensors can be compared along `dim`, and make them ready for it.

    Args:
        student: The student's tensor, any shape with a dimension `dim`.
        teacher: The teacher's tensor, of the same shape.
        dim: The dimension that the loss sums over.

    Returns:
        The student and the detached teacher, both in the dtype in which the loss is computed: the wider one of the
        two, and at least float32.

    Raises:
        ValueError: As `check_inputs`.
    """
    dtype = check_inputs(student, teacher, dim=dim)
    return widen(student, dtype), widen(teacher.detach(), dtype)


def check_mask(mask: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raise ValueError if the mask has not the shape and device of the per-sample values, or is complex."""
    if mask.shape != shape:
        raise ValueError(f"mask must be shaped like the per-sample values, {tuple(shape)}, got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"mask must be on the device of the values, {device}, got {mask.device}")
    if mask.is_complex():
        raise ValueError(f"mask must be bool or real weights, got {mask.dtype}")


def check_classes(logits: Tensor, *, dim: int) -> None:
    """Raise ValueError if there are fewer than two classes along `dim`."""
    if logits.shape[dim] < 2:
        raise ValueError(f"there must be at least 2 classes along dim {dim}, got shape {tuple(logits.shape)}")


def check_labels(target: Tensor | None, logits: Tensor, *, dim: int) -> Tensor:
    """Check class labels, and make them an index for `gather` and `scatter` along `dim`.

    Args:
        target: One class per sample: shaped like the logits without `dim`, integers from 0 to C - 1. Their range is
            left to `gather`: looking at it here would wait for the device.
        logits: The logits that the labels belong to.
        dim: The dimension of the C classes.

    Returns:
        The labels as int64, with a dimension of size 1 at `dim`.

    Raises:
        ValueError: If there are no labels, or they have another shape or device or are no integers.
    """
    if target is None:
        raise ValueError("target must be the class of every sample, got None")
    shape = tuple(size for d, size in enumerate(logits.shape) if d != dim % logits.ndim)
    if target.shape != shape:
        raise ValueError(f"target must be one class per sample, of shape {shape}, got shape {tuple(target.shape)}")
    if not is_integer(target):
        raise ValueError(f"target must be integers, got {target.dtype}")
    if target.device != logits.device:
        raise ValueError(f"target must be on the device of the logits, {logits.device}, got {target.device}")
    return target.long().unsqueeze(dim)


def is_integer(tensor: Tensor) -> bool:
    """Whether a tensor holds integers, which bools are not."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature, and spare the pass over memory where it is 1."""
    return logits if temperature == 1 else logits / temperature


def harden(values: Tensor, temperature: float) -> Tensor:
    """Multiply by the squared temperature, for the gradient that `soften` took away, and spare that where it is 1."""
    return values if temperature == 1 else values * temperature**2


def log_mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Compute log(share * a + (1 - share) * b) of two distributions; `share` is above 0 and below 1.

    The smallest normal number is added: it changes nothing but where a and b underflow both, and there, what a
    divergence multiplies the logarithm by is 0 as well.
    """
    return (torch.lerp(b, a, share) + torch.finfo(a.dtype).tiny).log()


def check_samples(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Check two batches whose samples are compared within each batch, and flatten every sample.

    Args:
        student: The student's batch, `(N, ...)`.
        teacher: The teacher's batch, `(N, ...)` of the same N; its other dimensions are its own.

    Returns:
        The student and the detached teacher, `(N, D)` each with a D of its own, both in the dtype in which the loss is
        computed: the wider one of the two, and at least float32.

    Raises:
        ValueError: If N differs, an input has fewer than two dimensions, is not floating-point or is empty, or the
            devices differ.
    """
    if min(student.ndim, teacher.ndim) < 2 or len(student) != len(teacher):
        raise ValueError(
            "student and teacher must be batches (N, ...) of the same N samples, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    student, teacher = make_ready(student, teacher)
    return student.flatten(1), teacher.flatten(1)


def normalize(tensor: Tensor, *, dim: int, eps: float = 1e-12) -> Tensor:
    """Divide by the L2 norm along `dim`; what has no norm above `eps` becomes 0 and gets no gradient.

    `F.normalize` divides by `eps` there instead, and multiplies the gradient of a channel that is 0 by 1e12.
    """
    norm = torch.linalg.vector_norm(tensor, dim=dim, keepdim=True)
    # What is divided by infinity is 0, and so is its gradient.
    return tensor / torch.where(norm > eps, norm, math.inf)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast leaves products of matrices on the tensor's device in the dtype they come in."""
    device = tensor.device.type
    # To switch off costs as much as a small product, so only what is on; the meta device has none to ask for.
    if device == "meta" or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device)):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def reduce(values: Tensor, reduction: Reduction, mask: Tensor | None = None) -> Tensor:
    """Reduce per-sample values, with optional weights.

    With weights w the mean is `sum(w * v) / sum(w)`, which is 0 where all weights are 0. A value whose weight is 0 does
    not count, not even if it is infinite or NaN; the gradient through such a value is NaN all the same.

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
    weights = mask.to(values.dtype)
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
