"""What the block functions of several losses share: how they are written, and who does what they cannot do."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill._checks import may_look
from distill._engine.fused import block_by_autograd


def ordinary_rows(formula: Callable[..., Tensor], block: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give a block function for `Rows` that leaves to the formula the rows of which `block` makes no finite value.

    So `block` need not know of probabilities of 0, nor of what its exponentials overflow on: it only has to let them
    show. To look for such rows would make a GPU wait, so that there the formula does all of them.

    Args:
        formula: As in `Rows`.
        block: As in `Rows`.
    """

    def run(student: Tensor, teacher: Tensor, *rest: Any, **options: Any) -> Tensor:
        if not may_look(student):
            return block_by_autograd(formula, student, teacher, *rest, **options)
        values = block(student, teacher, *rest, **options)
        left = (~values.isfinite()).nonzero().squeeze(-1)
        if len(left):
            *labels, factors, gradient, spare = rest
            part = student.new_empty(len(left), student.shape[-1])
            some = [x[left] for x in (student, teacher, *labels)]
            counts = None if factors is None else factors[left]
            values[left] = block_by_autograd(formula, *some, counts, part, spare, **options)
            if counts is not None:
                gradient[left] = part
        return values

    return run


def set_apart_rows(logits: Tensor, labels: Tensor, temperature: float, out: Tensor) -> tuple[Tensor, Tensor]:
    """Do the first half of `set_apart`, in a buffer.

    Args:
        logits: `(R, C)`.
        labels: `(R, 1)`.
        temperature: What the logits are divided by.
        out: `(R, C)`; here comes each logit over the temperature, from the largest other class; -inf at the target.

    Returns:
        The target's logit over the temperature from there, and the same at temperature 1, `(R, 1)` each.
    """
    out.copy_(logits).scatter_(-1, labels, -math.inf)
    largest = out.amax(-1, keepdim=True)
    out.sub_(largest)
    target = logits.gather(-1, labels) - largest
    if temperature == 1:
        return target, target
    out.mul_(1 / temperature)
    return target / temperature, target


def compare_rows(
    student: Tensor, teacher: Tensor, spare: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compare two softmaxes in place, with `divergence`'s accuracy: log(1 + sum_c p_c (exp(v_c) - 1 - v_c)).

    v are the differences of the logits, student less teacher, each from their mean under p.

    Args:
        student: `(R, C)`, logits over the temperature; exp(v) p comes in their place, up to the same factor as p's.
        teacher: The same, none above 0; p comes in their place, up to a factor.
        spare: `(R, C)`.
        labels: `(R, 1)`, a class that counts on neither side, -inf in both.

    Returns:
        KL(p || q), the sums of what is in place of student and teacher, and the logarithm of what the student's sum
        was divided by, `(R, 1)` each.
    """
    v = torch.sub(student, teacher, out=spare)
    if labels is not None:
        v.scatter_(-1, labels, 0.0)
    e_p = teacher.exp_()
    sum_p = e_p.sum(-1, keepdim=True)
    mean = torch.mul(v, e_p, out=student).sum(-1, keepdim=True) / sum_p
    v.sub_(mean)
    w = torch.expm1(v, out=student)
    value = torch.sub(w, v, out=v).mul_(e_p).sum(-1, keepdim=True).div_(sum_p).log1p_()
    e_q = w.mul_(e_p).add_(e_p)
    return value, e_q.sum(-1, keepdim=True), sum_p, mean
