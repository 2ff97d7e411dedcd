"""The divergence of softened rows from the teacher's: what `kl` compares over classes, and `cwd` over positions."""

from typing import Any

import torch
from torch import Tensor

from distill._checks import may_look
from distill._engine.blocks import block_by_autograd, redo
from distill._engine.rows import Rows
from distill.losses._softened import compare_rows, divergence_of_logits


def _formula(student: Tensor, teacher: Tensor, *, dim: int, temperature: float) -> Tensor:
    return divergence_of_logits(teacher, student, dim=dim, temperature=temperature)


def _block(
    student: Tensor, teacher: Tensor, factors: Tensor | None, gradient: Tensor, spare: Tensor, *, temperature: float
) -> Tensor:
    if not may_look(student):  # on a GPU: to see how far the rows are apart would wait for it
        return block_by_autograd(_formula, student, teacher, factors, gradient, spare, temperature=temperature)
    d, p = gradient, spare
    u, far = compare_rows(teacher, student, d, p, temperature=temperature)
    mean = torch.sub(u, d, out=d).mul_(p).sum(-1, keepdim=True)
    if factors is not None:  # T (q - p), where q is p (1 + u) / (1 + mean)
        torch.sub(u, mean, out=gradient).mul_(p).mul_(factors * temperature / (1 + mean))
    values = mean.clamp_min_(0.0).log1p_().mul_(temperature**2).squeeze(-1)
    return redo(far, values, _formula, student, teacher, factors, gradient, temperature=temperature)


def _kernel() -> Any:
    from distill._engine.triton import kl  # only where there is a GPU

    return kl


# Of rows that agree closely, for which the formula takes twice its operations, blocks pay sooner still.
ROWS = Rows(_formula, block=_block, kernel=_kernel, pays_from=1 / 2)
