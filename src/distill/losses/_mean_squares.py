"""The mean squared difference of rows: what `logit` compares, and `linear_logit` through two heads."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill._engine.rows import Rows


def _formula(student: Tensor, teacher: Tensor, *, dim: int, mean: bool = False) -> Tensor:
    if mean:
        value: Tensor = _mean(student, teacher)
        return value
    return F.mse_loss(student, teacher, reduction="none").mean(dim)


def _block(student: Tensor, teacher: Tensor, factors: Tensor | None, gradient: Tensor, spare: Tensor) -> Tensor:
    columns = student.shape[-1]
    difference = torch.sub(student, teacher, out=gradient)
    values = _squares(difference, spare) / columns
    if factors is not None:
        gradient.mul_(factors * (2 / columns))  # d/ds_c of the mean of (s_c - t_c)^2 is 2/C (s_c - t_c)
    return values


def _squares(difference: Tensor, spare: Tensor) -> Tensor:
    """Sums of the squares of each row."""
    columns = difference.shape[-1]
    pieces = math.gcd(columns, 64)
    if columns // pieces > 4096:
        return torch.mul(difference, difference, out=spare).sum(-1)
    # Reads once and writes nothing, but adds up one by one: only a short piece is as exact as a sum.
    norms: Tensor = torch.linalg.vector_norm(difference.view(-1, pieces, columns // pieces), dim=-1)
    return norms.square().sum(-1)


def _kernel() -> Any:
    from distill._engine.triton import logit  # only where there is a GPU

    return logit


# What `F.mse_loss` calls: that first expands both to one shape, which is two more operations of the graph.
_mean = torch.ops.aten.mse_loss.default

# Up to some three million elements caches hold what the plain form writes, and it is faster.
ROWS = Rows(_formula, block=_block, kernel=_kernel, mean=True, single=True, fused_from=3, longer=8, softmax=False)
