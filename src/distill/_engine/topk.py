"""Rows whose teacher is a `TopK`: k given classes and one for the rest, the student's logits whole.

The student's logits are merged into as many classes, and the loss's own formula does the rest. Its gradient for the k
classes is theirs; that for the class of the rest goes to the others by their share of it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from distill._checks import check_classes, check_tensor, may_look, ordinary
from distill._engine.blocks import block_by_autograd, redo
from distill._merged import merge_rest
from distill._reduction import check_mask
from distill.topk import TopK

if TYPE_CHECKING:
    from distill._engine.rows import Rows

_TINY = 1e-30  # a probability whose logarithm float32 still has all digits of
_AGREE = 16  # roundings within which two log-probabilities are the same number


class Given(NamedTuple):
    """What a loss of rows computes with, in place of itself and a `TopK`."""

    loss: Rows
    student: Tensor  # the classes last
    teacher: Tensor  # (..., k + 1)
    indices: Tensor  # (..., k)
    options: dict[str, Any]
    dtype: torch.dtype


def from_topk(
    loss: Rows, student: Tensor, topk: TopK, *, dim: int | None, mask: Tensor | None, options: dict[str, Any]
) -> Given:
    """Check a student and a `TopK`, and make of a loss of rows one that takes them.

    Args:
        loss: The loss.
        student: `(..., C)`, or with the C classes along `dim`.
        topk: The teacher.
        dim: The dimension of the classes; None: the last, of at most three.
        mask: Bool or weights, `(...)`: what it hides may be anything.
        options: The options of the loss.

    Raises:
        TypeError: If the student is no tensor, or the loss takes no `TopK`.
        ValueError: If shapes, devices, classes, temperature or mask do not fit.
    """
    if not check_tensor("student", student).is_floating_point():
        raise ValueError(f"student must be floating-point, got {student.dtype}")
    if student.numel() == 0:
        raise ValueError(f"student must not be empty, got shape {tuple(student.shape)}")
    if dim is not None and not -student.ndim <= dim < student.ndim:
        raise ValueError(f"dim must be a dimension of the inputs, got {dim} for shape {tuple(student.shape)}")
    student = student.movedim(check_classes(student, dim=dim), -1)
    check_fits(topk, student.shape, student.device)
    if mask is not None:
        check_mask(mask, topk.shape, topk.device)
        mask = ordinary(mask)
    loss, options = loss_of(loss, topk, student.shape[-1], mask, options)
    dtype = torch.promote_types(torch.promote_types(student.dtype, topk.dtype), torch.float32)
    return Given(loss, student, *topk.rows(dtype, mask), options, dtype)


def check_fits(topk: TopK, shape: torch.Size, device: torch.device) -> None:
    """Raise ValueError if a `TopK` does not have the samples of a student."""
    if topk.shape != shape[:-1]:
        raise ValueError(
            "the TopK must have a row for each of the student's (nothing is broadcast), "
            f"{tuple(shape[:-1])}, got {tuple(topk.shape)}"
        )
    if topk.device != device:
        raise ValueError(f"student and TopK must be on the same device, got {device} and {topk.device}")


def loss_of(
    loss: Rows, topk: TopK, classes: int, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Rows, dict[str, Any]]:
    """The loss that takes the rows of a `TopK`, and its options; raise an error if it takes none, or not these."""
    if not loss.topk:
        raise TypeError(refusal("the loss"))
    if topk.samples and loss.sampled is None:
        raise ValueError(
            f"only kl takes a TopK with classes drawn from the rest, since others are biased by it, got {topk}"
        )
    if options["temperature"] != topk.temperature:
        raise ValueError(
            f"the temperature of a TopK must be the loss's, {options['temperature']}, got {topk.temperature}: the rest "
            "is known at one temperature only"
        )
    if topk.indices.shape[-1] - topk.samples > classes:
        raise ValueError(f"a TopK must have at most as many classes as the student, {classes}, got k={topk.k}")
    if may_look(topk.indices):
        (topk if mask is None else topk[mask.detach() != 0]).check(classes)
    if topk.samples and loss.sampled is not None:
        return loss.sampled, {**options, "samples": topk.samples}
    return merged(loss), options


def refusal(who: str) -> str:
    """What a loss says that takes no `TopK`."""
    return (
        f"{who} takes no TopK, it needs the teacher's logits of all classes; divergences of two distributions take "
        "one, such as KLLoss, ReverseKLLoss and JSLoss"
    )


def merged(loss: Rows) -> Rows:
    """A divergence as one of a student's logits `(..., C)` and a teacher of `(..., k + 1)` log-probabilities.

    The classes `(..., k)` come as labels do.
    """

    def formula(student: Tensor, teacher: Tensor, indices: Tensor, *, dim: int, **options: Any) -> Tensor:
        ours = merge_rest(student, indices, options["temperature"])
        return of_merged(ours, teacher, dim=dim, **options)

    def of_merged(ours: Tensor, teacher: Tensor, *, dim: int, **options: Any) -> Tensor:
        temperature = options["temperature"]
        if ours.shape[dim] < teacher.shape[dim]:  # all classes are given: there is no rest
            teacher = teacher[..., :-1]
        log_q = torch.log_softmax(ours / temperature, dim)
        log_p = torch.log_softmax(teacher, dim)
        # Both were rounded on their way. What agrees but for that has to agree, or a sign would be made of it (`tvd`).
        rounding = _AGREE * torch.finfo(log_q.dtype).eps
        equal = (log_p - log_q).detach().abs() < rounding * (1 + log_q.detach().abs())
        log_p = torch.where(equal, log_q.detach(), log_p)
        return loss.formula(log_q * temperature, log_p * temperature, dim=dim, **options)

    def block(
        student: Tensor,
        teacher: Tensor,
        indices: Tensor,
        factors: Tensor | None,
        gradient: Tensor,
        spare: Tensor,
        **options: Any,
    ) -> Tensor:
        if not may_look(student) or indices.shape[1] == student.shape[1]:
            return block_by_autograd(formula, student, teacher, indices, factors, gradient, spare, **options)
        temperature = options["temperature"]
        scaled = student if temperature == 1 else torch.mul(student, 1 / temperature, out=gradient)
        q = torch.softmax(scaled, -1, out=gradient)
        given, of_given = student.gather(1, indices), q.gather(1, indices)
        others = q.scatter_(1, indices, 0.0)
        share = others.sum(-1, keepdim=True)
        largest = of_given.amax(-1, keepdim=True)
        # log sum exp of the others: the logarithm of all is found from a class that has a probability.
        rest = given.amax(-1, keepdim=True) + (share / largest).log() * temperature
        ours = torch.cat([given, rest], 1)
        slope = torch.empty_like(ours)
        values = block_by_autograd(of_merged, ours, teacher, factors, slope, None, **options)
        if factors is not None:
            others.mul_(slope[:, -1:] / share).scatter_(1, indices, slope[:, :-1])
        left = torch.logical_not((share > _TINY) & (largest > _TINY)).squeeze(-1).nonzero().squeeze(-1)
        return redo(left, values, formula, student, teacher, indices, factors, gradient, **options)

    def kernel() -> Any:
        from distill._engine.triton_topk import run  # only where there is a GPU

        return functools.partial(run, of_merged)

    return dataclasses.replace(loss, formula=formula, block=block, kernel=kernel, mean=None, labels=True)
