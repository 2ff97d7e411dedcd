"""Decoupled distillation: Zhao, Cui, Song, Qiu and Liang, "Decoupled Knowledge Distillation" (CVPR 2022)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill._checks import check_not_negative, check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._blocks import ordinary_rows, quick_first, without_rows
from distill.losses._others import set_apart, weigh
from distill.losses._softened import (
    add_up,
    are_close,
    compare_rows,
    divergence,
    expm1,
    harden,
    soften,
)

FAMILY = "logits and more"


def _quick(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    dim: int,
    alpha: float,
    beta: float,
    temperature: float,
    mean: bool,
) -> Tensor:
    s, _, mass_q, pair_q = _relative(student, labels, dim, temperature)
    t, others, mass_p, pair_p = _relative(teacher, labels, dim, temperature)
    # Both divergences in one sum, whose terms are what `divergence` has; at the target the others' weight is 0.
    d = torch.cat([pair_q - pair_p, s - t - (mass_q - mass_p)], dim)
    alpha, beta = alpha * temperature**2, beta * temperature**2
    weights = torch.cat([alpha * pair_p.exp(), others * (beta / mass_p.exp())], dim)
    return add_up(weights * (expm1(d) - d), dim, mean=mean)


def _relative(logits: Tensor, labels: Tensor, dim: int, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The logits less the largest of the others; exponentials of the others, the logarithm of their sum; the pair."""
    largest = logits.detach().scatter(dim, labels, -math.inf).amax(dim, keepdim=True)
    logits = soften(logits - largest, temperature)
    others = logits.scatter(dim, labels, -math.inf).exp()
    mass = others.sum(dim, keepdim=True).log()
    pair = F.log_softmax(torch.cat([logits.gather(dim, labels), mass], dim), dim)
    return logits, others, mass, pair


def _careful(
    student: Tensor, teacher: Tensor, labels: Tensor, *, dim: int, alpha: float, beta: float, temperature: float
) -> Tensor:
    pair_q, log_q = set_apart(student, labels, dim=dim, temperature=temperature)
    pair_p, log_p = set_apart(teacher, labels, dim=dim, temperature=temperature)
    of_target, of_others = divergence(pair_p, pair_q, dim), divergence(log_p, log_q, dim)
    # Where the teacher gives no other class a probability there is nothing to compare.
    of_others = of_others.masked_fill(pair_p.select(dim, 1) == -math.inf, 0.0)
    return temperature**2 * (weigh(of_target, alpha) + weigh(of_others, beta))


_formula = quick_first(_quick, _careful)


def _block(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    factors: Tensor | None,
    gradient: Tensor,
    spare: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    more = torch.empty_like(spare)
    s_target, _ = without_rows(student, labels, temperature, out=gradient)
    t_target, _ = without_rows(teacher, labels, temperature, out=more)
    p = spare
    d = gradient
    v, mean, _ = compare_rows(more, gradient, d, p, temperature=temperature)  # v is p (exp(d) - 1 - d)
    # The largest probabilities belong to the logits that all count from, so that they know the sums.
    q = torch.addcmul(v.add_(p), p, d, out=gradient)  # times 1 + mean
    mass_q, mass_p = (mean + 1).log() - q.amax(-1, keepdim=True).log(), -p.amax(-1, keepdim=True).log()
    pair_q = F.log_softmax(torch.cat([s_target / temperature, mass_q], -1), -1)
    pair_p = F.log_softmax(torch.cat([t_target / temperature, mass_p], -1), -1)
    values = temperature**2 * (alpha * divergence(pair_p, pair_q, -1) + beta * mean.log1p().squeeze(-1))
    if factors is not None:
        factors = factors * temperature
        pull = alpha * (pair_q.exp() - pair_p.exp())[:, :1]  # T times it is the gradient at the target
        q.mul_(factors * (beta - pull) / (mean + 1)).sub_(p.mul_(factors * beta))
        q.scatter_(-1, labels, factors * pull)
    return values


_BLOCK = ordinary_rows(_formula, _block)


def _few(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    factors: Any,
    *,
    alpha: float,
    beta: float,
    temperature: float,
) -> tuple[Tensor, Tensor | None] | None:
    """Do what `_block` does in fewer operations, though with more exponentials."""
    pair_q, log_q = _set_apart(student, labels, temperature)
    pair_p, log_p = _set_apart(teacher, labels, temperature)
    p_pair, p = pair_p.exp(), log_p.exp()
    of_target = pair_p.sub_(pair_q).mul_(p_pair).sum(-1)
    of_others = log_p.sub_(log_q).scatter_(1, labels, 0.0).mul_(p).sum(-1)
    total = of_target.mul_(alpha).add_(of_others, alpha=beta)
    if are_close(total, student.shape[-1], alpha + beta):
        return None
    if factors is None:
        return harden(total, temperature), None
    pull = pair_q.exp_().sub_(p_pair)[:, :1].mul_(alpha)  # T times it is the gradient at the target
    slope = log_q.exp_().mul_(beta - pull).sub_(p, alpha=beta).scatter_(1, labels, pull)
    return harden(total, temperature), slope.mul_(factors * temperature)


def _set_apart(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The logarithms of p_y and 1 - p_y, `(R, 2)`, and those of p_c / (1 - p_y), -inf at the target."""
    log_p = torch.log_softmax(soften(logits, temperature), -1)
    target = log_p.gather(1, labels)
    largest = log_p.scatter_(1, labels, -math.inf).amax(-1, keepdim=True)
    log_p = torch.log_softmax(log_p, -1)
    return torch.cat([target, largest.sub_(log_p.amax(-1, keepdim=True))], 1), log_p


_ROWS = Rows(_formula, mean=True, block=_BLOCK, few=_few, labels=True)


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    dim: int | None = None,
) -> Tensor:
    """Divergence of the target's probability and divergence among the other classes, one value per sample.

        p = softmax(t / T),  q = softmax(s / T),  y the target
        target part = KL((p_y, 1 - p_y) || (q_y, 1 - q_y))
        others' part = KL(p' || q'),  p' and q' being p and q without the target, normalised again
        loss = T^2 * [alpha * target part + beta * others' part]

    The plain divergence, `kl_loss`, is this with `alpha` 1 and `beta` 1 - p_y: where the teacher is sure, it hardly
    teaches how the other classes compare. With two classes there is nothing to compare, and their part is 0.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape. Gets no gradient.
        target: The class of every sample, integers from 0 to `C - 1`, `(...)`. The loss class takes any other label
            where its mask is 0.
        alpha: Weight of the target-class part, zero or positive.
        beta: Weight of the part of the other classes, zero or positive.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, in nats times the squared temperature, not negative; float32, or float64 if
        an input is. It is infinite where the student gives no probability and the teacher does. The others' part is 0
        where the teacher gives no class but the target a probability.

    Raises:
        TypeError: If student, teacher or target is no tensor, or `alpha`, `beta` or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, there are fewer than two
            classes, the target is missing, no integer per sample or no class, a weight is negative or not finite, the
            temperature is not positive and finite, or `dim` is out of range or not given where there are four
            dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import dkd_loss
        >>> student = torch.tensor([[0.5, 0.125, 0.375]]).log()
        >>> teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> dkd_loss(student, teacher, torch.tensor([0]), beta=2.0, temperature=1.0)  # 2 * log(4 / 3) / 2
        tensor([0.2877])

    Notes:
        Published with weight 1 beside the cross-entropy with weight 1, with `alpha` 1 and temperature 4 on CIFAR-100,
        and with `beta` 8 for five of eleven pairs of networks, 6 for four and 2 for two (ResNet-56 to ResNet-20,
        ResNet-110 to ResNet-32); the weight rises from 0 during the first 20 epochs.

        Scale: `mdistiller/distillers/DKD.py` of the authors' code (`megvii-research/mdistiller`), with the options in
        its `configs/cifar100/dkd`: T^2 times the sums over the classes, averaged over the samples.

    Reference:
        Borui Zhao, Quan Cui, Renjie Song, Yiyu Qiu and Jiajun Liang, "Decoupled Knowledge Distillation", CVPR 2022 and
        arXiv 2203.08679, section 3.
    """
    check_not_negative("alpha", alpha)
    check_not_negative("beta", beta)
    check_positive("temperature", temperature)
    return _ROWS.values(student, teacher, target, dim=dim, alpha=alpha, beta=beta, temperature=temperature)


@register_loss("dkd")
class DKDLoss(RowLoss):
    """Decoupled divergence: separate weights for the labelled class and the others; see `dkd_loss` for the formula.

    Args:
        alpha: Weight of the target-class part, zero or positive.
        beta: Weight of the part of the other classes, zero or positive.
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `alpha`, `beta` or `temperature` is no number.
        ValueError: If a weight is negative or not finite, the temperature is not positive and finite, or the
            reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import DKDLoss
        >>> loss = DKDLoss(beta=2.0)
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> loss(logits, logits, torch.tensor([2, 0]))
        tensor(0.)
    """

    rows = _ROWS
    options = {  # noqa: RUF012 - declared in the base
        "alpha": check_not_negative,
        "beta": check_not_negative,
        "temperature": check_positive,
    }

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        *,
        reduction: Reduction = "mean",
        dim: int | None = None,
    ) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
