"""The tensors in what models are given and give, whatever holds them: containers, mappings, objects with attributes."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_PLAIN = (str, bytes, int, float, complex, type(None), type, nn.Module)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nested value, also in attributes."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    _find(value, found, {})
    return found


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A nested value with a function of each tensor in its place; what holds tensors is new."""
    return function(value) if isinstance(value, Tensor) else _mapped(function, value, {})


def detached(value: Any) -> Any:
    """A nested value whose tensors have no graph."""
    return value.detach() if isinstance(value, Tensor) else tree_map(_detached, value)


def may_train(tensor: Tensor) -> bool:
    """Whether a gradient flows through a tensor: under `torch.vmap` nobody can tell, since what it batches hides it."""
    if tensor.requires_grad or torch.compiler.is_compiling():
        return tensor.requires_grad
    return torch._C._functorch.is_batchedtensor(tensor)


class Versions:
    """Tensors under a name, and whether they were changed in place since; traced tensors count no changes."""

    def __init__(self) -> None:
        self._noted: dict[str, list[tuple[Tensor, int]]] = {}

    def note(self, name: str, value: Any) -> None:
        """Add the tensors of a nested value; inference tensors count no changes either."""
        if not torch.compiler.is_compiling():
            found = [tensor for tensor in tensors_in(value) if not tensor.is_inference()]
            self._noted.setdefault(name, []).extend((tensor, tensor._version) for tensor in found)

    def changed(self, name: str) -> bool:
        """Whether one was changed."""
        return any(tensor._version != version for tensor, version in self._noted.get(name, ()))


class Given:
    """What a model is given, and whether it has left that alone."""

    def __init__(self, value: Any) -> None:
        self._value, self._versions = value, Versions()
        self._before = [] if torch.compiler.is_compiling() else tensors_in(value)
        self._versions.note("", self._before)
        # A cache of keys and values, by the method that all of `transformers` have: it is filled, not changed.
        leaves = [] if torch.compiler.is_compiling() else tree_leaves(value, is_leaf=_is_cache)
        self._caches = [(leaf, len(tensors_in(leaf))) for leaf in leaves if _is_cache(leaf)]

    def is_left_alone(self) -> bool:
        """Whether no tensor was changed in place or taken away, and no cache filled.

        A model may add what it has computed to anything else.
        """
        left = {id(tensor) for tensor in tensors_in(self._value)} if self._before else ()
        kept = not self._versions.changed("") and all(id(tensor) in left for tensor in self._before)
        return kept and all(len(tensors_in(cache)) == count for cache, count in self._caches)


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and not isinstance(value, nn.Module)


def _detached(leaf: Any) -> Any:
    holds_graph = any(tensor.requires_grad for tensor in tensors_in(leaf))
    return mapped(Tensor.detach, leaf) if holds_graph else leaf


def _find(value: Any, found: list[Tensor], seen: dict[int, Any]) -> None:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif id(leaf) not in seen and (parts := _parts(leaf)):
            seen[id(leaf)] = leaf  # the object too, or another one could get its id
            _find(parts, found, seen)


def _parts(leaf: Any) -> list[Any]:
    """What is held by something that is no container to PyTorch: its entries and attributes."""
    if isinstance(leaf, _PLAIN) or (torch.compiler.is_compiling() and not dataclasses.is_dataclass(leaf)):
        return []
    entries = [*leaf.values()] if isinstance(leaf, dict) else [*leaf] if isinstance(leaf, (list, tuple)) else []
    return [*entries, *_attributes(leaf).values()]


def _attributes(leaf: Any) -> dict[str, Any]:
    named = getattr(leaf, "__dict__", None)
    if named is not None:
        return dict(named)
    return {name: getattr(leaf, name) for name in getattr(leaf, "__dataclass_fields__", ())}  # of one with slots


def _mapped(function: Callable[[Tensor], Tensor], value: Any, made: dict[int, Any]) -> Any:
    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if id(leaf) in made:
            return made[id(leaf)]
        if not _parts(leaf) or not tensors_in(leaf):
            return leaf
        if isinstance(leaf, tuple):
            return tuple.__new__(type(leaf), (_mapped(function, part, made) for part in leaf))
        twin = made[id(leaf)] = copy.copy(leaf)
        if isinstance(leaf, dict):
            dict.update(twin, {key: _mapped(function, part, made) for key, part in leaf.items()})
        elif isinstance(leaf, list):
            list.__setitem__(twin, slice(None), [_mapped(function, part, made) for part in leaf])
        for name, part in _attributes(leaf).items():
            object.__setattr__(twin, name, _mapped(function, part, made))
        return twin

    return tree_map(of_leaf, value)
