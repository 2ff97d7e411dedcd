"""Runs a loss of rows without a temporary of the inputs' size: values and gradient in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from typing_extensions import override

from distill._checks import ordinary
from distill._engine.kernels import run_kernel, scale
from distill._engine.slabs import can_cut, run_slabs
from distill._reduction import Reduction, hide, reduce, row_weights


class Formula(Protocol):
    """What is run here: `Rows` in `rows.py`."""

    @property
    def formula(self) -> Callable[..., Tensor]: ...

    @property
    def few(self) -> Callable[..., tuple[Tensor, Tensor | None] | None] | None: ...

    @property
    def kernel(self) -> Callable[[], Any] | None: ...

    @property
    def longer(self) -> int: ...

    @property
    def transposed(self) -> bool: ...

    def own_block(self) -> Callable[..., Tensor]: ...

    def in_blocks(self) -> Callable[..., Tensor]: ...


SMALL = 2**20  # elements below which a few plain operations cost less than what has no closed form of its gradient
FEW = 2**15  # elements up to which the number of operations counts more than what they compute
SHORT = 64  # columns below which summing row by row costs more than a single operation for the mean saves
LARGEST_ROW = 2**21  # elements of a row above which the buffers of a block would no longer be small
_ORDINARY = Tensor, nn.Parameter


def can_fuse(
    student: Tensor, teacher: Tensor, dim: int, options: dict[str, Any], *, least: float, apart: float, shortest: int
) -> bool:
    """Whether these are ordinary tensors, large enough, and neither traced nor transformed (`torch.func`).

    It is not to be asked of what `torch.compile` traces, whose sizes may be symbols.

    Args:
        student: The student's rows, checked.
        teacher: The teacher's rows, detached.
        dim: The dimension of a row.
        options: What the formula takes.
        least: From how many times `SMALL` elements on the fused form pays on a CPU, and elsewhere from at least 1.
        apart: The same where the numbers of a row are not side by side.
        shortest: From how many columns on it pays.
    """
    least = least if _side_by_side(student, teacher, dim) else apart
    return (
        student.numel() >= SMALL * (least if student.is_cpu else max(least, 1.0))
        and shortest <= student.shape[dim] <= LARGEST_ROW
        and (student.is_cpu or student.is_cuda)
        and type(student) in _ORDINARY
        and type(teacher) in _ORDINARY
        and not any(map(torch.is_tensor, options.values()))  # it may want a gradient
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad.unpack_dual(student).tangent is None  # type: ignore[no-untyped-call]
    )


def run(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    call: Call,
) -> Tensor:
    """Compute the loss of inputs that `can_fuse`.

    Args:
        student: The student's rows, checked.
        teacher: The teacher's rows, detached.
        labels: For a loss that uses labels, one or some per row, checked, along the dimension of a row.
        mask: As in `reduce`, checked, in the dtype of the loss; one that needs no gradient.
        call: The loss, and everything else.
    """
    if torch.is_grad_enabled() and student.requires_grad:
        value: Tensor = _Fused.apply(student, teacher, labels, mask, call)  # type: ignore[no-untyped-call]
        return value
    return reduce(call.run(student, teacher, labels, mask=mask)[0], call.reduction, mask)


@dataclass(slots=True)
class Call:
    """One call of a loss, but for its tensors."""

    loss: Formula
    options: dict[str, Any]
    dim: int
    dtype: torch.dtype
    reduction: Reduction

    def plain(self, student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
        """Give the loss with plain operations."""
        if mask is not None:
            student, teacher = hide(student, mask, dim=self.dim), hide(teacher, mask, dim=self.dim)
        pair = student.to(self.dtype), ordinary(teacher).to(self.dtype)
        operands = () if labels is None else (labels,)
        values = self.loss.formula(*pair, *operands, dim=self.dim, **self.options)
        return reduce(values, self.reduction, mask)

    def weights(self, student: Tensor, mask: Tensor | None) -> Tensor | float:
        """Give what each row counts for in the reduced value: one number where that is the same for all."""
        if mask is not None:
            return row_weights(mask, self.reduction, mask)
        return student.shape[self.dim] / student.numel() if self.reduction == "mean" else 1.0

    def run(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        factors: Tensor | float | None = None,
        *,
        mask: Tensor | None = None,
        into: Tensor | None = None,
        elements: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Give the per-sample values and, if there are factors, the gradient for the student in its dtype.

        A row whose factor is 0 gets a gradient of 0, whatever it holds; one number is the factor of all. The gradient
        goes `into` a tensor if one is given: the student's own, or one whose memory overlaps the student's by what
        earlier blocks have read. A block has at most so many `elements`; None: by the device. The mask says which rows
        count, where there are no factors yet.
        """
        if into is None and self._are_few(student, teacher):
            return self._run_few(student, teacher, labels, factors)
        if into is None and self._in_slabs(student, teacher):
            elements = _block_elements(student.device)
            where = {"mask": mask, "dim": self.dim, "dtype": self.dtype, "elements": elements, **self.options}
            return run_slabs(self.loss.formula, student, teacher, labels, factors, **where)
        student, teacher = student.detach().movedim(self.dim, -1), teacher.movedim(self.dim, -1)
        labels = None if labels is None else labels.movedim(self.dim, -1)
        if isinstance(factors, float):
            factors = torch.full(student.shape[:-1], factors, dtype=self.dtype, device=student.device)
        values = torch.empty(student.shape[:-1], dtype=self.dtype, device=student.device)
        gradient = None if factors is None else torch.empty_like(student) if into is None else into
        more = () if labels is None else (labels,)
        if not run_kernel(self.loss.kernel, student, teacher, *more, values, factors, gradient, **self.options):
            self._run_blocks(student, teacher, labels, values, factors, gradient, elements)
        return values, None if gradient is None else gradient.movedim(-1, self.dim)

    def _are_few(self, student: Tensor, teacher: Tensor) -> bool:
        """Whether these are a few rows on a CPU, with nothing to cut, to widen or to move."""
        return (
            student.numel() <= FEW
            and student.ndim == 2
            and self.dim in (-1, 1)
            and student.dtype is teacher.dtype is self.dtype
            and student.is_cpu
        )

    def _run_few(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None, factors: Tensor | float | None
    ) -> tuple[Tensor, Tensor | None]:
        """Do what `_run_blocks` does for a few rows, where each operation shows."""
        operands = () if labels is None else (labels,)
        counts = factors.unsqueeze(1) if isinstance(factors, Tensor) else factors
        found = None if self.loss.few is None else self.loss.few(student, teacher, *operands, counts, **self.options)
        if found is not None:
            values, gradient = found
        else:
            gradient, spare = torch.empty_like(student), torch.empty_like(student)
            block = self.loss.own_block()
            values = block(student, teacher, *operands, counts, gradient, spare, **self.options)
        if isinstance(counts, Tensor) and gradient is not None:
            _clear_hidden(gradient, counts)
        return values, None if counts is None else gradient

    def _in_slabs(self, student: Tensor, teacher: Tensor) -> bool:
        """Whether to leave the rows as they lie: to copy the numbers of each costs more than a block function saves.

        Not along the last dimension, which a formula may count on: that for a `TopK` gathers there.
        """
        if _side_by_side(student, teacher, self.dim) or (self.loss.transposed and student.is_cpu):
            return False
        last = self.dim % student.ndim == student.ndim - 1
        return not last and can_cut(student, self.dim) and can_cut(teacher, self.dim)

    def _run_blocks(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        values: Tensor,
        factors: Tensor | None,
        gradient: Tensor | None,
        elements: int | None,
    ) -> None:
        columns = student.shape[-1]
        if all(x is None or x.is_contiguous() for x in (student, teacher, gradient)):
            labels = None if labels is None else labels.reshape(-1, labels.shape[-1])
            student, teacher = student.view(-1, columns), teacher.view(-1, teacher.shape[-1])
            values = values.view(-1)
            factors = None if factors is None else factors.reshape(-1)
            gradient = None if gradient is None else gradient.view(-1, columns)
        in_place = (
            gradient is not None
            and gradient.dtype == self.dtype
            and gradient.is_contiguous()
            and gradient.data_ptr() != student.data_ptr()  # a block still reads what it would overwrite
        )
        # What is not there as it is needed is copied into a buffer; the last two are the block's own.
        copied = [x.dtype != self.dtype or not x.is_contiguous() for x in (student, teacher)]
        if elements is None:  # what the caller says is a limit: memory beyond it may hold what is still to be read
            elements = _block_elements(student.device) * (self.loss.longer if in_place and not any(copied) else 1)
        limit = min(max(elements, columns), student.numel())
        size = limit // columns
        buffers = [
            torch.empty((size if needed else 0, width), dtype=self.dtype, device=student.device)
            for needed, width in zip(
                (*copied, not in_place, True), (columns, teacher.shape[-1], columns, columns), strict=True
            )
        ]
        block = self.loss.in_blocks()
        for index in _cut(student.shape, limit):
            ours, theirs = _rows(student[index], buffers[0]), _rows(teacher[index], buffers[1])
            grad, spare = buffers[2][: len(ours)], buffers[3][: len(ours)]
            operands = () if labels is None else (labels[index].reshape(-1, labels.shape[-1]),)
            if gradient is None or factors is None:
                part = block(ours, theirs, *operands, None, grad, spare, **self.options)
            else:
                out = gradient[index]
                grad = out.view(-1, columns) if in_place else grad
                counts = factors[index].reshape(-1, 1)
                part = block(ours, theirs, *operands, counts, grad, spare, **self.options)
                _clear_hidden(grad, counts)
                if not in_place:
                    out.copy_(grad.view(out.shape))
            values[index] = part.view(values[index].shape)


class _Fused(torch.autograd.Function):
    """The reduced loss of large inputs.

    The gradient is formed together with the values, while the rows are at hand, and kept. Backward returns it, times
    the gradient of the value, and does not keep it: if backward runs once more, it is formed anew from the inputs.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None, call: Call
    ) -> Tensor:
        # In half a gradient divided by the number of samples can underflow before a gradient scaler gets to it.
        early = student.dtype != torch.half
        counts = call.weights(student, mask) if early else None
        values, ctx.gradient = call.run(student, teacher, labels, counts, mask=mask)
        ctx.call = call
        # An inference tensor cannot be saved, and counts no changes that the saving would notice.
        ctx.teacher = teacher if teacher.is_inference() else None
        ctx.save_for_backward(student, None if ctx.teacher is teacher else teacher, labels, mask)
        return reduce(values, call.reduction, mask)

    @staticmethod
    @override
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        student, teacher, labels, mask = ctx.saved_tensors  # raises if one was changed in place
        teacher = ctx.teacher if teacher is None else teacher
        call: Call = ctx.call
        gradient, ctx.gradient = ctx.gradient, None  # returned once: the receiver may write into it
        again = torch.is_grad_enabled()  # the gradient is to be differentiated again
        if again or torch._C._functorch.is_legacy_batchedtensor(upstream[0]):  # several at a time: is_grads_batched
            with torch.enable_grad():
                value = call.plain(student, teacher, labels, mask)
            (gradient,) = torch.autograd.grad(value, student, upstream, create_graph=again)
            return gradient, None, None, None, None
        early = student.dtype != torch.half
        if gradient is None:  # with the same bits as the one that was formed early
            counts = call.weights(student, mask)
            if not early:
                counts = (counts * upstream[0]).expand(student.movedim(call.dim, -1).shape[:-1])
            gradient = call.run(student, teacher, labels, counts, mask=mask)[1]
        if early and call.reduction == "none":
            rows, counts = gradient.movedim(call.dim, -1), upstream[0].unsqueeze(-1)
            _clear_hidden(rows.mul_(counts), counts)
        elif early:
            scale(gradient, upstream[0])
        return gradient, None, None, None, None


def _side_by_side(student: Tensor, teacher: Tensor, dim: int) -> bool:
    return student.stride(dim) == teacher.stride(dim) == 1


def _clear_hidden(gradient: Tensor, factors: Tensor) -> None:
    """Set the gradient of rows that do not count to 0: what they hold may be NaN, and 0 times that is NaN."""
    hidden = factors == 0
    if gradient.is_cuda:  # to look would wait for the device
        gradient.masked_fill_(hidden, 0.0)  # pragma: no cover
    elif hidden.any():
        gradient[hidden.squeeze(-1)] = 0.0


def _block_elements(device: torch.device) -> int:
    """Give how many elements of a block stay in cache, yet keep every thread busy for longer than it takes to start."""
    if device.type != "cpu":
        return 2**22
    return min(2**19 * torch.get_num_threads(), 2**21)


def _cut(shape: torch.Size, limit: int) -> Iterator[tuple[int | slice, ...]]:
    """Give the indices that cut the dimensions before the last into pieces of at most `limit` elements."""
    if len(shape) == 1:
        yield ()
        return
    inner = math.prod(shape[1:])
    if inner > limit:
        for i in range(shape[0]):
            yield from ((i, *rest) for rest in _cut(shape[1:], limit))
        return
    pieces = math.ceil(shape[0] / (limit // inner))
    step = math.ceil(shape[0] / pieces)
    yield from ((slice(start, start + step),) for start in range(0, shape[0], step))


def _rows(x: Tensor, buffer: Tensor) -> Tensor:
    """Give `x` as contiguous rows of the buffer's dtype: itself if it is that already, else in the buffer."""
    if x.dtype == buffer.dtype and x.is_contiguous():
        return x.view(-1, x.shape[-1])
    rows = buffer[: x.numel() // x.shape[-1]]
    rows.view(x.shape).copy_(x)
    return rows
