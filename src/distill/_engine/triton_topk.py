"""Rows whose teacher is a `TopK` as Triton kernels. Imported only where a CUDA tensor comes.

One kernel reads the student's logits and makes k + 1 numbers of each row. On these the loss's own formula runs, for all
rows at once. Another kernel reads the logits again and writes the gradient: that for the class of the rest goes to the
others by their share of it. Given classes come in ascending order, so that a program meets each once on its way
through a row.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill._engine.blocks import block_by_autograd
from distill._engine.triton import find_layout, row_start

# Student and gradient lie as in `triton.py`; the other tensors have one row after another.


@triton.jit
def _following(indices, j, K: tl.constexpr, columns: tl.constexpr, BLOCK: tl.constexpr):
    """The j-th given class, or after the last one a number beyond every block."""
    return tl.load(indices + j, mask=j < K, other=columns + BLOCK)


@triton.jit
def _merge(
    student,
    indices,
    largest,
    total,
    inner,
    s_stride_0,
    s_stride_1,
    temperature,
    columns: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the classes that are not given: the largest logit, and the sum of exponentials of what they have less."""
    row = tl.program_id(0).to(tl.int64)
    student += row_start(row, inner, s_stride_0, s_stride_1)
    indices += row * K
    top = float("-inf")
    so_far = 0.0
    j = 0
    following = _following(indices, j, K, columns, BLOCK)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(student + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        while following < start + BLOCK:
            x = tl.where(at == following, float("-inf"), x)
            j += 1
            following = _following(indices, j, K, columns, BLOCK)
        new = tl.maximum(top, tl.max(x, 0))
        base = tl.where(new > float("-inf"), new, 0.0)  # while all is -inf, nothing has a probability
        so_far = so_far * tl.exp((top - base) / temperature) + tl.sum(tl.exp((x - base) / temperature), 0)
        top = new
    tl.store(largest + row, tl.where(top > float("-inf"), top, 0.0))
    tl.store(total + row, so_far)


@triton.jit
def _spread(
    student,
    indices,
    slopes,
    largest,
    total,
    factors,
    gradient,
    inner,
    s_stride_0,
    s_stride_1,
    g_stride_0,
    g_stride_1,
    temperature,
    columns: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of all classes from that of the k + 1, in which the factors are already."""
    row = tl.program_id(0).to(tl.int64)
    student += row_start(row, inner, s_stride_0, s_stride_1)
    gradient += row_start(row, inner, g_stride_0, g_stride_1)
    indices += row * K
    slopes += row * (K + 1)
    base = tl.load(largest + row)
    whole = tl.load(total + row)
    counts = tl.load(factors + row) != 0.0
    rest = tl.load(slopes + K)
    j = 0
    following = _following(indices, j, K, columns, BLOCK)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(student + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        # Where no other class has a probability, none has a share; a row that does not count may hold anything.
        slope = tl.where(whole == 0.0, 0.0, tl.exp((x - base) / temperature) / whole * rest)
        while following < start + BLOCK:
            slope = tl.where(at == following, tl.load(slopes + j), slope)
            j += 1
            following = _following(indices, j, K, columns, BLOCK)
        slope = tl.where(counts, slope, 0.0)
        tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=at < columns)


def run(
    formula: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    indices: Tensor,
    values: Tensor,
    factors: Tensor | None,
    gradient: Tensor | None,
    *,
    temperature: float,
    **options: Any,
) -> bool:
    """Fill in the values and, if there are factors, the gradient; say False where blocks have to do it.

    Args:
        formula: That of the loss, of a student's and a teacher's k + 1 classes.
        student: `(..., C)`.
        teacher: `(..., k + 1)`, float32.
        indices: `(..., k)`, the given classes, int64.
        values: `(...)`, float32.
        factors: `(...)`, float32, what each row's gradient is multiplied by.
        gradient: `(..., C)`, of any dtype; it may be the student's own memory.
        temperature: Of the loss.
        options: What else the formula takes.

    Returns:
        Whether it was done. It is not where all classes are given, or the memory is laid out otherwise.
    """
    columns, k = student.shape[-1], indices.shape[-1]
    layout = find_layout(student, student if gradient is None else gradient)
    if layout is None or k == columns:
        return False
    inner, strides = layout
    indices, order = indices.reshape(-1, k).sort(-1)
    teacher = teacher.reshape(-1, k + 1)
    teacher = torch.cat([teacher[:, :-1].gather(1, order), teacher[:, -1:]], 1)
    rows = len(indices)
    largest, total = torch.empty(2, rows, 1, device=student.device)
    classes = indices.int()
    sizes = {"columns": columns, "K": k, "BLOCK": min(triton.next_power_of_2(columns), 4096), "num_warps": 8}
    with torch.cuda.device_of(student):
        _merge[(rows,)](student, classes, largest, total, inner, *strides[:2], temperature, **sizes)
        given = student.gather(-1, indices.view(*student.shape[:-1], k)).reshape(-1, k).float()
        ours = torch.cat([given - largest, total.log() * temperature], 1)
        counts = None if factors is None else factors.reshape(-1, 1)
        slopes = torch.empty_like(ours)
        found = block_by_autograd(formula, ours, teacher, counts, slopes, None, temperature=temperature, **options)
        values.copy_(found.view(values.shape))
        if counts is not None and gradient is not None:
            _spread[(rows,)](
                student, classes, slopes, largest, total, counts, gradient, inner, *strides, temperature, **sizes
            )
    return True
