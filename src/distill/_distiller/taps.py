"""Reads a module's output or first input by its path, only while somebody listens."""

import difflib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_INPUT = ":input"
_Result = TypeVar("_Result")


def check_path(model: nn.Module, path: str, *, side: str) -> None:
    """Raise ValueError, with near matches, if a path names no module of the model.

    Args:
        model: The model that will be tapped.
        path: A module path as `named_modules()` spells it, with or without `":input"`.
        side: `"student"` or `"teacher"`, for the message.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    name = path.removesuffix(_INPUT)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3) or [child for child, _ in model.named_children()]
        known = ", ".join(map(repr, near)) or "none: it has no submodules"
        raise ValueError(f"a tap must name a module of the {side}, got {name!r}; the nearest are {known}")


def run_with_taps(
    model: nn.Module, paths: Sequence[str], call: Callable[[], _Result], *, side: str
) -> tuple[_Result, dict[str, Tensor]]:
    """Run `call`, listening at the paths meanwhile.

    Nothing hangs on the model before or after, so a recomputation in backward is not heard, and the model pickles
    and exports as if never tapped.

    Args:
        model: The model that has the paths; `call` must run it, wrapped or not.
        paths: Distinct module paths, each with or without `":input"`; checked by `check_path`.
        call: What runs the model.
        side: `"student"` or `"teacher"`, for the messages.

    Returns:
        What `call` returns, and the tensor seen at each path.

    Raises:
        ValueError: If a path is not reached or is reached twice, if what it sees is no tensor, or if that tensor is
            changed in place later in the forward.
    """
    listeners = [_Listener(model, path, side) for path in paths]
    started: list[_Listener] = []
    try:
        for listener in listeners:
            listener.start()
            started.append(listener)
        result = call()
    finally:
        for listener in reversed(started):
            listener.stop()
    return result, {listener.path: listener.tensor() for listener in listeners}


class _Listener:
    """Stands in for one module's `forward` while the model runs, and keeps what passes.

    An attribute of the instance hides the class's `forward`, and deleting it leaves no trace; a model that was compiled
    before is heard too, which hooks registered later are not. Inside a traced forward, where only some versions of
    `torch.compile` can follow that, the module's table of hooks is replaced for the while instead
    (`register_forward_hook` cannot be traced).
    """

    def __init__(self, model: nn.Module, path: str, side: str) -> None:
        self.module = model.get_submodule(path.removesuffix(_INPUT))
        self.path = path
        self.where = f"{side}'s tap {path!r}"
        self.seen: list[Any] = []
        self.versions: list[int] = []
        self.hidden: Any = None
        self.tables: dict[str, Any] = {}

    def start(self) -> None:
        if torch.compiler.is_compiling():
            for table, entry in (("_forward_hooks", self.hook), ("_forward_hooks_with_kwargs", True)):
                self.tables[table] = getattr(self.module, table)
                setattr(self.module, table, {**self.tables[table], self.where: entry})
        else:
            self.hidden = self.module.__dict__.get("forward")
            self.module.__dict__["forward"] = self.stand_in(self.module.forward)

    def stop(self) -> None:
        for table, kept in self.tables.items():
            setattr(self.module, table, kept or OrderedDict())  # the tracer forgets the type of an empty one
        if self.hidden is not None:
            self.module.__dict__["forward"] = self.hidden
        elif not self.tables:
            del self.module.__dict__["forward"]

    def stand_in(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def listen(*args: Any, **kwargs: Any) -> Any:
            if self.path.endswith(_INPUT):
                self.keep(_first(args, kwargs))
                return forward(*args, **kwargs)
            output = forward(*args, **kwargs)
            self.keep(output)
            return output

        return listen

    def hook(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.keep(_first(args, kwargs) if self.path.endswith(_INPUT) else output)

    def keep(self, value: Any) -> None:
        self.seen.append(value)
        # Inference tensors count no versions, and torch.compile cannot compare them: what it traces goes unchecked.
        if isinstance(value, Tensor) and not torch.compiler.is_compiling() and not value.is_inference():
            self.versions.append(value._version)

    def tensor(self) -> Tensor:
        if len(self.seen) != 1:
            times = "was not reached" if not self.seen else f"was reached {len(self.seen)} times"
            raise ValueError(f"the {self.where} must be reached once in a forward, but it {times}")
        value = self.seen[0]
        if not isinstance(value, Tensor):
            raise ValueError(f"the {self.where} must see a tensor, got {type(value).__name__}; tap a module inside it")
        if self.versions and value._version != self.versions[0]:
            raise ValueError(
                f"the {self.where} must not change after the tap, but a later operation changed it in place "
                "(inplace=True, +=); tap another module or make that operation out of place"
            )
        return value


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    values = (*args, *kwargs.values())
    return values[0] if values else None
