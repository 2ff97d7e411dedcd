"""Normalised distillation: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation" (ICCV 2023)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill._checks import check_not_negative, check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._blocks import ordinary_rows, quick_first, without_rows
from distill.losses._others import log_of_others, weigh
from distill.losses._softened import add_up, expectation, soften

FAMILY = "logits and more"


def _quick(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    dim: int,
    gamma: float,
    temperature: float,
    mean: bool,
) -> Tensor:
    log_q, p = F.log_softmax(student, dim).gather(dim, labels), F.softmax(teacher, dim).gather(dim, labels)
    student, teacher = (soften(x, temperature).scatter(dim, labels, -math.inf) for x in (student, teacher))
    # Both parts in one sum: the target's stands where the others have none.
    log_q = F.log_softmax(student, dim).scatter(dim, labels, log_q)
    weights = (F.softmax(teacher, dim) * (gamma * temperature**2)).scatter(dim, labels, p)
    return add_up(weights * log_q, dim, -1.0, mean=mean)


def _careful(student: Tensor, teacher: Tensor, labels: Tensor, *, dim: int, gamma: float, temperature: float) -> Tensor:
    log_q = log_of_others(student, labels, dim=dim, temperature=temperature)
    log_p = log_of_others(teacher, labels, dim=dim, temperature=temperature)
    p_target = F.softmax(teacher, dim).gather(dim, labels)
    of_target = expectation(p_target, F.log_softmax(student, dim).gather(dim, labels), dim)
    return -of_target - weigh(expectation(log_p.exp(), log_q, dim), gamma * temperature**2)


_formula = quick_first(_quick, _careful)


def _block(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    factors: Tensor | None,
    gradient: Tensor,
    spare: Tensor,
    *,
    gamma: float,
    temperature: float,
) -> Tensor:
    s_target, _ = without_rows(student, labels, temperature, out=gradient)
    t_target, _ = without_rows(teacher, labels, temperature, out=spare)
    more = torch.empty_like(spare)
    if temperature != 1:  # the target's part is always at 1
        sum_p1 = torch.exp(spare, out=more).sum(-1, keepdim=True)
        spare.mul_(1 / temperature)
    e_p = spare.exp_()
    sum_p = e_p.sum(-1, keepdim=True)
    mean = torch.mul(e_p, gradient, out=more).sum(-1, keepdim=True) / (temperature * sum_p)
    if temperature != 1:
        e_q1 = torch.exp(gradient, out=more)
        sum_q1 = e_q1.sum(-1, keepdim=True)
        gradient.mul_(1 / temperature)
    e_q = gradient.exp_()
    sum_q = e_q.sum(-1, keepdim=True)
    if temperature == 1:
        e_q1, sum_q1, sum_p1 = e_q, sum_q, sum_p
    odds_q, p_target = s_target - sum_q1.log(), (t_target - sum_p1.log()).sigmoid()
    if factors is not None:
        weight = factors * gamma * temperature
        pull = factors * p_target * (-odds_q).sigmoid()  # it leaves the target, and goes where q is
        if temperature == 1:
            e_q.mul_((weight + pull) / sum_q)
        else:
            e_q.mul_(weight / sum_q).add_(e_q1.mul_(pull / sum_q1))
        e_q.sub_(e_p.mul_(weight / sum_p)).scatter_(-1, labels, -pull)
    values = gamma * temperature**2 * (sum_q.log() - mean) - p_target * F.logsigmoid(odds_q)
    return values.squeeze(-1)


# From some 130,000 elements on one pass in blocks is faster than the operations of the formula and their backward.
_ROWS = Rows(_formula, mean=True, block=ordinary_rows(_formula, _block), labels=True, fused_from=1 / 8)


def nkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    dim: int | None = None,
) -> Tensor:
    """Cross-entropy with the teacher, of the labelled class and of the normalised others, one value per sample.

        p = softmax(t),  q = softmax(s),  y the target
        p' = softmax of t / T over the classes other than y,  q' likewise of s / T
        loss = -p_y log q_y - gamma * T^2 * sum_{c != y} p'_c log q'_c

    The target's part is at temperature 1 whatever T is. Both parts are cross-entropies: the smallest value is not 0
    but what the teacher's own probabilities give.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape. Gets no gradient.
        target: The class of every sample, integers from 0 to `C - 1`, `(...)`. The loss class takes any other label
            where its mask is 0.
        gamma: Weight of the part of the other classes, zero or positive.
        temperature: What the logits are divided by among the other classes, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, in nats (the second part times the squared temperature), not negative;
        float32, or float64 if an input is. It is infinite where the student gives no probability and the teacher does.
        The others' part is 0 where the teacher gives no class but the target a probability.

    Raises:
        TypeError: If student, teacher or target is no tensor, or `gamma` or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, there are fewer than two
            classes, the target is missing, no integer per sample or no class, `gamma` is negative or not finite, the
            temperature is not positive and finite, or `dim` is out of range or not given where there are four
            dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import nkd_loss
        >>> student = teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> nkd_loss(student, teacher, torch.tensor([0]), gamma=2.0)  # 0.5 log 2 + 2 log 2
        tensor([1.7329])

    Notes:
        Published with weight 1 beside the cross-entropy, with `gamma` 1.5 and temperature 1 on ImageNet, and with
        `gamma` 3.5 and temperature 3 on CIFAR-100.

        Scale: `mmcls/distillation/losses/nkd.py` of the authors' code (`yzd-v/cls_KD`), with the options in its
        `configs/distillers`: both parts are averaged over the samples, the second has T^2.

        Caveat: A version of that file leaves the target among the other classes, against the paper, since its mask is
        true everywhere; another takes it out, as is done here. Which of them the published results come from is not
        known.

    Reference:
        Zhendong Yang, Ailing Zeng, Zhe Li, Tianke Zhang, Chun Yuan and Yu Li, "From Knowledge Distillation to
        Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels", ICCV 2023 and
        arXiv 2303.13005.
    """
    check_not_negative("gamma", gamma)
    check_positive("temperature", temperature)
    return _ROWS.values(student, teacher, target, dim=dim, gamma=gamma, temperature=temperature)


@register_loss("nkd")
class NKDLoss(RowLoss):
    """Normalised distillation: target probability and normalised other classes; see `nkd_loss` for the formula.

    Args:
        gamma: Weight of the part of the other classes, zero or positive.
        temperature: What the logits are divided by among the other classes, positive and finite. It may be changed
            between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `gamma` or `temperature` is no number.
        ValueError: If `gamma` is negative or not finite, the temperature is not positive and finite, or the
            reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import NKDLoss
        >>> loss = NKDLoss(gamma=3.5, temperature=3.0)
        >>> student = torch.zeros(2, 10, requires_grad=True)
        >>> loss(student, torch.zeros(2, 10), torch.tensor([2, 0])).backward()
        >>> student.grad[1, 0]  # (0.1 - 1) * 0.1 for one of two samples
        tensor(-0.0450)
    """

    rows = _ROWS
    options = {"gamma": check_not_negative, "temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(
        self, gamma: float = 1.5, temperature: float = 1.0, *, reduction: Reduction = "mean", dim: int | None = None
    ) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.gamma = gamma
        self.temperature = temperature
