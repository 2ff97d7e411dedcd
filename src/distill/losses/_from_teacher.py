"""The divergence of softened rows from the teacher's: what `kl` compares over classes, and `cwd` over positions."""

from typing import Any

import torch
from torch import Tensor

from distill._checks import may_look
from distill._engine.blocks import block_by_autograd, redo
from distill._engine.rows import Rows
from distill.losses._softened import are_close, compare_rows, divergence_of_logits, harden, soften


def _formula(student: Tensor, teacher: Tensor, *, dim: int, temperature: float) -> Tensor:
    return divergence_of_logits(teacher, student, dim=dim, temperature=temperature)


def _block(
    student: Tensor, teacher: Tensor, factors: Tensor | None, gradient: Tensor, spare: Tensor, *, temperature: float
) -> Tensor:
    if not may_look(student):  # on a GPU: to see how far the rows are apart would wait for it
        return block_by_autograd(_formula, student, teacher, factors, gradient, spare, temperature=temperature)
    d, p = gradient, spare
    v, mean, far = compare_rows(teacher, student, d, p, temperature=temperature)
    if factors is not None:  # T (q - p), where q is p exp(d) / (1 + mean), and v is p (exp(d) - 1 - d)
        torch.addcmul(v, p, d.sub_(mean), out=gradient).mul_(factors * temperature / (1 + mean))
    values = mean.clamp_min_(0.0).log1p_().mul_(temperature**2).squeeze(-1)
    return redo(far, values, _formula, student, teacher, factors, gradient, temperature=temperature)


def _few(student: Tensor, teacher: Tensor, factors: Any, *, temperature: float) -> tuple[Tensor, Tensor | None] | None:
    """Do what `_block` does in fewer operations, though with more exponentials; None for rows that are too close."""
    log_q = torch.log_softmax(soften(student, temperature), -1)
    log_p = torch.log_softmax(soften(teacher, temperature), -1)
    p = torch.exp(log_p)
    values = log_p.sub_(log_q).mul_(p).sum(-1)
    if are_close(values, student.shape[-1]):
        return None
    gradient = None if factors is None else log_q.exp_().sub_(p).mul_(factors * temperature)  # T (q - p)
    return harden(values, temperature), gradient


def _kernel() -> Any:
    from distill._engine.triton import kl  # only where there is a GPU

    return kl


ROWS = Rows(_formula, block=_block, few=_few, kernel=_kernel)
