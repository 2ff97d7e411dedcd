"""Rows whose teacher is a `TopK`: k given classes and one for the rest, the student's logits whole.

The student's logits are merged into as many classes, and the loss's own formula does the rest. Its gradient for the k
classes is theirs; that for the class of the rest goes to the others by their share of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill._checks import check_classes, check_dim, check_numbers, check_tensor, may_look
from distill._engine.blocks import block_by_autograd, redo
from distill._merged import merge_rest
from distill._reduction import check_mask
from distill.topk import TopK

_TINY = 1e-30  # a probability whose logarithm float32 still has all digits of
_AGREE = 16  # roundings within which two log-probabilities are the same number


def ready_student(student: Tensor, topk: TopK, *, dim: int | None, mask: Tensor | None) -> Tensor:
    """Check a student and a mask beside a `TopK`, and bring the student's classes to the last dimension.

    Args:
        student: `(..., C)`, or with the C classes along `dim`.
        topk: The teacher.
        dim: The dimension of the classes; None: the last, of at most three.
        mask: Bool or weights, `(...)`.

    Raises:
        TypeError: If the student is no tensor.
        ValueError: If shapes, devices or mask do not fit.
    """
    if not check_tensor("student", student).is_floating_point():
        raise ValueError(f"student must be floating-point, got {student.dtype}")
    check_numbers("student", student)
    if student.numel() == 0:
        raise ValueError(f"student must not be empty, got shape {tuple(student.shape)}")
    check_dim(dim)
    if dim is not None and not -student.ndim <= dim < student.ndim:
        raise ValueError(f"dim must be a dimension of the inputs, got {dim} for shape {tuple(student.shape)}")
    student = student.movedim(check_classes(student, dim=dim), -1)
    check_fits(topk, student.shape, student.device)
    if mask is not None:
        check_mask(mask, topk.shape, topk.device)
    return student


def check_fits(topk: TopK, shape: torch.Size, device: torch.device) -> None:
    """Raise ValueError if a `TopK` does not have the samples of a student."""
    if topk.shape != shape[:-1]:
        raise ValueError(
            "the TopK must have a row for each of the student's (nothing is broadcast), "
            f"{tuple(shape[:-1])}, got {tuple(topk.shape)}"
        )
    if topk.device != device:
        raise ValueError(f"student and TopK must be on the same device, got {device} and {topk.device}")


def check_rows(topk: TopK, classes: int, mask: Tensor | None, temperature: float) -> None:
    """Raise ValueError if a `TopK` has another temperature than a loss, or rows that a student's classes do not have.

    What the mask hides may be anything.
    """
    if temperature != topk.temperature:
        raise ValueError(
            f"the temperature of a TopK must be the loss's, {temperature}, got {topk.temperature}: the rest "
            "is known at one temperature only"
        )
    if topk.indices.shape[-1] - topk.samples > classes:
        raise ValueError(f"a TopK must have at most as many classes as the student, {classes}, got k={topk.k}")
    if may_look(topk.indices):
        (topk if mask is None else topk[mask.detach() != 0]).check(classes)


def refusal(who: str) -> str:
    """What a loss says that takes no `TopK`."""
    return (
        f"{who} takes no TopK, it needs the teacher's logits of all classes; divergences of two distributions take "
        "one, such as KLLoss, ReverseKLLoss and JSLoss"
    )


def merged(plain: Callable[..., Tensor]) -> dict[str, Any]:
    """A divergence as one of a student's logits `(..., C)` and a teacher of `(..., k + 1)` log-probabilities.

    The classes `(..., k)` come as labels do. `plain` is the divergence's formula; formula, block and kernel are for
    `Rows`.
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
        return plain(log_q * temperature, log_p * temperature, dim=dim, **options)

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

    return {"formula": formula, "block": block, "kernel": kernel}
