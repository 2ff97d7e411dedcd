"""Reads what modules are given and give, by their paths, only while somebody listens."""

import copy
import difflib
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

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
    """Raise ValueError, with near matches, if a path names no module of the model.

    Args:
        model: The model that will be tapped.
        path: As `parse_path` takes it.
        side: `"student"` or `"teacher"`, for the message.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    name = parse_path(path)[0]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3) or [child for child, _ in model.named_children()]
        known = ", ".join(map(repr, near)) or "none: it has no submodules"
        raise ValueError(f"a tap must name a module of the {side}, got {name!r}; the nearest are {known}")


def run_with_taps(
    model: nn.Module, taps: Sequence[Tap], call: Callable[[], _Result], *, side: str
) -> tuple[_Result, dict[Tap, Any]]:
    """Run `call`, listening meanwhile.

    Nothing hangs on the model before or after, whatever interrupts the call; copies and pickles taken meanwhile carry
    nothing; what other threads run, and a recomputation in backward, is not heard.

    Args:
        model: The model that has the paths; `call` must run it, wrapped or not.
        taps: Distinct taps, whose paths `check_path` has checked.
        call: What runs the model.
        side: `"student"` or `"teacher"`, for the messages.

    Returns:
        What `call` returns, and what each tap has seen, of any type.

    Raises:
        ValueError: If a module is not called, or called more than once without `"#k"`, or what a tap has seen was
            changed in place later in the forward and the tap has no copy.
    """
    listeners = [_Listener(model, tap, side) for tap in taps]
    listen = _listen_traced if torch.compiler.is_compiling() else _listen
    result = listen(listeners, call)
    return result, {listener.tap: listener.value() for listener in listeners}


class _Listener:
    """Keeps what one tap sees in one forward."""

    def __init__(self, model: nn.Module, tap: Tap, side: str) -> None:
        name, self.takes_input, self.number = parse_path(tap.path)
        self.module = model.get_submodule(name)
        self.tap = tap
        self.where = f"{side}'s tap {tap.path!r}"
        self.calls = 0
        self.kept: Any = None
        self.versions: list[tuple[Tensor, int]] = []

    def hear(self, call: int, value: Any) -> None:
        """Keep the value that belongs to the module's call of this number."""
        if call != (self.number or 0):
            return
        if torch.compiler.is_compiling():
            # What is traced counts no versions. The compiler drops copies of what nobody changes.
            self.kept = tree_map(_copy, value)
        elif self.tap.copy:
            self.kept = tree_map(_copy, value)
        else:
            # Inference tensors count no versions either.
            self.kept = tree_map(_copy_inference, value)
            self.versions = [(leaf, leaf._version) for leaf in tree_leaves(self.kept) if _counts_versions(leaf)]

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
        if any(tensor._version != version for tensor, version in self.versions):
            raise ValueError(
                f"the {self.where} must not change after the tap, but a later operation changed it in place "
                "(inplace=True, +=); copy=True keeps what the module gave"
            )
        return self.kept


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _copy_inference(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _counts_versions(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_inference()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    values = (*args, *kwargs.values())
    return values[0] if values else None


class _Session:
    """Who listens to which module in one thread's forward, and the session that it runs inside of."""

    def __init__(self, listeners: Sequence[_Listener], outer: "_Session | None") -> None:
        self.outer = outer
        self.listeners: dict[int, list[_Listener]] = {}
        for listener in listeners:
            self.listeners.setdefault(id(listener.module), []).append(listener)


class _Here(threading.local):
    """The session of this thread."""

    session: _Session | None = None


_HERE = _Here()


def _listen(listeners: Sequence[_Listener], call: Callable[[], _Result]) -> _Result:
    outer = _HERE.session
    held: list[_Hold | None] = []
    # Everything is undone twice: the first time may be what an interrupt hits.
    try:
        try:
            for listener in listeners:
                _stand_in(listener.module, held)
            _HERE.session = _Session(listeners, outer)
            return call()
        finally:
            held.clear()
            _HERE.session = outer
    finally:
        held.clear()
        _HERE.session = outer


class _Hold:
    """Keeps a stand-in in its place. When the last thread drops its reference, the place is as it was before.

    That happens in one step that nothing can interrupt, since no Python code runs in it.
    """

    watch: Any = None


def _undo(place: dict[str, Any], before: Any) -> Callable[[Any], Any]:
    """What puts back the user's own `forward`, or none, without Python code; a weak reference calls it on death."""
    if before is None:
        return partial(next, map(place.pop, ("forward",)))
    return partial(next, map(place.__setitem__, ("forward",), (before,)))


class _Key(str):
    """The key `"forward"`, which is pickled as `"training"`: the entry of every module that a stand-in passes for."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return str(self)

    @override
    def __reduce__(self) -> Any:
        return str, ("training",)


_FORWARD = _Key("forward")


class _StandIn:
    """Its method `forward` stands in for a module's: an attribute of the instance hides that of the class.

    A model that was compiled before is heard too, which hooks registered later are not. It is a bound method since
    `torch.compile` would compile anew for every other object that can be called.
    """

    def __init__(self, module: nn.Module, before: Any) -> None:
        self.module = module
        self.key = id(module)
        self.before = before
        self.inner = module.forward
        self.hold: Callable[[], _Hold | None] = _nothing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        heard: list[tuple[_Listener, int]] = []
        session = _HERE.session
        while session is not None:
            for listener in session.listeners.get(self.key, ()):
                heard.append((listener, listener.calls))
                listener.calls += 1
            session = session.outer
        for listener, call in heard:
            if listener.takes_input:
                listener.hear(call, _first(args, kwargs))
        output = self.inner(*args, **kwargs)
        for listener, call in heard:
            if not listener.takes_input:
                listener.hear(call, output)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hold":
        """Nothing, in whose place the copy of what was there before comes when the copying ends and its memo dies."""
        passing, end, twin = _Hold(), _Hold(), memo.get(id(self.module))
        if twin is not None:
            passing.watch = weakref.ref(end, _undo(twin.__dict__, copy.deepcopy(self.before, memo)))
            memo[id(end)] = end
        return passing

    @override
    def __reduce__(self) -> Any:
        """What pickle asks for its attribute `forward`, which it stores under the module's key."""
        return SimpleNamespace, (), {"forward": self.module.training if self.before is None else self.before}


def _nothing() -> None:
    return None


def _stand_in(module: nn.Module, held: list[_Hold | None]) -> None:
    """Put a stand-in in its place, or find the one that another thread or an outer session has put there.

    No name may refer to the hold: the traceback of an interrupt would keep it, and the stand-in with it.
    """
    place = module.__dict__
    while True:
        found = place.get("forward")
        other = getattr(found, "__self__", None)
        if isinstance(other, _StandIn):
            held.append(other.hold())
            if held[-1] is not None:
                return
            continue  # the other thread has just undone it
        stand_in = _StandIn(module, found)
        held.append(_Hold())
        stand_in.hold = weakref.ref(held[-1], _undo(place, found))
        method = stand_in.forward
        if found is not None:
            place["forward"] = method
            return
        if place.setdefault(_FORWARD, method) is method:
            return
        stand_in.hold = _nothing  # another thread was first: nothing to undo


def _listen_traced(listeners: Sequence[_Listener], call: Callable[[], _Result]) -> _Result:
    """The same where this very code is traced, which only some versions can do with stand-ins.

    The modules' tables of hooks are replaced for the while (`register_forward_hook` cannot be traced). The tap sees
    what `forward` is given and gives, before and after hooks of the user's.
    """
    kept: list[tuple[nn.Module, str, Any]] = []
    try:
        for listener in listeners:
            _hook(listener, kept)
        return call()
    finally:
        for module, table, before in reversed(kept):
            setattr(module, table, before or OrderedDict())  # the tracer forgets the type of an empty one


def _hook(listener: _Listener, kept: list[tuple[nn.Module, str, Any]]) -> None:
    module, name = listener.module, listener.where + str(listener.tap.copy)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        listener.calls += 1
        listener.hear(listener.calls - 1, _first(args, kwargs))

    def after(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        listener.calls += 1
        listener.hear(listener.calls - 1, output)

    table = "_forward_pre_hooks" if listener.takes_input else "_forward_hooks"
    hooks, flags = getattr(module, table), getattr(module, f"{table}_with_kwargs")
    kept.append((module, table, hooks))
    kept.append((module, f"{table}_with_kwargs", flags))
    # Next to `forward`: the user's come before the input's and after the output's.
    setattr(module, table, {**hooks, name: before} if listener.takes_input else {name: after, **hooks})
    setattr(module, f"{table}_with_kwargs", {**flags, name: True})
