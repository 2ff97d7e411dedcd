"""How a module is listened to, so that nothing hangs on it when nobody does, whatever interrupts the listening."""

import operator
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import nn
from typing_extensions import override

_Result = TypeVar("_Result")


class Listener:
    """Hears what one module is given, or what it gives; a subclass says what it does with it.

    Attributes:
        module: The module.
        name: Tells the listeners of one run apart.
        takes_input: Whether it hears the module's first input instead of its output.
        calls: How often the module was called so far.
    """

    def __init__(self, module: nn.Module, name: str, *, takes_input: bool) -> None:
        self.module = module
        self.name = name
        self.takes_input = takes_input
        self.calls = 0

    def hear(self, call: int, value: Any) -> None:
        """Take the value of the module's call of this number, from 0."""
        raise NotImplementedError

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """As a hook before the module's forward."""
        self.calls += 1
        self.hear(self.calls - 1, first_of(args, kwargs))

    def after(self, _module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        """As a hook after the module's forward."""
        self.calls += 1
        self.hear(self.calls - 1, output)


def listen(listeners: Sequence[Listener], call: Callable[[], _Result]) -> _Result:
    """Run `call` while the listeners hear what their modules do in this thread."""
    outer = getattr(_HERE, "listeners", {})
    together = {key: list(others) for key, others in outer.items()}
    for listener in listeners:
        together.setdefault(id(listener.module), []).append(listener)
    held: list[Any] = []
    # Everything is undone twice: an interrupt may hit the first time.
    try:
        try:
            for listener in listeners:
                _put(listener.module, held)
            _HERE.listeners = together
            return call()
        finally:
            held.clear()
            _HERE.listeners = outer
    finally:
        held.clear()
        _HERE.listeners = outer


def listen_traced(listeners: Sequence[Listener], call: Callable[[], _Result]) -> _Result:
    """The same where this very code is traced, which not every version can do with stand-ins.

    The modules' tables of hooks are replaced for the while (`register_forward_hook` cannot be traced), next to
    `forward`: before what it gives reaches the user's own hooks, and after what it is given has.
    """
    kept: list[tuple[nn.Module, str, Any]] = []
    try:
        for listener in listeners:
            _hook(listener, kept)
        return call()
    finally:
        for module, table, before in reversed(kept):
            setattr(module, table, before or OrderedDict())  # the tracer forgets the type of an empty one


def first_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first input of a call, or None."""
    values = (*args, *kwargs.values())
    return values[0] if values else None


# Who listens in this thread: `listeners`, lists by the identity of the module. A default in a class would be what
# PyTorch 2.5 takes for the value where it traces.
_HERE = threading.local()


class _Hold:
    """Keeps a stand-in in its place. When the last thread drops its reference, everything is as it was before.

    That is one step that nothing can interrupt: weak references call back C functions only.
    """


class _Place:
    """Where a stand-in is: what was in its place, the reference to its hold, and those that undo it."""

    def __init__(self, before: Any, hold: "weakref.ref[_Hold]", undo: "list[weakref.ref[_Hold]]") -> None:
        self.before = before
        self.hold = hold
        self.undo = undo


# All by the identity of the module.
_STAND_INS: dict[int, Any] = {}  # for life: `torch.compile` compiles anew where it finds another object
_PLACES: dict[int, _Place] = {}  # those in place
_INNER: dict[int, Callable[..., Any]] = {}  # what these stand in for
_MODULES: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


class _Key(str):
    """The key `"forward"`, which copies and pickles as `"training"`: every module has this entry once already."""

    __slots__ = ()

    @override
    def __reduce__(self) -> Any:
        return str, ("training",)


_FORWARD = _Key("forward")


def _stand_in(key: int) -> Any:
    """What stands in for a module's `forward`: an attribute of the instance hides that of the class.

    A model that was compiled before is heard too, which hooks registered later are not.
    """
    made = partial(_heard, key)
    made.__dict__["__reduce_ex__"] = partial(_reduced, key)
    return _STAND_INS.setdefault(key, made)


def _heard(key: int, /, *args: Any, **kwargs: Any) -> Any:
    """Run a module's own `forward` and let this thread's listeners hear it."""
    heard: list[tuple[Listener, int]] = []
    for listener in getattr(_HERE, "listeners", {}).get(key, ()):
        heard.append((listener, listener.calls))
        listener.calls += 1
    for listener, call in heard:
        if listener.takes_input:
            listener.hear(call, first_of(args, kwargs))
    output = _INNER[key](*args, **kwargs) if key in _INNER else _MODULES[key].forward(*args, **kwargs)
    for listener, call in heard:
        if not listener.takes_input:
            listener.hear(call, output)
    return output


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    """A module's `forward` from its class, as a function: `torch.compile` compiles anew for another bound method."""
    bound = module.forward
    forward = getattr(bound, "__func__", None)
    if forward is None:  # a static method, or a function of C
        return bound

    def inner(*args: Any, **kwargs: Any) -> Any:
        return forward(module, *args, **kwargs)

    return inner


def _reduced(key: int, _protocol: Any) -> Any:
    """What copies and pickles have for a stand-in: what was there before, or under `_Key` the module's `training`."""
    place = _PLACES.get(key)
    before = None if place is None else place.before
    return operator.getitem, ((_MODULES[key].training if before is None else before,), 0)


def _put(module: nn.Module, held: list[Any]) -> None:
    """Put the stand-in in its place, or join the thread or the outer run that has put it there.

    No name may refer to a hold: the traceback of an interrupt would keep it, and the stand-in with it.
    """
    key, own = id(module), module.__dict__
    stand_in = _stand_in(key)
    _MODULES[key] = module
    while True:
        place = _PLACES.get(key)
        if place is None:
            before = own.get("forward")
            inner = _own_forward(module) if before is None else before
            held.append(_Hold())
            undo = [weakref.ref(held[-1], partial(next, step)) for step in _steps_back(key, own, before)]
            made = _Place(before, weakref.ref(held[-1]), undo)
            place = _PLACES.setdefault(key, made)
            if place is made:
                _INNER[key] = inner
                break
            undo.clear()  # another thread was first: nothing to undo  # pragma: no cover
        held.append(place.hold())
        if held[-1] is not None:  # else the other thread has just left
            break
    if place.before is None:
        own[_FORWARD] = stand_in
    else:
        own["forward"] = stand_in


def _steps_back(key: int, own: dict[str, Any], before: Any) -> tuple[Iterator[Any], ...]:
    """Each does its step when it is asked for its next element; the last is taken first."""
    back = map(own.pop, ("forward",), (None,)) if before is None else map(own.__setitem__, ("forward",), (before,))
    return map(_PLACES.pop, (key,), (None,)), map(_INNER.pop, (key,), (None,)), back


def _hook(listener: Listener, kept: list[tuple[nn.Module, str, Any]]) -> None:
    module = listener.module
    table = "_forward_pre_hooks" if listener.takes_input else "_forward_hooks"
    hooks, flags = getattr(module, table), getattr(module, f"{table}_with_kwargs")
    kept.append((module, table, hooks))
    kept.append((module, f"{table}_with_kwargs", flags))
    mine = {listener.name: listener.before if listener.takes_input else listener.after}
    setattr(module, table, {**hooks, **mine} if listener.takes_input else {**mine, **hooks})
    setattr(module, f"{table}_with_kwargs", {**flags, listener.name: True})
