"""Gram anchoring: Siméoni et al., "DINOv3" (2025)."""

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._tokens import token_cosines

FAMILY = "maps"


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference between the cosines of an image's tokens, one value per sample.

        loss = 1/L^2 * sum_ij (cos(s_i, s_j) - cos(t_i, t_j))^2

    Tokens are compared within each network, so their widths are free, and a rotation of all tokens changes nothing.
    With a softmax over j and a divergence it is `token_similarity`.

    Args:
        student: The student's tokens, `(N, L, D)`, without class and register tokens. Any floating dtype; half and
            bfloat16 are computed in float32.
        teacher: The teacher's tokens, `(N, L, D')`, at the same positions. Gets no gradient.

    Returns:
        One value per sample, `(N,)`, without a unit, from 0 to 4; float32, or float64 if an input is.

    Raises:
        TypeError: If an input is no tensor.
        ValueError: If the inputs are no tokens, N, L or the devices differ, there is only one token, or an input is
            empty or not floating-point.

    Examples:
        >>> import torch
        >>> from distill import gram_loss
        >>> teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # two tokens that have nothing in common
        >>> gram_loss(torch.ones(1, 2, 5), teacher)  # two of the four pairs differ by 1
        tensor([0.5000])

    Notes:
        Published with weight 2, the end of a schedule that starts at 0, beside the losses of pretraining.

        Scale: `dinov3/loss/gram_loss.py` of the authors' code (`facebookresearch/dinov3`), with the weight in its
        `configs/train/dinov3_vit7b16_gram_anchor.yaml`: the mean over all pairs and samples. The paper has the sum over
        the pairs.

        Caveat: That code can also set negative cosines to 0, which the configuration does not do, nor does this. Its
        option for pairs that are negative in both networks has no effect on the student's: it looks for them after it
        has set the teacher's to 0.

    Reference:
        Oriane Siméoni, Huy V. Vo, Maximilian Seitzer and others, "DINOv3", arXiv 2508.10104 (2025), section 4.2.
    """
    ours, theirs = token_cosines(student, teacher)
    return F.mse_loss(ours, theirs, reduction="none").flatten(1).mean(1)


@register_loss("gram")
class GramLoss(SampleLoss):
    """Squared difference between the cosines of an image's tokens; see `gram_loss` for the formula.

    Args:
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).

    Raises:
        ValueError: If the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import GramLoss
        >>> tokens = torch.randn(2, 49, 192, generator=torch.Generator().manual_seed(0))
        >>> GramLoss()(tokens, 2 * tokens)
        tensor(0.)
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)

    @override
    def per_sample(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return gram_loss(student, teacher)
