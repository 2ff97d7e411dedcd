"""How a module is listened to: a stand-in for its `forward`, there only while somebody listens.

Hooks would be shorter, but taps promise what hooks cannot give:

1. A model that `torch.compile` has compiled before is heard. Its graph does not look at hooks that are registered
   later; it does look whether the instance has a `forward` of its own.
2. Nothing stays on the model, whatever interrupts the run. An interrupt may come between any two steps of Python, so no
   `finally` can be relied on to undo several things. Here everything is undone when the last reference to one object
   goes, by functions of C, which is one step.
3. Threads that share a model hear their own run only: who listens is kept per thread, and the stand-in is taken away
   when the last of them goes, which is the same last reference.
4. A copy or pickle of a module taken inside a forward carries nothing: while the stand-in is there, so is a
   `__getstate__` that leaves both out. (Only what copies a `__dict__` by itself gets past that, as DataParallel does,
   which the Distiller refuses.)
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import nn

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

    The modules' tables of hooks are replaced while it runs (`register_forward_hook` cannot be traced). Ours are next to
    `forward`: they get an output before the user's own hooks, and an input after them.
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


# Who listens in this thread: `listeners`, lists by the identity of the module. It has no default on a class: tracing,
# PyTorch 2.5 would take that for the value.
_HERE = threading.local()


class _Hold:
    """What every run that listens to a module refers to: when it dies, the stand-in goes."""


class _Place(NamedTuple):
    """A stand-in in place.

    Attributes:
        forward: What it stands in for.
        before: What the module's `__dict__` had in the places of the stand-ins, if anything.
        hold: Refers to the hold.
        undo: Refer to it too; each takes its step back when it dies.
    """

    forward: Callable[..., Any]
    before: dict[str, Any]
    hold: "weakref.ref[_Hold]"
    undo: "list[weakref.ref[_Hold]]"


# All by the identity of the module.
_PLACES: dict[int, _Place] = {}
_STAND_INS: dict[int, dict[str, Any]] = {}  # for life: `torch.compile` compiles anew where it finds another object
_MODULES: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def _heard(key: int, /, *args: Any, **kwargs: Any) -> Any:
    """Stand in for a module's `forward`: run that, and let this thread's listeners hear it."""
    heard: list[tuple[Listener, int]] = []
    for listener in getattr(_HERE, "listeners", {}).get(key, ()):
        heard.append((listener, listener.calls))
        listener.calls += 1
    for listener, call in heard:
        if listener.takes_input:
            listener.hear(call, first_of(args, kwargs))
    # A forward that was passed on, to a recomputation in backward for example, is called after its time.
    output = (_PLACES.get(key) or _MODULES[key]).forward(*args, **kwargs)
    for listener, call in heard:
        if not listener.takes_input:
            listener.hear(call, output)
    return output


def _state(key: int) -> Any:
    """Stand in for a module's `__getstate__`, which copies and pickles ask: its state without the stand-ins."""
    module, place, ours = _MODULES[key], _PLACES.get(key), _STAND_INS[key]
    before = {} if place is None else place.before
    own = before.get("__getstate__") or partial(getattr(type(module), "__getstate__", vars), module)
    state = own()
    if not isinstance(state, dict):
        return state
    changed = {name for name, value in state.items() if name in ours and value is ours[name]}
    return {
        name: before[name] if name in changed else value
        for name, value in state.items()
        if name not in changed or name in before
    }


def _put(module: nn.Module, held: list[Any]) -> None:
    """Put the stand-ins in place, or join the thread or the outer run that has put them there.

    No name may refer to a hold: the traceback of an interrupt would keep it, and the stand-ins with it.
    """
    key, own = id(module), module.__dict__
    _MODULES[key] = module
    ours = _STAND_INS.setdefault(key, {"forward": partial(_heard, key), "__getstate__": partial(_state, key)})
    while True:
        place = _PLACES.get(key)
        if place is None:
            before = {name: value for name in ours if (value := own.get(name)) is not None}
            forward = before.get("forward") or _own_forward(module)
            if any(value in ours.values() for value in (*before.values(), forward)):
                continue  # another thread has put it there since we looked  # pragma: no cover
            held.append(_Hold())
            made = _Place(forward, before, weakref.ref(held[-1]), [])
            # The references call back in the reverse order: the place is free once all else is as it was.
            made.undo.append(weakref.ref(held[-1], _once(_PLACES.pop, key, None)))
            for name in ours:
                back = _once(own.__setitem__, name, before[name]) if name in before else _once(own.pop, name, None)
                made.undo.append(weakref.ref(held[-1], back))
            place = _PLACES.setdefault(key, made)
            if place is made:
                break
            made.undo.clear()  # another thread was first: nothing to undo  # pragma: no cover
        held.append(place.hold())
        if held[-1] is not None:  # else the other thread has just left
            break
    for name, stand_in in ours.items():
        own[name] = stand_in


def _once(function: Callable[..., Any], *arguments: Any) -> Callable[[Any], Any]:
    """A callback for a weak reference: calls a function of C with these arguments, itself in C."""
    return partial(next, map(function, *([argument] for argument in arguments)))


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    """A module's `forward` from its class, as a function: `torch.compile` compiles anew for another bound method."""
    bound = module.forward
    forward = getattr(bound, "__func__", None)
    if forward is None:  # a static method, or a function of C
        return bound

    def own(*args: Any, **kwargs: Any) -> Any:
        return forward(module, *args, **kwargs)

    return own


def _hook(listener: Listener, kept: list[tuple[nn.Module, str, Any]]) -> None:
    module = listener.module
    table = "_forward_pre_hooks" if listener.takes_input else "_forward_hooks"
    hooks, flags = getattr(module, table), getattr(module, f"{table}_with_kwargs")
    kept.append((module, table, hooks))
    kept.append((module, f"{table}_with_kwargs", flags))
    mine = {listener.name: listener.before if listener.takes_input else listener.after}
    setattr(module, table, {**hooks, **mine} if listener.takes_input else {**mine, **hooks})
    setattr(module, f"{table}_with_kwargs", {**flags, listener.name: True})
