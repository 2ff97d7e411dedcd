"""What losses share that set the target apart from the other classes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses._softened import soften


def set_apart(logits: Tensor, labels: Tensor, *, dim: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Set the target apart, in the softened distribution p.

    Args:
        logits: `(..., C)`, with the classes along `dim`; -inf is a probability of 0.
        labels: The target's class, with a dimension of size 1 at `dim`.
        dim: The dimension of the classes.
        temperature: What the logits are divided by.

    Returns:
        The logarithms of p_y and 1 - p_y, next to each other along `dim`; and those of `p_c / (1 - p_y)`, which are
        -inf at the target, and at all classes where no other has a probability.
    """
    others, largest, nothing = _without(logits, labels, dim)
    others = soften(others, temperature)
    mass = others.logsumexp(dim, keepdim=True).masked_fill(nothing, -math.inf)
    target = soften(logits.gather(dim, labels) - largest, temperature)
    pair = F.log_softmax(torch.cat([target, mass], dim), dim)
    return pair, _log_softmax(others, labels, nothing, dim)


def log_of_others(logits: Tensor, labels: Tensor, *, dim: int, temperature: float) -> Tensor:
    """Give the second of what `set_apart` gives."""
    others, _, nothing = _without(logits, labels, dim)
    return _log_softmax(soften(others, temperature), labels, nothing, dim)


def weigh(values: Tensor, weight: float) -> Tensor:
    """Multiply by a weight, of which 0 takes away what is infinite too."""
    if weight == 0:
        values = values.masked_fill(~values.isfinite(), 0.0)
    return values * weight


def _without(logits: Tensor, labels: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The logits with -inf at the target, less the largest of the others; that one; and where there is no other.

    What all logits of a sample have in common would only cost digits. The largest is a constant: the results do not
    depend on it. Where no other class has a probability all logits are 0 instead.
    """
    others = logits.scatter(dim, labels, -math.inf)
    largest = others.detach().amax(dim, keepdim=True)
    nothing = largest == -math.inf
    largest = largest.masked_fill(nothing, 0.0)
    return others.masked_fill(nothing, 0.0) - largest, largest, nothing


def _log_softmax(others: Tensor, labels: Tensor, nothing: Tensor, dim: int) -> Tensor:
    if others.shape[dim] == 2:  # the other one alone has all of what is not the target's, also where that is 0
        return others.new_zeros(others.shape).scatter(dim, labels, -math.inf)
    return F.log_softmax(others, dim).masked_fill(nothing, -math.inf)
