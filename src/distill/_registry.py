"""Names to loss classes: what `register_loss` puts in, `get_loss`, `create_loss` and `list_losses` find."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, distributions, entry_points
from typing import Any, TypeVar

from torch import nn

GROUP = "distill.losses"
_NAME = r"[a-z][a-z0-9_]*"

_Loss = TypeVar("_Loss", bound=type[nn.Module])
_registered: dict[str, type[nn.Module]] = {}


def register_loss(name: str) -> Callable[[_Loss], _Loss]:
    """Register a loss class under a name, as a decorator.

    Defining the same class again (running a notebook cell twice, reloading a module) replaces it.

    Args:
        name: The exact name that `create_loss` takes: lower-case letters, digits and underscores.

    Returns:
        A decorator that returns the class unchanged.

    Raises:
        ValueError: If the name is malformed, another class has it, or what is decorated is no `nn.Module` class.

    Examples:
        >>> import torch
        >>> from distill import create_loss, register_loss
        >>> @register_loss("docs_l1")
        ... class L1(torch.nn.Module):
        ...     def forward(self, student, teacher, target=None, *, mask=None):
        ...         return (student - teacher.detach()).abs().mean()
        >>> create_loss("docs_l1")
        L1()
    """
    if not re.fullmatch(_NAME, name):
        raise ValueError(
            f"a loss name must be lower-case letters, digits and underscores, first a letter, got {name!r}"
        )

    def register(cls: _Loss) -> _Loss:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise ValueError(f"register_loss({name!r}) must decorate an nn.Module class, got {cls!r}")
        taken = _registered.get(name)
        if taken is not None and _qualified_name(taken) != _qualified_name(cls):
            raise ValueError(
                f"a loss name must be unique, got {name!r} for {_qualified_name(cls)}: "
                f"{_qualified_name(taken)} has it already"
            )
        _registered[name] = cls
        return cls

    return register


def get_loss(name: str) -> type[nn.Module]:
    """Find a loss class by its registered name.

    A name registered in this process comes first; then the installed packages are asked for an entry point of that
    name in the group `distill.losses`, and only that one is imported.

    Args:
        name: The exact name, one of `list_losses()`.

    Returns:
        The class.

    Raises:
        KeyError: If there is no such name; the nearest one and the list are in the message.
        ImportError: If the entry point of that name cannot be imported, whatever its package raises.
        ValueError: If two packages offer that name, or what the entry point names is no `nn.Module` class.

    Examples:
        >>> from distill import get_loss
        >>> get_loss("kl")
        <class 'distill.losses.kl.KLLoss'>
    """
    if name in _registered:
        return _registered[name]
    points = [point for point in _entry_points() if point.name == name]
    if not points or not re.fullmatch(_NAME, name):
        raise KeyError(_unknown(name))
    if len({point.value for point in points}) > 1:
        raise ValueError(f"a loss name must be unique, got {name!r} from {' and '.join(sorted(map(_origin, points)))}")
    # Importing the module may itself run register_loss(name); registering the same class twice is no conflict.
    loss: type[nn.Module] = register_loss(name)(_load(points[0]))
    return loss


def create_loss(name: str, /, *args: Any, **kwargs: Any) -> nn.Module:
    """Build a loss from its registered name: `get_loss(name)`, called with the arguments.

    Args:
        name: The exact name, one of `list_losses()`.
        *args: Positional arguments of the class.
        **kwargs: Keyword arguments of the class.

    Returns:
        The loss.

    Raises:
        KeyError: As `get_loss`.
        ImportError: As `get_loss`.
        ValueError: As `get_loss`.

    Examples:
        >>> from distill import create_loss
        >>> create_loss("kl", temperature=2.0)
        KLLoss(temperature=2.0, reduction='mean', dim=None)
    """
    return get_loss(name)(*args, **kwargs)


def list_losses() -> list[str]:
    """List the names that `create_loss` takes: the registered ones and those of installed packages.

    Entry points are listed by name, without importing the packages behind them. Left out are malformed names, and a
    name that two packages offer: `create_loss` refuses both. A package whose metadata cannot be read hides only itself.

    Returns:
        The names, sorted.

    Examples:
        >>> from distill import list_losses
        >>> "logit" in list_losses()
        True
    """
    values: dict[str, set[str]] = {}
    for point in _entry_points():
        values.setdefault(point.name, set()).add(point.value)
    offered = {name for name, those in values.items() if len(those) == 1 and re.fullmatch(_NAME, name)}
    return sorted({*_registered, *offered})


def _entry_points() -> list[EntryPoint]:
    """The entry points of the group, of every package whose metadata can be read."""
    try:
        return list(entry_points(group=GROUP))
    except Exception:  # one malformed file fails the call for all packages, with whatever the parser meets first
        found = []
        for package in distributions():
            try:
                found += [point for point in package.entry_points if point.group == GROUP]
            except Exception:  # this package's own names are lost, and no other's
                continue
        return found


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except (Exception, SystemExit) as error:  # a package may raise anything while it is imported
        reason = str(error) if isinstance(error, (ImportError, AttributeError)) else repr(error)
        raise ImportError(f"the loss {point.name!r} of {_origin(point)} cannot be imported: {reason}") from error


def _origin(point: EntryPoint) -> str:
    try:
        package = point.dist.name if point.dist else None  # None too where the metadata give no name
    except Exception:  # metadata that cannot be read
        package = None
    return f"{point.value} (package {package or 'unknown'})"


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _unknown(name: str) -> str:
    names = list_losses()
    like = re.sub(r"_?loss$", "", str(name).lower())  # also of a class or function: KLLoss, kl_loss
    near = [like] if like in names else difflib.get_close_matches(like, names, n=1) if len(like) > 2 else []
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"a loss name must be a registered one, got {name!r}{hint} Known: {', '.join(names)}"
