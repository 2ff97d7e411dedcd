"""Looks at models before and after: what each module gives, and how often student and teacher agree."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from typing_extensions import override

from distill._checks import check_classes, check_count, check_inputs
from distill._distiller.evaluate import call
from distill._distiller.stand_ins import Listener, listen
from distill._distiller.taps import scripted, unfused
from distill._reduction import reduce
from distill._table import Entries, table
from distill._values import Versions

__all__ = ["TapShape", "TapShapes", "agreement", "tap_shapes"]

_DROPOUTS = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout
_WIDTH = 60


@dataclass(frozen=True)
class TapShape:
    """What one module was given and gave in a forward; an entry of `tap_shapes`.

    Attributes:
        calls: How often it was called. A tap at a module called more than once names the call: `"path#0"`.
        inputs: Its first input in each call: a tensor's shape, or the structure of anything else, in words.
        outputs: What it gave in each call, likewise.
        input_overwritten: Whether a first input was changed in place later: a tap at `"path:input"` needs `copy=True`.
        overwritten: The same for what it gave, and a tap at `"path"`.
    """

    calls: int
    inputs: tuple[tuple[int, ...] | str, ...]
    outputs: tuple[tuple[int, ...] | str, ...]
    input_overwritten: bool
    overwritten: bool

    @property
    def shape(self) -> tuple[int, ...] | str | None:
        """What it gave in its first call; None if it was not called."""
        return self.outputs[0] if self.outputs else None


class TapShapes(Entries[TapShape]):
    """What `tap_shapes` gives: a `TapShape` by path, in the order of `named_modules()`; prints as a table.

    Attributes:
        order: By path, when in the forward the module gave its last output; only the order has a meaning. -1 where it
            was not called.
    """

    def __init__(self, entries: Mapping[str, TapShape], order: Mapping[str, int] | None = None) -> None:
        super().__init__(entries)
        self.order = dict(order or {})

    @override
    def __repr__(self) -> str:
        rows = [("path", "calls", "input", "output", "overwritten later")]
        for path, entry in self._entries.items():
            which = {"input": entry.input_overwritten, "output": entry.overwritten}
            rows.append(
                (
                    path or "(the model)",
                    str(entry.calls),
                    _distinct(entry.inputs),
                    _distinct(entry.outputs),
                    ", ".join(name for name, is_so in which.items() if is_so),
                )
            )
        return table(rows)


def tap_shapes(model: nn.Module, inputs: Any, *, depth: int | None = None) -> TapShapes:
    """Run a model once and list the input and output shapes of its modules: the paths that a `Term` can name.

    The model runs in eval mode and without gradients, but a dropout with `inplace=True` counts as changing its input,
    as it does in training. Modes, buffers and random numbers are afterwards as they were. On the device `"meta"` a
    model of any size needs neither weights nor time: build it and the inputs under `torch.device("meta")`. A model that
    looks at values, as DETR does at its masks, cannot run there.

    Args:
        model: The model, a student or a teacher.
        inputs: For the model, as the Distiller takes them: a tensor is passed as `model(x)`, a tuple as `model(*x)`, a
            mapping as `model(**x)`, anything else as `model(x)`.
        depth: Only modules whose path has at most so many names; `"encoder.layers.3"` has three. None: all.

    Returns:
        A mapping from the path of every module to its `TapShape`, but for what torch.jit runs, which has no taps;
        printed, a table.

    Raises:
        TypeError: If the model is no module.
        ValueError: If the depth is no positive integer.

    Examples:
        >>> import torch
        >>> from distill import tap_shapes
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 3))
        >>> shapes = tap_shapes(model, torch.zeros(2, 8))
        >>> shapes["0"].shape
        (2, 4)
        >>> print(shapes)
        path         calls  input   output  overwritten later
        (the model)  1      (2, 8)  (2, 3)
        0            1      (2, 8)  (2, 4)  output
        1            1      (2, 4)  (2, 4)  input
        2            1      (2, 4)  (2, 3)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be an nn.Module, got {type(model).__name__}")
    if depth is not None:
        check_count("depth", depth)
    modules = dict(model.named_modules(remove_duplicate=False))
    unheard = scripted(modules)
    paths = {path: module for path, module in modules.items() if path not in unheard}
    clock = itertools.count()
    looks = {
        id(module): (_Look(module, clock, takes_input=True), _Look(module, clock, takes_input=False))
        for module in paths.values()
    }
    dropped = [
        _Dropped(module, "distill drop", takes_input=True)
        for module in {*paths.values()}
        if isinstance(module, _DROPOUTS) and module.inplace and module.p > 0
    ]
    with as_it_was(model), torch.no_grad(), unfused(model, paths):
        model.eval()
        # The looks first: what they note at the same place is from before.
        listen([*(look for pair in looks.values() for look in pair), *dropped], lambda: call(model, inputs))
    shown = {path: looks[id(module)] for path, module in paths.items() if depth is None or path.count(".") < depth}
    return TapShapes(
        {path: _entry(*pair) for path, pair in shown.items()}, {path: shown[path][1].last for path in shown}
    )


@torch.no_grad()
def agreement(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, dim: int | None = None) -> Tensor:
    """Share of the samples in which student and teacher put the same class first.

    Args:
        student: The student's logits, `(..., C)`, or with the `C` classes along `dim`.
        teacher: The teacher's logits, same shape.
        mask: Bool or weights, one per sample, `(...)`: what a 0 hides counts nowhere.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        A scalar from 0 to 1, float32, or float64 if an input is; 0 where the mask hides all, NaN where logits that
        count are.

    Raises:
        TypeError: If an input is no tensor.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, there is only one class,
            `dim` is out of range or not given where there are four dimensions or more, or the mask has another shape.

    Examples:
        >>> import torch
        >>> from distill import agreement
        >>> student = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> agreement(student, student.flip(0))
        tensor(0.5000)
    """
    dtype = check_inputs(student, teacher, dim=-1 if dim is None else dim, columns=dim in (None, -1))
    dim = check_classes(student, dim=dim)
    (ours, our_class), (theirs, their_class) = student.max(dim), teacher.max(dim)
    same = (our_class == their_class).to(dtype).masked_fill(ours.isnan() | theirs.isnan(), torch.nan)
    return reduce(same, "mean", mask)


class _Dropped(Listener):
    """Counts what a dropout in place is given as changed, which it changes in training alone."""

    @override
    def hear(self, call: int, value: Any) -> None:
        if isinstance(value, Tensor) and not value.is_inference():
            increment_version(value)


class _Look(Listener):
    """Notes what passes, and the version of every tensor in it."""

    def __init__(self, module: nn.Module, clock: Iterator[int], *, takes_input: bool) -> None:
        super().__init__(module, "distill look", takes_input=takes_input)
        self.clock = clock
        self.last = -1
        self.seen: list[tuple[int, ...] | str] = []
        self.versions = Versions()

    @override
    def hear(self, call: int, value: Any) -> None:
        self.last = next(self.clock)
        self.seen.append(_describe(value))
        self.versions.note(self.name, value)

    def overwritten(self) -> bool:
        return self.versions.changed(self.name)


def _entry(given: _Look, gave: _Look) -> TapShape:
    return TapShape(gave.calls, tuple(given.seen), tuple(gave.seen), given.overwritten(), gave.overwritten())


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put modes, buffers and random numbers back: of the CPU, of the GPUs that it is on, and of generators of its own.

    A model may draw in eval mode too, as a masked autoencoder does.
    """
    held = (value for module in model.modules() for value in vars(module).values())
    states = [(value, value.get_state()) for value in held if isinstance(value, torch.Generator)]
    devices = {tensor.device.index for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    modes = {module: module.training for module in model.modules()}
    tables = {module: dict(module._buffers.items()) for module in model.modules()}
    kept = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        for module, mode in modes.items():
            module.training = mode
        for module, table in tables.items():
            for name, buffer in table.items():  # that of torch.jit is no dict
                module._buffers[name] = buffer
        with torch.no_grad():
            for buffer, version, clone in kept:  # a batch norm changes its statistics without a new version
                if buffer._version != version or not (buffer.is_meta or torch.equal(buffer, clone)):
                    buffer.copy_(clone)


def _describe(value: Any) -> tuple[int, ...] | str:
    """A tensor's shape; the structure of anything else in words."""
    return tuple(value.shape) if isinstance(value, Tensor) else _in_words(value)


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_in_words(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_in_words, value)) + "]"
    return "None" if value is None else type(value).__name__


def _distinct(seen: Sequence[tuple[int, ...] | str]) -> str:
    """Each once, shortened for the table."""
    text = " | ".join(dict.fromkeys(map(str, seen)))
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
