"""Weighted transformed teacher matching: Zheng and Yang, "Transformed Teacher Matching" (ICLR 2024)."""

import torch.nn.functional as F
from torch import Tensor

from distill._checks import check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._softened import divergence_of_logits

FAMILY = "logits"


def _formula(student: Tensor, teacher: Tensor, *, dim: int, gamma: float) -> Tensor:
    power_sum = (F.log_softmax(teacher, dim) * gamma).exp().sum(dim)  # a probability of 0 adds 0
    return power_sum * divergence_of_logits(teacher * gamma, student, dim=dim, temperature=1.0)


_ROWS = Rows(_formula)


def wttm_loss(student: Tensor, teacher: Tensor, *, gamma: float = 0.2, dim: int | None = None) -> Tensor:
    """`ttm_loss`, with each sample weighted by the teacher's uncertainty, one value per sample.

        p = softmax(t),  q = softmax(s),  r_c = p_c^gamma / sum_j p_j^gamma
        loss = (sum_j p_j^gamma) * KL(r || q)

    The weight is a measure of the teacher's uncertainty: for gamma below 1 it is 1 where the teacher is sure of one
    class and `C^(1 - gamma)` where all are alike.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape; -inf is a probability of 0. Gets no gradient.
        gamma: The exponent, positive and finite; below 1 it makes the teacher less sure.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, in nats times the sum of powers, never negative; infinite where a class has
        a probability of 0 for the student alone. float32, or float64 if an input is.

    Raises:
        TypeError: If an input is no tensor, or `gamma` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, gamma is not positive and
            finite, there is only one class, or `dim` is out of range or not given where there are four dimensions or
            more.

    Examples:
        >>> import torch
        >>> from distill import wttm_loss
        >>> student = torch.tensor([[0.5, 0.5]]).log()
        >>> teacher = torch.tensor([[0.1, 0.9]]).log()  # roots 0.3162 and 0.9487, which is 0.25 and 0.75 of their sum
        >>> wttm_loss(student, teacher, gamma=0.5)  # 1.2649 * (0.25 log 0.5 + 0.75 log 1.5)
        tensor([0.1655])

    Notes:
        Published with weight 4 and gamma 0.2 beside the cross-entropy and 0.8 times the loss of `crd`, for a VGG-13
        that teaches a VGG-8 on CIFAR-100; gamma and the weight were chosen for each pair of networks.

        Scale: `distiller_zoo/wttm.py` of the authors' code (`zkxufo/TTM`), the weight as in the command of its README:
        the sum over the classes, averaged over the samples, whose weights are not divided by their sum.

        Caveat: The weights of the other pairs, and of this loss without `crd`, are not in that repository.

    Reference:
        Kaixiang Zheng and En-Hui Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024 and
        arXiv 2402.11148.
    """
    check_positive("gamma", gamma)
    return _ROWS.values(student, teacher, dim=dim, gamma=gamma)


@register_loss("wttm")
class WTTMLoss(RowLoss):
    """Divergence from a power of the teacher's distribution, weighted by its uncertainty; see `wttm_loss`.

    Args:
        gamma: The exponent, positive and finite; below 1 it makes the teacher less sure. It may be changed between
            steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample). The mean is over the number of
            samples, not over the sum of the teacher's weights.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `gamma` is no number.
        ValueError: If gamma is not positive and finite, or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import WTTMLoss
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> WTTMLoss(gamma=0.5)(logits, 2 * logits)
        tensor(0.)
    """

    rows = _ROWS
    options = {"gamma": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(self, gamma: float = 0.2, *, reduction: Reduction = "mean", dim: int | None = None) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.gamma = gamma
