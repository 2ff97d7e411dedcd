"""Variational information distillation: Ahn et al., "Variational Information Distillation ..." (CVPR 2019)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_count, check_pair, check_positive
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._layers import run_layers
from distill.losses._maps import check_maps, per_channel, pool_to_smaller
from distill.losses._sizes import MAPS

FAMILY = "learned maps"


def vid_loss(student: Tensor, teacher: Tensor, *, variance: Tensor) -> Tensor:
    """Negative log-likelihood of the teacher's map under a Gaussian around the student's guess, one value per sample.

        loss = 1/(C P) * sum_c sum_i 1/2 [(t_ci - m_ci)^2 / v_c + log v_c]    over C channels and P positions

    m is what a small network predicts from the student's map, v the variance of each channel; both are learned with
    the student (`VIDLoss` owns them). Up to a constant, minus this value is a lower bound of the mutual information of
    the two maps. The loss may be negative.

    Args:
        student: The predicted mean of the teacher's map, `(N, C, ...)`. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's map, same shape. Gets no gradient.
        variance: The variance of each channel, positive, `(C,)`.

    Returns:
        One value per sample, shape `(N,)`, in nats per element; float32, or float64 if an input is.

    Raises:
        TypeError: If an input or the variance is no tensor.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, or the variance is not of
            shape `(C,)`.

    Examples:
        >>> import torch
        >>> from distill import vid_loss
        >>> mean, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]])
        >>> vid_loss(mean, teacher, variance=torch.tensor([4.0, 1.0]))  # (4/4 + log 4 + 0/1 + log 1) / 4
        tensor([0.5966])

    Notes:
        Published with weight 1 for each of several pairs of layers (the CIFAR-100 benchmark of Tian, Krishnan and
        Isola, "Contrastive Representation Distillation", ICLR 2020).

        Scale: `distiller_zoo/VID.py` of that benchmark (`HobbitLong/RepDistiller`): the mean over all elements, without
        the constant `1/2 log(2 pi)`. The paper *sums* over channels and positions.

    Reference:
        Sungsoo Ahn, Shell Xu Hu, Andreas Damianou, Neil D. Lawrence and Zhenwen Dai, "Variational Information
        Distillation for Knowledge Transfer", CVPR 2019.
    """
    student, teacher = check_pair(student, teacher, dim=1)
    variance = per_channel("variance", variance, student)
    squares = F.mse_loss(student, teacher, reduction="none").reshape(*student.shape[:2], -1).mean(2)
    return (squares / variance + variance.log()).mean(1) / 2


@register_loss("vid")
class VIDLoss(SampleLoss):
    """Gaussian negative log-likelihood of the teacher's map given the student's; see `vid_loss` for the formula.

    The mean comes from three 1x1 convolutions without bias, with ReLUs (slope 0 at 0) between them, over the student's
    map; the variance of channel c is `softplus(a_c) + eps`. Both are parameters of this module and must be in the
    optimizer. The maps are `(N, student_channels, H, W)` and `(N, teacher_channels, H', W')`; of unequal size they are
    average-pooled to the smaller height and width.

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map; also the width of the hidden convolutions.
        init_variance: The variance of every channel at first, greater than `eps` and finite.
        eps: The least variance, positive.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).

    Raises:
        TypeError: If `eps` is no number.
        ValueError: If channels, variances or the reduction are not as said.

    Examples:
        >>> import torch
        >>> from distill import VIDLoss
        >>> loss = VIDLoss(student_channels=16, teacher_channels=32)
        >>> loss(torch.randn(4, 16, 8, 8), torch.randn(4, 32, 8, 8)).shape
        torch.Size([])
        >>> loss.variance.shape, round(loss.variance[0].item(), 4)
        (torch.Size([32]), 5.0)
    """

    options = {  # noqa: RUF012 - declared in the base
        "student_channels": check_count,
        "teacher_channels": check_count,
        "init_variance": check_positive,
        "eps": check_positive,
    }
    built = ("student_channels", "teacher_channels", "init_variance")
    size = MAPS

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        init_variance: float = 5.0,
        eps: float = 1e-5,
        *,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        self.init_variance, self.eps = init_variance, eps
        if init_variance <= eps:
            raise ValueError(f"init_variance must be greater than eps, got {init_variance!r} and {eps!r}")
        self.mean_network = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        above = init_variance - eps
        inverse_softplus = above + math.log(-math.expm1(-above))
        self.raw_variance = nn.Parameter(torch.full((teacher_channels,), inverse_softplus))

    @property
    def variance(self) -> Tensor:
        """The variance of each of the teacher's channels, `(C,)`, with its graph."""
        return self._variance(torch.promote_types(self.raw_variance.dtype, torch.float32))

    @override
    def per_sample(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        student, teacher = check_maps(student, teacher, channels=(self.student_channels, self.teacher_channels))
        student, teacher = pool_to_smaller(student, teacher)
        mean = run_layers(self.mean_network, student)
        return vid_loss(mean, teacher, variance=self._variance(student.dtype))

    def _variance(self, dtype: torch.dtype) -> Tensor:
        return F.softplus(self.raw_variance.to(dtype)) + self.eps
