"""The weights of a Distiller's terms."""

import math
import numbers
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from typing_extensions import override


class Weights(MutableMapping[str, float]):
    """Finite weights under fixed names, so that a misspelt name is an error and not a new entry."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._values: dict[str, float] = {}
        for name, weight in weights.items():
            self.add(name, weight)

    def add(self, name: str, weight: float) -> None:
        """Add a name."""
        self._values[name] = check_weight(f"the weight of {name!r}", weight)

    def __getitem__(self, name: str) -> float:
        self._check(name)
        return self._values[name]

    @override
    def __contains__(self, name: object) -> bool:
        return name in self._values

    @override
    def get(self, name: str, default: Any = None) -> Any:  # both without an error inside, which is slow to trace
        return self._values.get(name, default)

    def __setitem__(self, name: str, weight: float) -> None:
        self._check(name)
        self.add(name, weight)

    def __delitem__(self, name: str) -> None:
        raise ValueError(f"the terms of a Distiller are fixed; set the weight of {name!r} to 0 instead")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def _check(self, name: str) -> None:
        if name not in self._values:
            raise KeyError(
                f"a weight must belong to one of the terms {list(self._values)}, got {name!r}; a Distiller has those "
                "that it was built with"
            )

    def __repr__(self) -> str:
        return repr(self._values)


def check_weight(what: str, weight: float) -> float:
    """Return a weight if it is a finite number; a tensor would neither be trained nor saved."""
    if not isinstance(weight, numbers.Real) or isinstance(weight, bool):
        raise TypeError(
            f"{what} must be a number, got {type(weight).__name__}; a weight that learns belongs into a loss of yours"
        )
    if not math.isfinite(weight):
        raise ValueError(f"{what} must be finite, got {weight!r}")
    return weight if type(weight) in (int, float) else float(weight)  # not all that takes a NumPy number or a Fraction
