"""The cross-entropy of the student's logits as a loss of rows, alone or in the same pass as another loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill._engine.rows import Rows


def with_cross_entropy(rows: Rows, weight: float | Tensor, compared: int | None, *, more: bool = False) -> Rows:
    """A loss of rows plus a weight times the cross-entropy of the student, from the same logits in one pass.

    Args:
        rows: The loss.
        weight: What the cross-entropy is multiplied by. A negative label has none.
        compared: How many columns the loss compares, from the first on; the cross-entropy takes all. None: all.
        more: Whether the labels are `(..., 1 + k)`: that of the cross-entropy, and then those of the loss. Otherwise
            it uses the same, if any.
    """

    def split(labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if more:
            return labels[..., :1], (labels[..., 1:],)
        return labels, (labels,) if rows.labels else ()

    def formula(student: Tensor, teacher: Tensor, labels: Tensor, *, dim: int, **options: Any) -> Tensor:
        labels, operands = split(labels)
        ours = student.narrow(dim, 0, compared or student.shape[dim])
        values = rows.formula(ours, teacher, *operands, dim=dim, **options)
        return values + weight * cross_entropy(student, labels, dim)

    def block(
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        factors: Tensor | None,
        gradient: Tensor,
        spare: Tensor,
        **options: Any,
    ) -> Tensor:
        labels, operands = split(labels)
        n = compared or student.shape[1]
        inner = rows.in_blocks()
        values = inner(student[:, :n], teacher, *operands, factors, gradient[:, :n], spare[:, :n], **options)
        if factors is not None:
            gradient[:, n:] = 0.0
        return values + weight * add_cross_entropy(student, labels, factors, gradient, spare, weight)

    return Rows(formula, block=block, softmax=rows.softmax, labels=True)


def cross_entropy(student: Tensor, labels: Tensor, dim: int) -> Tensor:
    """Minus the log-probability of each label; 0 where the label is negative."""
    none = labels < 0
    picked = F.log_softmax(student, dim).gather(dim, labels.masked_fill(none, 0))
    return -picked.masked_fill(none, 0.0).squeeze(dim)


def add_cross_entropy(
    student: Tensor,
    labels: Tensor,
    factors: Tensor | None,
    gradient: Tensor,
    spare: Tensor,
    weight: float | Tensor,
) -> Tensor:
    """Give the cross-entropy of a block, `(R,)`, and add its gradient, each row times its factor and the weight."""
    none = labels < 0
    index = labels.masked_fill(none, 0)
    q = torch.softmax(student, -1, out=spare)
    # The largest logit less the logarithm of its probability is the logarithm of the sum: no other pass is needed.
    total = student.amax(-1, keepdim=True) - q.amax(-1, keepdim=True).log()
    values = (total - student.gather(1, index)).masked_fill(none, 0.0)
    if factors is not None:
        counts = (factors * weight).masked_fill(none, 0.0)
        gradient.addcmul_(q, counts)
        gradient.scatter_add_(1, index, -counts)
    return values.squeeze(-1)


def _cross_entropy_block(
    student: Tensor,
    teacher: Tensor,  # noqa: ARG001 (every block function is called alike)
    labels: Tensor,
    factors: Tensor | None,
    gradient: Tensor,
    spare: Tensor,
) -> Tensor:
    if factors is not None:
        gradient.zero_()
    return add_cross_entropy(student, labels, factors, gradient, spare, 1.0)


def _cross_entropy_formula(student: Tensor, teacher: Tensor, labels: Tensor, *, dim: int) -> Tensor:  # noqa: ARG001
    return cross_entropy(student, labels, dim)


CROSS_ENTROPY = Rows(_cross_entropy_formula, block=_cross_entropy_block, labels=True)
