"""Reads a module's output or first input by its path, only while somebody listens."""

import difflib
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

    An attribute of the instance hides the class's `forward`; deleting it leaves no trace. Forward hooks would say the
    same in eager mode, but `torch.compile` can neither trace their registration nor see hooks that come to a model
    after it was compiled, and does see this.
    """

    def __init__(self, model: nn.Module, path: str, side: str) -> None:
        self.module = model.get_submodule(path.removesuffix(_INPUT))
        self.path = path
        self.where = f"{side}'s tap {path!r}"
        self.seen: list[Any] = []
        self.versions: list[int] = []
        self.hidden: Any = None

    def start(self) -> None:
        forward = self.module.forward
        self.hidden = self.module.__dict__.get("forward")
        if self.path.endswith(_INPUT):

            def listen(*args: Any, **kwargs: Any) -> Any:
                self.keep(args[0] if args else next(iter(kwargs.values()), None))
                return forward(*args, **kwargs)
        else:

            def listen(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                self.keep(output)
                return output

        self.module.__dict__["forward"] = listen

    def stop(self) -> None:
        if self.hidden is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.hidden

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
