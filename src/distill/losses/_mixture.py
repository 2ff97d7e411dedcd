"""How far teacher and student are from a mixture of them: what the Jensen-Shannon and the skew divergences share."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill._checks import check_fraction, may_look
from distill._engine.blocks import block_by_autograd
from distill.losses._softened import (
    add_up,
    are_close,
    divergence_of_logits,
    harden,
    not_negative,
    soften,
    softmax_rows,
)

check_skew = functools.partial(check_fraction, zero=True)  # what both skew divergences ask of `alpha`
_TINY = 1e-30
_LITTLE = 1e-3  # a share below which 1 minus it loses digits that count where q is 0


class Mixture(NamedTuple):
    """Which mixture m = share p + (1 - share) q is meant, and how much the divergences from it count."""

    share: float  # of the teacher, from 0 to 1; at 0, where m is q, only `of_teacher` counts, at 1 only the other
    of_teacher: float  # the weight of KL(p || m)
    of_student: float  # the weight of KL(q || m)

    @property
    def own(self) -> float:
        """The share of what is compared, where one of the two divergences counts."""
        return 1 - self.share if self.of_student else self.share

    # No property: PyTorch 2.5 traces none of a NamedTuple.
    def drift(self) -> float:
        """What the sum of q - p would change, which is 0 but for rounding."""
        return self.of_teacher * (1 - self.share) - self.of_student * self.share

    def factors(self, dtype: torch.dtype) -> tuple[float, float]:
        """What w = (q - p) / m is multiplied by in log(p / m) = log1p(.. w) and in log(q / m) = log1p(.. w).

        They are a few roundings nearer to 0 than they should be: where p or q is 0, rounding must not lead to the
        logarithm of 0, since 0 times minus infinity is NaN.
        """
        less = 1 - 4 * torch.finfo(dtype).eps
        return -(1 - self.share) * less, self.share * less


def from_mixture(
    student: Tensor, teacher: Tensor, mixture: Mixture, *, dim: int, temperature: float, mean: bool = False
) -> Tensor:
    """Compute T^2 [of_teacher KL(p || m) + of_student KL(q || m)], row by row.

    The logarithms are taken of 1 plus a multiple of w = (q - p) / m: so small differences keep their digits, and
    nothing is infinite. A class that neither gives a probability counts nothing.

    Args:
        student: Logits whose softmax is q.
        teacher: Logits whose softmax is p, detached.
        mixture: The mixture and the weights.
        dim: The dimension of the classes.
        temperature: What the logits are divided by.
        mean: Whether to give the mean over all rows.
    """
    share, of_teacher, of_student = mixture
    if share in (0, 1):  # compared with numbers, here and below: PyTorch 2.5 cannot trace `if x` of a symbol
        a, b = (teacher, student) if of_teacher != 0 else (student, teacher)
        return divergence_of_logits(a, b, dim=dim, temperature=temperature, mean=mean)
    q = torch.softmax(soften(student, temperature), dim)
    p = torch.softmax(soften(teacher, temperature), dim)
    difference = q - p
    tiny = 8 * torch.finfo(p.dtype).tiny  # so that 1 / tiny is below 1e307, from where some log1p give infinity
    if of_student == 0 and share > _LITTLE:  # log(m / p) as it stands: to divide by a constant is the cheaper way
        scale, terms = of_teacher, torch.log1p(difference / ((p + tiny) / (1 - share))) * -p
    else:
        to_p, to_q = mixture.factors(q.dtype)
        scale, x, factor = (of_student, q, to_q) if of_student != 0 else (of_teacher, p, to_p)
        # What w is multiplied by goes into m.
        of_p = p * (share / factor) + math.copysign(tiny, factor)
        w = difference / of_p.add(q, alpha=(1 - share) / factor)
        terms = x * torch.log1p(w)
        if of_student != 0 and of_teacher != 0:
            terms = terms.addcmul(p, torch.log1p(w * (to_p / to_q)), value=of_teacher / of_student)
    drift = mixture.drift()
    if drift != 0:  # each divergence changes with the sums of p and q, which are 1 only up to rounding
        terms = terms.add(difference.detach(), alpha=drift / scale)
    return not_negative(add_up(terms, dim, scale * temperature**2, mean=mean))


def block_from_mixture(
    student: Tensor,
    teacher: Tensor,
    factors: Tensor | None,
    gradient: Tensor,
    spare: Tensor,
    *,
    mixture: Mixture,
    temperature: float,
) -> Tensor:
    """Do what `from_mixture` does as the block function of `Rows`.

    The gradient for the student is T q (g - E_q[g]) with g = of_student log(q / m) + (1 - share) drift w.
    """
    share, of_teacher, of_student = mixture
    if share in (0, 1):
        formula = functools.partial(from_mixture, mixture=mixture)
        return block_by_autograd(formula, student, teacher, factors, gradient, spare, temperature=temperature)
    q = softmax_rows(student, temperature, out=gradient)
    p = softmax_rows(teacher, temperature, out=spare)
    drift = mixture.drift()
    if drift and mixture.own <= 1 / 2 and may_look(student):
        values = _of_one(q, p, factors, mixture=mixture, temperature=temperature)
        if values is not None:
            return harden(values, temperature)
    w = torch.sub(q, p)
    values = drift * w.sum(-1) if drift else torch.zeros_like(w[:, 0])
    m = torch.lerp(q, p, share)
    w.div_(m.add_(torch.finfo(p.dtype).tiny))
    logarithm, within = m, 1.0  # the memory, from here on, and what w has been multiplied by
    for weight, x, factor in zip((of_teacher, of_student), (p, q), mixture.factors(q.dtype), strict=True):
        if weight:
            torch.log1p(w.mul_(factor / within), out=logarithm)
            within = factor
            mean = torch.mul(logarithm, x, out=spare).sum(-1, keepdim=True)
            values += weight * mean.squeeze(-1)
    if factors is not None:
        slope, size = (logarithm, of_student) if of_student else (w, (1 - share) * drift / within)
        if drift and of_student:
            slope.add_(w, alpha=(1 - share) * drift / within / of_student)
        if drift:  # else the mean of the student's logarithm is what was summed last
            mean = torch.mul(slope, q, out=spare).sum(-1, keepdim=True)
        gradient.mul_(slope.sub_(mean).mul_(factors * (temperature * size)))
    return torch.mul(values, temperature**2).clamp_(min=0)


def _of_one(q: Tensor, p: Tensor, factors: Any, *, mixture: Mixture, temperature: float) -> Tensor | None:
    """Do what `block_from_mixture` does where one of the two divergences counts, in fewer passes.

    With r = x / m, x the distribution that is compared, its gradient for q is g = log r - (1 - share) r if x is q, and
    -(1 - share) r if x is p, up to a constant.

    Args:
        q: The student's rows; here comes the gradient.
        p: The teacher's rows.
        factors: What the gradient of each row is multiplied by.
        mixture: The mixture.
        temperature: What the logits are divided by.

    Returns:
        The divergences. None, and the rows as they were but for 1e-30, where one is so small that the rounding of r
        would show.
    """
    x = q if mixture.of_student else p
    x.add_(_TINY)  # the logarithm is nowhere infinite; beside a number that counts this is lost
    r = torch.lerp(q, p, mixture.share)
    torch.div(x, r, out=r)
    terms = torch.log(r).mul_(x)
    values = terms.sum(-1)
    if are_close(values, q.shape[-1]):
        return None
    if factors is not None:  # T q (g - E_q[g])
        slope, size = r.mul_(q), (mixture.share - 1) * temperature
        if mixture.of_student:
            slope, size = terms.sub_(slope, alpha=1 - mixture.share), temperature
        torch.addcmul(slope, q, slope.sum(-1, keepdim=True), value=-1, out=q).mul_(factors * size)
    return values
