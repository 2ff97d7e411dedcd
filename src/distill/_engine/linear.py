"""Rows of logits formed from hidden states and a head, some samples at a time, for any loss of rows.

The logits of a chunk go into two buffers that every chunk reuses; the loss's block leaves the gradient where the
student's logits were, and two products (`products.py`) take it to the hidden states and the head. So nothing is formed
twice, and nothing as large as all logits exists.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from distill._checks import may_look
from distill._engine.fused import Call
from distill._engine.kernels import scale
from distill._engine.products import (
    Gradients,
    Side,
    autocast_dtype,
    chunk_rows,
    logits_dtype,
    multiply,
    product_dtype,
    under_autocast,
)
from distill._reduction import hide, reduce, row_weights

# Elements of a block on a CPU: its four buffers at most are all the memory beside the logits of a chunk.
_BLOCK = 3 * 2**17
_KNOWN = 2**20  # where the teacher's rows are known: there are no logits of its, and more small operations in a block


def under_softcap(rows: Any, softcap: float) -> Any:
    """A loss of rows of capped logits, whose gradient is that for the logits before the student's soft cap.

    With z the capped logits, the derivative of c tanh(x / c) is 1 - (z / c)^2.
    """
    inner = rows.in_blocks()

    def block(student: Tensor, teacher: Tensor, *rest: Any, **options: Any) -> Tensor:
        *_, factors, gradient, spare = rest
        values: Tensor = inner(student, teacher, *rest, **options)
        if factors is not None:
            torch.mul(student, 1 / softcap, out=spare).square_().neg_().add_(1.0)
            gradient.mul_(spare)
        return values

    return replace(rows, block=block, few=None, kernel=None)


def linear_rows(
    call: Call,
    student: Side,
    teacher: Side | Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    *,
    chunk: int | None,
) -> Tensor:
    """Compute the reduced loss of the logits that two heads give.

    Args:
        call: The loss, its options and its reduction; `dim` is -1.
        student: The student's hidden states and head.
        teacher: The teacher's, detached; or its rows, where they are known; None for a loss of the student alone.
        labels: `(N, 1)`, or some for each sample, checked, for a loss that uses labels.
        mask: `(N,)`, checked, in the dtype of the loss.
        chunk: How many samples at a time; None: by the device.
    """
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    learns = (mask is not None and mask.requires_grad) or any(map(torch.is_tensor, call.options.values()))
    if traced or learns:
        return _plain(call, student, teacher, labels, mask)
    tensors = (student.hidden, student.weight, student.bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        theirs = tuple(teacher[:3]) if isinstance(teacher, Side) else (teacher, None, None)
        extra = call, student[3:], teacher[3:] if isinstance(teacher, Side) else None, chunk
        value: Tensor = _Linear.apply(*tensors, *theirs, labels, mask, extra)  # type: ignore[no-untyped-call]
        return value
    values, _ = _run(call, student, teacher, labels, mask, None, (False, False, False), chunk)
    return reduce(values, call.reduction, mask)


class _Linear(torch.autograd.Function):
    """The reduced loss; gradients are formed in the forward where the reduction says what each sample counts for."""

    @staticmethod
    @override
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.extra = arguments
        call, labels, mask = ctx.extra[0], tensors[6], tensors[7]
        student, teacher = _sides(tensors, ctx.extra)
        # In half a gradient divided by the number of samples can underflow before a gradient scaler gets to it.
        needed = zip(tensors, ctx.needs_input_grad[:3], strict=False)
        dtypes = product_dtype(student), *(tensor.dtype for tensor, needs in needed if needs)
        early = call.reduction != "none" and torch.half not in dtypes
        ctx.autocast = autocast_dtype(student.hidden)
        factors = _factors(call, student.hidden, mask) if early else None
        values, ctx.gradients = _run(
            call, student, teacher, labels, mask, factors, ctx.needs_input_grad[:3], ctx.extra[-1]
        )
        # Inference tensors cannot be saved, and count no changes that the saving would notice.
        ctx.constants = [tensor if tensor is not None and tensor.is_inference() else None for tensor in tensors]
        pairs = zip(tensors, ctx.constants, strict=True)
        ctx.save_for_backward(*(tensor if constant is None else None for tensor, constant in pairs))
        return reduce(values, call.reduction, mask)

    @staticmethod
    @override
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # raises if one was changed in place
        tensors = [kept if constant is None else constant for kept, constant in zip(saved, ctx.constants, strict=True)]
        gradients, ctx.gradients = ctx.gradients, None  # returned once: the receivers may write into them
        call, labels, mask = ctx.extra[0], tensors[6], tensors[7]
        needs = ctx.needs_input_grad[:3]
        again = torch.is_grad_enabled()
        with under_autocast(ctx.autocast, tensors[0]):
            if again or torch._C._functorch.is_legacy_batchedtensor(upstream[0]):
                with torch.enable_grad():
                    value = _plain(call, *_sides(tensors, ctx.extra), labels, mask)
                wanted = [tensor for tensor, needed in zip(tensors, needs, strict=False) if needed]
                found = iter(torch.autograd.grad(value, wanted, upstream, create_graph=again))
                return *(next(found) if needed else None for needed in needs), *(None,) * 6
            if gradients is None or all(gradient is None for gradient in gradients):
                student, teacher = _sides(tensors, ctx.extra)
                factors = _factors(call, student.hidden, mask) * upstream[0]
                gradients = _run(call, student, teacher, labels, mask, factors, needs, ctx.extra[-1])[1]
            else:
                for gradient in gradients:
                    if gradient is not None:
                        scale(gradient, upstream[0])
        return *gradients, *(None,) * 6


def _sides(tensors: list[Any], extra: tuple[Any, ...]) -> tuple[Side, Side | Tensor | None]:
    _, options, their_options, _ = extra
    theirs = tensors[3] if their_options is None else Side(*tensors[3:6], *their_options)
    return Side(*tensors[:3], *options), theirs


def _plain(
    call: Call, student: Side, teacher: Side | Tensor | None, labels: Tensor | None, mask: Tensor | None
) -> Tensor:
    """The same with formed logits and plain operations."""
    if mask is not None:
        # Not `_replace`, which PyTorch 2.5 does not trace.
        student = Side(hide(student.hidden, mask, dim=-1), *student[1:])
        if isinstance(teacher, Side):
            teacher = Side(hide(teacher.hidden, mask, dim=-1), *teacher[1:])
    ours = student.logits()
    theirs = teacher.logits() if isinstance(teacher, Side) else ours.detach() if teacher is None else teacher
    return call.plain(ours, theirs, labels, mask)


def _factors(call: Call, hidden: Tensor, mask: Tensor | None) -> Tensor:
    like = torch.empty(len(hidden), dtype=call.dtype, device=hidden.device) if mask is None else mask
    return row_weights(like, call.reduction, mask)


def _run(
    call: Call,
    student: Side,
    teacher: Side | Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    factors: Tensor | None,
    needs: tuple[bool, ...],
    chunk: int | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Per-sample values, `(N,)`, and with factors the gradients that are needed: for hidden states, weight and bias."""
    hidden = student.hidden
    values = torch.zeros(len(hidden), dtype=call.dtype, device=hidden.device)
    kept = None
    if mask is not None and (may_look(mask) or mask.is_cuda):
        counted = mask.detach() != 0
        if not bool(counted.all()):
            kept = counted.nonzero().squeeze(-1)
            student = student._replace(hidden=hidden.detach()[kept])
            if isinstance(teacher, Side):
                teacher = teacher._replace(hidden=teacher.hidden[kept])
            elif teacher is not None:
                teacher = teacher[kept]
            labels = None if labels is None else labels[kept]
            factors = None if factors is None else factors[kept]
    if factors is None:
        needs = (False, False, False)
    gradients = Gradients(student, needs, len(student.hidden), chunk)
    part = _chunks(call, student, teacher, labels, factors, gradients, chunk)
    if kept is None:
        return part, gradients.finished(hidden, None)
    return values.index_copy(0, kept, part), gradients.finished(hidden, kept)


def _chunks(
    call: Call,
    student: Side,
    teacher: Side | Tensor | None,
    labels: Tensor | None,
    factors: Tensor | None,
    gradients: Gradients,
    chunk: int | None,
) -> Tensor:
    count, device = len(student.hidden), student.hidden.device
    values = torch.empty(count, dtype=call.dtype, device=device)
    step = chunk_rows(chunk, device, count)
    if student.softcap is not None and factors is not None:
        call = replace(call, loss=under_softcap(call.loss, student.softcap))
    ours = student.product(product_dtype(student))
    theirs = teacher.product(product_dtype(teacher)) if isinstance(teacher, Side) else None
    elements = None if device.type != "cpu" else _KNOWN if isinstance(teacher, Tensor) else _BLOCK
    # A block leaves its gradient where the logits of the block before it were: so it needs no buffer and no copy.
    dtype, ahead = logits_dtype(ours), 0
    if elements is not None and dtype == call.dtype:
        ahead = min(max(elements // len(ours.weight), 1), step)
    both = torch.empty(ahead + step, len(ours.weight), dtype=dtype, device=device)
    other = None
    if theirs is not None:
        other = torch.empty(step, len(theirs.weight), dtype=logits_dtype(theirs), device=device)
    for start in range(0, count, step):
        piece = slice(start, min(start + step, count))
        logits = multiply(ours, piece, both[ahead:])
        if other is None or theirs is None:  # nothing to multiply: there is no teacher, or its rows are known
            constant = teacher[piece] if isinstance(teacher, Tensor) else logits
        else:
            constant = multiply(theirs, piece, other)
        counts = None if factors is None else factors[piece]
        gradient = None if counts is None else both[: len(logits)]
        values[piece], _ = call.run(
            logits,
            constant,
            None if labels is None else labels[piece],
            counts,
            into=gradient,
            elements=elements,
        )
        if gradient is not None:
            gradients.add(gradient, ours, piece, other)
    return values
