"""Runs a loss of rows on large inputs without a temporary of their size: values and gradient in one pass."""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from typing_extensions import override

from distill._checks import ordinary
from distill._reduction import Reduction, hide, reduce, row_weights


class Formula(Protocol):
    """What is run here: `Rows` in `rows.py`."""

    @property
    def formula(self) -> Callable[..., Tensor]: ...

    @property
    def kernel(self) -> Callable[[], Any] | None: ...

    @property
    def pays_from(self) -> float: ...

    @property
    def longer(self) -> int: ...

    def in_blocks(self) -> Callable[..., Tensor]: ...


SMALL = 2**20  # elements below which a few plain operations cost less than the fused form
SHORT = 64  # columns below which summing row by row costs more than a single operation for the mean saves
LARGEST_ROW = 2**21  # elements of a row above which the buffers of a block would no longer be small


def can_fuse(loss: Formula, student: Tensor, teacher: Tensor, dim: int, options: dict[str, Any], *, mean: bool) -> bool:
    """Whether these are ordinary tensors, large enough, with rows in one piece, and nobody traces or transforms.

    Args:
        loss: The loss.
        student: The student's rows, checked.
        teacher: The teacher's rows, detached.
        dim: The dimension of a row.
        options: What the formula takes.
        mean: Whether PyTorch has a single operation for what is asked.
    """
    return (
        not torch.compiler.is_compiling()
        and student.numel() >= SMALL * loss.pays_from
        and (SHORT if mean else 1) <= student.shape[dim] <= LARGEST_ROW
        # Collecting the numbers of a row from all over the memory costs more than blocks save.
        and student.stride(dim) == teacher.stride(dim) == 1
        and student.device.type in ("cpu", "cuda")
        and type(student) in (Tensor, nn.Parameter)
        and type(teacher) in (Tensor, nn.Parameter)
        and not any(isinstance(option, Tensor) for option in options.values())  # it may want a gradient
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad.unpack_dual(student).tangent is None  # type: ignore[no-untyped-call]
    )


def run(
    loss: Formula,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    dim: int,
    dtype: torch.dtype,
    reduction: Reduction,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Compute the loss of inputs that `can_fuse`.

    Args:
        loss: The loss.
        student: The student's rows, checked.
        teacher: The teacher's rows, detached.
        labels: For a loss that uses labels, one or some per row, checked, along `dim`.
        dim: The dimension of a row.
        dtype: The dtype to compute in.
        reduction: As in `reduce`.
        mask: As in `reduce`, checked; one that needs no gradient.
        options: What the formula takes.
    """
    call = Call(loss, options, dim, dtype, reduction)
    if torch.is_grad_enabled() and student.requires_grad:
        value: Tensor = _Fused.apply(student, teacher, labels, mask, call)  # type: ignore[no-untyped-call]
        return value
    return reduce(call.run(student, teacher, labels)[0], reduction, mask)


@dataclass(frozen=True)
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

    def weights(self, student: Tensor, mask: Tensor | None) -> Tensor:
        """Give what each row counts for in the reduced value."""
        shape = student.movedim(self.dim, -1).shape[:-1]
        if mask is None:
            count = 1 / math.prod(shape) if self.reduction == "mean" else 1.0
            return torch.full(shape, count, dtype=self.dtype, device=student.device)
        return row_weights(mask, self.reduction, mask)

    def run(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        factors: Tensor | None = None,
        *,
        into: Tensor | None = None,
        elements: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Give the per-sample values and, if there are factors, the gradient for the student in its dtype.

        A row whose factor is 0 gets a gradient of 0, whatever it holds. The gradient goes `into` a tensor if one is
        given: the student's own, or one whose memory overlaps the student's by what earlier blocks have read. A block
        has at most so many `elements`; None: by the device.
        """
        student, teacher = student.detach().movedim(self.dim, -1), teacher.movedim(self.dim, -1)
        labels = None if labels is None else labels.movedim(self.dim, -1)
        values = torch.empty(student.shape[:-1], dtype=self.dtype, device=student.device)
        gradient = None if factors is None else torch.empty_like(student) if into is None else into
        more = () if labels is None else (labels,)
        if not run_kernel(self.loss.kernel, student, teacher, *more, values, factors, gradient, **self.options):
            self._run_blocks(student, teacher, labels, values, factors, gradient, elements)
        return values, None if gradient is None else gradient.movedim(-1, self.dim)

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


def kernel_first(kernel: Callable[[], Any], block: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give a block function that takes the kernel where that can do the rows, for losses that are part of another."""

    def run(student: Tensor, teacher: Tensor, *rest: Any, **options: Any) -> Tensor:
        *labels, factors, gradient, _ = rest
        values = student.new_empty(len(student))
        counts, out = (None, None) if factors is None else (factors.view(-1), gradient)
        if run_kernel(kernel, student, teacher, *labels, values, counts, out, **options):
            return values
        return block(student, teacher, *rest, **options)

    return run


def run_kernel(kernel: Callable[[], Any] | None, student: Tensor, *rest: Any, **options: Any) -> bool:
    """Let a kernel, if there is one, fill in values and gradient, and say whether it did; `rest` as in `triton.run`."""
    _, *labels, values, _, _ = rest
    if kernel is None or (kernels := _kernels(student, values.dtype)) is None:
        return False
    return bool((kernel() if labels else functools.partial(kernels.run, kernel()))(student, *rest, **options))


class _Fused(torch.autograd.Function):
    """The reduced loss of large inputs.

    The gradient is formed together with the values, while the rows are at hand, and kept; backward gives it away, times
    the factors from above. If backward runs once more, it is formed anew from the inputs.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None, call: Call
    ) -> Tensor:
        # In half a gradient divided by the number of samples can underflow before a gradient scaler gets to it.
        early = student.dtype != torch.half
        values, ctx.gradient = call.run(student, teacher, labels, call.weights(student, mask) if early else None)
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
        gradient, ctx.gradient = ctx.gradient, None  # given away once: the receiver may write into it
        again = torch.is_grad_enabled()  # the gradient is to be differentiated again
        if again or torch._C._functorch.is_legacy_batchedtensor(upstream[0]):  # several at a time: is_grads_batched
            with torch.enable_grad():
                value = ctx.call.plain(student, teacher, labels, mask)
            (gradient,) = torch.autograd.grad(value, student, upstream, create_graph=again)
            return gradient, None, None, None, None
        early = student.dtype != torch.half
        if gradient is None:  # with the same bits as the one that was formed early
            counts = ctx.call.weights(student, mask)
            gradient = ctx.call.run(student, teacher, labels, counts if early else counts * upstream[0])[1]
        if early and ctx.call.reduction == "none":
            rows, counts = gradient.movedim(ctx.call.dim, -1), upstream[0].unsqueeze(-1)
            _clear_hidden(rows.mul_(counts), counts)
        elif early:
            scale(gradient, upstream[0])
        return gradient, None, None, None, None


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
    return min(max(2**19 * torch.get_num_threads(), 2**19), 2**21)


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


def scale(gradient: Tensor, factor: Tensor) -> None:
    """Multiply in place, but not by one: that would read and write the whole gradient for nothing."""
    kernels = _kernels(gradient, factor.dtype)
    if kernels is not None and gradient.is_contiguous():
        kernels.scale(gradient, factor)
    elif gradient.is_cuda or factor != 1:  # on a GPU the comparison would wait for the device
        gradient.mul_(factor)


def _kernels(x: Tensor, dtype: torch.dtype) -> ModuleType | None:
    """Give the module of Triton kernels, where they can compute on this tensor in this dtype."""
    return _import_triton(x.device) if x.is_cuda and dtype == torch.float32 else None


@functools.cache
def _import_triton(device: torch.device) -> ModuleType | None:
    """Give the module of Triton kernels if they run on a device; only there is Triton imported at all."""
    try:
        kernels = importlib.import_module("distill._engine.triton")
    except ImportError:
        return None
    try:
        kernels.scale(torch.zeros(16, device=device), torch.ones((), device=device))
    except Exception as error:  # whatever Triton raises for a GPU too old or a missing C compiler
        warnings.warn(
            f"Triton does not run on {device}, so that large losses take plain operations in blocks of rows: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return kernels
