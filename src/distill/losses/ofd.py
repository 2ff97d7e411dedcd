"""Overhaul of feature distillation: Heo et al., "A Comprehensive Overhaul of Feature Distillation" (ICCV 2019)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_count, check_pair, check_tensor
from distill._merged import exact
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._layers import run_layers
from distill.losses._maps import check_maps, per_channel, pool_to_smaller
from distill.losses._sizes import MAPS

FAMILY = "learned maps"


def ofd_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """Margin of each channel for `OFDLoss`: the mean of the negative values that a batch norm gives.

        margin = E[x | x < 0] = b - s * phi(b / s) / Phi(-b / s),    x ~ Normal(b, s^2),  s = |weight|,  b = bias

    Where a channel is below zero with a probability of at most 0.001 the margin is -3 s, as in the authors' code; a
    channel with s = 0 is constant and has the margin min(b, 0).

    Args:
        weight: The weight of the teacher's batch norm before the ReLU, `(C,)`.
        bias: Its bias, `(C,)`.

    Returns:
        The margins, none above 0, shape `(C,)`, without a graph; float32, or float64 if an input is.

    Raises:
        TypeError: If one is no tensor, such as the weight of a batch norm without one.
        ValueError: If the two are not of one shape `(C,)`.

    Examples:
        >>> import torch
        >>> from distill import ofd_margin
        >>> norm = torch.nn.BatchNorm2d(2)  # standard normal at first: the margin is -sqrt(2 / pi)
        >>> ofd_margin(norm.weight, norm.bias)
        tensor([-0.7979, -0.7979])

    Reference:
        As `ofd_loss`.
    """
    if check_tensor("weight", weight).ndim != 1 or weight.shape != check_tensor("bias", bias).shape:
        raise ValueError(
            f"weight and bias must be of one shape (C,), got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(weight.dtype, bias.dtype), torch.float32)
    spread, mean = exact(weight.detach()).abs(), exact(bias.detach())
    ratio = mean / torch.where(spread == 0, 1.0, spread)
    log_below = torch.special.log_ndtr(-ratio)
    expected = mean - spread * (-(ratio**2) / 2 - math.log(2 * math.pi) / 2 - log_below).exp()
    margin = torch.where(log_below > math.log(0.001), expected, -3 * spread)
    return torch.where(spread == 0, mean.clamp(max=0), margin).to(weight.device, dtype)


def ofd_loss(student: Tensor, teacher: Tensor, *, margin: Tensor) -> Tensor:
    """Partial squared distance to the teacher's map after a margin ReLU, one value per sample.

        r = max(t, margin)                                              per channel, before the teacher's ReLU
        loss = sum_i { 0 if s_i <= r_i <= 0, else (s_i - r_i)^2 }       over channels and positions

    Where the teacher's value is not positive (r <= 0) the student's only has to be at most r, not equal. The maximum
    is a constant, and where s = r the slope is 0 from both sides, so ties have no effect.

    Args:
        student: The student's map before its ReLU, brought to the teacher's channels, `(N, C, ...)`. Any floating
            dtype; half and bfloat16 are computed in float32.
        teacher: The teacher's map before its ReLU, same shape. Gets no gradient.
        margin: The least value that counts in each channel, not positive, `(C,)`; see `ofd_margin`.

    Returns:
        One value per sample, shape `(N,)`, in squared units of the maps; float32, or float64 if an input is.

    Raises:
        TypeError: If an input or the margin is no tensor.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, or the margin is not of shape
            `(C,)`.

    Examples:
        >>> import torch
        >>> from distill import ofd_loss
        >>> student, teacher = torch.tensor([[[-5.0, 0.0, 1.0]]]), torch.tensor([[[-9.0, -9.0, 3.0]]])
        >>> ofd_loss(student, teacher, margin=torch.tensor([-1.0]))  # 0 + (0 + 1)^2 + (1 - 3)^2
        tensor([5.])

    Notes:
        Published with weight 1e-3 for the last stage and half the weight of the next stage for each one before it,
        beside 1 times the cross-entropy: on CIFAR-100 in the authors' code and in the benchmark of Zhao et al.,
        "Decoupled Knowledge Distillation" (CVPR 2022). For ImageNet both have 1e-4.

        Scale: `CIFAR-100/distiller.py` and `train_with_distillation.py` of the authors' code
        (`clovaai/overhaul-distillation`), and `mdistiller/distillers/OFD.py` of `megvii-research/mdistiller`: the sum
        over channels and positions, averaged over the samples.

        Caveat: The authors' scripts run the teacher in training mode, on the statistics of the batch; that benchmark
        and the `Distiller` run it in eval mode.

    Reference:
        Byeongho Heo, Jeesoo Kim, Sangdoo Yun, Hyojin Park, Nojun Kwak and Jin Young Choi, "A Comprehensive Overhaul of
        Feature Distillation", ICCV 2019.
    """
    student, teacher = check_pair(student, teacher, dim=1)
    margin = per_channel("margin", margin, student).detach()
    goal = torch.maximum(teacher, margin.reshape(-1, *(1,) * (student.ndim - 2)))
    counted = ((student > goal) | (goal > 0)).to(student.dtype)
    return (F.mse_loss(student, goal, reduction="none") * counted).flatten(1).sum(1)


@register_loss("ofd")
class OFDLoss(SampleLoss):
    """Partial squared distance to the teacher's map after a margin ReLU; see `ofd_loss` for the formula.

    Both maps are taken before the ReLU of their stage, `(N, student_channels, H, W)` and `(N, teacher_channels, H',
    W')`; of unequal size they are average-pooled to the smaller height and width. The student's goes through a learned
    1x1 convolution without bias and a batch norm, which always uses the statistics of the batch, without the samples
    that a mask hides: it serves the loss only, and has no running state to keep. Its parameters must be in the
    optimizer.

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map.
        margin: The least value that counts in each of the teacher's channels, not positive, `(teacher_channels,)`:
            `ofd_margin(norm.weight, norm.bias)` of the teacher's batch norm before the tap.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).

    Raises:
        ValueError: If channels, margin or the reduction are not as said.

    Examples:
        >>> import torch
        >>> from distill import OFDLoss, ofd_margin
        >>> norm = torch.nn.BatchNorm2d(32)  # the teacher's last one before the tap
        >>> loss = OFDLoss(16, 32, ofd_margin(norm.weight, norm.bias))
        >>> loss(torch.randn(4, 16, 8, 8), norm(torch.randn(4, 32, 8, 8))).shape
        torch.Size([])

    Notes:
        `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes the batch norm take the statistics of all processes while
        the loss is in training mode, on a CPU too.
    """

    options = {"student_channels": check_count, "teacher_channels": check_count}  # noqa: RUF012 - declared in the base
    built = ("student_channels", "teacher_channels")
    size = MAPS
    margin: Tensor

    def __init__(
        self, student_channels: int, teacher_channels: int, margin: Tensor, *, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(reduction=reduction)
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        if check_tensor("margin", margin).shape != (teacher_channels,):
            raise ValueError(f"margin must have shape ({teacher_channels},), got {tuple(margin.shape)}")
        if not (margin <= 0).all():
            raise ValueError(f"margin must not be positive, got {margin.max().item()}")
        self.register_buffer("margin", margin.detach().clone())
        convolution = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
        nn.init.normal_(convolution.weight, std=math.sqrt(2 / teacher_channels))
        self.connector = nn.Sequential(convolution, nn.BatchNorm2d(teacher_channels, track_running_stats=False))

    @override
    def values(self, student: Tensor, teacher: Tensor, target: Tensor | None, mask: Tensor | None) -> Tensor:
        student, teacher = check_maps(student, teacher, channels=(self.student_channels, self.teacher_channels))
        student, teacher = pool_to_smaller(student, teacher)
        return ofd_loss(run_layers(self.connector, student, mask), teacher, margin=self.margin)
