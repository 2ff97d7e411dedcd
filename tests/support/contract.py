"""What every loss promises, whatever its formula: a function to call from the loss's own test file."""

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def make_pair(
    *shape: int, teacher_shape: Sequence[int] | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A student that wants a gradient and a teacher, both standard normal."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    teacher = torch.randn(teacher_shape or shape, generator=generator, dtype=torch.float64).to(dtype)
    return student, teacher


def gradient(loss: Callable[..., Tensor], student: Tensor, *rest: Any, **options: Any) -> Tensor:
    """The gradient of a scalar loss for the student."""
    student = student.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(student, *rest, **options), student)
    return result


def pickled_modules(thing: Any) -> set[str]:
    """The modules of ours whose names stand in the pickle of a thing."""
    modules = set()

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            modules.add(module)
            return super().find_class(module, name)

    Reader(io.BytesIO(pickle.dumps(thing))).load()
    return {module for module in modules if module.partition(".")[0] == "distill"}


def assert_loss_contract(
    build: Callable[..., nn.Module],
    *,
    shape: Sequence[int] | Sequence[Sequence[int]],
    teacher_shape: Sequence[int] | Sequence[Sequence[int]] | None = None,
    target: Tensor | None = None,
    per_sample: bool = True,
    maps: bool = False,
    batches: bool = False,
    moves: bool = True,
) -> None:
    """Check the promises of the design that do not depend on the formula.

    Args:
        build: The class, or a function that passes keyword arguments on to it. What it builds is the same each time,
            also where the loss has learned parts.
        shape: Shape of student and teacher, batch first; the batch is at least 4. For a loss that takes tuples: the
            shapes of the tensors.
        teacher_shape: Shape or shapes of the teacher, where they differ from the student's.
        target: Labels, for losses that need them.
        per_sample: Whether the loss has a reduction and a mask (a loss of a whole batch has none).
        maps: Whether the loss compares maps (N, C, H, W), whose sizes may differ.
        batches: Whether the loss compares samples within each batch (N, ...), so that all but N may differ.
        moves: Whether moving the loss moves all that it needs.
    """
    teacher_shape = teacher_shape or shape
    if isinstance(shape[0], int):
        _check_refuses_bad_pairs(build(), *make_pair(*shape, teacher_shape=teacher_shape), target, maps, batches)
    else:
        shapes, teacher_shapes = shape, teacher_shape
        shape, teacher_shape = _flat_shape(shapes), _flat_shape(teacher_shapes)
        student, teacher = make_pair(*shape, teacher_shape=teacher_shape)
        tuples = _unflatten(student, shapes), _unflatten(teacher, teacher_shapes)
        _check_refuses_bad_pairs(build(), *tuples, target, maps, batches)
        build = functools.partial(_Flat, build, shapes, teacher_shapes)

    def pair(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
        return make_pair(*shape, teacher_shape=teacher_shape, dtype=dtype, seed=seed)

    loss = build()
    _check_scalar_and_gradients(loss, *pair(), target)
    _check_leaves_global_state_alone(loss, *pair(), target)
    _check_copies(loss, *pair(), target)
    for dtype in (torch.bfloat16, torch.half):
        _check_low_precision(loss, *pair(dtype), target)
    _check_autocast(loss, *pair(torch.float32), target)
    if moves:
        _check_reads_no_value(loss, *pair(torch.float32), target)
    _check_compile(loss, *pair(torch.float32), target)
    _check_func(loss, *pair(), target)
    _check_vmap(loss, *pair(), *pair(seed=1), target)
    if per_sample:
        _check_reductions(build, *pair(), target)
        _check_mask(build, *pair(), target)
        for bad in ("avg", "Mean", None):
            with pytest.raises(ValueError, match=f"reduction must be 'mean', 'sum' or 'none', got {bad!r}"):
                build(reduction=bad)


class _Flat(nn.Module):
    """A loss of two tuples as one of two tensors `(N, D)`, which is all that most checks know."""

    def __init__(
        self, build: Callable[..., nn.Module], shapes: Sequence[Any], teacher_shapes: Sequence[Any], **options: Any
    ) -> None:
        super().__init__()
        self.loss = build(**options)
        self.shapes, self.teacher_shapes = shapes, teacher_shapes

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None, **options: Any) -> Tensor:
        sides = _unflatten(student, self.shapes), _unflatten(teacher, self.teacher_shapes)
        return self.loss(*sides, target, **options)


def _flat_shape(shapes: Sequence[Any]) -> tuple[int, int]:
    return shapes[0][0], sum(math.prod(shape[1:]) for shape in shapes)


def _unflatten(flat: Tensor, shapes: Sequence[Any]) -> tuple[Tensor, ...]:
    parts = flat.split([math.prod(shape[1:]) for shape in shapes], dim=1)
    return tuple(part.reshape(len(part), *shape[1:]) for part, shape in zip(parts, shapes, strict=True))


def _check_scalar_and_gradients(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    teacher.requires_grad_()
    value = loss(student, teacher, target)
    assert value.shape == ()
    assert value.dtype == torch.float64
    value.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


def _check_leaves_global_state_alone(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    random_state = torch.random.get_rng_state()
    versions = student._version, teacher._version
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            value = loss(student, teacher, target)
            assert torch.is_grad_enabled() is enabled
            assert value.requires_grad is enabled
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert (student._version, teacher._version) == versions
    assert teacher.requires_grad is False


def _check_copies(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    expected = loss(student, teacher, target)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(student, teacher, target), expected)
        assert repr(twin) == repr(loss)


def _check_low_precision(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    value = loss(student, teacher, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(student.float(), teacher.float(), target))
    value.backward()
    assert student.grad is not None
    assert student.grad.dtype == student.dtype
    assert loss(student, teacher.double(), target).dtype == torch.float64


def _check_autocast(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(student, teacher, target))


def _check_reads_no_value(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    # On the meta device every read of a value (.item(), bool(), a comparison in an if) raises.
    loss = copy.deepcopy(loss).to("meta")
    target = None if target is None else target.to("meta")
    assert gradient(loss, student.to("meta"), teacher.to("meta"), target).shape == student.shape


def _check_compile(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    # aot_eager traces forward and backward as inductor does, and needs no C++ compiler.
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher, target), loss(student, teacher, target))
    torch.testing.assert_close(gradient(compiled, student, teacher, target), gradient(loss, student, teacher, target))


def _check_func(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    of_func = torch.func.grad(lambda s: loss(s, teacher, target))(student.detach())
    torch.testing.assert_close(of_func, gradient(loss, student, teacher, target))


def _check_refuses_bad_pairs(
    loss: nn.Module, student: Any, teacher: Any, target: Tensor | None, maps: bool, batches: bool
) -> None:
    def each(change: Callable[[Tensor], Tensor], side: Any) -> Any:
        return change(side) if isinstance(side, Tensor) else tuple(map(change, side))

    match = r"same shape.* \(nothing is broadcast\), got \("
    changes = [lambda t: t[:1], lambda t: t[0]]  # these would broadcast
    if maps:
        match = r"must be maps \(N, C, .*\) of the same N.*, got \[?\("
    elif batches:
        match = r"must be batches \(N, \.\.\.\) of the same N samples, got \("
    else:
        changes.append(lambda t: t[..., :1])
    for change in changes:
        with pytest.raises(ValueError, match=match):
            loss(student, each(change, teacher), target)
    with pytest.raises(ValueError, match=r"must be floating-point, got torch.int64 and torch.float64"):
        loss(each(lambda s: s.detach().long(), student), teacher, target)
    with pytest.raises(ValueError, match=r"must be floating-point, got torch.float64 and torch.complex128"):
        loss(student, each(lambda t: t + 0j, teacher), target)
    with pytest.raises(ValueError, match="on the same device, got cpu and meta"):
        loss(student, each(lambda t: t.to("meta"), teacher), target)
    with pytest.raises(ValueError, match=r"must not be empty, got shape \(0, "):
        loss(each(lambda s: s[:0], student), each(lambda t: t[:0], teacher), target)


def _check_reductions(build: Callable[..., nn.Module], student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    values = build(reduction="none")(student, teacher, target)
    assert values.shape[0] == student.shape[0]
    assert values.ndim < student.ndim
    torch.testing.assert_close(build()(student, teacher, target), values.mean())
    torch.testing.assert_close(build(reduction="sum")(student, teacher, target), values.sum())


def _check_mask(
    build: Callable[..., nn.Module], student: Tensor, teacher: Tensor, target: Tensor | None, *, meet: bool = False
) -> None:
    """What a mask does; `meet` says that samples meet in a batch norm, so that others may change a sample's value."""
    mean, total, none = build(), build(reduction="sum"), build(reduction="none")
    values = whole = none(student, teacher, target)
    weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen = weights > (0.2 if meet else 0.5)  # a batch norm needs two of them
    assert 0 < chosen.sum() < chosen.numel()
    for mask in (weights, chosen, chosen.long()):
        w = mask.double()
        if meet:
            kept = mask != 0
            values = torch.zeros_like(whole).index_put((kept,), none(student[kept], teacher[kept], target))
        torch.testing.assert_close(mean(student, teacher, target, mask=mask), (w * values).sum() / w.sum())
        torch.testing.assert_close(total(student, teacher, target, mask=mask), (w * values).sum())
        torch.testing.assert_close(none(student, teacher, target, mask=mask), w * values)
    torch.testing.assert_close(mean(student, teacher, target, mask=chosen), values[chosen].mean())

    nothing = torch.zeros_like(chosen)
    for loss in (mean, total):
        value = loss(student, teacher, target, mask=nothing)
        assert value == 0
        assert torch.equal(torch.autograd.grad(value, student)[0], torch.zeros_like(student))

    spoilt = teacher.clone()
    spoilt[0] = torch.nan
    kept = torch.ones_like(chosen)
    kept[0] = False
    assert mean(student, teacher, target, mask=kept) == mean(student, spoilt, target, mask=kept)

    with pytest.raises(ValueError, match=r"mask must be shaped like the per-sample values, \(.*got \(1,"):
        mean(student, teacher, target, mask=chosen[:1])
    with pytest.raises(ValueError, match="mask must be shaped like the per-sample values"):
        mean(student, teacher, target, mask=torch.ones(student.shape))
    with pytest.raises(ValueError, match="mask must be on the device of the values, cpu, got meta"):
        mean(student, teacher, target, mask=chosen.to("meta"))
    with pytest.raises(ValueError, match=r"mask must be bool or real weights, got torch.complex64"):
        mean(student, teacher, target, mask=chosen.to(torch.complex64))


def _check_vmap(
    loss: nn.Module, student: Tensor, teacher: Tensor, student2: Tensor, teacher2: Tensor, target: Tensor | None
) -> None:
    students, teachers = torch.stack([student, student2]).detach(), torch.stack([teacher, teacher2])
    mapped = torch.vmap(lambda s, t: loss(s, t, target))(students, teachers)
    torch.testing.assert_close(mapped[0], loss(student.detach(), teacher, target))
    torch.testing.assert_close(mapped[1], loss(student2.detach(), teacher2, target))
