"""Correlation congruence: Peng et al., "Correlation Congruence for Knowledge Distillation" (ICCV 2019)."""

import math

from torch import Tensor
from typing_extensions import override

from distill._checks import check_count, check_positive, without_autocast
from distill._registry import register_loss
from distill.losses._base import BatchLoss
from distill.losses._batches import mean_square_of_pairs, select
from distill.losses._vectors import normalize

FAMILY = "relations"


def cc_loss(
    student: Tensor, teacher: Tensor, *, gamma: float = 0.4, order: int = 2, mask: Tensor | None = None
) -> Tensor:
    """Mean squared difference of the correlations that student and teacher see between the samples of a batch.

        K_s,ij = exp(-2 gamma) * sum_{p=0}^{order} (2 gamma)^p / p! * (s_i . s_j)^p,  s_i with L2 norm 1; K_t alike
        loss = 1/N^2 * sum_ij (K_s,ij - K_t,ij)^2

    K is the Taylor series of the Gaussian kernel exp(-gamma |s_i - s_j|^2) of unit vectors. The paper calls this the
    correlation congruence, and adds the soft targets of `kl_loss` to it.

    Args:
        student: The student's features, `(N, ...)`. Any floating dtype; half and bfloat16 are computed in float32.
        teacher: The teacher's, `(N, ...)` of the same N; its other dimensions are its own. Gets no gradient.
        gamma: Of the Gaussian kernel, positive and finite: how fast the correlation falls with the distance.
        order: The highest power of the Taylor series, at least 1.
        mask: Bool or integers, `(N,)`: which samples count. None: all.

    Returns:
        A scalar without unit, not negative; float32, or float64 if an input is.

    Raises:
        TypeError: If what must be a tensor is none, or `gamma` is no number.
        ValueError: If N or the devices differ, an input has fewer than two dimensions, is empty or not floating-point,
            the mask is not `(N,)` or holds weights, gamma is not positive and finite, or the order is no integer of at
            least 1.

    Examples:
        >>> import torch
        >>> from distill import cc_loss
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> teacher = torch.tensor([[3.0], [3.0]])
        >>> cc_loss(student, teacher, gamma=0.5, order=1)  # half the entries differ, by exp(-1)
        tensor(0.0677)

    Notes:
        Published with weight 100 (the CIFAR-10 script of Hu's Knowledge-Distillation-Zoo, at these defaults).

        Scale: `example_train_script.sh` of `AberHu/Knowledge-Distillation-Zoo` for the weight and the options, and its
        `kd_losses/cc.py` for the formula: the mean over the N^2 entries.

        Caveat: `kd_losses/cc.py` was read in the copies of other repositories only, which agree. The benchmark of Tian,
        Krishnan and Isola (ICLR 2020) has another formula under this name, without the kernel, as a mail of the author
        has it; its weight 0.02 is not for this loss.

    Reference:
        Baoyun Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019 and arXiv 1904.01802.
    """
    check_positive("gamma", gamma)
    check_count("order", order)
    student, teacher, kept = select(student, teacher, mask)
    with without_autocast(student):
        ours, theirs = _correlations(student, gamma, order), _correlations(teacher, gamma, order)
    # Hidden samples are 0 on both sides: their correlations do not differ.
    return mean_square_of_pairs(ours, theirs, kept)


def _correlations(features: Tensor, gamma: float, order: int) -> Tensor:
    features = normalize(features, dim=1)
    cosines = features @ features.mT
    # Horner's rule: 1 + 2 gamma c / 1 (1 + 2 gamma c / 2 (1 + ...))
    series = 1 + cosines * (2 * gamma / order)
    for power in range(order - 1, 0, -1):
        series = 1 + series * cosines * (2 * gamma / power)
    return series * math.exp(-2 * gamma)


@register_loss("cc")
class CCLoss(BatchLoss):
    """Mean squared difference of the correlations between samples; see `cc_loss` for the formula.

    It exists for a whole batch only, so it has no reduction, and its mask selects samples.

    Args:
        gamma: Of the Gaussian kernel, positive and finite. It may be changed between steps.
        order: The highest power of its Taylor series, at least 1.
        gather: Whether processes that train together compare the samples of all of them: the loss is that of the whole
            batch, and so is the mean of the processes' gradients (DDP, FSDP). Not in eval mode. False: each its own.

    Raises:
        TypeError: If `gamma` is no number.
        ValueError: If gamma is not positive and finite, or the order is no integer of at least 1.

    Examples:
        >>> import torch
        >>> from distill import CCLoss
        >>> features = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, -1.0]])
        >>> CCLoss()(features, 2 * features)
        tensor(0.)
    """

    options = {"gamma": check_positive, "order": check_count}  # noqa: RUF012 - declared in the base

    def __init__(self, gamma: float = 0.4, order: int = 2, *, gather: bool = False) -> None:
        super().__init__(gather=gather)
        self.gamma = gamma
        self.order = order

    @override
    def whole(self, student: Tensor, teacher: Tensor, target: Tensor | None, mask: Tensor | None) -> Tensor:
        return cc_loss(student, teacher, mask=mask, **self.given())
