"""Flow of the solution procedure: Yim, Joo, Bae and Kim, "A Gift from Knowledge Distillation" (2017)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from distill._checks import without_autocast
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._maps import ANY, check_maps, check_tuples, pool_to_smaller

FAMILY = "maps"


def fsp_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the products of two layers' channels (FSP matrices), one value per sample.

        G(f, g)_ij = 1/(HW) * sum_hw f_i g_j,  f and g two layers of one network
        loss = 1/(C1 C2) * sum_ij (G(s)_ij - G(t)_ij)^2

    Where the two layers of a network differ in size, the larger is average-pooled to the smaller height and width. The
    matrices are C1 x C2 whatever the sizes, so student and teacher may differ in theirs. Maps may have one to three
    dimensions of positions; their channels come first (`distill.adapt.NHWC` brings them there).

    Args:
        student: The student's two layers, maps `(N, C1, H1, W1)` and `(N, C2, H2, W2)`. Any floating dtype; half and
            bfloat16 are computed in float32.
        teacher: The teacher's two layers, maps `(N, C1, H1', W1')` and `(N, C2, H2', W2')`. Get no gradient.

    Returns:
        One value per sample, `(N,)`, in the fourth power of the inputs' unit; float32, or float64 if an input is.

    Raises:
        TypeError: If a side is no tuple, or holds what is no tensor.
        ValueError: If a side is no pair of maps, N, C1, C2 or the devices differ, or an input is empty or not
            floating-point.

    Examples:
        >>> import torch
        >>> from distill import fsp_loss
        >>> student = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
        >>> teacher = torch.ones(1, 1, 4, 4), 3 * torch.ones(1, 1, 2, 2)
        >>> fsp_loss(student, teacher)  # (1 * 1 - 1 * 3)^2
        tensor([4.])

    Notes:
        Published with weight 50 (the CIFAR-100 script of Tian, Krishnan and Isola, "Contrastive Representation
        Distillation", ICLR 2020).

        Scale: `distiller_zoo/FSP.py` of that benchmark (`HobbitLong/RepDistiller`): the mean over the entries and
        samples, summed over three pairs of layers (the first convolution and the three stages). The paper sums over the
        entries.

        Caveat: The weight is without effect there. The loss initialises the student in a stage of its own, where it is
        the only one and has no weight (`helper/pretrain.py`), and is 0 afterwards (`helper/loops.py`).

    Reference:
        Junho Yim, Donggyu Joo, Jihoon Bae and Junmo Kim, "A Gift from Knowledge Distillation: Fast Optimization,
        Network Minimization and Transfer Learning", CVPR 2017, sections 3.2 and 3.3.
    """
    check_tuples(student, teacher, number=2)
    layers = [check_maps(s, t, same_channels=True, positions=ANY) for s, t in zip(student, teacher, strict=True)]
    if layers[0][0].ndim != layers[1][0].ndim:
        raise ValueError(
            f"the two layers must have as many dimensions, got {[tuple(maps.shape) for maps, _ in layers]}"
        )
    (s1, t1), (s2, t2) = layers
    return F.mse_loss(_flow(s1, s2), _flow(t1, t2), reduction="none").flatten(1).mean(1)


def _flow(first: Tensor, second: Tensor) -> Tensor:
    first, second = (maps.flatten(2) for maps in pool_to_smaller(first, second))
    dtype = torch.promote_types(first.dtype, second.dtype)
    with without_autocast(first):
        return first.to(dtype) @ second.to(dtype).mT / first.shape[2]


@register_loss("fsp")
class FSPLoss(SampleLoss):
    """Mean squared difference of the products of two layers' channels; see `fsp_loss` for the formula.

    In a `Term`, `at=(("layer1", "layer2"), ("layer1", "layer2"))` names the student's two layers and the teacher's.

    Args:
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).

    Raises:
        ValueError: If the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import FSPLoss
        >>> loss = FSPLoss()
        >>> layers = torch.rand(2, 4, 8, 8), torch.rand(2, 6, 4, 4)
        >>> loss(layers, layers)
        tensor(0.)
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)

    @override
    def per_sample(self, student: Sequence[Tensor], teacher: Sequence[Tensor], target: Tensor | None) -> Tensor:
        return fsp_loss(student, teacher)
