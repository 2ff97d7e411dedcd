"""Relations in feature maps: Huang et al., "DIST+: Knowledge Distillation From a Stronger Adaptive Teacher" (2025)."""

import torch
from torch import Tensor
from typing_extensions import override

from distill._checks import check_not_negative
from distill._reduction import hide
from distill._registry import register_loss
from distill.losses._base import BatchLoss
from distill.losses._batches import centre, check_selection, count
from distill.losses._maps import ANY, check_maps, pool_to_smaller
from distill.losses._vectors import magnitude, normalize

FAMILY = "maps"


def dist_plus_loss(
    student: Tensor, teacher: Tensor, *, iota: float = 1.0, kappa: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Correlation of the maps, over the channels and over the samples, one value for the batch.

        r(a, b) = sum (a - mean a)(b - mean b) / (|a - mean a| |b - mean b|)
        channel = 1 - mean over samples and positions of r(s_np, t_np), along the channels
        spatial = 1 - mean over positions of r(S_p, T_p), along the samples; S and T are the maps summed over channels
        loss = iota * channel + kappa * spatial

    This is the part of DIST+ for feature maps. The part for logits is `dist`, which stands beside it as a term of its
    own. A factor of its own for each position, and what is added to all its channels, do not count in the first part.
    Where a side does not vary there is no correlation: 1 - r is then 0 if neither side varies, as with a single channel
    or a single sample, and 1/2 if one does. Maps of unequal size are average-pooled to the smaller height and width.
    Maps may have one to three dimensions of positions.

    Args:
        student: The student's map, `(N, C, H, W)`. Any floating dtype; half and bfloat16 are computed in float32.
        teacher: The teacher's map, `(N, C, H', W')`. Gets no gradient.
        iota: Weight of the part over channels, zero or positive.
        kappa: Weight of the part over samples, zero or positive.
        mask: Bool or integers, `(N,)`: which samples count. None: all.

    Returns:
        A scalar without unit, between 0 and `2 * (iota + kappa)`; float32, or float64 if an input is.

    Raises:
        TypeError: If what must be a tensor is none, or `iota` or `kappa` is no number.
        ValueError: If an input is no map, N, C or the devices differ, an input is empty or not floating-point, a weight
            is negative or not finite, or the mask is not `(N,)` or holds weights.

    Examples:
        >>> import torch
        >>> from distill import dist_plus_loss
        >>> student = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 2.0]]).reshape(2, 3, 1, 1)  # sums of 6 and 15
        >>> dist_plus_loss(student, student + 1)
        tensor(0.)
        >>> dist_plus_loss(student, -student)  # correlations of -1 in both parts
        tensor(4.)

    Notes:
        Published with weights that could not be seen; both are 1 where they are not given in torchdistill.

        Scale: `DISTPlusLoss` in `torchdistill/losses/mid_level.py` of torchdistill 1.1.5, without the 1e-8 in its
        denominators. It adds the correlation over channels itself; here 1 - r is added, so that the loss falls as
        student and teacher come to agree.

        Caveat: The paper is not open, and the authors' repositories do not have this part. Along which dimension the
        second correlation goes is taken from torchdistill.

    Reference:
        Tao Huang, Shan You, Fei Wang, Chen Qian and Chang Xu, "DIST+: Knowledge Distillation From a Stronger Adaptive
        Teacher", IEEE TPAMI 47(7), 2025.
    """
    check_not_negative("iota", iota)
    check_not_negative("kappa", kappa)
    student, teacher = check_maps(student, teacher, same_channels=True, positions=ANY)
    kept = check_selection(mask, student.shape[:1], student.device)
    if kept is not None:
        student, teacher = hide(student, kept), hide(teacher, kept)
    student, teacher = (maps.flatten(2) for maps in pool_to_smaller(student, teacher))
    samples = len(student) if kept is None else count(kept)
    channel = _uncorrelated(student, teacher, dim=1).sum() / (samples * student.shape[2])
    spatial = _uncorrelated(student.mean(1), teacher.mean(1), dim=0, kept=kept).mean()
    return torch.add(iota * channel, spatial, alpha=kappa)


def _uncorrelated(student: Tensor, teacher: Tensor, *, dim: int, kept: Tensor | None = None) -> Tensor:
    """1 - r as half the squared difference of the directions, which keeps its digits near agreement."""
    return (_direction(student, dim, kept) - _direction(teacher, dim, kept)).square().sum(dim) / 2


def _direction(values: Tensor, dim: int, kept: Tensor | None) -> Tensor:
    centred = centre(values, kept, dim)
    # What is left of a constant is rounding, which has no direction.
    constant = magnitude(centred, dim) <= 4 * torch.finfo(values.dtype).eps * magnitude(values, dim)
    return normalize(centred.masked_fill(constant, 0.0), dim=dim)


@register_loss("dist_plus")
class DISTPlusLoss(BatchLoss):
    """Correlation of the maps over channels and over samples; see `dist_plus_loss` for the formula.

    It exists for a whole batch only, so it has no reduction, and its mask selects samples.

    Args:
        iota: Weight of the part over channels, zero or positive.
        kappa: Weight of the part over samples, zero or positive.
        gather: Whether processes that train together compare the samples of all of them: the loss is that of the whole
            batch, and so is the mean of the processes' gradients (DDP, FSDP). Not in eval mode. False: each its own.

    Raises:
        TypeError: If `iota` or `kappa` is no number.
        ValueError: If a weight is negative or not finite, or `gather` is neither True nor False.

    Examples:
        >>> import torch
        >>> from distill import DISTPlusLoss
        >>> loss = DISTPlusLoss()
        >>> maps = torch.arange(32.0).reshape(2, 4, 2, 2).sin()
        >>> loss(maps, 3 * maps) < 1e-6
        tensor(True)
    """

    options = {"iota": check_not_negative, "kappa": check_not_negative}  # noqa: RUF012 - declared in the base

    def __init__(self, iota: float = 1.0, kappa: float = 1.0, *, gather: bool = False) -> None:
        super().__init__(gather=gather)
        self.iota = iota
        self.kappa = kappa

    @override
    def whole(self, student: Tensor, teacher: Tensor, target: Tensor | None, mask: Tensor | None) -> Tensor:
        return dist_plus_loss(student, teacher, mask=mask, **self.given())
