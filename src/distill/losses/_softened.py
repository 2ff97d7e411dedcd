"""What losses on softened distributions share: the temperature, and sums over classes of which some have no chance."""

import math

import torch
from torch import Tensor

from distill._checks import may_look

_LOG2_E = 1 / math.log(2)
LARGEST = 80.0  # exp of it is finite in float32
_CLOSE = 4e-3  # times log C: divergences below it are computed in the form that keeps their digits
APART = 0.5  # a difference of logarithms beside which it does not show that an exponential is rounded


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature, and spare the pass over memory where it is 1."""
    return logits if temperature == 1 else logits / temperature


def harden(values: Tensor, temperature: float) -> Tensor:
    """Multiply by the squared temperature, for the gradient that `soften` took away, and spare that where it is 1."""
    return values if temperature == 1 else values * temperature**2


def add_up(terms: Tensor, dim: int, weight: float = 1.0, *, mean: bool = False) -> Tensor:
    """Sum terms over the classes and multiply by a weight; or give the mean of that over all samples, in one sum."""
    if mean:
        return terms.sum() * (weight * terms.shape[dim] / terms.numel())
    return terms.sum(dim) if weight == 1 else terms.sum(dim) * weight


def softmax_rows(logits: Tensor, temperature: float, *, out: Tensor) -> Tensor:
    """Give the softmax of rows of logits over the temperature in a buffer, for the blocks of a loss."""
    return torch.softmax(logits if temperature == 1 else torch.mul(logits, 1 / temperature, out=out), -1, out=out)


def log_softmax_rows(logits: Tensor, temperature: float, *, out: Tensor) -> Tensor:
    """Do what `softmax_rows` does for the logarithms."""
    return torch.log_softmax(logits if temperature == 1 else torch.mul(logits, 1 / temperature, out=out), -1, out=out)


def exp_rows(x: Tensor, *, out: Tensor) -> Tensor:
    """Give exp(x) in a buffer, possibly `x` itself, as a power of 2: on a CPU that takes two thirds of the time."""
    return torch.mul(x, _LOG2_E, out=out).exp2_()


def not_negative(values: Tensor) -> Tensor:
    """Take away what rounding leaves below 0; the derivatives stay as they are, at 0 too."""
    return values - values.detach().clamp(max=0)


def expectation(p: Tensor, x: Tensor, dim: int) -> Tensor:
    """Compute sum_c p_c x_c, where a class of probability 0 counts nothing, be its x infinite or NaN.

    The gradient for x is p, and for p it is x, but 0 at a class of probability 0: on its way to the logits it is
    multiplied by p again.

    Args:
        p: Probabilities.
        x: What is averaged, mostly a logarithm that is -inf where a probability is 0.
        dim: The dimension of the classes.
    """
    return (p * x.masked_fill(p == 0, 0.0)).sum(dim)


def divergence(log_a: Tensor, log_b: Tensor, dim: int) -> Tensor:
    """Compute KL(a || b) = sum_c a_c (log a_c - log b_c) of two distributions.

    A class that a gives no probability counts nothing, one that b alone gives none makes it infinite. It is never
    negative and keeps its digits where a and b are close: it is the sum of a (exp(d) - 1 - d) with d = log b - log a,
    whose terms are all positive, and which is the same since a and b both sum to 1. The gradient is right for both.

    Args:
        log_a: Logarithms of the probabilities of a, such as `log_softmax` gives them: -inf is a probability of 0.
        log_b: The same of b.
        dim: The dimension of the classes.
    """
    a, d = log_a.exp(), log_b - log_a
    tiny = torch.finfo(a.dtype).tiny
    if may_look(a) and bool(a.detach().amin() >= tiny):  # to choose element by element costs more than all the rest
        return (a * (expm1(d) - d)).sum(dim)
    none = a < tiny  # there exp(d) may overflow, and all that counts of the term is b
    d = d.masked_fill(none, 0.0)
    return torch.where(none, log_b.exp(), a * (expm1(d) - d)).sum(dim)


def divergence_of_logits(a: Tensor, b: Tensor, *, dim: int, temperature: float, mean: bool = False) -> Tensor:
    """Compute T^2 KL(softmax(a / T) || softmax(b / T)), in the form of `compare_rows` where that is possible.

    The gradient is right for both. With `mean` it is the mean over all samples.
    """
    softened = (a, b) if temperature == 1 else (a / temperature, b / temperature)
    log_a, log_b = torch.log_softmax(softened[0], dim), torch.log_softmax(softened[1], dim)
    if may_look(a):
        p = log_a.exp()
        terms = p * (log_a - log_b)
        if not are_close(terms.detach().sum(dim), a.shape[dim]):
            return add_up(terms, dim, temperature**2, mean=mean)
        d = soften(b - a, temperature)
        d = d - (p * d).sum(dim, keepdim=True)
        if bool(d.detach().amax() < LARGEST):
            values = harden(not_negative(torch.log1p((p * (expm1(d) - d)).sum(dim))), temperature)
            return values.mean() if mean else values
    values = harden(divergence(log_a, log_b, dim), temperature)
    return values.mean() if mean else values


def compare_rows(
    a: Tensor, b: Tensor, d: Tensor, p: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compare rows of logits `(R, C)` so that close ones keep their digits, for the blocks of a divergence.

    With p = softmax(a / T), and d the difference (b - a) / T minus its mean under p, KL(p || softmax(b / T)) is
    log(sum p exp(d)), which is log1p(sum p (exp(d) - 1 - d)) since the mean of d is 0: no term is negative.

    Args:
        a: Logits.
        b: Logits.
        d: Where to put the centred difference.
        p: Where to put the probabilities.
        temperature: What both logits are divided by.

    Returns:
        p (exp(d) - 1 - d), its sums `(R, 1)`, and the indices of the rows that want another form, since their
        exponentials may overflow or they are no number; None for none.
    """
    softmax_rows(a, temperature, out=p)
    torch.sub(b, a, out=d)
    v = torch.mul(p, d)
    if temperature == 1:
        d.sub_(v.sum(-1, keepdim=True))
    else:
        torch.add(v.sum(-1, keepdim=True).mul_(-1 / temperature), d, alpha=1 / temperature, out=d)
    highest = d.amax(-1)
    low, high = map(float, highest.aminmax())
    u = exp_rows(d, out=v).sub_(1.0) if low > APART else torch.expm1(d, out=v)
    return u.sub_(d).mul_(p), v.sum(-1, keepdim=True), far_rows(highest, high)


def far_rows(highest: Tensor, high: float) -> Tensor | None:
    """Find rows with exponents that may overflow or are no number, by the largest of each and of all.

    Returns:
        Their indices; None for none.
    """
    return None if high < LARGEST else torch.logical_not(highest < LARGEST).nonzero().squeeze(-1)


def are_apart(values: Tensor, least: float) -> bool:
    """Whether all are finite and above what a quick form needs, where they are on a CPU."""
    low, high = values.aminmax()
    return float(low) > least and float(high) < math.inf


def are_close(values: Tensor, classes: int, weight: float = 1.0) -> bool:
    """Whether a divergence of so many classes is too small for the digits that a difference of logarithms leaves.

    Args:
        values: The divergences, times a weight. One that is NaN counts as too small.
        classes: How many classes.
        weight: The weight.
    """
    # Rounding leaves some 1e-7 log C in them.
    return not float(values.amin()) > weight * _CLOSE * math.log(classes)


def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 with all its digits, compiled too.

    On a CPU `torch.compile` writes `torch.expm1` as exp(x) - 1, which loses those of a small x.
    """
    if not torch.compiler.is_compiling():
        return torch.expm1(x)
    half = x.clamp(min=-100.0) / 2  # -inf would be 0 times infinity
    return 2 * half.exp() * half.sinh()


def expm1_rows(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Give exp(x) - 1 of rows of differences, with the digits that they have where they are small.

    Args:
        x: `(R, C)`.
        out: Where to put it, possibly `x` itself; None: into a new tensor.
    """
    if x.dtype == torch.float64 or not may_look(x):
        return torch.expm1(x, out=out)
    if bool((x.amax(-1) < APART).any()):
        return torch.expm1(x, out=out)
    return torch.exp(x, out=out).sub_(1.0)  # twice as fast, and what it loses is small beside such differences
