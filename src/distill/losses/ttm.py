"""Transformed teacher matching: Zheng and Yang, "Transformed Teacher Matching" (ICLR 2024)."""

from torch import Tensor

from distill._checks import check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._softened import divergence_of_logits

FAMILY = "logits"


def _formula(student: Tensor, teacher: Tensor, *, dim: int, gamma: float, mean: bool = False) -> Tensor:
    # A power of a softmax, normalised, is the softmax of the logits times the exponent.
    return divergence_of_logits(teacher * gamma, student, dim=dim, temperature=1.0, mean=mean)


_ROWS = Rows(_formula, mean=True)


def ttm_loss(student: Tensor, teacher: Tensor, *, gamma: float = 0.1, dim: int | None = None) -> Tensor:
    """Divergence of the student's distribution from a power of the teacher's, one value per sample.

        p = softmax(t),  q = softmax(s),  r_c = p_c^gamma / sum_j p_j^gamma
        loss = KL(r || q) = sum_c r_c (log r_c - log q_c)

    The power is what a temperature of 1 / gamma does to the teacher; the student has none. That is soft targets without
    the temperature on the student's side and without the factor T^2, which adds a term that keeps the student's
    distribution from being too sure. Its smallest value, 0, is where the student gives r.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape; -inf is a probability of 0. Gets no gradient.
        gamma: The exponent, positive and finite; below 1 it makes the teacher less sure.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, in nats, never negative; infinite where a class has a probability of 0 for
        the student alone. float32, or float64 if an input is.

    Raises:
        TypeError: If an input is no tensor, or `gamma` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, gamma is not positive and
            finite, there is only one class, or `dim` is out of range or not given where there are four dimensions or
            more.

    Examples:
        >>> import torch
        >>> from distill import ttm_loss
        >>> student = torch.tensor([[0.5, 0.5]]).log()
        >>> teacher = torch.tensor([[0.1, 0.9]]).log()  # the root: 0.25 and 0.75
        >>> ttm_loss(student, teacher, gamma=0.5)  # 0.25 log 0.5 + 0.75 log 1.5
        tensor([0.1308])

    Notes:
        Published with weight 45 and gamma 0.1 beside the cross-entropy, for a VGG-13 that teaches a VGG-8 on CIFAR-100;
        gamma and the weight were chosen for each pair of networks.

        Scale: `distiller_zoo/ttm.py` of the authors' code (`zkxufo/TTM`), the weight as in the command of its README:
        the sum over the classes, averaged over the samples.

        Caveat: The weights of the other pairs are not in that repository.

    Reference:
        Kaixiang Zheng and En-Hui Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024 and
        arXiv 2402.11148.
    """
    check_positive("gamma", gamma)
    return _ROWS.values(student, teacher, dim=dim, gamma=gamma)


@register_loss("ttm")
class TTMLoss(RowLoss):
    """Divergence from a power of the teacher's distribution; see `ttm_loss` for the formula.

    Args:
        gamma: The exponent, positive and finite; below 1 it makes the teacher less sure. It may be changed between
            steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `gamma` is no number.
        ValueError: If gamma is not positive and finite, or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import TTMLoss
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> TTMLoss(gamma=0.5)(logits, 2 * logits)
        tensor(0.)
    """

    rows = _ROWS
    options = {"gamma": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(self, gamma: float = 0.1, *, reduction: Reduction = "mean", dim: int | None = None) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.gamma = gamma
