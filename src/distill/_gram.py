"""The squared difference of two linear heads' logits: what it costs and how it is computed without forming them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from typing_extensions import override

# Rows of the weights that are widened to float64 at a time.
_ROWS = 1024
# Logits that are formed at a time: 4 MB in float32, which stay in a CPU's cache; a GPU wants larger products.
_LOGITS = 2**20
_LOGITS_ON_GPU = 2**25
# A float64 multiply-add, in those of float32: measured on a CPU, and at full rate on the GPUs built for it.
_WIDE = 1.8
_GPUS_WITH_FULL_FLOAT64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))
_WIDE_ON_OTHER_GPUS = 64.0
# What it costs to write, subtract and square one logit, in multiply-adds; measured on a CPU.
_PER_LOGIT = 100.0
# Calls over which the factor, computed once, is expected to be used.
_CALLS = 100
# The relative rounding of a gradient in float32 that is let pass before it is computed in float64.
_TOLERANCE = 1e-4


class Heads(NamedTuple):
    """Two heads: `student @ h_s + column` and `teacher @ h_t` give the logits to compare."""

    student: Tensor  # (V, d_s)
    teacher: Tensor  # (V, d_t)
    column: Tensor | None  # (V, 1), the difference of the biases

    def left(self) -> list[Tensor]:
        """The student's matrix with the column of biases, in parts side by side: (V, a)."""
        return [self.student] if self.column is None else [self.student, self.column]


class Factor(NamedTuple):
    """What is left of two heads by a QR factorisation: |student z + teacher h_t|^2 + |rest h_t|^2."""

    student: Tensor  # (k, a), k at most a
    teacher: Tensor  # (k, d_t)
    rest: Tensor  # (., d_t): what no student's hidden state can reach


class Plan(NamedTuple):
    """Which form is taken, and why.

    Attributes:
        method: `"factor"`, `"gram"` or `"blocks"`.
        costs: The estimate for every form that can be taken, in 10^9 float32 multiply-adds.
        reason: The same in words.
    """

    method: str
    costs: dict[str, float]
    reason: str


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64 at all."""
    return device.type != "mps"


def float64_cost(device: torch.device) -> float:
    """The price of a float64 multiply-add in those of float32."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) not in _GPUS_WITH_FULL_FLOAT64:
        return _WIDE_ON_OTHER_GPUS
    return _WIDE


def make_plan(
    samples: int,
    vocabulary: int,
    student: int,
    teacher: int,
    *,
    device: torch.device,
    trains: bool,
    may_factor: bool,
    keeps_teacher: bool,
) -> Plan:
    """Estimate forward and backward of every form, and take the cheapest.

    Args:
        samples: N, how many hidden states there are.
        vocabulary: V, the rows of both heads.
        student: Columns of the student's head, one more with a bias.
        teacher: Columns of the teacher's head.
        device: Where it will run.
        trains: Whether the student's head gets a gradient.
        may_factor: Whether a factor may be taken: nothing in the heads is trained, and it can be kept between calls.
        keeps_teacher: Whether the teacher's own Gram matrix is kept between calls.

    Returns:
        The plan.
    """
    n, v, a, t = samples, vocabulary, student, teacher
    logits = n * v * (a + t + _PER_LOGIT)
    costs = {"blocks": logits + n * v * a + (logits + n * v * a if trains else 0)}
    if has_float64(device):
        wide = float64_cost(device)
        # Products of hidden states forward, and backward for the hidden states.
        small = n * (a * (a + t) + t * t) + n * a * a
        gram = v * a * (a + t) + (0 if keeps_teacher else v * t * t)
        backward = (v + n) * a * (a + t) if trains else 0
        costs["gram"] = wide * (small + gram + backward)
        if may_factor:
            costs["factor"] = wide * (small + 4 * v * (a + t) ** 2 / _CALLS)
    costs = {name: cost / 1e9 for name, cost in costs.items()}
    method = min(costs, key=lambda name: costs[name])
    heads = "the student's head trains" if trains else "the heads are frozen" if may_factor else "no factor is kept"
    estimates = ", ".join(f"{name} {cost:.3g}" for name, cost in sorted(costs.items(), key=lambda item: item[1]))
    reason = (
        f"{method}: N={n}, V={v}, {a} and {t} columns on {device.type}, {heads}; "
        f"in 10^9 float32 multiply-adds: {estimates}"
    )
    return Plan(method, costs, reason)


def teacher_gram(teacher: Tensor) -> Tensor:
    """`W_t^T W_t` in float64, (d_t, d_t)."""
    return _left_gram([teacher], teacher.shape[1])


def factorise(heads: Heads) -> Factor:
    """Factorise `[W_s, c, -W_t]` by QR in float64, some rows at a time.

    With the student first, R is `[[student, teacher], [0, rest]]`: only the first rows know the student.
    """
    parts = [*heads.left(), heads.teacher]
    width = sum(part.shape[1] for part in parts)
    columns = width - heads.teacher.shape[1]
    rows = max(4 * width, _ROWS)
    r = heads.student.new_empty(0, width, dtype=torch.float64)
    for start in range(0, len(heads.student), rows):
        r = torch.linalg.qr(torch.cat([r, _stack(parts, start, rows)]), mode="r").R
    # Copies, so that the kept factor holds no memory that nobody reads.
    return Factor(r[:columns, :columns].clone(), -r[:columns, columns:], r[columns:, columns:].clone())


def by_factor(student: Tensor, teacher: Tensor, factor: Factor) -> Tensor:
    """Sums over the vocabulary of the squared differences, (N,), from a factor: never negative, nothing cancels.

    Args:
        student: `[h_s, 1]`, or `h_s` where there are no biases, (N, a).
        teacher: `h_t`, (N, d_t).
        factor: What `factorise` gives.
    """
    student, teacher = student.double(), teacher.double()
    reached = student @ factor.student.T + teacher @ factor.teacher.T
    return reached.square().sum(-1) + (teacher @ factor.rest.T).square().sum(-1)


def by_gram(student: Tensor, teacher: Tensor, heads: Heads, own: Tensor) -> Tensor:
    """Sums over the vocabulary of the squared differences, (N,), from Gram matrices in float64.

    Args:
        student: As in `by_factor`.
        teacher: As in `by_factor`.
        heads: The heads.
        own: What `teacher_gram` gives.
    """
    student, teacher = student.double(), teacher.double()
    gram: Tensor = _Gram.apply(heads.student, heads.column, heads.teacher)  # type: ignore[no-untyped-call]
    columns = student.shape[-1]
    cross = student @ gram[:, :columns] - 2 * (teacher @ gram[:, columns:].T)
    values = (cross * student).sum(-1) + ((teacher @ own) * teacher).sum(-1)
    # What rounding leaves below zero goes, and the gradient stays.
    return values - values.detach().clamp(max=0)


def by_blocks(student: Tensor, teacher: Tensor, heads: Heads) -> Tensor:
    """Sums over the vocabulary of the squared differences, (N,), from logits formed for some classes at a time.

    Args:
        student: `h_s`, (N, d_s), in the dtype to compute in.
        teacher: `h_t`, (N, d_t), in that dtype.
        heads: The heads.
    """
    wanted = torch.is_grad_enabled() and student.requires_grad
    values: Tensor = _Blocks.apply(student, heads.student, heads.column, teacher, heads.teacher, wanted)[0]  # type: ignore[no-untyped-call]
    return values


class _Gram(Function):
    """`L^T [L, W_t]` with `L = [W_s, c]` in float64, (a, a + d_t), from blocks of rows that are widened and dropped."""

    generate_vmap_rule = True

    @staticmethod
    @override
    def forward(student: Tensor, column: Tensor | None, teacher: Tensor) -> Tensor:
        left = Heads(student, teacher, column).left()
        return _left_gram([*left, teacher], sum(part.shape[1] for part in left))

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, column, teacher, gram = ctx.saved_tensors
        parts = [*Heads(student, teacher, column).left(), teacher]
        a = len(grad)
        right = torch.cat([grad[:, :a] + grad[:, :a].T, grad[:, a:].T])
        if _must_stay_differentiable():
            both = _stack(parts, 0, len(student)) @ right
            ours = both[:, : student.shape[1]].to(student.dtype)
            biases = None if column is None else both[:, student.shape[1] :].to(column.dtype)
        elif student.device.type == "cpu" and student.dtype != torch.float64 and not torch.compiler.is_compiling():
            # The student's and the teacher's part cancel as the two agree; on a CPU it costs nothing to look.
            ours, biases = _combine(parts, right.float(), student, column)
            part = (right[:a] * (gram[:, :a] @ right[:a])).sum().clamp(min=0).sqrt()
            if torch.linalg.vector_norm(ours) * _TOLERANCE < part * torch.finfo(torch.float32).eps:
                ours, biases = _combine(parts, right, student, column)
        else:
            ours, biases = _combine(parts, right, student, column)
        return ours, biases, None


class _Blocks(Function):
    """Sums of squared differences, (N,), and half their gradient for the student's hidden states, (N, d_s)."""

    generate_vmap_rule = True

    @staticmethod
    @override
    def forward(
        hidden: Tensor, student: Tensor, column: Tensor | None, theirs: Tensor, teacher: Tensor, wanted: bool
    ) -> tuple[Tensor, Tensor]:
        heads = Heads(student, teacher, column)
        values, gradient = hidden.new_zeros(len(hidden)), hidden.new_zeros(0)
        for start, stop in _classes(heads, len(hidden)):
            difference, weight = _difference(hidden, theirs, heads, start, stop)
            values = values + difference.square().sum(-1)
            if wanted:
                gradient = torch.addmm(gradient, difference, weight) if start else difference @ weight
        return values, gradient

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:5], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, student, column, theirs, teacher, gradient = ctx.saved_tensors
        heads = Heads(student, teacher, column)
        scale = 2 * grad.unsqueeze(-1)
        with torch.autocast(hidden.device.type, enabled=False):
            if _must_stay_differentiable():
                difference, weight = _difference(hidden, theirs, heads, 0, len(student))
                difference = scale * difference
                biases = None if column is None else difference.sum(0).unsqueeze(-1).to(column.dtype)
                ours = (difference.T @ hidden).to(student.dtype)
                return difference @ weight, ours, biases, None, None, None
            ours = biases = None
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                ours, biases = torch.empty_like(student), None if column is None else torch.empty_like(column)
                for start, stop in _classes(heads, len(hidden)):
                    difference = scale * _difference(hidden, theirs, heads, start, stop)[0]
                    ours[start:stop] = difference.T @ hidden
                    if biases is not None:
                        biases[start:stop, 0] = difference.sum(0)
            return scale * gradient if ctx.needs_input_grad[0] else None, ours, biases, None, None, None


def _must_stay_differentiable() -> bool:
    """Whether a backward is itself differentiated (`create_graph=True`) or transformed (`torch.func`).

    Then it is written as plain operations, which need memory for all of the vocabulary.
    """
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def _stack(parts: list[Tensor], start: int, rows: int) -> Tensor:
    """Some rows of matrices side by side, in float64."""
    return torch.cat([part[start : start + rows].double() for part in parts], 1)


def _left_gram(parts: list[Tensor], columns: int) -> Tensor:
    """`X[:, :columns]^T X` of matrices side by side, in float64."""
    total = None
    for start in range(0, len(parts[0]), _ROWS):
        x = _stack(parts, start, _ROWS)
        product = x[:, :columns].T @ x
        total = product if total is None else total + product
    return total


def _combine(
    parts: list[Tensor], right: Tensor, student: Tensor, column: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`X right` for matrices X side by side, in the dtype of `right`: what the student's matrix and the biases get."""
    factors = right.split([part.shape[1] for part in parts])
    ours, biases = torch.empty_like(student), None if column is None else torch.empty_like(column)
    for start in range(0, len(student), _ROWS):
        rows = slice(start, start + _ROWS)
        both = parts[0][rows].to(right.dtype) @ factors[0]
        for part, factor in zip(parts[1:], factors[1:], strict=True):
            both.addmm_(part[rows].to(right.dtype), factor)
        ours[rows] = both[:, : student.shape[1]]
        if biases is not None:
            biases[rows] = both[:, student.shape[1] :]
    return ours, biases


def _classes(heads: Heads, samples: int) -> list[tuple[int, int]]:
    """The classes of each block."""
    vocabulary = len(heads.student)
    step = max((_LOGITS_ON_GPU if heads.student.is_cuda else _LOGITS) // samples, 16)
    return [(start, min(start + step, vocabulary)) for start in range(0, vocabulary, step)]


def _difference(hidden: Tensor, theirs: Tensor, heads: Heads, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The difference of the logits of some classes, (N, classes), and the student's rows for them."""
    weight, teacher = heads.student[start:stop].to(hidden.dtype), heads.teacher[start:stop].to(hidden.dtype)
    ours = hidden @ weight.T
    if heads.column is not None:
        ours = ours + heads.column[start:stop, 0].to(hidden.dtype)
    return torch.addmm(ours, theirs, teacher.T, alpha=-1), weight
