"""Token-wise distillation: Jung, Yoon, Kim and Lee, "ToDi" (EMNLP 2025)."""

import math

import torch.nn.functional as F
from torch import Tensor

from distill._checks import check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._softened import expectation, not_negative, soften

FAMILY = "divergences"


def _formula(student: Tensor, teacher: Tensor, *, dim: int, temperature: float) -> Tensor:
    log_q, log_p = (F.log_softmax(soften(x, temperature), dim) for x in (student, teacher))
    ratio = log_p - log_q
    ratio = ratio.masked_fill((log_p == -math.inf) & (log_q == -math.inf), 0.0)
    weight = ratio.detach().sigmoid()
    values = expectation(weight * log_p.exp(), ratio, dim) - expectation((1 - weight) * log_q.exp(), ratio, dim)
    return not_negative(values)


_ROWS = Rows(_formula)


def todi_loss(student: Tensor, teacher: Tensor, *, temperature: float = 2.0, dim: int | None = None) -> Tensor:
    """Forward and reverse divergence, mixed for each class by which side gives it more, one value per sample.

        p = softmax(t / T),  q = softmax(s / T),  a_c = sigmoid(log p_c - log q_c), a constant in the gradient
        loss = sum_c [a_c p_c log(p_c / q_c) + (1 - a_c) q_c log(q_c / p_c)]

    Where the student gives a class too little, the forward divergence counts more, which pulls it up; where it gives
    too much, the reverse one, which pushes it down. The value is that of `KL(p || q) + KL(q || p)`, since a_c is
    p_c / (p_c + q_c); the gradient is another one, since a_c is a constant in it.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape; -inf is a probability of 0. Gets no gradient.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, in nats, never negative; infinite where a
        class has a probability of 0 for one side alone. float32, or float64 if an input is.

    Raises:
        TypeError: If an input is no tensor, or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, the temperature is not
            positive and finite, there is only one class, or `dim` is out of range or not given where there are four
            dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import todi_loss
        >>> student = torch.tensor([[0.5, 0.5]]).log()
        >>> teacher = torch.tensor([[0.25, 0.75]]).log()
        >>> todi_loss(student, teacher, temperature=1.0)  # 0.1308 + 0.1438
        tensor([0.2747])

    Notes:
        Published with weight 0.5 at temperature 2, beside 0.5 times the cross-entropy.

        Scale: `code/criterions/various_divergence.py` of the authors' code (`jungseongryong/ToDi`), with the options of
        its `scripts`: the sum over the vocabulary, averaged over the tokens. There is no factor T^2.

        Caveat: Those scripts name another divergence, to be replaced; it is taken that their options are those of all.

    Reference:
        Seongryong Jung, Suwan Yoon, DongGeon Kim and Hwanhee Lee, "ToDi: Token-wise Distillation via Fine-Grained
        Divergence Control", EMNLP 2025 and arXiv 2505.16297.
    """
    check_positive("temperature", temperature)
    return _ROWS.values(student, teacher, dim=dim, temperature=temperature)


@register_loss("todi")
class ToDiLoss(RowLoss):
    """Forward and reverse divergence, mixed class by class; see `todi_loss` for the formula.

    Args:
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `temperature` is no number.
        ValueError: If the temperature is not positive and finite, or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import ToDiLoss
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> ToDiLoss()(logits, logits)
        tensor(0.)
    """

    rows = _ROWS
    options = {"temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(self, temperature: float = 2.0, *, reduction: Reduction = "mean", dim: int | None = None) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.temperature = temperature
