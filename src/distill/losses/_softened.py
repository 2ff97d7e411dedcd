"""What losses on softened distributions share: the temperature, and the logarithm of a mixture."""

import torch
from torch import Tensor


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature, and spare the pass over memory where it is 1."""
    return logits if temperature == 1 else logits / temperature


def harden(values: Tensor, temperature: float) -> Tensor:
    """Multiply by the squared temperature, for the gradient that `soften` took away, and spare that where it is 1."""
    return values if temperature == 1 else values * temperature**2


def log_mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Compute log(share * a + (1 - share) * b) of two distributions; `share` is above 0 and below 1.

    The smallest normal number is added: it changes nothing but where a and b underflow both, and there, what a
    divergence multiplies the logarithm by is 0 as well.
    """
    return (torch.lerp(b, a, share) + torch.finfo(a.dtype).tiny).log()
