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
        ValueError: If the shapes differ (they are never broadcast), an input is not floating-point, the devices
            differ, the tensors are empty, or `dim` is out of range.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            "student and teacher must have the same shape (nothing is broadcast), "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    student, teacher = _ready(student, teacher)
    if not -student.ndim <= dim < student.ndim:
        raise ValueError(f"dim must be a dimension of the inputs, got {dim} for shape {tuple(student.shape)}")
    return student, teacher


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
    student, teacher = _ready(student, teacher)
    return student.flatten(1), teacher.flatten(1)


def _ready(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Check what does not depend on the shapes; detach the teacher and widen both."""
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(f"student and teacher must be floating-point, got {student.dtype} and {teacher.dtype}")
    if student.device != teacher.device:
        raise ValueError(f"student and teacher must be on the same device, got {student.device} and {teacher.device}")
    for tensor in (student, teacher):
        if tensor.numel() == 0:
            raise ValueError(f"student and teacher must not be empty, got shape {tuple(tensor.shape)}")
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def normalize(tensor: Tensor, *, dim: int, eps: float = 1e-12) -> Tensor:
    """Divide by the L2 norm along `dim`; what has no norm above `eps` becomes 0 and gets no gradient.

    `F.normalize` divides by `eps` there instead, and multiplies the gradient of a channel that is 0 by 1e12.
    """
    norm = torch.linalg.vector_norm(tensor, dim=dim, keepdim=True)
    # Two steps: where() stops the gradient of what it does not choose, but 0 times an infinite one would be NaN.
    return tensor * torch.where(norm > eps, norm.clamp_min(eps).reciprocal(), 0.0)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast leaves products of matrices on the tensor's device in the dtype they come in."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


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
    if mask.shape != values.shape:
        raise ValueError(
            f"mask must be shaped like the per-sample values, {tuple(values.shape)}, got {tuple(mask.shape)}"
        )
    if mask.device != values.device:
        raise ValueError(f"mask must be on the device of the values, {values.device}, got {mask.device}")
    if mask.is_complex():
        raise ValueError(f"mask must be bool or real weights, got {mask.dtype}")
    weights = mask.to(values.dtype)
    weighted = torch.where(weights == 0, 0.0, values * weights)
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    total = weights.sum()
    return weighted.sum() / torch.where(total == 0, 1.0, total)
