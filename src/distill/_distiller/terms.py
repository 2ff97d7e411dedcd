"""What a Distiller is told and what it gives: terms, the sides they compare, outputs."""

from __future__ import annotations

import copy as copying
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from distill._checks import check_flag, is_function
from distill._distiller.taps import Tap, check_path, parse_path
from distill._distiller.weights import check_weight
from distill.topk import TopK

Side: TypeAlias = str | tuple[str, ...] | Callable[[Any], Any] | None
Adapter: TypeAlias = Callable[[Any], Any] | tuple[Callable[[Any], Any], ...]

TASK = "task"
_UNNAMED = "distillation"


@dataclass(frozen=True)
class Term:
    """A loss, where its two inputs come from, and its weight in the total.

    Args:
        loss: A loss of this library, or any module called as `loss(student, teacher, target)` that returns a scalar.
            One that also takes a keyword `mask` can be given the mask of the Distiller's call.
        at: What the loss compares. None: the outputs of both models. Otherwise one side for both models, or a pair of
            the student's side and the teacher's. A side is

            - a path: the output of the module that `named_modules()` calls so, as its `forward` returns it, before
              hooks of yours change it. `":input"` after it takes the module's first input instead, `"#k"` its k-th call
              in a forward, from 0, where it is called more than once.
            - a tuple of paths: the loss gets a tuple.
            - a function of what the model returned: `lambda out: out.hidden_states[4]`.
            - None, for the teacher in a pair: nothing. The loss is one of the student alone and gets None there.
        weight: What the loss is multiplied by in the total, a finite number. 0 switches the term off.
        student: Adapter for the student's side: a module or function, applied before the loss sees it, or a tuple of
            them for a tuple of paths (`distill.adapt` has the usual ones). A module may learn: it trains and is saved
            with the losses.
        teacher: Adapter for the teacher's side. A constant, in eval mode: a module with something to learn is refused.
        copy: Compare a copy of what the paths give, taken before a later operation of the model overwrites it
            (`inplace=True`, `+=`). Without it such a change is an error.

    Raises:
        ValueError: If the loss is no module or cannot be called so, `at` has another form or is a module with
            parameters or buffers, the weight is not finite, a side that is None has an adapter, the teacher's adapter
            has something to learn, or `copy` is set and there is no path.
        TypeError: If the weight is no number (a tensor would not be trained), or an adapter cannot be called.

    Examples:
        >>> from distill import LogitLoss, Term, adapt
        >>> Term(LogitLoss(), at="fc:input")
        Term(loss=LogitLoss(reduction='mean', dim=-1), at='fc:input', weight=1.0)
        >>> deep = Term(LogitLoss(), at=("encoder.3", "encoder.11"), weight=0.1)
        >>> swin = Term(LogitLoss(), at=("layer4", "layers.3"), teacher=adapt.NHWC())
    """

    loss: nn.Module
    at: Side | tuple[Side, Side] = None
    weight: float = 1.0
    _: KW_ONLY
    student: Adapter | None = field(default=None, repr=False)
    teacher: Adapter | None = field(default=None, repr=False)
    copy: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        """Check the fields."""
        check_loss(self.loss)
        check_weight("weight", self.weight)
        sides = parse_at(self.at)
        for side in sides:
            held = (
                [name for name, _ in (*side.named_parameters(), *side.named_buffers())]
                if isinstance(side, nn.Module)
                else []
            )
            if held:
                raise ValueError(
                    "a side of at must have no parameters or buffers (they would not be trained, moved or saved), got "
                    f"{type(side).__name__} with {held[:3]}; an adapter (student=, teacher=) may have them"
                )
        for name, adapter, side in (("student", self.student, sides[0]), ("teacher", self.teacher, sides[1])):
            _check_adapter(name, adapter, side)
        for module in adapter_modules(self.teacher):
            learned = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
            if learned:
                raise ValueError(
                    f"the teacher's adapter must have nothing to learn, got {type(module).__name__} with {learned}; "
                    "adapt the student, or freeze it with requires_grad_(False)"
                )
        check_flag("copy", self.copy)
        if self.copy and not any(paths_of(side) for side in sides):
            raise ValueError(f"copy=True must have a path to copy from, got at={self.at!r}")


class DistillerOutput(NamedTuple):
    """The result of a Distiller's call.

    Attributes:
        loss: The total, a scalar to call `backward()` on.
        student: What the student returned.
        teacher: What the teacher returned, without a graph; None where it was not needed.
        terms: Every term that was computed by name, unweighted and detached scalars; `"task"` is the task loss.
        losses: The same with their graph, for methods that balance gradients.
    """

    loss: Tensor
    student: Any
    teacher: Any
    terms: dict[str, Tensor]
    losses: dict[str, Tensor] = {}  # noqa: RUF012 - a default of a NamedTuple


class TeacherOutput(NamedTuple):
    """A teacher's output and features: for `teacher_output=`, or the result of a function that is the teacher.

    Attributes:
        output: What the teacher returned; None where only features are compared.
        features: What the terms' paths for the teacher would see, by path.

    Examples:
        >>> import torch
        >>> from distill import Distiller, HintLoss, TeacherOutput, Term
        >>> student = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 3))
        >>> distiller = Distiller(student, None, Term(HintLoss(), at=("0", "encoder.0")), task_loss=None)
        >>> stored = TeacherOutput(features={"encoder.0": torch.randn(2, 4)})
        >>> distiller(torch.randn(2, 8), teacher_output=stored).loss.shape
        torch.Size([])
    """

    output: Any = None
    features: Mapping[str, Any] = {}


Term.__module__ = DistillerOutput.__module__ = TeacherOutput.__module__ = "distill"


def check_loss(loss: nn.Module) -> None:
    """Raise ValueError if a loss is no module that is called as the library's losses are."""
    if not isinstance(loss, nn.Module):
        raise ValueError(f"a loss must be an nn.Module, got {loss!r}")
    signature = inspect.signature(loss.forward)
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise ValueError(
            f"a loss must be callable as loss(student, teacher, target), got {type(loss).__name__}{signature}"
        ) from error


def takes(function: Any, keyword: str) -> bool:
    """Whether a loss, module or function, takes a keyword."""
    try:
        parameters = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    except (TypeError, ValueError):  # some built-in functions have no signature
        return False
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def check_task_loss(task_loss: Any, *, there: bool) -> tuple[bool, bool]:
    """Whether a task loss takes a target, and a mask; raise ValueError if it cannot be called at all.

    Args:
        task_loss: The task loss.
        there: Whether the Distiller was built with one: only then it has a weight, and another may take its place.

    Raises:
        AttributeError: If there was none, or is none now.
    """
    if (task_loss is not None) != there:
        raise AttributeError(
            "a Distiller has a task loss or none from the start: distiller.weights['task'] = 0 switches it off, got "
            f"{task_loss!r} where {'there is one' if there else 'task_loss=None was built'}"
        )
    with_mask = task_loss is not None and takes(task_loss, "mask")
    if task_loss is None or _binds(task_loss, None, None):
        return True, with_mask
    if not _binds(task_loss, None):
        raise ValueError(
            f"task_loss must be a module or function called as task_loss(student_output, target), got {task_loss!r}"
        )
    return False, with_mask


def _binds(function: Any, *arguments: Any) -> bool:
    if not is_function(function):
        return False
    try:
        inspect.signature(function.forward if isinstance(function, nn.Module) else function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def named_terms(losses: nn.Module | Term | Mapping[str, nn.Module | Term]) -> dict[str, Term]:
    """The terms by name: a single one is called `"distillation"`."""
    if isinstance(losses, (nn.Module, Term)):
        losses = {_UNNAMED: losses}
    if not isinstance(losses, Mapping):
        raise ValueError(f"losses must be a loss, a Term or a dict of them, got {losses!r}")
    for name in losses:
        if not isinstance(name, str) or not name or "." in name or name == TASK or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"a term's name must be a string without dots, not {TASK!r} and no attribute of nn.ModuleDict, "
                f"got {name!r}"
            )
    return {name: loss if isinstance(loss, Term) else Term(loss) for name, loss in losses.items()}


def whole_output(result: Any) -> Any:
    """Stands for the side of a term without `at`: the tensor that the Distiller finds in a model's output."""
    return result  # pragma: no cover - compared by identity, never called


def parse_at(at: Any) -> tuple[Side, Side]:
    """The student's and the teacher's side of a term's `at`."""
    if at is None:
        return whole_output, whole_output
    if isinstance(at, str) or is_function(at):
        at = (at, at)
    if not (isinstance(at, tuple) and len(at) == 2 and _is_side(at[0]) and (at[1] is None or _is_side(at[1]))):
        raise ValueError(
            "at must be a path, a function of what a model returned, or a pair (student's side, teacher's side) of "
            f"paths, tuples of paths and functions, the teacher's possibly None, got {at!r}"
        )
    for path in (*paths_of(at[0]), *paths_of(at[1])):
        parse_path(path)
    return at


def _is_side(side: Any) -> bool:
    if isinstance(side, tuple):
        return len(side) > 0 and all(isinstance(path, str) for path in side)
    return isinstance(side, str) or is_function(side)


def paths_of(side: Side) -> tuple[str, ...]:
    """The paths of a side: none if it is a function or nothing."""
    return (side,) if isinstance(side, str) else side if isinstance(side, tuple) else ()


def check_paths(model: nn.Module, sides: Iterable[Side], *, side: str) -> None:
    """Raise ValueError if a path of these sides names no module of the model."""
    for path in (path for each in sides for path in paths_of(each)):
        check_path(model, path, side=side)


@dataclass(frozen=True)
class Compared:
    """What a term compares: its sides, whether they are copied, and their adapters."""

    student: Side
    teacher: Side
    copy: bool
    adapt_student: Adapter | None
    adapt_teacher: Adapter | None

    @classmethod
    def of(cls, term: Term) -> Compared:
        """What a term says of it."""
        return cls(*parse_at(term.at), term.copy, term.student, term.teacher)

    def apart_from(self, trained: set[nn.Module]) -> Compared:
        """The same with a teacher's adapter that is in eval mode, also where the student's side has that module too."""
        modules = adapter_modules(self.adapt_teacher)
        if not any(part in trained for module in modules for part in module.modules()):
            return self
        if any(True for module in modules for _ in module.buffers()):
            raise ValueError(
                "the teacher's adapter must have no buffers in common with what trains (they would be of both sides), "
                f"got {[type(module).__name__ for module in modules]}; give it a module of its own "
                "(copy.deepcopy)"
            )
        holds = any(True for module in modules for _ in module.parameters())  # frozen, and the same for both
        return self if holds else replace(self, adapt_teacher=copying.deepcopy(self.adapt_teacher))

    def plain(self) -> tuple[Any, ...]:
        """The same for a pickle, which names nothing of this file."""
        sides = (... if side is whole_output else side for side in (self.student, self.teacher))
        return (*sides, self.copy, self.adapt_student, self.adapt_teacher)

    @classmethod
    def from_plain(cls, plain: tuple[Any, ...]) -> Compared:
        """What `plain` gave."""
        sides = [whole_output if side is ... else side for side in plain[:2]]
        return cls(sides[0], sides[1], *plain[2:])


def by_name(what: str, given: Any, on: list[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """What each term that is on gets of a target or mask: the same, or its entry of a mapping."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(on, given)
    for name in given:
        if name not in known:
            way = f"a {what} that is itself a mapping goes in as {{'task': {what}}}"
            raise KeyError(f"a mapping as {what} must have names of terms, {[*known]}, got {name!r}; {way}")
    return {name: given.get(name) for name in on}


def taps_of(sides: Iterable[tuple[Side, bool]]) -> list[Tap]:
    """What must be listened to for sides with their `copy`, each once."""
    return list(dict.fromkeys(Tap(path, copy) for side, copy in sides for path in paths_of(side)))


def _check_adapter(name: str, adapter: Any, side: Side) -> None:
    if adapter is None:
        return
    if side is None:
        raise ValueError(f"{name}= must have something to adapt, got an adapter for a side that is None")
    parts = adapter if isinstance(adapter, tuple) else (adapter,)
    if isinstance(adapter, tuple) and (not isinstance(side, tuple) or len(adapter) != len(side)):
        raise ValueError(
            f"{name}= must be one adapter, or one for each of a tuple of paths, got {len(adapter)} for {side!r}"
        )
    for part in parts:
        if not is_function(part):
            raise TypeError(f"{name}= must be a module or function of what was tapped, got {part!r}")


def adapter_modules(adapter: Adapter | None) -> list[nn.Module]:
    """The modules of an adapter: what may have parameters and buffers."""
    parts = adapter if isinstance(adapter, tuple) else (adapter,)
    return [part for part in parts if isinstance(part, nn.Module)]


def adapted(value: Any, adapter: Adapter | None) -> Any:
    """What the loss is given: the value, through its adapter; tensors, or a tuple of them, where there is none."""
    if isinstance(adapter, tuple):
        return tuple(part(entry) for part, entry in zip(adapter, value, strict=True))
    if adapter is not None:
        return adapter(value)
    for part in value if isinstance(value, (tuple, list)) and not hasattr(value, "_fields") else (value,):
        if not isinstance(part, (Tensor, TopK)):
            where = "" if part is value else f"{type(value).__name__} with "
            raise ValueError(
                f"what is compared must be a tensor or a tuple of tensors, got {where}{type(part).__name__}; an "
                "adapter can take it apart (adapt.Select), or tap a module inside it"
            )
    return value
