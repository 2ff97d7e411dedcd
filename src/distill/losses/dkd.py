"""Decoupled distillation: Zhao, Cui, Song, Qiu and Liang, "Decoupled Knowledge Distillation" (CVPR 2022)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill._checks import check_not_negative, check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._blocks import compare_rows, ordinary_rows, set_apart_rows
from distill.losses._others import set_apart, weigh
from distill.losses._softened import divergence

FAMILY = "refined logits"


def _formula(
    student: Tensor, teacher: Tensor, labels: Tensor, *, dim: int, alpha: float, beta: float, temperature: float
) -> Tensor:
    odds_q, log_q = set_apart(student, labels, dim=dim, temperature=temperature)
    odds_p, log_p = set_apart(teacher, labels, dim=dim, temperature=temperature)
    # Where the teacher gives no other class a probability there is nothing to compare.
    of_others = divergence(log_p, log_q, dim).masked_fill((odds_p == math.inf).squeeze(dim), 0.0)
    # The target against all others together.
    log_p, log_q = (torch.cat([F.logsigmoid(odds), F.logsigmoid(-odds)], dim) for odds in (odds_p, odds_q))
    return temperature**2 * (weigh(divergence(log_p, log_q, dim), alpha) + weigh(of_others, beta))


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
    s_target, _ = set_apart_rows(student, labels, temperature, out=gradient)
    t_target, _ = set_apart_rows(teacher, labels, temperature, out=spare)
    of_others, sum_q, sum_p, log_scale = compare_rows(gradient, spare, torch.empty_like(spare), labels)
    odds_q, odds_p = s_target - log_scale - sum_q.log(), t_target - sum_p.log()
    log_p, log_q = (torch.cat([F.logsigmoid(odds), F.logsigmoid(-odds)], -1) for odds in (odds_p, odds_q))
    of_target = divergence(log_p, log_q, -1)
    if factors is not None:
        factors = factors * temperature
        pull = alpha * (odds_q.sigmoid() - odds_p.sigmoid())  # T times it is the gradient at the target
        gradient.mul_(factors * (beta - pull) / sum_q).sub_(spare.mul_(factors * beta / sum_p))
        gradient.scatter_(-1, labels, factors * pull)
    return temperature**2 * (alpha * of_target + beta * of_others.squeeze(-1))


_ROWS = Rows(_formula, block=ordinary_rows(_formula, _block), labels=True)


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

    Published with weight 1 beside the cross-entropy with weight 1, with `alpha` 1 and temperature 4 on CIFAR-100, and
    with `beta` 8 for five of eleven pairs of networks, 6 for four and 2 for two (ResNet-56 to ResNet-20, ResNet-110 to
    ResNet-32); the weight rises from 0 during the first 20 epochs.

    Scale: `mdistiller/distillers/DKD.py` of the authors' code (`megvii-research/mdistiller`), with the options in its
    `configs/cifar100/dkd`: T^2 times the sums over the classes, averaged over the samples.

    Doubt: none known.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape. A constant: no gradient reaches it.
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
        TypeError: If student, teacher or target is no tensor.
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
    """Decoupled divergence: target class and the others with a weight each; see `dkd_loss` for the formula.

    Args:
        alpha: Weight of the target-class part, zero or positive.
        beta: Weight of the part of the other classes, zero or positive.
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
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
