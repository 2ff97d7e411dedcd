"""Alpha-beta divergence: Wang et al., "ABKD: Pursuing a Proper Allocation of the Probability Mass" (ICML 2025)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill._checks import check_not_negative, check_positive, may_look
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._softened import (
    APART,
    add_up,
    are_apart,
    exp_rows,
    expm1,
    expm1_rows,
    log_softmax_rows,
    not_negative,
    soften,
)
from distill.topk import TopK

FAMILY = "divergences"

_SMALL = 0.05  # an exponent below which the formula as it stands would drown in rounding
_CLOSE = 0.01  # what must be left of the two sums of powers, or it loses too many digits
_NEGLIGIBLE = 1e-30  # an exponent that changes no digit of anything, and with which float32 can no longer compute
_LN_2 = math.log(2)
_FAR = 40.0  # exp(-40) does not count beside 1


def _check_exponents(alpha: float, beta: float) -> None:
    check_not_negative("alpha", alpha)
    check_not_negative("beta", beta)
    if alpha == beta == 0:
        raise ValueError(f"alpha and beta must not both be zero, got {alpha!r} and {beta!r}")


def _formula(
    student: Tensor,
    teacher: Tensor,
    *,
    dim: int,
    alpha: float,
    beta: float,
    temperature: float,
    mean: bool = False,
) -> Tensor:
    _check_exponents(alpha, beta)
    log_q = F.log_softmax(soften(student, temperature), dim)
    log_p = F.log_softmax(soften(teacher, temperature), dim)
    total = alpha + beta
    if min(alpha, beta) >= _SMALL and may_look(student):  # the formula as it stands takes two thirds of the time
        of_q, of_p = total * log_q, total * log_p
        terms = of_q.exp().sub(torch.lerp(of_p, of_q, beta / total).exp(), alpha=total / beta)
        terms = terms.add(of_p.exp(), alpha=alpha / beta)
        largest = (1 + alpha / beta) * max(student.shape[dim] ** (1 - total), 1.0)  # of the sum of the two powers
        if float(terms.detach().sum(dim).amin()) >= _CLOSE * largest:
            return add_up(terms, dim, 1 / (alpha * total), mean=mean)
    return not_negative(add_up(_centred(log_p, log_q, alpha, beta), dim, 1 / total, mean=mean))


def _centred(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """Give alpha + beta times the divergence class by class: small exponents and differences keep their digits.

    With d = log q - log p a term is p^alpha q^beta [expm1(alpha d) / alpha + expm1(-beta d) / beta]. Nothing cancels as
    an exponent tends to 0, and no term is negative. A p so much smaller than q, or the other way round, that its power
    does not count is taken to be just that much smaller, so that no exponential overflows; which of the two a gradient
    takes where they meet does not count either.
    """
    if alpha > _NEGLIGIBLE:
        log_p = torch.maximum(log_p, log_q - _FAR / alpha)
    if beta > _NEGLIGIBLE:
        log_q = torch.maximum(log_q, log_p - _FAR / beta)
    if alpha <= _NEGLIGIBLE:
        middle = (beta * log_q).exp()
    elif beta <= _NEGLIGIBLE:
        middle = (alpha * log_p).exp()
    else:
        middle = (alpha * log_p + beta * log_q).exp()
    d = (log_q - log_p).masked_fill(middle == 0, 0.0)  # infinite or NaN where a probability is 0
    up = expm1(alpha * d) / alpha if alpha > _NEGLIGIBLE else d
    down = expm1(-beta * d) / beta if beta > _NEGLIGIBLE else -d
    return middle * (up + down)


def _block(
    student: Tensor,
    teacher: Tensor,
    factors: Tensor | None,
    gradient: Tensor,
    spare: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """Do what `_centred` does, in place, whatever the exponents.

    The gradient is (g - q sum g) / T with g = (q^(alpha + beta) - p^alpha q^beta) / alpha, one part of each term.
    """
    _check_exponents(alpha, beta)
    if min(alpha, beta) >= _SMALL and may_look(student):
        options = {"alpha": alpha, "beta": beta, "temperature": temperature}
        values = _apart(student, teacher, factors, gradient, spare, **options)
        if values is not None:
            return values
    log_q = log_softmax_rows(student, temperature, out=torch.empty_like(spare))
    q = torch.exp(log_q, out=gradient)
    log_p = log_softmax_rows(teacher, temperature, out=spare)
    d = torch.sub(log_q, log_p)
    low, high = d.aminmax()
    # On a GPU to look would wait for it.
    near = may_look(student) and bool((high * alpha < _FAR) & (low * -beta < _FAR))
    if not near:
        if alpha > _NEGLIGIBLE:
            torch.maximum(log_p, torch.sub(log_q, _FAR / alpha, out=d), out=log_p)
        if beta > _NEGLIGIBLE:
            torch.maximum(log_q, torch.sub(log_p, _FAR / beta, out=d), out=log_q)
        torch.sub(log_q, log_p, out=d)
    if alpha <= _NEGLIGIBLE:
        middle = torch.mul(log_q, beta, out=spare).exp_()
    elif beta <= _NEGLIGIBLE:
        middle = log_p.mul_(alpha).exp_()
    else:
        middle = log_p.mul_(alpha).add_(log_q, alpha=beta).exp_()
    if not near:
        d.masked_fill_(middle == 0, 0.0)
    up = expm1_rows(torch.mul(d, alpha, out=log_q), out=log_q).div_(alpha) if alpha > _NEGLIGIBLE else log_q.copy_(d)
    down = expm1_rows(d.mul_(-beta), out=d).div_(beta) if beta > _NEGLIGIBLE else d.neg_()
    values = down.add_(up).mul_(middle).sum(-1).div_(alpha + beta).clamp_(min=0)
    if factors is not None:
        slope = up.mul_(middle)
        q.mul_(slope.sum(-1, keepdim=True).neg_()).add_(slope).mul_(factors / temperature)
    return values


def _apart(
    student: Tensor,
    teacher: Tensor,
    factors: Any,
    gradient: Tensor,
    spare: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor | None:
    """Do what `_block` does with the formula as it stands, in fewer passes; None for rows that it leaves no digits."""
    log_q = log_softmax_rows(student, temperature, out=gradient)
    log_p = log_softmax_rows(teacher, temperature, out=spare)
    total = alpha + beta
    of_student: Tensor | float = 1.0
    of_teacher: Tensor | float = 1.0
    power = None
    if not (one := math.isclose(total, 1, rel_tol=1e-15)):  # else p and q are their own powers
        of_teacher = torch.exp2(log_p * (total / _LN_2)).sum(-1, keepdim=True)
        power = torch.exp2(log_q * (total / _LN_2))
        of_student = power.sum(-1, keepdim=True)
    d = log_p.sub_(log_q)
    if not are_apart(d.amax(-1), APART):
        return None
    both = torch.add(log_q if one else log_q * total, d, alpha=alpha, out=d)
    of_both = exp_rows(both, out=both).sum(-1, keepdim=True)
    values = (of_both / (-alpha * beta)).add_(of_teacher / (beta * total) + of_student / (alpha * total)).clamp_(min=0)
    if factors is not None:  # (g - q sum g) / T with g = (q^(alpha + beta) - p^alpha q^beta) / alpha
        q = exp_rows(log_q, out=log_q)
        if power is not None:
            both, of_both = both.sub_(power), of_both - of_student
        torch.addcmul(both, q, of_both, value=-1, out=gradient).mul_(factors * (-1 / (alpha * temperature)))
    return values.squeeze(-1)


# From some 260,000 elements on one pass in blocks is faster than the operations of the formula and their backward.
_ROWS = Rows(_formula, block=_block, mean=True, topk=True, fused_from=1 / 4)


def alpha_beta_loss(
    student: Tensor,
    teacher: Tensor | TopK,
    *,
    alpha: float,
    beta: float,
    temperature: float = 1.0,
    dim: int | None = None,
) -> Tensor:
    """Alpha-beta divergence of teacher and student, one value per sample.

        p = softmax(t / T),  q = softmax(s / T),  both exponents not negative
        loss = 1 / (alpha beta) * sum_c [alpha / (alpha + beta) * p_c^(alpha + beta)
               + beta / (alpha + beta) * q_c^(alpha + beta) - p_c^alpha q_c^beta]

    The limits are part of it, and reached continuously: (1, 0) is KL(p || q), (0, 1) is KL(q || p). (1, 1) is half the
    squared distance of p and q, (0.5, 0.5) four times the squared Hellinger distance.

    There is no factor T^2, as in the authors' code: `KLLoss(T)` is T^2 times `AlphaBetaLoss(1, 0, T)`.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape; -inf is a probability of 0. Or a `TopK`. Gets no gradient.
        alpha: Exponent of the teacher, zero or positive.
        beta: Exponent of the student, zero or positive, not zero together with `alpha`.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, without a unit, not negative; float32, or float64 if an input is.

    Raises:
        TypeError: If an input is no tensor, or `alpha`, `beta` or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, an exponent is negative or not
            finite, both are zero, the temperature is not positive and finite, there is only one class, or `dim` is out
            of range or not given where there are four dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import alpha_beta_loss
        >>> student = torch.tensor([[0.25, 0.75]]).log()
        >>> teacher = torch.tensor([[0.0, 0.0]])
        >>> alpha_beta_loss(student, teacher, alpha=1.0, beta=1.0)  # (0.25^2 + 0.25^2) / 2
        tensor([0.0625])

    Notes:
        Published with weight 32 for `alpha` 0.8 and `beta` 0.3 on CIFAR-100 (ResNet-56 to ResNet-20, the authors'
        README), at the temperature 4 that is the default of the code it builds on.

        Scale: `standard_classification/distiller_zoo/abkl.py` of the authors' code (`ghwang-s/abkd`), averaged over the
        samples; its form for language models, `ab_div` in `distillation_llm/distillm/losses.py`, has no temperature.

        Caveat: Where one exponent is 0 and the other is not 1, that code has the other exponent times this value, which
        is the limit of its own formula and that of Cichocki et al. The script with the temperature could not be seen,
        only the code it builds on (`zkxufo/TTM`), nor were the exponents for language models.

    Reference:
        Guanghui Wang, Zhiyong Yang, Zitai Wang, Shi Wang, Qianqian Xu and Qingming Huang, "ABKD: Pursuing a Proper
        Allocation of the Probability Mass in Knowledge Distillation via alpha-beta-Divergence", ICML 2025 and
        arXiv 2505.04560. The divergence is that of Cichocki, Cruces and Amari, "Generalized Alpha-Beta
        Divergences and Their Application to Robust Nonnegative Matrix Factorization", Entropy 2011.
    """
    _check_exponents(alpha, beta)
    check_positive("temperature", temperature)
    return _ROWS.values(student, teacher, dim=dim, alpha=alpha, beta=beta, temperature=temperature)


@register_loss("alpha_beta")
class AlphaBetaLoss(RowLoss):
    """Alpha-beta divergence of the softened distributions; see `alpha_beta_loss` for the formula.

    Args:
        alpha: Exponent of the teacher, zero or positive.
        beta: Exponent of the student, zero or positive, not zero together with `alpha`.
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `alpha`, `beta` or `temperature` is no number.
        ValueError: If an exponent is negative or not finite, both are zero, the temperature is not positive and finite,
            or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import AlphaBetaLoss
        >>> loss = AlphaBetaLoss(0.2, 0.7)
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> loss(logits, logits).abs() < 1e-5
        tensor(True)
    """

    rows = _ROWS
    options = {"alpha": check_not_negative, "beta": check_not_negative, "temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(
        self,
        alpha: float,
        beta: float,
        temperature: float = 1.0,
        *,
        reduction: Reduction = "mean",
        dim: int | None = None,
    ) -> None:
        super().__init__(reduction=reduction, dim=dim)
        _check_exponents(alpha, beta)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
