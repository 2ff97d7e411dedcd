"""Row-wise losses as Triton kernels: one program per row, float32 inside. Imported only where a CUDA tensor comes."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Every kernel of a loss takes the same arguments, so that `run` can launch any of them:
#   student, teacher  rows of `columns` numbers next to each other; row r lies at
#                     (r // inner) * stride_0 + (r % inner) * stride_1, so that logits[:, :-1] needs no copy
#   values            the value of each row
#   factors, gradient where WITH_GRADIENT: what each row's gradient is multiplied by, and where it goes


@triton.jit
def _start(row, inner, stride_0, stride_1):
    return (row // inner) * stride_0 + (row % inner) * stride_1


@triton.jit
def _logit(
    student,
    teacher,
    values,
    factors,
    gradient,
    inner,
    s_stride_0,
    s_stride_1,
    t_stride_0,
    t_stride_1,
    g_stride_0,
    g_stride_1,
    columns: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += _start(row, inner, s_stride_0, s_stride_1)
    teacher += _start(row, inner, t_stride_0, t_stride_1)
    gradient += _start(row, inner, g_stride_0, g_stride_1)
    factor = 0.0
    if WITH_GRADIENT:
        factor = tl.load(factors + row) * 2.0 / columns
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        s = tl.load(student + at, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(teacher + at, mask=inside, other=0.0).to(tl.float32)
        difference = s - t
        squares += difference * difference
        if WITH_GRADIENT:
            tl.store(gradient + at, (difference * factor).to(gradient.dtype.element_ty), mask=inside)
    tl.store(values + row, tl.sum(squares, 0) / columns)


@triton.jit
def _kl(
    student,
    teacher,
    values,
    factors,
    gradient,
    inner,
    s_stride_0,
    s_stride_1,
    t_stride_0,
    t_stride_1,
    g_stride_0,
    g_stride_1,
    temperature,
    columns: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += _start(row, inner, s_stride_0, s_stride_1)
    teacher += _start(row, inner, t_stride_0, t_stride_1)
    gradient += _start(row, inner, g_stride_0, g_stride_1)
    # Maxima and sums of exponentials as they are so far, the sums for the maxima so far.
    s_max = float("-inf")
    t_max = float("-inf")
    s_sum = 0.0
    t_sum = 0.0
    # Of the teacher's exponentials and the differences of the logits, each from the first of its row: an offset between
    # student and teacher would cost digits.
    product = 0.0
    s_first = tl.load(student).to(tl.float32)
    t_first = tl.load(teacher).to(tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        s = tl.load(student + at, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher + at, mask=inside, other=float("-inf")).to(tl.float32)
        s_new = tl.maximum(s_max, tl.max(s, 0))
        t_new = tl.maximum(t_max, tl.max(t, 0))
        e_t = tl.exp((t - t_new) / temperature)
        t_shrink = tl.exp((t_max - t_new) / temperature)
        s_sum = s_sum * tl.exp((s_max - s_new) / temperature) + tl.sum(tl.exp((s - s_new) / temperature), 0)
        t_sum = t_sum * t_shrink + tl.sum(e_t, 0)
        product = product * t_shrink + tl.sum(tl.where(inside, e_t * ((t - t_first) - (s - s_first)), 0.0), 0)
        s_max = s_new
        t_max = t_new
    value = product / t_sum + ((s_max - s_first) - (t_max - t_first)) + temperature * (tl.log(s_sum) - tl.log(t_sum))
    tl.store(values + row, temperature * value)
    if WITH_GRADIENT:
        factor = tl.load(factors + row) * temperature
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < columns
            s = tl.load(student + at, mask=inside, other=0.0).to(tl.float32)
            t = tl.load(teacher + at, mask=inside, other=0.0).to(tl.float32)
            q = tl.exp((s - s_max) / temperature) / s_sum
            p = tl.exp((t - t_max) / temperature) / t_sum
            tl.store(gradient + at, (factor * (q - p)).to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _scale(gradient, factor, size, BLOCK: tl.constexpr):
    f = tl.load(factor)
    if f != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(gradient + at, mask=at < size).to(tl.float32)
        tl.store(gradient + at, (x * f).to(gradient.dtype.element_ty), mask=at < size)


_KERNELS = {"logit": _logit, "kl": _kl}


def run(
    name: str,
    student: Tensor,
    teacher: Tensor,
    values: Tensor,
    factors: Tensor | None,
    gradient: Tensor | None,
    **options: Any,
) -> bool:
    """Fill in the values and, if there are factors, the gradient; say False where the memory is laid out otherwise.

    Args:
        name: The loss.
        student: `(..., C)`.
        teacher: Same shape.
        values: `(...)`, float32.
        factors: `(...)`, float32, what each row's gradient is multiplied by.
        gradient: `(..., C)`, of any dtype.
        options: What the loss takes.

    Returns:
        Whether it was done.
    """
    layout = _layout(student, teacher, student if gradient is None else gradient)
    if layout is None:
        return False
    inner, strides = layout
    columns = student.shape[-1]
    with torch.cuda.device_of(student):
        _KERNELS[name][(values.numel(),)](
            student,
            teacher,
            values,
            # Where there is no gradient the kernel touches neither, but wants pointers.
            values if factors is None else factors.contiguous(),
            values if gradient is None else gradient,
            inner,
            *strides,
            **options,
            columns=columns,  # fixed at compile time: a model has few vocabularies
            BLOCK=min(triton.next_power_of_2(columns), 4096),
            WITH_GRADIENT=gradient is not None,
            num_warps=8,
        )
    return True


def scale(gradient: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous tensor in place by a number on the device, without looking at it from here."""
    block = 4096
    with torch.cuda.device_of(gradient):
        grid = (triton.cdiv(gradient.numel(), block),)
        _scale[grid](gradient, factor, gradient.numel(), BLOCK=block, num_warps=8)


def _layout(*tensors: Tensor) -> tuple[int, list[int]] | None:
    """Give the number of rows in the inner of two dimensions, and two strides per tensor, if two are enough."""
    *rows, columns = tensors[0].shape
    if columns > 1 and any(x.stride(-1) != 1 for x in tensors):
        return None
    # Sizes and each tensor's stride; neighbours that lie one after the other in all tensors are merged.
    merged: list[tuple[int, list[int]]] = []
    for d, size in enumerate(rows):
        strides = [x.stride(d) for x in tensors]
        if size == 1:
            continue
        if merged and merged[-1][1] == [size * stride for stride in strides]:
            size *= merged.pop()[0]
        merged.append((size, strides))
    if len(merged) > 2:
        return None
    (_, outer_strides), (inner, inner_strides) = [(1, [0] * len(tensors))] * (2 - len(merged)) + merged
    return inner, [stride for pair in zip(outer_strides, inner_strides, strict=True) for stride in pair]
