"""Names to loss classes: what `register_loss` puts in, `get_loss`, `create_loss` and `list_losses` find."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from torch import nn

GROUP = "distill.losses"

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
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
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
        KeyError: If nobody has that name; the nearest one and the list are in the message.
        ImportError: If the entry point of that name cannot be imported.
        ValueError: If two packages offer that name, or what the entry point names is no `nn.Module` class.

    Examples:
        >>> from distill import get_loss
        >>> get_loss("kl")
        <class 'distill.losses.kl.KLLoss'>
    """
    if name in _registered:
        return _registered[name]
    points = tuple(entry_points(group=GROUP, name=name))
    if not points:
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

    Entry points are listed by name, without importing the packages behind them.

    Returns:
        The names, sorted.

    Examples:
        >>> from distill import list_losses
        >>> "logit" in list_losses()
        True
    """
    return sorted({*_registered, *(point.name for point in entry_points(group=GROUP))})


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise ImportError(f"the loss {point.name!r} of {_origin(point)} cannot be imported: {error}") from error


def _origin(point: EntryPoint) -> str:
    return f"{point.value} (package {point.dist.name if point.dist else 'unknown'})"


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _unknown(name: str) -> str:
    names = list_losses()
    near = difflib.get_close_matches(str(name).lower(), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"a loss name must be a registered one, got {name!r}{hint} Known: {', '.join(names)}"
