"""Inter-channel correlation: Liu et al., "Exploring Inter-Channel Correlation" (2021)."""

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from distill._checks import without_autocast
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._maps import ANY, check_maps, pool_to_smaller
from distill.losses._vectors import similarities

FAMILY = "maps"


def ickd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the channels' normalised correlations, one value per sample.

        G(f)_ij = sum_hw f_i f_j, each row over its L2 norm
        loss = 1/(C N) * sum_ij (G(s)_ij - G(t)_ij)^2

    Maps of unequal size are average-pooled to the smaller height and width; they may have one to three dimensions of
    positions. A channel that is 0 everywhere has a row of zeros. The mean over the samples is the sum over the batch
    divided by `C N^2`: the value of a sample depends on how many there are in the batch, N, and those that a mask hides
    are among them.

    Args:
        student: The student's map, `(N, C, H, W)`. Any floating dtype; half and bfloat16 are computed in float32.
        teacher: The teacher's map, `(N, C, H', W')`. Gets no gradient.

    Returns:
        One value per sample, `(N,)`, without unit, between 0 and 4 / N; float32, or float64 if an input is.

    Raises:
        TypeError: If what must be a tensor is none.
        ValueError: If an input is no map, N, C or the devices differ, or an input is empty or not floating-point.

    Examples:
        >>> import torch
        >>> from distill import ickd_loss
        >>> student = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # two channels, not correlated
        >>> teacher = torch.tensor([[[[1.0, 0.0]], [[2.0, 0.0]]]])  # rows (1, 2) and (2, 4), normalised
        >>> ickd_loss(student, teacher)  # (2 - 2 * 0.4472 + 2 - 2 * 0.8944) / 2
        tensor([0.6584])

    Notes:
        Published with weight 500, beside half the cross-entropy and half the `kl` at temperature 1
        (torchdistill's ImageNet configuration, batches of 256). The authors' CIFAR-100 code divides by N only once,
        with weight 2.5: that is 2.5 N here.

        Scale: `ChSimLoss` in `ImageNet/torchdistill/losses/single.py` of the authors' code (`ADLab-AutoDrive/ICKD`),
        which divides by `C N^2`, as torchdistill's own does.

        Caveat: The ImageNet configuration in the authors' code has weight 1; that the results were reached with it is
        not said. All of them pass the student through a 1x1 convolution and a batch norm first, which is left to the
        caller.

    Reference:
        Li Liu, Qingle Huang, Sihao Lin, Hongwei Xie, Bing Wang, Xiaojun Chang and Xiaodan Liang, "Exploring
        Inter-Channel Correlation for Diversity-preserved Knowledge Distillation", ICCV 2021 and arXiv 2202.03680.
    """
    student, teacher = pool_to_smaller(*check_maps(student, teacher, same_channels=True, positions=ANY))
    samples, channels = student.shape[:2]
    with without_autocast(student):
        ours, theirs = similarities(student.flatten(2)), similarities(teacher.flatten(2))
    return F.mse_loss(ours, theirs, reduction="none").sum((1, 2)) / (channels * samples)


@register_loss("ickd")
class ICKDLoss(SampleLoss):
    """Squared difference of the channels' normalised correlations; see `ickd_loss` for the formula.

    Args:
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        gather: Whether N counts the samples of all processes that train together: the loss is that of the whole batch,
            and so is the mean of the processes' gradients (DDP, FSDP). Not in eval mode. False: each its own.

    Raises:
        ValueError: If the reduction is unknown, or `gather` is neither True nor False.

    Examples:
        >>> import torch
        >>> from distill import ICKDLoss
        >>> loss = ICKDLoss()
        >>> maps = torch.arange(1.0, 33.0).reshape(2, 4, 2, 2)
        >>> loss(maps, maps.flip(3))  # where in the map does not count
        tensor(0.)
    """

    def __init__(self, *, reduction: Reduction = "mean", gather: bool = False) -> None:
        super().__init__(reduction=reduction)
        self.gather = gather

    @override
    def per_sample(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return ickd_loss(student, teacher)
