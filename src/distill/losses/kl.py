"""Soft targets: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015)."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill._checks import check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._from_teacher import ROWS
from distill.losses._softened import expectation, harden, log_softmax_rows, soften
from distill.topk import TopK

FAMILY = "divergences"


def _weigh(log_probs: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """What each class of a `TopK` with drawn ones counts for, and its log-probability."""
    log_p, log_tail = log_probs[..., :-1], log_probs[..., -1:]
    share = (log_tail - math.log(samples)).expand(*log_tail.shape[:-1], samples)
    return torch.softmax(torch.cat([log_p[..., :-samples], share], -1), -1), log_p


def _sampled_formula(
    student: Tensor, teacher: Tensor, indices: Tensor, *, dim: int, temperature: float, samples: int
) -> Tensor:
    w, log_p = _weigh(teacher, samples)
    log_q = F.log_softmax(soften(student, temperature), dim).gather(dim, indices)
    return harden(expectation(w, log_p - log_q, dim), temperature)


def _sampled_block(
    student: Tensor,
    teacher: Tensor,
    indices: Tensor,
    factors: Tensor | None,
    gradient: Tensor,
    spare: Tensor,  # noqa: ARG001 - every block function is called alike
    *,
    temperature: float,
    samples: int,
) -> Tensor:
    w, log_p = _weigh(teacher, samples)
    log_q = log_softmax_rows(student, temperature, out=gradient)
    values = harden(expectation(w, log_p - log_q.gather(1, indices), -1), temperature)
    if factors is not None:  # T (q - w)
        counts = factors * temperature
        gradient.exp_().mul_(counts).scatter_add_(1, indices, w.mul_(-counts))
    return values


_ROWS = dataclasses.replace(ROWS, topk=True, sampled=Rows(_sampled_formula, block=_sampled_block, labels=True))


def kl_loss(student: Tensor, teacher: Tensor | TopK, *, temperature: float = 4.0, dim: int | None = None) -> Tensor:
    """Kullback-Leibler divergence of the student's softened distribution from the teacher's, one value per sample.

        p = softmax(t / T),  q = softmax(s / T)
        loss = T^2 * KL(p || q) = T^2 * sum_c p_c (log p_c - log q_c)

    The factor T^2 keeps the size of the gradient when the temperature changes. As the temperature grows the loss
    tends to half the mean squared difference of the logits, each centred over the classes.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape; -inf is a probability of 0. Or a `TopK`. Gets no gradient.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, in nats times the squared temperature, never negative; infinite where a
        class has a probability of 0 for the student alone. float32, or float64 if an input is.

    Raises:
        TypeError: If an input is no tensor, or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, the temperature is not
            positive and finite, there is only one class, or `dim` is out of range or not given where there are four
            dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import kl_loss
        >>> student = torch.tensor([[0.0, 0.0]])
        >>> teacher = torch.tensor([[0.25, 0.75]]).log()
        >>> kl_loss(student, teacher, temperature=1.0)  # 0.25 log(0.25 / 0.5) + 0.75 log(0.75 / 0.5)
        tensor([0.1308])

    Notes:
        Published with weight 0.9 at temperature 4, beside 0.1 times the cross-entropy (the CIFAR-100 benchmark of Tian,
        Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020).

        Scale: `distiller_zoo/KD.py` of that benchmark (`HobbitLong/RepDistiller`): T^2 times the sum over the classes,
        averaged over the samples.

    Reference:
        Geoffrey Hinton, Oriol Vinyals and Jeff Dean, "Distilling the Knowledge in a Neural Network", NIPS deep
        learning workshop 2014 and arXiv 1503.02531 (2015).
    """
    check_positive("temperature", temperature)
    return _ROWS.values(student, teacher, dim=dim, temperature=temperature)


@register_loss("kl")
class KLLoss(RowLoss):
    """Kullback-Leibler divergence of softened distributions, T^2 KL(teacher || student); see `kl_loss` for the formula.

    Args:
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `temperature` is no number.
        ValueError: If the temperature is not positive and finite, or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import KLLoss
        >>> loss = KLLoss(temperature=2.0)
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> loss(logits, logits)
        tensor(0.)

    Notes:
        With large inputs the gradient is computed in the forward pass and kept, which costs one tensor of the student's
        size. So evaluate under `torch.no_grad()`.

        Do not change student, teacher or mask in place before backward. With large inputs this is an error, with small
        ones it may be one; it never gives a wrong gradient.
    """

    rows = _ROWS
    options = {"temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(self, temperature: float = 4.0, *, reduction: Reduction = "mean", dim: int | None = None) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.temperature = temperature
