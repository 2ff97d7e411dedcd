"""Pearson correlation: Cao et al., "PKD: General Distillation Framework for Object Detectors" (2022)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._registry import register_loss
from distill.losses._maps import check_maps, pool_to_smaller

FAMILY = "maps"

_EPS = 1e-6  # what the benchmark adds to the deviation


def pearson_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the mean squared difference of the maps, each channel standardised over samples and positions.

        x~ = (x - mean_c(x)) / (std_c(x) + 1e-6), mean and unbiased deviation over the M = NHW values of a channel
        loss = 1/2 * 1/(CM) * sum (s~ - t~)^2

    It equals `(1 - 1/M) * (1 - r)`, but for the 1e-6, where r is Pearson's correlation of a channel of the student
    with the same channel of the teacher, averaged over the channels: shift and scale of a channel do not count. It
    exists for a whole batch only, whose statistics it takes, so it has no values per sample. A constant channel becomes
    0, and so does one whose deviation is no more than the rounding of its mean.

    Published with weight 6 for Faster R-CNN and 10 for RetinaNet, for each of four levels of a feature pyramid (the
    MMRazor configurations of PKD).

    Scale: `mmrazor/models/losses/pkd_loss.py` of `open-mmlab/mmrazor`, which also fixes the unbiased deviation and the
    1e-6.

    Doubt: none known for maps of equal size. MMRazor resizes the student bilinearly where the sizes differ; here, as in
    all losses on maps, the larger map is average-pooled to the smaller height and width.

    Args:
        student: The student's map, `(N, C, H, W)`. Any floating dtype; half and bfloat16 are computed in float32.
        teacher: The teacher's map, `(N, C, H', W')`. A constant: no gradient reaches it.

    Returns:
        A scalar without unit, between 0 and 2; float32, or float64 if an input is.

    Raises:
        ValueError: If an input is no map, N, C or the devices differ, an input is empty or not floating-point, or a
            channel has a single value.

    Examples:
        >>> import torch
        >>> from distill import pearson_loss
        >>> student = torch.tensor([[[[1.0, 2.0, 3.0]]]])
        >>> pearson_loss(student, -5 * student)  # correlation -1: (1 - 1/3) * 2
        tensor(1.3333)

    Reference:
        Weihan Cao, Yifan Zhang, Jianfei Gao, Anda Cheng, Ke Cheng and Jian Cheng, "PKD: General Distillation Framework
        for Object Detectors via Pearson Correlation Coefficient", NeurIPS 2022 and arXiv 2207.02039.
    """
    student, teacher = pool_to_smaller(*check_maps(student, teacher, same_channels=True))
    if student[:, 0].numel() < 2:
        raise ValueError(
            f"a channel must have at least two values over samples and positions, got shape {tuple(student.shape)}"
        )
    return F.mse_loss(_standardize(student), _standardize(teacher)) / 2


def _standardize(maps: Tensor) -> Tensor:
    # Positions first, then samples: on the CPU both at once, or std_mean(), take three times as long.
    flat = maps.flatten(2)
    mean = flat.mean(2, keepdim=True).mean(0, keepdim=True)
    centred = flat - mean
    count = maps[:, 0].numel()
    norm: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(centred, dim=2, keepdim=True), dim=0, keepdim=True)
    # What is left of a constant is rounding, which may be larger than the 1e-6 and would be blown up.
    rounding = 4 * torch.finfo(maps.dtype).eps * math.sqrt(count) * mean.detach().abs()
    return centred * torch.where(norm > rounding, (norm / math.sqrt(count - 1) + _EPS).reciprocal(), 0.0)


@register_loss("pearson")
class PearsonLoss(nn.Module):
    """Half the mean squared difference of the standardised maps; see `pearson_loss` for the formula.

    It has no options, and no reduction: the loss is one number for the whole batch.

    Examples:
        >>> import torch
        >>> from distill import PearsonLoss
        >>> loss = PearsonLoss()
        >>> maps = torch.arange(32.0).reshape(2, 4, 2, 2)
        >>> loss(maps, maps)
        tensor(0.)
    """

    @override
    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            student: Map, `(N, C, H, W)`.
            teacher: Map, `(N, C, H', W')`.
            target: Not used; every loss is called alike.

        Returns:
            A scalar.

        Raises:
            ValueError: As `pearson_loss`.
        """
        return pearson_loss(student, teacher)
