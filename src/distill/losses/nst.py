"""Neuron selectivity transfer: Huang and Wang, "Like What You Like" (2017)."""

from torch import Tensor
from typing_extensions import override

from distill._checks import without_autocast
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._maps import ANY, check_maps, pool_to_smaller
from distill.losses._vectors import normalize

FAMILY = "maps"


def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Maximum mean discrepancy of the channels' activation patterns, one value per sample.

        s_i, t_j = channel i of the student, j of the teacher: its HW values over their L2 norm
        k(a, b)  = (a . b)^2
        loss = 1/C^2 * sum_ii' k(s_i, s_i') + 1/C'^2 * sum_jj' k(t_j, t_j') - 2/(C C') * sum_ij k(s_i, t_j)

    Maps of unequal size are average-pooled to the smaller height and width. A channel that is 0 everywhere stays 0.
    Needs memory for the products of channels or of positions, whichever are fewer, never for `C x C' x HW` values.
    Maps may have one to three dimensions of positions.

    Channels come first. Maps (N, H, W, C) on one side alone are refused where they can be recognised (see
    `distill.adapt.NHWC`); on both sides they cannot be, nor can tokens (B, T, C), which have the dimensions of a map
    (N, C, L): `distill.adapt.TokensToMap` makes maps of them.

    Args:
        student: The student's map, `(N, C, H, W)`, also `(N, C, L)` or `(N, C, D, H, W)`. Any floating dtype; half and
            bfloat16 are computed in float32.
        teacher: The teacher's map, `(N, C', H', W')`, or likewise. Gets no gradient.

    Returns:
        One value per sample, `(N,)`, without unit, not negative but for rounding, at most 2; float32, or float64 if an
        input is.

    Raises:
        TypeError: If an input is no tensor.
        ValueError: If an input is no map or seems to have its channels last, N or the devices differ, or an input is
            empty or not floating-point.

    Examples:
        >>> import torch
        >>> from distill import nst_loss
        >>> student = torch.tensor([[[[1.0, 0.0]]]])
        >>> teacher = torch.tensor([[[[2.0, 0.0]], [[0.0, 3.0]]]])
        >>> nst_loss(student, teacher)  # 1 + 1/2 - 2 * 1/2
        tensor([0.5000])

    Notes:
        Published with weight 50, on the sum over the stages of the network (the CIFAR-100 benchmark of Tian, Krishnan
        and Isola, "Contrastive Representation Distillation", ICLR 2020).

        Scale: `distiller_zoo/NST.py` of that benchmark (`HobbitLong/RepDistiller`): means of the kernel over the pairs
        of channels and the samples.

    Reference:
        Zehao Huang and Naiyan Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
        arXiv 1707.01219 (2017), with the polynomial kernel of degree 2 and offset 0.
    """
    student, teacher = pool_to_smaller(*check_maps(student, teacher, positions=ANY))
    s, t = (normalize(maps.flatten(2), dim=2) for maps in (student, teacher))
    with without_autocast(s):
        if s.shape[2] <= max(s.shape[1], t.shape[1]):
            # (a . b)^2 is the inner product of a a^T and b b^T: the discrepancy is the distance of their means.
            return (s.mT @ s / s.shape[1] - t.mT @ t / t.shape[1]).square().sum((1, 2))
        return _mean_kernel(s, s) + _mean_kernel(t, t) - 2 * _mean_kernel(s, t)


def _mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.mT).square().sum((1, 2)) / (a.shape[1] * b.shape[1])


@register_loss("nst")
class NSTLoss(SampleLoss):
    """Maximum mean discrepancy of the channels' activation patterns; see `nst_loss` for the formula.

    Args:
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).

    Raises:
        ValueError: If the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import NSTLoss
        >>> loss = NSTLoss()
        >>> maps = torch.tensor([[[[1.0, 2.0]], [[3.0, 5.0]]]])
        >>> loss(maps, maps.flip(1))  # the order of the channels does not count
        tensor(0.)
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)

    @override
    def per_sample(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return nst_loss(student, teacher)
