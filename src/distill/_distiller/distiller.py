"""The only file that knows models exist: it runs teacher and student, taps them and adds the losses up."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import override

from distill._distiller.taps import Tap, check_path, run_with_taps

_Side: TypeAlias = str | tuple[str, ...]
_Sides: TypeAlias = tuple[_Side, _Side]

_TASK = "task"
_UNNAMED = "distillation"


@dataclass(frozen=True)
class Term:
    """A loss, where its two inputs come from, and its weight in the total.

    Args:
        loss: A loss of this library, or any module called as `loss(student, teacher, target)` that returns a scalar.
            One that also takes a keyword `mask` is given the mask of the Distiller's call.
        at: What the loss compares. None: the outputs of both models. A path, as `named_modules()` spells it: that
            module's output in both; with `":input"` after it, the module's first input. A pair: the student's path
            and the teacher's. In a pair a side may be a tuple of paths: the loss then gets a tuple of tensors.
        weight: What the loss is multiplied by in the total, finite.

    Raises:
        ValueError: If the loss cannot be called so, `at` is of another form, or the weight is not finite.

    Examples:
        >>> from distill import LogitLoss, Term
        >>> Term(LogitLoss(), at="fc:input")
        Term(loss=LogitLoss(reduction='mean', dim=-1), at='fc:input', weight=1.0)
        >>> deep = Term(LogitLoss(), at=("encoder.3", "encoder.11"), weight=0.1)
    """

    loss: nn.Module
    at: _Side | _Sides | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields."""
        _check_loss(self.loss)
        _parse_at(self.at)
        _check_weight("weight", self.weight)


class DistillerOutput(NamedTuple):
    """What a Distiller's call gives.

    Attributes:
        loss: The total, a scalar to call `backward()` on.
        student: What the student returned.
        teacher: What the teacher returned, without a graph.
        terms: Every term by name, unweighted and detached scalars; `"task"` is the task loss.
    """

    loss: Tensor
    student: Any
    teacher: Any
    terms: dict[str, Tensor]


class Distiller(nn.Module):
    """Runs a frozen teacher and a student on the same inputs, and adds the losses up.

        loss = task_weight * task_loss(student, target) + sum_k weight_k * loss_k(student_k, teacher_k, target)

    The teacher is in eval mode and frozen whatever `.train()` says, and runs under `no_grad`. It follows `.to()`,
    `.half()`, `deepcopy` and `pickle`, but is neither in `parameters()` nor in `state_dict()`, so optimizers,
    checkpoints and DistributedDataParallel see the student and the losses' own weights only.

    Args:
        student: The model that learns. `distiller.student` is this very module.
        teacher: The model to imitate. It is put in eval mode and its parameters no longer require a gradient.
        losses: A loss, a `Term`, or a dict of them by name. A single one is named `"distillation"`.
        task_loss: Called as `task_loss(student_output, target)`, gives a scalar. None trains without labels.
        task_weight: What the task loss is multiplied by in the total, finite.
        output: Takes what a model returned and gives the tensor that the task loss and the terms without `at`
            compare. Not needed for models that return a tensor, or an object with the tensor as `.logits`.

    Attributes:
        weights: The weights by name, `"task"` among them: `distiller.weights["hint"] = 0.5` counts from the next call.

    Raises:
        ValueError: If a path names no module, student and teacher share a parameter or buffer, there is no loss at
            all, or an argument is malformed.

    Examples:
        >>> import torch
        >>> from distill import Distiller, LogitLoss
        >>> student, teacher = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)
        >>> distiller = Distiller(student, teacher, LogitLoss())
        >>> optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
        >>> out = distiller(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
        >>> out.loss.backward()
        >>> sorted(out.terms)
        ['distillation', 'task']
    """

    teacher: nn.Module

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        losses: nn.Module | Term | Mapping[str, nn.Module | Term],
        *,
        task_loss: Callable[[Tensor, Tensor], Tensor] | None = nn.CrossEntropyLoss(),  # noqa: B008 - it has no state
        task_weight: float = 1.0,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        terms = _named_terms(losses)
        if task_loss is None and not terms:
            raise ValueError("a Distiller needs a loss, got task_loss=None and no terms")
        if task_loss is not None and (isinstance(task_loss, type) or not callable(task_loss)):
            raise ValueError(
                f"task_loss must be a module or function called as task_loss(student, target), got {task_loss!r}"
            )
        if output is not None and not callable(output):
            raise ValueError(f"output must be a function of what a model returns, got {output!r}")
        self.student = student
        self.losses = nn.ModuleDict({name: term.loss for name, term in terms.items()})
        self.task_loss = task_loss
        self.output = output
        self._weights = _Weights({name: term.weight for name, term in terms.items()})
        if task_loss is not None:
            self._weights.add(_TASK, task_weight)
        elif task_weight != 1.0:
            raise ValueError(f"task_weight needs a task_loss, got task_weight={task_weight!r} and task_loss=None")
        self._sides = {name: _parse_at(term.at) for name, term in terms.items()}
        self._takes_mask = {name: _takes_mask(term.loss) for name, term in terms.items()}
        self._student_paths = _distinct(sides[0] for sides in self._sides.values() if sides)
        self._teacher_paths = _distinct(sides[1] for sides in self._sides.values() if sides)
        for path in self._student_paths:
            check_path(student, path, side="student")
        for path in self._teacher_paths:
            check_path(teacher, path, side="teacher")
        _check_disjoint(self, teacher)
        # Kept past nn.Module's attribute registration: a submodule would be trained, saved and sent by DDP.
        self.__dict__["teacher"] = teacher.eval().requires_grad_(False)

    @property
    def weights(self) -> MutableMapping[str, float]:
        """The weights of the terms by name, `"task"` among them; set an entry to change it."""
        return self._weights

    @override
    def forward(
        self,
        inputs: Any,
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        student: Callable[..., Any] | None = None,
        teacher_inputs: Any = None,
        teacher_output: Any = None,
    ) -> DistillerOutput:
        """Run both models and compute the losses.

        Args:
            inputs: For the models: a tensor is passed as `model(x)`, a tuple as `model(*x)`, a mapping as
                `model(**x)`, anything else (a list, a namedtuple) as `model(x)`.
            target: Labels for the task loss and for the losses that use them.
            mask: Bool or weights, shaped like the per-sample values, for every term whose loss takes a mask.
            student: The student as you have wrapped it (DDP, FSDP, `torch.compile`, a trainer's model), run in place
                of the bare one.
            teacher_inputs: For the teacher, where it sees something else than the student.
            teacher_output: What the teacher would return, computed before; it is then not run.

        Returns:
            The total loss, both models' outputs and the terms.

        Raises:
            ValueError: If an argument is missing or of no use, a tap is not reached or carries no gradient, a model's
                output has no tensor to compare, or a loss refuses its inputs or gives no scalar.
        """
        self._check_call(target, mask, teacher_inputs, teacher_output)
        if teacher_output is None:
            teacher_result, teacher_seen = self._run_teacher(inputs if teacher_inputs is None else teacher_inputs)
        else:
            teacher_result, teacher_seen = teacher_output, {}
        model = self.student if student is None else student
        student_result, student_seen = _run_with_paths(
            self.student, self._student_paths, lambda: _call(model, inputs), side="student"
        )
        if self.training and torch.is_grad_enabled():
            _check_gradients(student_seen)

        terms: dict[str, Tensor] = {}
        if self.task_loss is not None and target is not None:
            terms[_TASK] = _check_scalar(_TASK, self.task_loss(self._tensor(student_result), target))
        for name, loss in self.losses.items():
            sides = self._sides[name]
            ours = _read(student_seen, sides[0]) if sides else self._tensor(student_result)
            theirs = _read(teacher_seen, sides[1]) if sides else self._tensor(teacher_result).detach()
            options = {"mask": mask} if mask is not None and self._takes_mask[name] else {}
            try:
                value = loss(ours, theirs, target, **options)
            except ValueError as error:
                raise ValueError(f"term {name!r}: {error}") from error
            terms[name] = _check_scalar(name, value)
        first, *rest = (self._weights[name] * value for name, value in terms.items())
        return DistillerOutput(
            sum(rest, first), student_result, teacher_result, {name: value.detach() for name, value in terms.items()}
        )

    @override
    def extra_repr(self) -> str:
        """Show the teacher's class and the weights in `repr`."""
        return f"teacher={type(self.teacher).__name__}, weights={dict(self._weights)}"

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher":
            raise AttributeError("a Distiller keeps its teacher for life; build a new Distiller for another one")
        super().__setattr__(name, value)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distiller":
        """Let the teacher follow `.to()`, `.half()`, `.cuda()` and the like."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _check_call(self, target: Any, mask: Any, teacher_inputs: Any, teacher_output: Any) -> None:
        if self.task_loss is not None and target is None:
            raise ValueError("the task loss needs a target, got None; give one, or build with task_loss=None")
        if mask is not None and not any(self._takes_mask.values()):
            raise ValueError(f"a mask needs a term whose loss takes one, got the terms {list(self.losses)}")
        if teacher_output is None:
            return
        if teacher_inputs is not None:
            raise ValueError("teacher_inputs or teacher_output must be given, got both")
        if self._teacher_paths:
            raise ValueError(f"taps need the teacher's forward, got teacher_output and taps at {self._teacher_paths}")

    def _run_teacher(self, inputs: Any) -> tuple[Any, dict[str, Tensor]]:
        if any(module.training for module in self.teacher.modules()):
            self.teacher.eval()
        with torch.no_grad():
            return _run_with_paths(
                self.teacher, self._teacher_paths, lambda: _call(self.teacher, inputs), side="teacher"
            )

    def _tensor(self, result: Any) -> Tensor:
        """The tensor to compare in what a model returned."""
        tensor: Any
        if self.output is not None:
            tensor = self.output(result)
        else:
            tensor = result if isinstance(result, Tensor) else getattr(result, "logits", None)
        if not isinstance(tensor, Tensor):
            what = "output= must give a tensor" if self.output else "a model's output must be a tensor or have .logits"
            got = type(tensor if self.output else result).__name__
            raise ValueError(f"{what}, got {got}; output= takes a function that finds the tensor in it")
        return tensor


class _Weights(MutableMapping[str, float]):
    """Finite weights under fixed names, so that a misspelt name is an error and not a new entry."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._values: dict[str, float] = {}
        for name, weight in weights.items():
            self.add(name, weight)

    def add(self, name: str, weight: float) -> None:
        self._values[name] = _check_weight(f"the weight of {name!r}", weight)

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __setitem__(self, name: str, weight: float) -> None:
        if name not in self._values:
            raise KeyError(f"a weight must belong to one of the terms {list(self._values)}, got {name!r}")
        self.add(name, weight)

    def __delitem__(self, name: str) -> None:
        raise ValueError(f"the terms of a Distiller are fixed; set the weight of {name!r} to 0 instead")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


def _check_weight(what: str, weight: float) -> float:
    if not math.isfinite(weight):
        raise ValueError(f"{what} must be finite, got {weight!r}")
    return weight


def _check_loss(loss: nn.Module) -> None:
    if not isinstance(loss, nn.Module):
        raise ValueError(f"a loss must be an nn.Module, got {loss!r}")
    signature = inspect.signature(loss.forward)
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise ValueError(
            f"a loss must be callable as loss(student, teacher, target), got {type(loss).__name__}{signature}"
        ) from error


def _takes_mask(loss: nn.Module) -> bool:
    parameters = inspect.signature(loss.forward).parameters
    return "mask" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _parse_at(at: Any) -> _Sides | None:
    """The student's and the teacher's side of a term's `at`."""
    if at is None:
        return None
    pair = (at, at) if isinstance(at, str) else at
    if isinstance(pair, tuple) and len(pair) == 2 and all(map(_is_side, pair)):
        return pair
    raise ValueError(f"at must be a path or a pair of paths or of tuples of paths, got {at!r}")


def _is_side(side: Any) -> bool:
    return isinstance(side, str) or (
        isinstance(side, tuple) and len(side) > 0 and all(isinstance(path, str) for path in side)
    )


def _distinct(sides: Iterable[_Side]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path for side in sides for path in ((side,) if isinstance(side, str) else side)))


def _read(seen: Mapping[str, Tensor], side: _Side) -> Tensor | tuple[Tensor, ...]:
    return seen[side] if isinstance(side, str) else tuple(seen[path] for path in side)


def _named_terms(losses: nn.Module | Term | Mapping[str, nn.Module | Term]) -> dict[str, Term]:
    if isinstance(losses, (nn.Module, Term)):
        losses = {_UNNAMED: losses}
    if not isinstance(losses, Mapping):
        raise ValueError(f"losses must be a loss, a Term or a dict of them, got {losses!r}")
    for name in losses:
        if not isinstance(name, str) or not name or "." in name or name == _TASK or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"a term's name must be a string without dots, not {_TASK!r} and no attribute of nn.ModuleDict, "
                f"got {name!r}"
            )
    return {name: loss if isinstance(loss, Term) else Term(loss) for name, loss in losses.items()}


def _run_with_paths(
    model: nn.Module, paths: tuple[str, ...], call: Callable[[], Any], *, side: str
) -> tuple[Any, dict[str, Tensor]]:
    result, seen = run_with_taps(model, [Tap(path) for path in paths], call, side=side)
    for tap, value in seen.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"the {side}'s tap {tap.path!r} must see a tensor, got {type(value).__name__}")
    return result, {tap.path: value for tap, value in seen.items()}


def _call(model: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple) and not hasattr(inputs, "_fields"):
        return model(*inputs)
    return model(inputs)


def _check_scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"term {name!r} must be a scalar tensor (reduction='mean' or 'sum'), got {got}")
    return value


def _check_gradients(seen: Mapping[str, Tensor]) -> None:
    for path, tensor in seen.items():
        if not tensor.requires_grad:
            raise ValueError(
                f"the student's tap {path!r} must carry a gradient in training, but it has none: nothing before it is "
                "trained, or it lies inside reentrant activation checkpointing (use_reentrant=False keeps it)"
            )


def _check_disjoint(trained: nn.Module, teacher: nn.Module) -> None:
    ours = {_storage(tensor): name for name, tensor in _tensors(trained)}
    for name, tensor in _tensors(teacher):
        shared = ours.get(_storage(tensor))
        if shared is not None:
            raise ValueError(
                "student, losses and teacher must share no parameter or buffer (the teacher would be trained), got "
                f"the teacher's {name!r} in {shared!r}; give copy.deepcopy(teacher)"
            )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _storage(tensor: Tensor) -> tuple[str, int]:
    """What tells whether two tensors are the same memory; tensors without memory of their own are told by identity."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"
    pointer = tensor.untyped_storage().data_ptr() if plain else 0
    return ("storage", pointer) if pointer else ("object", id(tensor))
