"""What losses on softened distributions share: the temperature, and sums over classes of which some have no chance."""

import torch
from torch import Tensor


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature, and spare the pass over memory where it is 1."""
    return logits if temperature == 1 else logits / temperature


def harden(values: Tensor, temperature: float) -> Tensor:
    """Multiply by the squared temperature, for the gradient that `soften` took away, and spare that where it is 1."""
    return values if temperature == 1 else values * temperature**2


def softmax_rows(logits: Tensor, temperature: float, *, out: Tensor) -> Tensor:
    """Give the softmax of rows of logits over the temperature in a buffer, for the blocks of a loss."""
    return torch.softmax(logits if temperature == 1 else torch.div(logits, temperature, out=out), -1, out=out)


def log_softmax_rows(logits: Tensor, temperature: float, *, out: Tensor) -> Tensor:
    """Do what `softmax_rows` does for the logarithms."""
    return torch.log_softmax(logits if temperature == 1 else torch.div(logits, temperature, out=out), -1, out=out)


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
    a, b = log_a.exp(), log_b.exp()
    none = a < torch.finfo(a.dtype).tiny  # there exp(d) may overflow, and all that counts of the term is b
    d = (log_b - log_a).masked_fill(none, 0.0)
    return torch.where(none, b, a * (torch.expm1(d) - d)).sum(dim)
