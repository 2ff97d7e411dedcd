"""Reads what modules are given and give, by their paths, only while somebody listens."""

import difflib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from distill._distiller.stand_ins import Listener, listen, listen_traced
from distill._values import Versions, mapped

_Result = TypeVar("_Result")
_PATH = re.compile(r"(?P<module>[^#]*?)(?P<input>:input)?(#(?P<call>\d+))?")


class Tap(NamedTuple):
    """What to listen to.

    Attributes:
        path: A module path as `named_modules()` spells it, with `":input"` for its first input instead of its output,
            with `"#k"` for its k-th call in a forward, counted from 0: `"layer4.1.relu:input#1"`.
        copy: Whether to keep a copy, which later changes in place do not reach; the gradient flows through it.
    """

    path: str
    copy: bool = False


def parse_path(path: str) -> tuple[str, bool, int | None]:
    """Take a path apart.

    Args:
        path: A module path, with or without `":input"`, with or without `"#k"`, in this order.

    Returns:
        The module's path, whether its input is meant, and the number of the call or None.

    Raises:
        ValueError: If the path has another form.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        raise ValueError(f"a path must be 'module', 'module:input', 'module#k' or 'module:input#k', got {path!r}")
    call = match["call"]
    return match["module"], match["input"] is not None, None if call is None else int(call)


def check_path(model: nn.Module, path: str, *, side: str) -> None:
    """Raise ValueError, with near matches, if a path names no module of the model, or one that cannot be heard.

    Args:
        model: The model that will be tapped.
        path: As `parse_path` takes it.
        side: `"student"` or `"teacher"`, for the message.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names, name = list(modules), parse_path(path)[0]
    if name not in modules:
        near = difflib.get_close_matches(name, names, n=3) or [child for child, _ in model.named_children()]
        known = ", ".join(map(repr, near)) or "none: it has no submodules"
        raise ValueError(f"a tap must name a module of the {side}, got {name!r}; the nearest are {known}")
    if name in scripted(modules):
        raise ValueError(
            f"a tap must name a module that Python runs, but {name!r} of the {side} is in a torch.jit.ScriptModule: "
            "use the model that it was made from, or compare outputs alone"
        )


def scripted(modules: Mapping[str, nn.Module]) -> set[str]:
    """Those of a model's modules, by path, that torch.jit runs: these cannot be tapped."""
    around = [path for path, module in modules.items() if isinstance(module, torch.jit.ScriptModule)]
    return {path for path in modules for outer in around if outer in ("", path) or path.startswith(f"{outer}.")}


@contextmanager
def unfused(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Let PyTorch's transformer encoders run their parts, where these paths name one.

    In eval mode they would compute a layer in one operation, and a padded batch as nested tensors. They look for hooks,
    and would not see a stand-in. The switch is one for all threads.

    Args:
        model: The model that has the paths.
        paths: Of modules in it.
    """
    if not any(_in_encoder(model, path) for path in paths):
        yield
        return
    with _FUSED.lock:
        if not _FUSED.runs:
            _FUSED.before = torch.backends.mha.get_fastpath_enabled()
        _FUSED.runs += 1
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _FUSED.lock:
            _FUSED.runs -= 1
            if not _FUSED.runs:
                torch.backends.mha.set_fastpath_enabled(_FUSED.before)


class _Switch:
    """The switch of PyTorch's fused encoders: as it was before, and how many runs have it off."""

    def __init__(self) -> None:
        self.lock, self.runs, self.before = threading.Lock(), 0, True


_FUSED = _Switch()


def _in_encoder(model: nn.Module, path: str) -> bool:
    inside: nn.Module = model
    for name in path.split(".") if path else ():
        if isinstance(inside, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            return True
        inside = inside.get_submodule(name)
    return False


def run_with_taps(
    model: nn.Module, taps: Sequence[Tap], call: Callable[[], _Result], *, side: str, runs: Any = None
) -> tuple[_Result, dict[Tap, Any]]:
    """Run `call`, and listen at the taps while it runs.

    Nothing hangs on the model before or after, whatever interrupts the call; copies and pickles taken meanwhile carry
    nothing; what other threads run, and a recomputation in backward, is not heard.

    Args:
        model: The model that has the paths; `call` must run it, wrapped or not.
        taps: Distinct taps, whose paths `check_path` has checked.
        call: What runs the model.
        side: `"student"` or `"teacher"`, for the messages.
        runs: What `call` runs, if that is the model wrapped.

    Returns:
        What `call` returns, and what each tap has seen, of any type.

    Raises:
        ValueError: If a module is gone, is not called, or called more than once without `"#k"`, what a tap has seen was
            changed in place later in the forward and the tap has no copy, or replicas of the model run in its place.
    """
    runs = model if runs is None else runs
    if taps and isinstance(runs, nn.DataParallel) and len(runs.device_ids) > 1:
        raise ValueError(
            f"the {side}'s taps must hear the {side} itself, but nn.DataParallel runs replicas of it: use "
            "nn.parallel.DistributedDataParallel, or compare outputs alone"
        )
    listeners = [_Listener(model, tap, side) for tap in taps]
    if torch.compiler.is_compiling():
        result = listen_traced(listeners, call)
    else:
        with unfused(model, [parse_path(tap.path)[0] for tap in taps]):
            result = listen(listeners, call)
    return result, {listener.tap: listener.value() for listener in listeners}


class _Listener(Listener):
    """Keeps what one tap sees in one forward."""

    def __init__(self, model: nn.Module, tap: Tap, side: str) -> None:
        _, takes_input, self.number = parse_path(tap.path)
        super().__init__(_submodule(model, tap.path, side), f"distill {tap.path} {tap.copy}", takes_input=takes_input)
        self.tap = tap
        self.where = f"{side}'s tap {tap.path!r}"
        self.kept: Any = None
        self.versions = Versions()

    @override
    def hear(self, call: int, value: Any) -> None:
        """Keep the value that belongs to the module's call of this number."""
        if call != (self.number or 0):
            return
        # What is traced counts no versions. The compiler drops copies of what does not change.
        copies = self.tap.copy or torch.compiler.is_compiling()
        # Inference tensors count no versions either.
        self.kept = mapped(Tensor.clone if copies else _copy_inference, value)
        self.versions.note(self.where, self.kept)

    def value(self) -> Any:
        """What was seen, once the forward is over."""
        reached = f"was reached {self.calls} times" if self.calls else "was not reached"
        if self.number is None and self.calls != 1:
            way_out = f"; {self.tap.path + '#0'!r} is the first of them" if self.calls else ""
            raise ValueError(f"the {self.where} must be reached once in a forward, but it {reached}{way_out}")
        if self.number is not None and self.number >= self.calls:
            raise ValueError(
                f"the {self.where} must be reached at least {self.number + 1} times in a forward (calls count from 0), "
                f"but it {reached}"
            )
        if self.versions.changed(self.where):
            raise ValueError(
                f"the {self.where} must not change after the tap, but a later operation changed it in place "
                "(inplace=True, +=); copy=True keeps what the module gave"
            )
        return self.kept


def _submodule(model: nn.Module, path: str, side: str) -> nn.Module:
    """The module of a path, which may be gone since the path was checked."""
    try:
        return model.get_submodule(parse_path(path)[0])
    except AttributeError:
        check_path(model, path, side=side)
        raise


def _copy_inference(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
