"""Adaptive divergence: Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation" (2024)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill._checks import check_fraction, check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._softened import divergence, harden, soften

FAMILY = "divergences"


def _formula(student: Tensor, teacher: Tensor, *, dim: int, mu: float, temperature: float) -> Tensor:
    log_q, log_p = (F.log_softmax(soften(x, temperature), dim) for x in (student, teacher))
    forward, reverse = divergence(log_p, log_q, dim), divergence(log_q, log_p, dim)
    share = _share_of_head(log_p, log_q.detach(), dim=dim, mu=mu)
    # A share of 0 takes away what is infinite too. With a share of 1 the tails agree, and nothing else is infinite.
    values = forward.masked_fill(share == 0, 0.0) * share + reverse * (1 - share)
    return harden(values, temperature)


def _share_of_head(log_p: Tensor, log_q: Tensor, *, dim: int, mu: float) -> Tensor:
    """The part of the difference between the two distributions that lies in the teacher's head."""
    p, order = log_p.exp().sort(dim=dim, descending=True, stable=True)
    gaps = (p - log_q.exp().gather(dim, order)).abs()
    tail = p.cumsum(dim) > mu
    first = torch.zeros_like(tail.narrow(dim, 0, 1))  # the likeliest class is in the head, however likely
    tail = torch.cat([first, tail.narrow(dim, 1, tail.shape[dim] - 1)], dim)
    in_head, in_tail = gaps.masked_fill(tail, 0.0).sum(dim), gaps.masked_fill(~tail, 0.0).sum(dim)
    whole = in_head + in_tail
    return torch.where(whole == 0, 0.5, in_head / whole.masked_fill(whole == 0, 1.0))


_ROWS = Rows(_formula)


def akl_loss(
    student: Tensor, teacher: Tensor, *, mu: float = 0.5, temperature: float = 1.0, dim: int | None = None
) -> Tensor:
    """Forward and reverse divergence, weighted by where student and teacher differ, one value per sample.

        p = softmax(t / T),  q = softmax(s / T)
        h = sum over the head of |p_c - q_c|,  l = the same over the tail, a constant in the gradient
        loss = T^2 * [h / (h + l) * KL(p || q) + l / (h + l) * KL(q || p)]

    The classes are sorted by the teacher's probability. The head are the likeliest ones while these add up to at most
    `mu`, and at least one class; the tail are the others. So the class that crosses `mu` is in the tail, unless it is
    the first. Where student and teacher agree, h and l are 0: both weights are 1/2 there, and the value is 0.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape; -inf is a probability of 0. Gets no gradient.
        mu: How much of the teacher's probability the head holds at most, above 0 and below 1.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, in nats times the squared temperature, never negative; infinite where a
        class has a probability of 0 for one side alone and the weight of that side's divergence is not 0. float32, or
        float64 if an input is.

    Raises:
        TypeError: If an input is no tensor, or `mu` or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, `mu` is not above 0 and below
            1, the temperature is not positive and finite, there is only one class, or `dim` is out of range or not
            given where there are four dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import akl_loss
        >>> student = torch.tensor([[0.4, 0.4, 0.2]]).log()
        >>> teacher = torch.tensor([[0.7, 0.2, 0.1]]).log()  # the head is the first class: h = 0.3 and l = 0.2 + 0.1
        >>> akl_loss(student, teacher)  # half of 0.1838 and half of 0.1920
        tensor([0.1879])

    Notes:
        Published with weight 1 at temperature 1, where the factor T^2 is 1, and `mu` 0.5.

        Scale: `AKL.py` of the authors' code (`wutaiqiang/LLM_KD_AKL`): the sum over the vocabulary, averaged over the
        tokens.

        Caveat: Which side the class that crosses `mu` belongs to is taken from that file. Others put it into the head,
        such as `code/criterions/various_divergence.py` of `jungseongryong/ToDi`, which sorts the other way. Both give
        0/0 where student and teacher agree.

    Reference:
        Taiqiang Wu, Chaofan Tao, Jiahao Wang, Runming Yang, Zhe Zhao and Ngai Wong, "Rethinking Kullback-Leibler
        Divergence in Knowledge Distillation for Large Language Models", COLING 2025 and arXiv 2404.02657.
    """
    check_fraction("mu", mu)
    check_positive("temperature", temperature)
    return _ROWS.values(student, teacher, dim=dim, mu=mu, temperature=temperature)


@register_loss("akl")
class AKLLoss(RowLoss):
    """Forward and reverse divergence, weighted by where the two differ; see `akl_loss` for the formula.

    Args:
        mu: How much of the teacher's probability the head holds at most, above 0 and below 1.
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `mu` or `temperature` is no number.
        ValueError: If `mu` is not above 0 and below 1, the temperature is not positive and finite, or the reduction is
            unknown.

    Examples:
        >>> import torch
        >>> from distill import AKLLoss
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> AKLLoss()(logits, logits)  # not 0/0
        tensor(0.)
    """

    rows = _ROWS
    options = {"mu": check_fraction, "temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(
        self, mu: float = 0.5, temperature: float = 1.0, *, reduction: Reduction = "mean", dim: int | None = None
    ) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.mu = mu
        self.temperature = temperature
