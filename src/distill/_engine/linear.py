"""Rows of logits formed from hidden states and a head, some samples at a time, for any loss of rows.

The logits of a chunk go into two buffers that every chunk reuses; the loss's block leaves the gradient where the
student's logits were, and two products take it to the hidden states and the head. So nothing is formed twice, and
nothing as large as all logits exists.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from distill._checks import may_look
from distill._engine.fused import Call, scale
from distill._reduction import hide, reduce, row_weights

# Samples whose logits are formed at a time, where the caller does not say: few enough for memory, enough for products.
_CPU, _GPU = 256, 2048
# Elements of a block on a CPU: the block's own buffers are all the memory beside the chunk's logits.
_BLOCK = 2**18
_KNOWN = 2**20  # where the teacher's rows are known: there are no logits of its, and more small operations in a block
# Chunks up to which a head in half precision may add up its gradient in that precision.
_FEW = 8


class Side(NamedTuple):
    """What forms one side's logits: `scale * (weight @ hidden + bias)`, under a soft cap where there is one."""

    hidden: Tensor  # (N, d)
    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None = None

    def logits(self) -> Tensor:
        """All logits, (N, V)."""
        logits = F.linear(self.hidden, self.weight, self.bias)
        return capped(logits if self.scale == 1 else logits * self.scale, self.softcap)

    def product(self, dtype: torch.dtype) -> Side:
        """What a chunk multiplies: the same with the scale in the hidden states and the bias, all in one dtype."""
        hidden, bias = self.hidden.detach().to(dtype), self.bias
        bias = None if bias is None else bias.detach().to(dtype)
        if self.scale != 1:
            hidden, bias = hidden * self.scale, None if bias is None else bias * self.scale
        return Side(hidden, self.weight.detach().to(dtype), bias, 1.0, self.softcap)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits under a soft cap c, which is c tanh(logits / c)."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


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

    return replace(rows, block=block, kernel=None)


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
    if traced or (mask is not None and mask.requires_grad):
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
        early = call.reduction != "none" and student.hidden.dtype != torch.half
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
        gradients, ctx.gradients = ctx.gradients, None  # given away once: the receivers may write into them
        call, labels, mask = ctx.extra[0], tensors[6], tensors[7]
        needs = ctx.needs_input_grad[:3]
        again = torch.is_grad_enabled()
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
        student = student._replace(hidden=hide(student.hidden, mask, dim=-1))
        if isinstance(teacher, Side):
            teacher = teacher._replace(hidden=hide(teacher.hidden, mask, dim=-1))
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
    gradients = _Gradients(student, needs, len(student.hidden), chunk)
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
    gradients: _Gradients,
    chunk: int | None,
) -> Tensor:
    count, device = len(student.hidden), student.hidden.device
    values = torch.empty(count, dtype=call.dtype, device=device)
    step = _step(chunk, device, count)
    if student.softcap is not None and factors is not None:
        call = replace(call, loss=under_softcap(call.loss, student.softcap))
    ours = student.product(_product_dtype(student))
    theirs = teacher.product(_product_dtype(teacher)) if isinstance(teacher, Side) else None
    elements = None if device.type != "cpu" else _KNOWN if isinstance(teacher, Tensor) else _BLOCK
    # A block leaves its gradient where the logits of the block before it were: so it needs no buffer and no copy.
    ahead = (
        0 if elements is None or ours.hidden.dtype != call.dtype else min(max(elements // len(ours.weight), 1), step)
    )
    both = torch.empty(ahead + step, len(ours.weight), dtype=ours.hidden.dtype, device=device)
    other = None if theirs is None else torch.empty(step, len(theirs.weight), dtype=theirs.hidden.dtype, device=device)
    for start in range(0, count, step):
        piece = slice(start, min(start + step, count))
        logits = _multiply(ours, piece, both[ahead:])
        if other is None or theirs is None:  # nothing to multiply: there is no teacher, or its rows are known
            constant = teacher[piece] if isinstance(teacher, Tensor) else logits
        else:
            constant = _multiply(theirs, piece, other)
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
            gradients.add(gradient, ours, piece)
    return values


def _multiply(side: Side, piece: slice, buffer: Tensor) -> Tensor:
    rows = side.hidden[piece]
    out = buffer[: len(rows)]
    if side.bias is None:
        torch.mm(rows, side.weight.T, out=out)
    else:
        torch.addmm(side.bias, rows, side.weight.T, out=out)
    return out if side.softcap is None else out.mul_(1 / side.softcap).tanh_().mul_(side.softcap)


class _Gradients:
    """Adds up the gradients of hidden states, weight and bias over the chunks."""

    def __init__(self, student: Side, needs: tuple[bool, ...], count: int, chunk: int | None) -> None:
        self.scale = student.scale
        product = _product_dtype(student)
        many = -(-count // _step(chunk, student.hidden.device, count)) > _FEW if count else False
        weight = torch.float32 if many and student.weight.dtype.itemsize < 4 else student.weight.dtype
        self.hidden = torch.empty_like(student.hidden, dtype=product) if needs[0] else None
        self.weight = torch.empty_like(student.weight, dtype=weight) if needs[1] else None
        self.empty = True  # the first chunk writes, the others add
        wide = torch.promote_types(product, torch.float32)
        self.bias = torch.zeros_like(student.bias, dtype=wide) if needs[2] and student.bias is not None else None
        self.dtypes = student.weight.dtype, None if student.bias is None else student.bias.dtype

    def add(self, gradient: Tensor, side: Side, piece: slice) -> None:
        """Add what the gradient of some logits, (R, V), gives."""
        hidden, weight = side.hidden, side.weight
        if self.hidden is not None:
            torch.mm(gradient, weight, out=self.hidden[piece])
        if self.weight is not None:
            if self.weight.dtype != gradient.dtype:
                part = gradient.T @ hidden[piece]
                self.weight.copy_(part) if self.empty else self.weight.add_(part)
            elif self.empty:
                torch.mm(gradient.T, hidden[piece], out=self.weight)
            else:
                self.weight.addmm_(gradient.T, hidden[piece])
            self.empty = False
        if self.bias is not None:
            self.bias.add_(gradient.sum(0, dtype=self.bias.dtype))

    def finished(self, whole: Tensor, kept: Tensor | None) -> list[Tensor | None]:
        """The gradients in the dtypes of what they belong to; of hidden states that were left out they are 0."""
        hidden = self.hidden
        if hidden is not None:
            hidden = (hidden if self.scale == 1 else hidden * self.scale).to(whole.dtype)
            if kept is not None:
                hidden = torch.zeros_like(whole).index_copy(0, kept, hidden)
        if self.weight is not None and self.empty:
            self.weight.zero_()
        weight = None if self.weight is None else self.weight.to(self.dtypes[0])
        bias = None if self.bias is None else self.bias.mul_(self.scale).to(self.dtypes[1])
        return [hidden, weight, bias]


def _step(chunk: int | None, device: torch.device, count: int) -> int:
    """How many samples at a time, in chunks of equal size."""
    most = chunk or (_CPU if device.type == "cpu" else _GPU)
    pieces = max(-(-count // most), 1)
    return max(-(-count // pieces), 1)


def _product_dtype(side: Side) -> torch.dtype:
    """The dtype in which hidden states and head are multiplied: autocast's where it is on."""
    device = side.hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(side.hidden.dtype, side.weight.dtype)
