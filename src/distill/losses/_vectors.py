"""Vectors of unit norm, as losses on maps and on relations between samples compare them."""

import math

import torch
from torch import Tensor


def normalize(tensor: Tensor, *, dim: int, eps: float = 1e-12) -> Tensor:
    """Divide by the L2 norm along `dim`; what has no norm above `eps` becomes 0 and gets no gradient.

    `F.normalize` divides by `eps` there instead, and multiplies the gradient of a channel that is 0 by 1e12.
    """
    norm = torch.linalg.vector_norm(tensor, dim=dim, keepdim=True)
    # What is divided by infinity is 0, and so is its gradient.
    return tensor / torch.where(norm > eps, norm, math.inf)
