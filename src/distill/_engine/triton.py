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
def row_start(row, inner, stride_0, stride_1):
    return (row // inner) * stride_0 + (row % inner) * stride_1


@triton.jit
def logit(
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
    student += row_start(row, inner, s_stride_0, s_stride_1)
    teacher += row_start(row, inner, t_stride_0, t_stride_1)
    gradient += row_start(row, inner, g_stride_0, g_stride_1)
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
            # A row that does not count may hold anything: 0 times NaN is NaN.
            slope = tl.where(factor == 0.0, 0.0, difference * factor)
            tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=inside)
    tl.store(values + row, tl.sum(squares, 0) / columns)


@triton.jit
def _divergence(
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
    REVERSE: tl.constexpr,
):
    """T^2 KL(a || b) of the softened rows: a is the teacher's, or in reverse the student's, and b the other one."""
    row = tl.program_id(0).to(tl.int64)
    student += row_start(row, inner, s_stride_0, s_stride_1)
    teacher += row_start(row, inner, t_stride_0, t_stride_1)
    gradient += row_start(row, inner, g_stride_0, g_stride_1)
    # Maxima and sums of exponentials as they are so far, the sums for the maxima so far.
    a_max = float("-inf")
    b_max = float("-inf")
    a_sum = 0.0
    b_sum = 0.0
    # Of a's exponentials and the differences b - a, these from that of the first class: an offset would cost digits.
    product = 0.0
    first = tl.load(teacher).to(tl.float32) - tl.load(student).to(tl.float32)
    if not REVERSE:
        first = -first
    first = tl.where(tl.abs(first) < float("inf"), first, 0.0)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        a = tl.load(student + at, mask=inside, other=float("-inf")).to(tl.float32)
        b = tl.load(teacher + at, mask=inside, other=float("-inf")).to(tl.float32)
        if not REVERSE:
            a, b = b, a
        # While all is -inf, nothing has a probability.
        a_new = tl.maximum(a_max, tl.max(a, 0))
        b_new = tl.maximum(b_max, tl.max(b, 0))
        a_from = tl.where(a_new > float("-inf"), a_new, 0.0)
        b_from = tl.where(b_new > float("-inf"), b_new, 0.0)
        e_a = tl.exp((a - a_from) / temperature)
        a_shrink = tl.exp((a_max - a_from) / temperature)
        b_sum = b_sum * tl.exp((b_max - b_from) / temperature) + tl.sum(tl.exp((b - b_from) / temperature), 0)
        a_sum = a_sum * a_shrink + tl.sum(e_a, 0)
        product = product * a_shrink + tl.sum(tl.where(e_a == 0.0, 0.0, e_a * ((b - a) - first)), 0)
        a_max = a_new
        b_max = b_new
    mean = product / a_sum
    apart = tl.log(b_sum) - tl.log(a_sum)
    factor = 0.0
    if WITH_GRADIENT:
        factor = tl.load(factors + row) * temperature
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        a = tl.load(student + at, mask=inside, other=float("-inf")).to(tl.float32)
        b = tl.load(teacher + at, mask=inside, other=float("-inf")).to(tl.float32)
        if not REVERSE:
            a, b = b, a
        p_a = tl.exp((a - a_max) / temperature) / a_sum
        p_b = tl.exp((b - b_max) / temperature) / b_sum
        # With d = log p_b - log p_a the divergence is the sum of p_a (exp(d) - 1 - d): p_b where p_a is 0.
        d = ((b - a) - (b_max - a_max)) / temperature - apart
        bend = d * d * (0.5 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720)))))
        close = tl.abs(d) < 0.25
        term = tl.where(close, p_a * bend, (p_b - p_a) - p_a * d)
        total += tl.where(p_a == 0.0, p_b, term)
        if WITH_GRADIENT:
            if REVERSE:
                slope = tl.where(p_a == 0.0, 0.0, -p_a * (((b - a) - first) - mean) / temperature)
            else:
                slope = tl.where(close, p_a * (d + bend), p_b - p_a)
            # A row that does not count may hold anything: 0 times NaN is NaN.
            slope = tl.where(factor == 0.0, 0.0, factor * slope)
            tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=inside)
    tl.store(values + row, temperature * temperature * tl.sum(total, 0))


@triton.jit
def kl(
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
    _divergence(
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
        columns,
        BLOCK,
        WITH_GRADIENT,
        False,
    )


@triton.jit
def reverse_kl(
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
    _divergence(
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
        columns,
        BLOCK,
        WITH_GRADIENT,
        True,
    )


@triton.jit
def _scale(gradient, factor, size, BLOCK: tl.constexpr):
    f = tl.load(factor)
    if f != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(gradient + at, mask=at < size).to(tl.float32)
        tl.store(gradient + at, (x * f).to(gradient.dtype.element_ty), mask=at < size)


def run(
    kernel: Any,
    student: Tensor,
    teacher: Tensor,
    values: Tensor,
    factors: Tensor | None,
    gradient: Tensor | None,
    **options: Any,
) -> bool:
    """Fill in the values and, if there are factors, the gradient; say False where the memory is laid out otherwise.

    Args:
        kernel: That of the loss, one of the above.
        student: `(..., C)`.
        teacher: Same shape.
        values: `(...)`, float32.
        factors: `(...)`, float32, what each row's gradient is multiplied by.
        gradient: `(..., C)`, of any dtype.
        options: What the loss takes.

    Returns:
        Whether it was done.
    """
    layout = find_layout(student, teacher, student if gradient is None else gradient)
    if layout is None:
        return False
    inner, strides = layout
    columns = student.shape[-1]
    with torch.cuda.device_of(student):
        kernel[(values.numel(),)](
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


def find_layout(*tensors: Tensor) -> tuple[int, list[int]] | None:
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
