"""Total variation: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation" (ACL 2023)."""

import torch
from torch import Tensor

from distill._checks import check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._softened import add_up, soften, softmax_rows
from distill.topk import TopK

FAMILY = "divergences"


def _formula(student: Tensor, teacher: Tensor, *, dim: int, temperature: float, mean: bool = False) -> Tensor:
    q = torch.softmax(soften(student, temperature), dim)
    p = torch.softmax(soften(teacher, temperature), dim)
    difference = q - p
    # The sign as a constant chooses the gradient where p and q are equal: 0, in the middle of what it may be.
    return add_up(difference * difference.detach().sign(), dim, 1 / 2, mean=mean)


def _block(
    student: Tensor, teacher: Tensor, factors: Tensor | None, gradient: Tensor, spare: Tensor, *, temperature: float
) -> Tensor:
    q = softmax_rows(student, temperature, out=gradient)
    p = softmax_rows(teacher, temperature, out=spare)
    difference = torch.sub(q, p, out=spare)
    sign = difference.sign()
    values = difference.mul_(sign).sum(-1).div_(2)
    if factors is not None:  # q (g - E_q[g]) / T with g = sign(q - p) / 2
        slope = torch.mul(q, sign, out=spare)
        slope.addcmul_(q, slope.sum(-1, keepdim=True), value=-1)
        torch.mul(slope, factors / (2 * temperature), out=gradient)
    return values


# From some 260,000 elements on one pass in blocks is faster than the operations of the formula and their backward.
_ROWS = Rows(_formula, block=_block, mean=True, topk=True, fused_from=1 / 4)


def tvd_loss(student: Tensor, teacher: Tensor | TopK, *, temperature: float = 1.0, dim: int | None = None) -> Tensor:
    """Total variation distance of teacher and student, one value per sample.

        p = softmax(t / T),  q = softmax(s / T)
        loss = 1/2 * sum_c |p_c - q_c|

    It lies between 0 and 1, and has no factor T^2. Where both are sure of different classes it is 1 and its gradient
    vanishes.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape; -inf is a probability of 0. Or a `TopK`. Gets no gradient.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, a probability, from 0 to 1 but for rounding; float32, or float64 if
        an input is.

    Raises:
        TypeError: If an input is no tensor, or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, the temperature is not
            positive and finite, there is only one class, or `dim` is out of range or not given where there are four
            dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import tvd_loss
        >>> student = torch.tensor([[0.25, 0.75]]).log()
        >>> teacher = torch.tensor([[0.0, 0.0]])
        >>> tvd_loss(student, teacher)
        tensor([0.2500])

    Notes:
        Published with weight 1 at temperature 1, as the only term.

        Scale: `calc_tvd_loss` of the authors' code (`summa/kd.py` of `MANGA-UOFA/fdistill`): half the sum over the
        vocabulary, averaged over the tokens.

        Caveat: The authors average the values on given sequences and on sequences that the student samples, which is
        left to the caller. At other temperatures than 1 their code for summaries has a factor T^2, that for translation
        (`t5mt/kd.py`) has neither factor nor temperature.

    Reference:
        Yuqiao Wen, Zichao Li, Wenyu Du and Lili Mou, "f-Divergence Minimization for Sequence-Level Knowledge
        Distillation", ACL 2023 and arXiv 2307.15190.
    """
    check_positive("temperature", temperature)
    return _ROWS.values(student, teacher, dim=dim, temperature=temperature)


@register_loss("tvd")
class TVDLoss(RowLoss):
    """Total variation distance of the softened distributions; see `tvd_loss` for the formula.

    Args:
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `temperature` is no number.
        ValueError: If the temperature is not positive and finite, or the
            reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import TVDLoss
        >>> loss = TVDLoss(temperature=2.0)
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> loss(logits, logits)
        tensor(0.)
    """

    rows = _ROWS
    options = {"temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(self, temperature: float = 1.0, *, reduction: Reduction = "mean", dim: int | None = None) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.temperature = temperature
