"""The squared difference of two linear heads' logits from Gram matrices or a factor, without forming them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from typing_extensions import override

from distill._checks import may_look

# Rows of the weights that are multiplied at a time: fewer round less; more wait less for each other's threads.
_ROWS = {torch.float32: 2048, torch.float64: 1024}
# The smallest squared difference, relative to the squares of the logits, that a form gives to better than 1e-3, as
# benchmarks/agreement.py measures: Gram matrices err by some eps / r^2, a factor by some eps / r.
_SMALLEST_BY_GRAM = {torch.float32: 1e-3, torch.float64: 1e-10}
_SMALLEST_BY_FACTOR = 1e-5


class Heads(NamedTuple):
    """Two heads: `weight @ hidden + column` and `teacher_weight @ teacher_hidden` give the logits to compare."""

    weight: Tensor  # (V, d_s)
    teacher_weight: Tensor  # (V, d_t)
    column: Tensor | None  # (V, 1), the difference of the biases

    def left(self) -> list[Tensor]:
        """The student's weight with the column of biases, in parts side by side: (V, a)."""
        return [self.weight] if self.column is None else [self.weight, self.column]

    def trains(self) -> bool:
        """Whether the student's head gets a gradient."""
        return torch.is_grad_enabled() and any(part.requires_grad for part in self.left())


class Factor(NamedTuple):
    """R of `[W_s, c, -W_t] = Q R`, as what takes the hidden states `z = [h_s, 1]` and `h_t`.

    The sum of squared differences is `|left z + right h_t|^2 + |rest h_t|^2`.
    """

    left: Tensor  # (k, a), k at most a
    right: Tensor  # (k, d_t)
    rest: list[Tensor]  # what no student's hidden state can reach: a triangle, in slabs without their leading zeros


def teacher_gram(teacher_weight: Tensor) -> Tensor:
    """`W_t^T W_t` in float64, (d_t, d_t)."""
    return _left_gram([teacher_weight], 1, torch.float64)


def factorise(heads: Heads) -> Factor:
    """Factorise `[W_s, c, -W_t]` by QR in float64, some rows at a time.

    With the student's columns first, R is `[[left, right], [0, rest]]`: only the first rows know the student.
    """
    parts = [*heads.left(), heads.teacher_weight]
    width = sum(part.shape[1] for part in parts)
    columns = width - heads.teacher_weight.shape[1]
    rows = max(4 * width, _ROWS[torch.float64])
    r = heads.weight.new_empty(0, width, dtype=torch.float64)
    for start in range(0, len(heads.weight), rows):
        r = torch.linalg.qr(torch.cat([r, _stack(parts, start, rows, torch.float64)]), mode="r").R
    # Copies: views would keep all of R in memory.
    return Factor(
        r[:columns, :columns].clone(),
        -r[:columns, columns:],
        [slab.clone() for _, slab in _slabs(r[columns:, columns:])],
    )


def by_factor(hidden: Tensor, teacher_hidden: Tensor, factor: Factor) -> Tensor:
    """Sums over the vocabulary of the squared differences, (N,), from a factor: never negative.

    Args:
        hidden: `[h_s, 1]`, or `h_s` where there are no biases, (N, a), in float32 or float64.
        teacher_hidden: `h_t`, (N, d_t), in that dtype.
        factor: What `factorise` gives.
    """

    def compute(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        h_s, h_t = hidden.to(dtype), teacher_hidden.to(dtype)
        s, t = h_s @ factor.left.to(dtype).T, h_t @ factor.right.to(dtype).T
        rest = h_t.new_zeros(len(h_t))
        for slab in factor.rest:
            rest = rest + (h_t[:, -slab.shape[1] :] @ slab.to(dtype).T).square().sum(-1)
        return (s + t).square().sum(-1) + rest, s.detach().square().sum(-1) + t.square().sum(-1) + rest

    return _precisely(compute, hidden, _SMALLEST_BY_FACTOR)[0]


def by_gram(hidden: Tensor, teacher_hidden: Tensor, heads: Heads, theirs: Tensor) -> Tensor:
    """Sums over the vocabulary of the squared differences, (N,), from Gram matrices.

    Args:
        hidden: As in `by_factor`.
        teacher_hidden: As in `by_factor`.
        heads: The heads.
        theirs: What `teacher_gram` gives.
    """

    def compute(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        h_s, h_t = hidden.to(dtype), teacher_hidden.to(dtype)
        gram: Tensor = function_of(_Gram, heads)(heads.weight, heads.column, heads.teacher_weight, dtype)
        columns = h_s.shape[-1]
        s, t = h_s @ gram[:, :columns], h_t @ gram[:, columns:].T
        rest = h_t.new_zeros(len(h_t))
        for rows, slab in _slabs(theirs.to(dtype)):  # symmetric: its diagonal blocks, and twice what is right of them
            doubled = torch.cat([slab[:, : len(slab)], 2 * slab[:, len(slab) :]], 1)
            rest = rest + ((h_t[:, -slab.shape[1] :] @ doubled.T) * h_t[:, rows]).sum(-1)
        return ((s - 2 * t) * h_s).sum(-1) + rest, (s.detach() * h_s.detach()).sum(-1) + rest

    values, sizes = _precisely(compute, hidden, _SMALLEST_BY_GRAM[torch.float32])
    # Values that float64 does not save come from the factor. The gradient, which errs by eps / r only, stays.
    with torch.no_grad():
        if may_look(hidden) and (values < _SMALLEST_BY_GRAM[torch.float64] * sizes).any():
            better = by_factor(hidden, teacher_hidden, factorise(heads))
        else:
            better = values.clamp(min=0)
    return values + (better - values).detach()


class _Gram(Function):
    """`L^T [L, W_t]` with `L = [W_s, c]`, (a, a + d_t), from blocks of rows that are widened and dropped."""

    generate_vmap_rule = True

    @staticmethod
    @override
    def forward(weight: Tensor, column: Tensor | None, teacher_weight: Tensor, dtype: torch.dtype) -> Tensor:
        left = Heads(weight, teacher_weight, column).left()
        return _left_gram([*left, teacher_weight], len(left), dtype)

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, column, teacher_weight = ctx.saved_tensors
        parts = [*Heads(weight, teacher_weight, column).left(), teacher_weight]
        a, width = len(grad), weight.shape[1]
        right = torch.cat([grad[:, :a] + grad[:, :a].T, grad[:, a:].T])
        with torch.autocast(grad.device.type, enabled=False):
            if must_stay_differentiable():
                both = _stack(parts, 0, len(weight), right.dtype) @ right
                biases = None if column is None else both[:, width:].to(column.dtype)
                return both[:, :width].to(weight.dtype), biases, None, None
            return *_combine(parts, right, weight, column), None, None


def function_of(function: type[Function], heads: Heads, *more: Tensor) -> Callable[..., Any]:
    # torch 2.5 cannot trace `apply` where nothing needs a gradient.
    needed = heads.trains() or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in more))
    return function.apply if needed else function.forward


def must_stay_differentiable() -> bool:
    """Whether a backward is itself differentiated (`create_graph=True`) or transformed (`torch.func`).

    Then it is written as plain operations, which need memory for all of the vocabulary.
    """
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def _slabs(matrix: Tensor) -> list[tuple[slice, Tensor]]:
    """Which rows, and of those rows what is not left of the diagonal: some rows at a time."""
    step = max(128, matrix.shape[1] // 8)
    starts = range(0, len(matrix), step)
    return [(slice(start, start + step), matrix[start : start + step, start:]) for start in starts]


def _precisely(
    compute: Callable[[torch.dtype], tuple[Tensor, Tensor]], hidden: Tensor, smallest: float
) -> tuple[Tensor, Tensor]:
    """Values and the squares of the logits in float64, or in float32 where that is faster and enough."""
    if hidden.dtype == torch.float64 or not may_look(hidden):
        return compute(torch.float64)
    values, sizes = compute(torch.float32)
    if (values.detach() < smallest * sizes.detach()).any():
        return compute(torch.float64)
    return values, sizes


def _stack(parts: list[Tensor], start: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Some rows of matrices side by side."""
    return torch.cat([part[start : start + rows].to(dtype) for part in parts], 1)


def _left_gram(parts: list[Tensor], left: int, dtype: torch.dtype) -> Tensor:
    """`L^T X` for X the matrices side by side and L the first so many of them."""
    sums: list[tuple[int, Tensor]] = []  # of so many blocks each, added up in pairs: rounding grows with the logarithm
    for start in range(0, len(parts[0]), _ROWS[dtype]):
        rows = [part[start : start + _ROWS[dtype]].to(dtype) for part in parts]
        product = torch.cat([torch.cat([ours.T @ x for x in rows], 1) for ours in rows[:left]])
        blocks = 1
        while sums and (sums[-1][0] == blocks or start + _ROWS[dtype] >= len(parts[0])):
            more, other = sums.pop()
            blocks, product = blocks + more, product + other
        sums.append((blocks, product))
    return sums[0][1]


def _combine(parts: list[Tensor], right: Tensor, weight: Tensor, column: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`X right` for matrices X side by side, in the dtype of `right`: what the student's weight and the biases get."""
    factors = right.split([part.shape[1] for part in parts])  # type: ignore[no-untyped-call]
    ours, biases = torch.empty_like(weight), None if column is None else torch.empty_like(column)
    step = _ROWS[right.dtype]
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        both = parts[0][rows].to(right.dtype) @ factors[0]
        for part, factor in zip(parts[1:], factors[1:], strict=True):
            both.addmm_(part[rows].to(right.dtype), factor)
        ours[rows] = both[:, : weight.shape[1]]
        if biases is not None:
            biases[rows] = both[:, weight.shape[1] :]
    return ours, biases
