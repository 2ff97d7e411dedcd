"""What every loss promises, whatever its formula: a function to call from the loss's own test file."""

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import refusals
from distill.losses._base import Loss


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


def with_weights(loss: nn.Module, seed: int = 0) -> nn.Module:
    """The loss with seeded weights, none of them 0 or 1, so that each of them counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return loss


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
    meet: bool = False,
    widths: bool = False,
    elementwise: bool = False,
    adversary: bool = False,
) -> None:
    """Check the promises of the design that do not depend on the formula.

    What the loss does under `torch.compile` is tested by `tests/losses/test_compile.py`, with these arguments.

    Args:
        build: The class, or a function that passes keyword arguments on to it.
        shape: Shape of student and teacher, batch first; the batch is at least 4. For a loss that takes tuples: the
            shapes of the tensors.
        teacher_shape: Shape or shapes of the teacher, where they differ from the student's.
        target: Labels, for losses that need them.
        per_sample: Whether the loss has a reduction (a loss of a whole batch has none, and its mask selects samples).
        maps: Whether the loss compares maps (N, C, H, W), whose sizes may differ.
        batches: Whether the loss compares samples within each batch (N, ...), so that all but N may differ.
        moves: Whether moving the loss moves all that it needs; if not, what it learns is not its own.
        meet: Whether samples meet in a batch norm, so that others may change a sample's value.
        widths: Whether the last dimensions of the two sides may differ.
        elementwise: Whether each number is a sample of its own.
        adversary: Whether what the loss owns learns to make it larger.
    """
    learned = is_learned(build, moves)
    sides = make_sides(shape, teacher_shape)
    refusals.check_pairs(build(), *sides, target, maps=maps, batches=batches, learned=learned, widths=widths)
    build, pair = prepare(build, shape, teacher_shape, learned=learned)

    loss = build()
    _check_scalar_and_gradients(loss, *pair(), target)
    _check_leaves_global_state_alone(loss, *pair(), target)
    _check_copies(loss, *pair(), target)
    if moves:
        private = [module for module in pickled_modules(loss) if "._" in module]
        assert not private, f"a pickle must outlive a move and name no private module, got {private}"
    for dtype in (torch.bfloat16, torch.half):
        _check_low_precision(loss, *pair(dtype), target)
    _check_autocast(loss, *pair(torch.float32), target)
    if moves:
        _check_reads_no_value(loss, *pair(torch.float32), target)
    _check_func(loss, *pair(), target)
    _check_vmap(loss, *pair(), *pair(seed=1), target)
    _check_zeros_and_extremes(loss, *pair(), target)
    _check_inference_tensors(loss, *pair(), target)
    refusals.check_later_options(build())
    refusals.check_classes(build(), *pair(), target)
    if learned:
        _check_weights(build, pair, target, adversary=adversary)
    if per_sample:
        _check_reductions(build, *pair(), target, elementwise=elementwise)
        _check_mask(build, *pair(), target, meet=meet)
        _check_hides(build, *pair(), target, learned=learned)
        refusals.check_masks(build, *pair(), target, elementwise=elementwise)
    else:
        _check_selects(loss, *pair(), target)


def is_learned(build: Callable[..., nn.Module], moves: bool) -> bool:
    """Whether what is built owns weights."""
    return moves and any(parameter.requires_grad for parameter in build().parameters())


def make_sides(shape: Sequence[Any], teacher_shape: Sequence[Any] | None) -> tuple[Any, Any]:
    """Student and teacher as the loss takes them: tensors, or tuples where there are several shapes."""
    if isinstance(shape[0], int):
        return make_pair(*shape, teacher_shape=teacher_shape)
    shapes, teacher_shapes = shape, teacher_shape or shape
    student, teacher = make_pair(*_flat_shape(shapes), teacher_shape=_flat_shape(teacher_shapes))
    return _unflatten(student, shapes), _unflatten(teacher, teacher_shapes)


def prepare(
    build: Callable[..., nn.Module], shape: Sequence[Any], teacher_shape: Sequence[Any] | None, *, learned: bool
) -> tuple[Callable[..., nn.Module], Callable[..., tuple[Tensor, Tensor]]]:
    """What builds the loss, the same each time and for one tensor a side, and what makes such tensors.

    The second takes a dtype, a seed and how many samples there are to be less than in the shape.
    """
    teacher_shape = teacher_shape or shape
    if not isinstance(shape[0], int):
        build = functools.partial(_Flat, build, shape, teacher_shape)
        shape, teacher_shape = _flat_shape(shape), _flat_shape(teacher_shape)

    def pair(dtype: torch.dtype = torch.float64, seed: int = 0, less: int = 0) -> tuple[Tensor, Tensor]:
        sizes = [(size[0] - less, *size[1:]) for size in (shape, teacher_shape)]
        return make_pair(*sizes[0], teacher_shape=sizes[1], dtype=dtype, seed=seed)

    return (lambda **options: with_weights(build(**options))) if learned else build, pair


def inner(loss: nn.Module) -> Any:
    """The loss itself, where a module around it brings the tensors into the form that it takes."""
    return loss if isinstance(loss, Loss) else getattr(loss, "loss", loss)


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


def _unflatten(flat: Any, shapes: Sequence[Any]) -> Any:
    if not isinstance(flat, Tensor):
        return flat
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


def _check_func(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    of_func = torch.func.grad(lambda s: loss(s, teacher, target))(student.detach())
    torch.testing.assert_close(of_func, gradient(loss, student, teacher, target))


def _check_vmap(
    loss: nn.Module, student: Tensor, teacher: Tensor, student2: Tensor, teacher2: Tensor, target: Tensor | None
) -> None:
    students, teachers = torch.stack([student, student2]).detach(), torch.stack([teacher, teacher2])
    mapped = torch.vmap(lambda s, t: loss(s, t, target))(students, teachers)
    torch.testing.assert_close(mapped[0], loss(student.detach(), teacher, target))
    torch.testing.assert_close(mapped[1], loss(student2.detach(), teacher2, target))


def _check_zeros_and_extremes(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    for factor in (0.0, 1e4):
        assert gradient(loss, factor * student, factor * teacher, target).isfinite().all()


def _check_inference_tensors(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    with torch.inference_mode():
        constants = [None if constant is None else constant.clone() for constant in (teacher, target)]
    assert torch.equal(gradient(loss, student, *constants), gradient(loss, student, teacher, target))


def _check_weights(
    build: Callable[..., nn.Module],
    pair: Callable[..., tuple[Tensor, Tensor]],
    target: Tensor | None,
    *,
    adversary: bool,
) -> None:
    """Each weight gets a gradient, is saved, trains and may be of any dtype; nothing moves in a forward."""
    loss, (student, teacher) = build(), pair()
    state = copy.deepcopy(loss.state_dict())
    value = loss(student, teacher, target)
    assert torch.equal(copy.deepcopy(loss).eval()(student, teacher, target), value)
    for name, tensor in loss.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    value.backward()
    for name, parameter in loss.named_parameters():  # DDP waits for each
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name

    other = with_weights(build(), seed=1)
    assert not torch.equal(other(student, teacher, target), value)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(student, teacher, target), value)
    other(student, teacher, target).backward()
    torch.optim.SGD(other.parameters(), lr=1e-3).step()
    assert other(student, teacher, target) > value if adversary else other(student, teacher, target) < value

    for dtype in (torch.bfloat16, torch.half):
        student, teacher = pair(dtype)
        cast = copy.deepcopy(loss).to(dtype)  # as Distiller.half() leaves it
        assert torch.equal(cast(student, teacher, target), copy.deepcopy(cast).float()(student, teacher, target))


def _check_reductions(
    build: Callable[..., nn.Module], student: Tensor, teacher: Tensor, target: Tensor | None, *, elementwise: bool
) -> None:
    values = build(reduction="none")(student, teacher, target)
    assert values.shape[0] == student.shape[0]
    assert values.shape == student.shape if elementwise else values.ndim < student.ndim
    torch.testing.assert_close(build()(student, teacher, target), values.mean())
    torch.testing.assert_close(build(reduction="sum")(student, teacher, target), values.sum())


def _check_mask(
    build: Callable[..., nn.Module], student: Tensor, teacher: Tensor, target: Tensor | None, *, meet: bool
) -> None:
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
        assert all((slope == 0).all() for slope in torch.autograd.grad(value, [student, *_own(loss)]))


def _own(loss: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in loss.parameters() if parameter.requires_grad]


def _check_hides(
    build: Callable[..., nn.Module], student: Tensor, teacher: Tensor, target: Tensor | None, *, learned: bool
) -> None:
    """What a mask of 0 hides leaves value and gradients exactly alone: NaN, infinity, a label that is no class."""
    none = build(reduction="none")
    dim = getattr(inner(none), "dim", None)
    kept = torch.ones_like(none(student, teacher, target), dtype=torch.bool)
    kept[0] = kept.view(-1)[-1] = False

    def hidden(tensor: Tensor) -> Tensor:
        return (tensor if dim is None else tensor.movedim(dim, -1))[~kept]

    def spoil(tensor: Tensor, value: float) -> Tensor:
        tensor = tensor.detach().clone()
        (tensor if dim is None or tensor.ndim == kept.ndim else tensor.movedim(dim, -1))[~kept] = value
        return tensor

    def results(
        loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None, mask: Tensor | None
    ) -> list[Tensor]:
        student = student.detach().clone().requires_grad_()
        value = loss(student, teacher, target, mask=mask)
        return [value, *torch.autograd.grad(value.sum(), [student, *_own(loss)])]

    with torch.inference_mode():
        weights = kept.double() * 3
    for loss, mask in ((none, kept), (build(), kept), (build(), weights)):
        expected = results(loss, student, teacher, target, mask)
        assert all(result.isfinite().all() for result in expected)
        assert hidden(expected[1]).abs().max() == 0
        for bad in (math.nan, math.inf):
            labels = None if target is None else spoil(target, -100)
            with torch.autograd.set_detect_anomaly(math.isnan(bad)):  # nor is it found by who looks for NaN
                spoilt = results(loss, spoil(student, bad), spoil(teacher, bad), labels, mask)
            assert all(map(torch.equal, spoilt, expected))
    if learned:  # as if the kept samples were alone, also in a batch norm
        value, slope, *slopes = results(
            build(), student[kept], teacher[kept], None if target is None else target[kept], None
        )
        alone = [value, torch.zeros_like(student).index_put((kept,), slope), *slopes]
        torch.testing.assert_close(expected, alone)


def _check_selects(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    """The mask of a loss of a batch leaves the others as if the hidden samples were not there."""
    dim = getattr(loss, "dim", None)

    def samples(tensor: Tensor) -> Tensor:
        return tensor if dim is None else tensor.movedim(dim, -1)

    kept = torch.ones(len(student) if dim is None else samples(student).shape[:-1], dtype=torch.bool)
    kept[1] = False
    alone = [samples(side)[kept] for side in (student, teacher)] + [None if target is None else target[kept]]
    slope = torch.zeros_like(student)
    samples(slope)[kept] = gradient(loss, *alone)
    spoilt = [side.detach().clone() for side in (student, teacher)]
    for side in spoilt:
        samples(side)[~kept] = math.nan
    for mask in (kept, kept.long()):
        got = loss(*spoilt, target, mask=mask), gradient(loss, *spoilt, target, mask=mask)
        torch.testing.assert_close(got, (loss(*alone), slope))
    value = loss(student, teacher, target, mask=torch.zeros_like(kept))
    assert value == 0
    assert (torch.autograd.grad(value, student)[0] == 0).all()
    refusals.check_selection(loss, student, teacher, target, kept)
