"""Normalised features: Miles and Mikolajczyk, "Understanding the Role of the Projector" (AAAI 2024)."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_count, check_number, check_tensors, make_ready, without_autocast
from distill._reduction import hide
from distill._registry import register_loss
from distill.losses._base import BatchLoss
from distill.losses._batches import check_selection, count
from distill.losses._layers import check_device
from distill.losses._sizes import FEATURES

FAMILY = "relations"

_EPS, _LEAST = 1e-4, 1e-5


def srd_loss(student: Tensor, teacher: Tensor, *, power: float = 4.0, mask: Tensor | None = None) -> Tensor:
    """Logarithm of a power of the differences of normalised features, one value for the batch.

        BN(x) = (x - mean of the batch) / sqrt(variance of the batch + 1e-4), for each channel by itself
        loss = log(1e-5 + sum_nc |BN(s) - BN(t)|^power)

    The logarithm keeps the gradient from growing with the size of the batch and the number of channels. `SRDLoss`
    learns the linear layer W that the student's features go through; this function takes what it gives.

    Args:
        student: The student's features, `(N, C)`, N at least 2; of maps `(N, C, H, W)` the mean over the positions. Any
            floating dtype; half and bfloat16 are computed in float32.
        teacher: The teacher's features, of the same N and C, likewise. Gets no gradient.
        power: The exponent, at least 1.
        mask: Bool or integers, `(N,)`: which samples count. None: all.

    Returns:
        A scalar, from log(1e-5), about -11.5, up; 0 if the mask leaves fewer than two samples. float32, or float64 if
        an input is.

    Raises:
        TypeError: If what must be a tensor is none, or `power` is no number.
        ValueError: If N, C or the devices differ, N is 1, an input has fewer than two dimensions, is empty or not
            floating-point, the mask is not `(N,)` or holds weights, or the power is less than 1 or not finite.

    Examples:
        >>> import torch
        >>> from distill import srd_loss
        >>> student = torch.tensor([[1.0], [-1.0]])
        >>> srd_loss(student, -student)  # log(2 * 2^4), but for the eps
        tensor(3.4655)

    Notes:
        Published with weight 2 on pooled features, beside the divergence of the logits with weight 1 at temperature 1
        and the cross-entropy with weight 1, with `power` 4, from ResNet-34 to ResNet-18 on ImageNet.

        Scale: `imagenet/torchdistill/losses/single.py` of the authors' code (`roymiles/Simple-Recipe-Distillation`):
        the sum over samples and channels, whose batch norms have the eps of 1e-4.

        Caveat: There the sum has nothing added to it, and the loss of what agrees is minus infinity; the 1e-5 is that
        of their code for DeiT (`deit/models.py`). torchdistill's `SRDLoss` has a power of 1 by default. Their linear
        layer has a bias, which the batch norm takes away again; here it has none.

    Reference:
        Roy Miles and Krystian Mikolajczyk, "Understanding the Role of the Projector in Knowledge Distillation", AAAI
        2024 and arXiv 2303.11098, section 3.
    """
    _check_power("power", power)
    student, teacher, kept = _features(student, teacher, mask)
    if student.shape != teacher.shape:
        raise ValueError(
            "student and teacher must have the same number of channels (nothing is broadcast), "
            f"got {student.shape[1]} and {teacher.shape[1]}"
        )
    return _distance(student, teacher, kept, power)


def _check_power(name: str, value: float) -> float:
    check_number(name, value)
    if not 1 <= value < float("inf"):
        raise ValueError(f"{name} must be at least 1 and finite, got {value!r}")
    return value


def _features(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features `(N, C)` of what was checked, and which samples count; the others are 0."""
    check_tensors(student, teacher)
    if min(student.ndim, teacher.ndim) < 2 or len(student) != len(teacher):
        raise ValueError(
            "student and teacher must be batches (N, ...) of the same N samples, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    student, teacher = make_ready(student, teacher)
    if len(student) < 2:
        raise ValueError(
            f"there must be at least 2 samples, got shape {tuple(student.shape)} (DataLoader: drop_last=True)"
        )
    kept = check_selection(mask, student.shape[:1], student.device)
    if kept is not None:
        student, teacher = hide(student, kept), hide(teacher, kept)
    return _pooled(student), _pooled(teacher), kept


def _pooled(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.flatten(2).mean(2)


def _distance(student: Tensor, teacher: Tensor, kept: Tensor | None, power: float) -> Tensor:
    difference = (_batch_norm(student, kept) - _batch_norm(teacher, kept)).abs()
    value = torch.log(_LEAST + (difference**power).sum())
    return value if kept is None else value.masked_fill(kept.sum() < 2, 0.0)


def _batch_norm(x: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        centred = x - x.mean(0)
        return centred * (centred.square().mean(0) + _EPS).rsqrt()
    centred = (x - x.sum(0) / count(kept)).masked_fill(~kept[:, None], 0.0)
    return centred * (centred.square().sum(0) / count(kept) + _EPS).rsqrt()


@register_loss("srd")
class SRDLoss(BatchLoss):
    """Logarithm of a power of the differences of normalised features, the student's through a learned linear layer.

    See `srd_loss` for the formula. It exists for a whole batch only, so it has no reduction, and its mask selects
    samples. The statistics are always those of the batch. The value may be negative.

    Args:
        student_channels: Channels of the student's features.
        teacher_channels: Channels of the teacher's features.
        power: The exponent, at least 1. It may be changed between steps.
        gather: Whether processes that train together compare the samples of all of them: the loss is that of the whole
            batch, and so is the mean of the processes' gradients (DDP, FSDP). Not in eval mode. False: each its own.

    Attributes:
        projector: The learned layer, an `nn.Linear` without a bias, also where the channels agree.

    Raises:
        TypeError: If `power` is no number.
        ValueError: If a number of channels is no positive integer, or the power is less than 1 or not finite.

    Examples:
        >>> import torch
        >>> from distill import SRDLoss
        >>> loss = SRDLoss(64, 256)
        >>> loss(torch.randn(8, 64), torch.randn(8, 256)).shape
        torch.Size([])
    """

    options = {  # noqa: RUF012 - declared in the base
        "student_channels": check_count,
        "teacher_channels": check_count,
        "power": _check_power,
    }
    built = ("student_channels", "teacher_channels")
    size = FEATURES

    def __init__(
        self, student_channels: int, teacher_channels: int, power: float = 4.0, *, gather: bool = False
    ) -> None:
        super().__init__(gather=gather)
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        self.power = power
        self.projector = nn.Linear(student_channels, teacher_channels, bias=False)

    @override
    def whole(self, student: Tensor, teacher: Tensor, target: Tensor | None, mask: Tensor | None) -> Tensor:
        student, teacher, kept = _features(student, teacher, mask)
        sides = (("student", student, self.student_channels), ("teacher", teacher, self.teacher_channels))
        for name, side, channels in sides:
            if side.shape[1] != channels:
                raise ValueError(f"{name} must have {channels} channels, got {side.shape[1]}")
        check_device(self.projector, student)
        with without_autocast(student):
            projected = student @ self.projector.weight.to(student.dtype).mT
        return _distance(projected, teacher, kept, self.power)
