"""A folder of shards as one: which there must be, and where each sample is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from distill._checks import is_integer
from distill._store.files import HEADER, StoreError, read_json
from distill._store.header import Header, read_header
from distill._store.shards import NAME, Shard, spoken

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Bools: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]


def as_ids(ids: Any) -> Integers:
    """Ids as an array `(N, 1)` or `(N, 2)`.

    Args:
        ids: Integers `(N,)`, or pairs `(N, 2)` of a sample and a seed: a tensor, an array or a list.

    Raises:
        ValueError: If they are something else.
    """
    try:
        found = torch.as_tensor(np.ascontiguousarray(ids) if isinstance(ids, np.ndarray) else ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"ids must be integers (N,), or pairs (N, 2) of a sample and a seed: {error}") from error
    if not is_integer(found) or not (found.ndim == 1 or found.shape[1:] == (2,)) or len(found) == 0:
        raise ValueError(
            "ids must be integers (N,), or pairs (N, 2) of a sample and a seed, at least one, "
            f"got {found.dtype} of shape {tuple(found.shape)}"
        )
    array: Integers = found.to("cpu", torch.int64, copy=True).numpy()
    return array if array.ndim == 2 else array[:, np.newaxis]


class Folder:
    """What is in a folder when it is opened.

    Attributes:
        path: The folder.
        header: What holds for all samples.
        shards: The shards of all writers.
        left: Files that killed writers left, which hold nothing that was reported written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: Header = read_header(path)
        self.shards = [Shard(path / f"{name}.safetensors", self.header) for name in _names(path)]
        self.left = sorted(path.glob("*.tmp"))
        self._index()

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def ids(self) -> Integers:
        """All ids in ascending order, `(N, 1)` or `(N, 2)`."""
        places = np.unravel_index(self._keys, [len(values) for values in self._values])
        return np.stack([values[place] for values, place in zip(self._values, places, strict=True)], 1)

    def find(self, ids: Integers) -> tuple[Integers, Bools]:
        """Where samples are, as numbers for `rows_of`, and whether they are there at all.

        Args:
            ids: As `as_ids` gives them.

        Raises:
            ValueError: If these are samples and the folder has pairs, or the other way round.
        """
        if ids.shape[1] != self.header.ids:
            kinds = {1: "samples (N,)", 2: "pairs (N, 2) of a sample and a seed"}
            raise ValueError(f"ids in {self.path} are {kinds[self.header.ids]}, got {kinds[ids.shape[1]]}")
        if not len(self):
            return np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
        keys, known = self._key(ids)
        if len(self._values) == 1:  # a sample is its own key
            return self._places[keys], known
        place = np.minimum(np.searchsorted(self._keys, keys), len(self) - 1)
        return self._places[place], known & (self._keys[place] == keys)

    def rows_of(self, places: Integers) -> list[tuple[Shard, int]]:
        """The shard of each place, and the row in it."""
        numbers = np.searchsorted(self._starts, places, side="right") - 1
        rows = places - self._starts[numbers]
        return [(self.shards[number], row) for number, row in zip(numbers.tolist(), rows.tolist(), strict=True)]

    def _key(self, ids: Integers) -> tuple[Integers, Bools]:
        """One number for each id, and whether its sample and its seed occur."""
        keys, known = np.zeros(len(ids), np.int64), np.ones(len(ids), bool)
        for values, column in zip(self._values, ids.T, strict=True):
            place = np.minimum(np.searchsorted(values, column), len(values) - 1)
            known &= values[place] == column
            keys = keys * len(values) + place
        return keys, known

    def _index(self) -> None:
        self._starts = np.cumsum([0, *(len(shard.ids) for shard in self.shards)])
        ids = np.concatenate([np.zeros((0, self.header.ids), np.int64), *(shard.ids for shard in self.shards)])
        self._values = [np.unique(column) for column in ids.T]  # samples, and seeds where there are some
        if not len(ids):
            self._keys = self._places = np.zeros(0, np.int64)
            return
        keys = self._key(ids)[0]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        for twins in zip(self.rows_of(order[again - 1]), self.rows_of(order[again]), strict=True):
            self._check_twin(*twins)
        self._keys, self._places = np.delete(keys, again), np.delete(order, again)

    def _check_twin(self, first: tuple[Shard, int], second: tuple[Shard, int]) -> None:
        """A sample may be stored twice, by two processes, if it is the same sample."""
        (shard, row), (other, again) = first, second
        if shard.hashes is not None and other.hashes is not None:
            what, a, b = "tokens or pixels", shard.hashes[row], other.hashes[again]
        else:
            what, a, b = "content", shard.checksums[row], other.checksums[again]
        if not np.array_equal(a, b):
            raise StoreError(
                f"an id must be stored once, got {spoken(shard.ids[row])} twice with other {what}: {a} in "
                f"{shard.path} and {b} in {other.path}"
            )


def _names(path: Path) -> list[str]:
    """The names of the shards that a folder must have, in order; raise StoreError where one is missing.

    What is in the folder is looked up before what its writers have reported, since they may be writing.
    """
    found: dict[str, set[int]] = {}
    for file in path.glob("*.safetensors"):
        name = NAME.fullmatch(file.stem)
        if name is None:
            raise StoreError(f"{path} must have no other safetensors files than its shards, got {file.name}")
        found.setdefault(name["writer"], set()).add(int(name["number"]))
    counts = {file.stem: _count(file) for file in path.glob("*.json") if file.name != HEADER}
    names = []
    for writer in sorted({*found, *counts}):
        count, there = counts.get(writer, 0), found.get(writer, set())
        beyond = max(there, default=-1)
        if beyond > count:
            raise StoreError(
                f"{path / writer}.json must count the shards of its writer, at least {beyond}, got {count}: it was "
                "deleted, or is an old one"
            )
        # One more may be there: its writer was killed before it could count it, or is about to.
        for number in range(count + (count in there)):
            names.append(f"{writer}-{number:06d}")
            if not (path / f"{names[-1]}.safetensors").exists():
                raise StoreError(f"{path} must have the shard {names[-1]}, one of {count}: it was deleted")
    return names


def _count(file: Path) -> int:
    """How many shards a writer has reported."""
    values = read_json(file)
    if values.get("writer") != file.stem:
        raise StoreError(
            f"{file} must count the shards of writer {file.stem}, got the content of {values.get('writer')}"
        )
    count: int = values["shards"]
    return count
