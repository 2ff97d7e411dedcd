"""Weighted soft labels: Zhou et al., "Rethinking Soft Labels for Knowledge Distillation" (ICLR 2021)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill._checks import check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._blocks import ordinary_rows, quick_first
from distill.losses._softened import add_up, expectation, expm1, harden, soften

FAMILY = "logits and more"

_EPS = 1e-7


def _quick(student: Tensor, teacher: Tensor, labels: Tensor, *, dim: int, temperature: float, mean: bool) -> Tensor:
    log_q = F.log_softmax(soften(student, temperature), dim)
    p = torch.softmax(soften(teacher, temperature), dim)
    ratio = _log_on_label(student.detach(), labels, dim) / (_log_on_label(teacher, labels, dim) - _EPS)
    return add_up(expm1(-ratio) * p * log_q, dim, temperature**2, mean=mean)


def _careful(student: Tensor, teacher: Tensor, labels: Tensor, *, dim: int, temperature: float) -> Tensor:
    weight = _weight(-_log_on_label(student.detach(), labels, dim), -_log_on_label(teacher, labels, dim)).squeeze(dim)
    p = torch.softmax(soften(teacher, temperature), dim)
    values = harden(-expectation(p, F.log_softmax(soften(student, temperature), dim), dim), temperature)
    # A sample that does not count adds nothing, also where its cross-entropy is infinite.
    return torch.where(weight == 0, 0.0, weight * values)


def _log_on_label(logits: Tensor, labels: Tensor, dim: int) -> Tensor:
    return F.log_softmax(logits, dim).gather(dim, labels)


def _weight(of_student: Tensor, of_teacher: Tensor) -> Tensor:
    ratio = of_student / (of_teacher + _EPS)
    # A label that neither gives a probability: both cross-entropies grow alike, and their ratio tends to 1.
    ratio = ratio.masked_fill((of_student == math.inf) & (of_teacher == math.inf), 1.0)
    return -expm1(-ratio)


_formula = quick_first(_quick, _careful)


def _block(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    factors: Tensor | None,
    gradient: Tensor,
    spare: Tensor,
    *,
    temperature: float,
) -> Tensor:
    more = torch.empty_like(spare)
    s = torch.sub(student, student.amax(-1, keepdim=True), out=gradient)
    t = torch.sub(teacher, teacher.amax(-1, keepdim=True), out=spare)
    of_student, of_teacher = (
        torch.exp(x, out=more).sum(-1, keepdim=True).log_() - x.gather(-1, labels) for x in (s, t)
    )
    weight = _weight(of_student, of_teacher)
    s.mul_(1 / temperature)
    e_p = t.mul_(1 / temperature).exp_()
    sum_p = e_p.sum(-1, keepdim=True)
    mean = torch.mul(e_p, s, out=more).sum(-1, keepdim=True) / sum_p
    e_q = s.exp_()
    sum_q = e_q.sum(-1, keepdim=True)
    if factors is not None:
        factors = factors * temperature * weight
        e_q.mul_(factors / sum_q).sub_(e_p.mul_(factors / sum_p))
    return (temperature**2 * weight * (sum_q.log() - mean)).squeeze(-1)


# From some 130,000 elements on one pass in blocks is faster than the operations of the formula and their backward.
_ROWS = Rows(_formula, mean=True, block=ordinary_rows(_formula, _block), labels=True, fused_from=1 / 8)


def wsld_loss(
    student: Tensor, teacher: Tensor, target: Tensor | None, *, temperature: float = 2.0, dim: int | None = None
) -> Tensor:
    """Cross-entropy with the teacher, each sample weighted by how the student does on its label, one value per sample.

        p = softmax(t / T),  q = softmax(s / T),  y the target
        w = 1 - exp(-CE_s / (CE_t + 1e-7)),  CE_s = -log softmax(s)_y,  CE_t = -log softmax(t)_y
        loss = T^2 * w * (-sum_c p_c log q_c)

    The weight is a constant: no gradient flows through it. It is near 0 where the student already does much better
    on the label than the teacher, and near 1 where it does much worse. Its logits are not divided by the temperature.
    Where the teacher gives the label no probability it is 0, and where the student does not either, 1 - 1/e: both
    cross-entropies are infinite then, and their ratio tends to 1.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape. Gets no gradient.
        target: The class of every sample, integers from 0 to `C - 1`, `(...)`. The loss class takes any other label
            where its mask is 0.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, in nats times the squared temperature, not negative; float32, or float64
        if an input is. It is infinite where the student gives no probability and the teacher does, unless the weight
        is 0: then it is 0.

    Raises:
        TypeError: If student, teacher or target is no tensor, or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, there are fewer than two
            classes, the target is missing, no integer per sample or no class, the temperature is not positive and
            finite, or `dim` is out of range or not given where there are four dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import wsld_loss
        >>> student = teacher = torch.tensor([[0.0, 0.0]])
        >>> wsld_loss(student, teacher, torch.tensor([0]), temperature=1.0)  # (1 - 1/e) log 2
        tensor([0.4382])

    Notes:
        Published with weight 2.5 at temperature 2 on ImageNet (the authors' code), and with weight 2.25 at temperature
        4 on CIFAR-100 (their answer in issue 2 of their repository), beside the cross-entropy with weight 1.

        Scale: `knowledge_distiller.py` of the authors' code (`bellymonster/Weighted-Soft-Label-Distillation`): T^2
        times the sum over the classes, averaged over the samples. It also fixes the 1e-7, which keeps the ratio finite
        for a teacher that is sure.

        Caveat: In that code the teacher runs in training mode, on the statistics of the batch.

    Reference:
        Helong Zhou, Liangchen Song, Jiajie Chen, Ye Zhou, Guoli Wang, Junsong Yuan and Qian Zhang, "Rethinking Soft
        Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective", ICLR 2021 and arXiv 2102.00650.
    """
    check_positive("temperature", temperature)
    return _ROWS.values(student, teacher, target, dim=dim, temperature=temperature)


@register_loss("wsld")
class WSLDLoss(RowLoss):
    """Soft cross-entropy, weighted sample by sample; see `wsld_loss` for the formula.

    Args:
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `temperature` is no number.
        ValueError: If the temperature is not positive and finite, or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import WSLDLoss
        >>> loss = WSLDLoss()
        >>> student = torch.zeros(2, 3, requires_grad=True)
        >>> loss(student, torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]]), torch.tensor([0, 2])).backward()
        >>> student.grad[0] < 0
        tensor([ True, False, False])
    """

    rows = _ROWS
    options = {"temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(self, temperature: float = 2.0, *, reduction: Reduction = "mean", dim: int | None = None) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.temperature = temperature
