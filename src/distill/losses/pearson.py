"""Pearson correlation: Cao et al., "PKD: General Distillation Framework for Object Detectors" (2022)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from distill._checks import may_look
from distill._reduction import hide
from distill._registry import register_loss
from distill.losses._base import BatchLoss
from distill.losses._batches import check_selection, count
from distill.losses._maps import ANY, check_maps, pool_to_smaller
from distill.losses._vectors import are_ordinary, magnitude

FAMILY = "maps"

_EPS = 1e-6  # what the benchmark adds to the deviation


def pearson_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Half the mean squared difference of the maps, each channel standardised over samples and positions.

        x~ = (x - mean_c(x)) / (std_c(x) + 1e-6), mean and unbiased deviation over the M = NHW values of a channel
        loss = 1/2 * 1/(CM) * sum (s~ - t~)^2

    Except for the 1e-6 it equals `(1 - 1/M) * (1 - r)`, where r is Pearson's correlation of a channel of the student
    with the same channel of the teacher, averaged over the channels: shift and scale of a channel do not count. It
    exists for a whole batch only, whose statistics it takes, so it has no values per sample. A constant channel becomes
    0, and so does one whose deviation is no more than the rounding of its mean. Maps may have one to three dimensions
    of positions.

    Args:
        student: The student's map, `(N, C, H, W)`. Any floating dtype; half and bfloat16 are computed in float32.
        teacher: The teacher's map, `(N, C, H', W')`. Gets no gradient.
        mask: Bool or integers, `(N,)`: which samples count. None: all.

    Returns:
        A scalar without unit, between 0 and 2; float32, or float64 if an input is.

    Raises:
        TypeError: If what must be a tensor is none.
        ValueError: If an input is no map, N, C or the devices differ, an input is empty or not floating-point, a
            channel has a single value, or the mask is not `(N,)` or holds weights.

    Examples:
        >>> import torch
        >>> from distill import pearson_loss
        >>> student = torch.tensor([[[[1.0, 2.0, 3.0]]]])
        >>> pearson_loss(student, -5 * student)  # correlation -1: (1 - 1/3) * 2
        tensor(1.3333)

    Notes:
        Published with weight 6 for Faster R-CNN and 10 for RetinaNet, for each of four levels of a feature pyramid (the
        MMRazor configurations of PKD).

        Scale: `mmrazor/models/losses/pkd_loss.py` of `open-mmlab/mmrazor`, which also fixes the unbiased deviation and
        the 1e-6.

        Caveat: MMRazor resizes the student bilinearly where the sizes differ; here, as in all losses on maps, the
        larger map is average-pooled to the smaller height and width.

    Reference:
        Weihan Cao, Yifan Zhang, Jianfei Gao, Anda Cheng, Ke Cheng and Jian Cheng, "PKD: General Distillation Framework
        for Object Detectors via Pearson Correlation Coefficient", NeurIPS 2022 and arXiv 2207.02039.
    """
    student, teacher = check_maps(student, teacher, same_channels=True, positions=ANY)
    kept = check_selection(mask, student.shape[:1], student.device)
    if kept is not None:
        student, teacher = hide(student, kept), hide(teacher, kept)
    student, teacher = pool_to_smaller(student, teacher)
    if student[:, 0].numel() < 2:
        raise ValueError(
            f"a channel must have at least two values over samples and positions, got shape {tuple(student.shape)}"
        )
    ours, theirs = _standardize(student, kept), _standardize(teacher, kept)
    if kept is None:
        return F.mse_loss(ours, theirs) / 2
    return F.mse_loss(ours, theirs, reduction="sum") / (count(kept) * student[0].numel()) / 2


def _standardize(maps: Tensor, kept: Tensor | None) -> Tensor:
    flat = maps.flatten(2)
    samples: int | Tensor = len(flat)
    free: int | Tensor = len(flat) * flat.shape[2] - 1
    if kept is not None:
        samples = count(kept)
        free = (samples * flat.shape[2] - 1).clamp_min(1)
    # Positions first, then samples: on the CPU both at once, or std_mean(), take three times as long.
    mean = flat.mean(2, keepdim=True).sum(0, keepdim=True) / samples
    centred = flat - mean if kept is None else hide(flat - mean, kept)
    squares = _sum_of_squares(centred) if may_look(maps) else None
    unit: float | Tensor = 1.0
    if squares is None or not are_ordinary(squares):  # in units of the largest magnitude no square overflows
        unit = magnitude(flat, 2).amax(0, keepdim=True)
        unit = unit.masked_fill(unit == 0, 1.0)
        centred = centred / unit
        squares = _sum_of_squares(centred)
    # What is left of a constant is rounding, which may be larger than the 1e-6 and would be blown up.
    rounding = 4 * torch.finfo(maps.dtype).eps * mean.detach().abs() / unit
    constant = squares.detach() <= rounding.square() * (free + 1)
    deviation = (squares.masked_fill(constant, 1.0) / free).sqrt()
    return centred * (deviation + _EPS / unit).reciprocal().masked_fill(constant, 0.0)


def _sum_of_squares(flat: Tensor) -> Tensor:
    return flat.square().sum(2, keepdim=True).sum(0, keepdim=True)


@register_loss("pearson")
class PearsonLoss(BatchLoss):
    """Half the mean squared difference of the standardised maps; see `pearson_loss` for the formula.

    It has no reduction: the loss is one number for the whole batch, whose mask selects samples.

    Args:
        gather: Whether processes that train together take the statistics of all their samples: the loss is that of the
            whole batch, and so is the mean of the processes' gradients (DDP, FSDP). Not in eval mode. False: each has
            its own.

    Raises:
        ValueError: If `gather` is neither True nor False.

    Examples:
        >>> import torch
        >>> from distill import PearsonLoss
        >>> loss = PearsonLoss()
        >>> maps = torch.arange(32.0).reshape(2, 4, 2, 2)
        >>> loss(maps, maps)
        tensor(0.)
    """

    @override
    def whole(self, student: Tensor, teacher: Tensor, target: Tensor | None, mask: Tensor | None) -> Tensor:
        return pearson_loss(student, teacher, mask=mask)
