"""Attention transfer: Zagoruyko and Komodakis, "Paying More Attention to Attention" (2017)."""

import math

from torch import Tensor
from typing_extensions import override

from distill._checks import check_number
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._maps import ANY, check_maps, pool_to_smaller
from distill.losses._vectors import normalize, over_largest

FAMILY = "maps"


def at_loss(student: Tensor, teacher: Tensor, *, p: float = 2) -> Tensor:
    """Mean squared difference of the normalised attention maps, one value per sample.

        a(f) = mean_c |f_c|^p  at each position,  A(f) = a(f) / ||a(f)||_2
        loss = 1/(HW) * sum_hw (A(s) - A(t))^2

    Maps of unequal size are average-pooled to the smaller height and width. The attention maps are normalised over the
    positions, so neither the number of channels nor the scale of a map counts (with p = 2 in float32: from 1e-15 to
    1e15); one that is 0 everywhere stays 0. Maps may have one to three dimensions of positions.

    Channels come first. Maps (N, H, W, C) on one side alone are refused where they can be recognised (see
    `distill.adapt.NHWC`); on both sides they cannot be, nor can tokens (B, T, C), which have the dimensions of a map
    (N, C, L): `distill.adapt.TokensToMap` makes maps of them.

    With p = 1 the formula has a kink where a value of the student is 0: its slope there is 0.

    Args:
        student: The student's map, `(N, C, H, W)`, also `(N, C, L)` or `(N, C, D, H, W)`. Any floating dtype; half and
            bfloat16 are computed in float32.
        teacher: The teacher's map, `(N, C', H', W')`, or likewise. Gets no gradient.
        p: The power, finite and at least 1. The larger, the more the strongest activations count.

    Returns:
        One value per sample, `(N,)`, without unit, between 0 and 2 / (HW); float32, or float64 if an input is.

    Raises:
        TypeError: If an input is no tensor, or `p` is no number.
        ValueError: If an input is no map or seems to have its channels last, N or the devices differ, an input is empty
            or not floating-point, or p is not finite or below 1.

    Examples:
        >>> import torch
        >>> from distill import at_loss
        >>> student = torch.tensor([[[[3.0, 0.0]]]])  # one channel, attention (1, 0)
        >>> teacher = torch.tensor([[[[0.0, 5.0]], [[0.0, 1.0]]]])  # two channels, attention (0, 1)
        >>> at_loss(student, teacher)
        tensor([1.])

    Notes:
        Published with weight 1000, on the sum over the stages of the network (the CIFAR-100 benchmark of Tian, Krishnan
        and Isola, "Contrastive Representation Distillation", ICLR 2020).

        Scale: `distiller_zoo/AT.py` of that benchmark (`HobbitLong/RepDistiller`): the mean over the positions and
        samples. The paper's equation has the norm of the difference, not squared, and the sum over the channels.

        Caveat: For p other than 2 the benchmark takes the power of `f` and not of `|f|`, which differs where p is odd
        and a map has negative values.

    Reference:
        Sergey Zagoruyko and Nikos Komodakis, "Paying More Attention to Attention: Improving the Performance of
        Convolutional Neural Networks via Attention Transfer", ICLR 2017 and arXiv 1612.03928.
    """
    _check_p("p", p)
    student, teacher = pool_to_smaller(*check_maps(student, teacher, positions=ANY))
    return (_attention(student, p) - _attention(teacher, p)).square().mean(1)


def _attention(maps: Tensor, p: float) -> Tensor:
    if p == 2:
        powers = maps.square()
    else:
        # |f| by the sign: where the formula has a kink, for p = 1 at 0, this chooses the slope 0.
        magnitudes = (maps * maps.detach().sign()).flatten(1)
        powers = over_largest(magnitudes, dim=1).reshape(maps.shape).pow(p)  # high powers leave the range sooner
    # The sum for the mean: 1/C cancels, and the gradient of mean() would be a tensor of the size of the map.
    return normalize(powers.sum(1).flatten(1), dim=1)


def _check_p(name: str, value: float) -> float:
    check_number(name, value)
    if not 1 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 1, got {value!r}")
    return value


@register_loss("at")
class ATLoss(SampleLoss):
    """Mean squared difference of the normalised attention maps; see `at_loss` for the formula.

    Args:
        p: The power, finite and at least 1.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).

    Raises:
        TypeError: If `p` is no number.
        ValueError: If p is not finite or below 1, or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import ATLoss
        >>> loss = ATLoss()
        >>> maps = torch.arange(32.0).reshape(2, 4, 2, 2)
        >>> loss(maps, 4 * maps)  # the scale does not count
        tensor(0.)
    """

    options = {"p": _check_p}  # noqa: RUF012 - declared in the base

    def __init__(self, p: float = 2, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        self.p = p

    @override
    def per_sample(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return at_loss(student, teacher, **self.given())
