"""What losses share that set the target apart from the other classes."""

import math

from torch import Tensor

from distill.losses._softened import soften


def set_apart(logits: Tensor, labels: Tensor, *, dim: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Set the target apart, in the softened distribution p.

    What all logits of a sample have in common would only cost digits, so they count from the largest other class.

    Args:
        logits: `(..., C)`, with the classes along `dim`; -inf is a probability of 0.
        labels: The target's class, with a dimension of size 1 at `dim`.
        dim: The dimension of the classes.
        temperature: What the logits are divided by.

    Returns:
        The target's log-odds, `log(p_y / (1 - p_y))`, with a dimension of size 1 at `dim`; and the logarithms of
        `p_c / (1 - p_y)`, which are -inf at the target, and at all classes where no other has a probability.
    """
    others = logits.scatter(dim, labels, -math.inf)
    largest = others.detach().amax(dim, keepdim=True)  # a constant that the result does not depend on
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    others = soften(others - largest, temperature)
    target = soften(logits.gather(dim, labels) - largest, temperature)
    mass = others.exp().sum(dim, keepdim=True)
    nothing = mass == 0
    log_mass = (mass + nothing).log()
    odds = target - log_mass.masked_fill(nothing, -math.inf)
    if logits.shape[dim] == 2:  # the other one alone has all of what is not the target's, also where that is 0
        return odds, others.new_zeros(others.shape).scatter(dim, labels, -math.inf)
    return odds, others - log_mass


def weigh(values: Tensor, weight: float) -> Tensor:
    """Multiply by a weight, of which 0 takes away what is infinite too."""
    if weight == 0:
        values = values.masked_fill(~values.isfinite(), 0.0)
    return values * weight
