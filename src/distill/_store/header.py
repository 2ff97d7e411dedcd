"""What a stored teacher is: the header, which every shard repeats."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from distill._store.files import HEADER, StoreError, as_text, read_json, write_json


@dataclass(frozen=True)
class Part:
    """One thing that is stored of every sample: the output, or a feature.

    Attributes:
        kind: `"tensor"` or `"top-k"`.
        dtype: What its numbers are stored in.
        shape: The shape for one sample, without the length of a sequence and without k.
        sequence: Whether a sample has a length of its own, before this shape.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    sequence: bool

    def __str__(self) -> str:
        rows = ["T"] if self.sequence else []
        shape = ", ".join([*rows, *map(str, self.shape), *(["k"] if self.kind == "top-k" else [])])
        return f"{self.kind} ({shape}) of {self.dtype}"


@dataclass(frozen=True)
class Header:
    """What holds for all samples of a stored teacher.

    Attributes:
        model: The fingerprint or name of the teacher, or None if it was not given.
        vocabulary: The number of classes, where it is known.
        k: How many of the largest log-probabilities are kept; None where the output is no top-k.
        samples: How many classes are kept beside them that were drawn from the rest.
        temperature: That of the top-k; None where there is none.
        ids: How many integers an id has: 1 for a sample, 2 for a sample and a seed.
        tokens: Whether a hash of each sample's tokens or pixels is kept.
        parts: What is stored by name, `"output"` and `"feature/<path>"`, in alphabetical order.
    """

    model: str | None
    vocabulary: int | None
    k: int | None
    samples: int
    temperature: float | None
    ids: int
    tokens: bool
    parts: dict[str, Part]

    def text(self) -> str:
        """The same as JSON, for a shard."""
        return as_text(asdict(self))

    @classmethod
    def of(cls, values: dict[str, Any]) -> Header:
        """The header of values as they stand in a file."""
        found = sorted(values["parts"].items())
        parts = {name: Part(**{**part, "shape": tuple(part["shape"])}) for name, part in found}
        return cls(**{**values, "parts": parts})


def read_header(folder: Path) -> Header:
    """Read a folder's header.

    Raises:
        StoreError: If there is none, or it is damaged or of another version.
    """
    try:
        values = read_json(folder / HEADER)
        if "parts" not in values:
            raise StoreError(f"{folder / HEADER} must be a header, got the content of another file: {values}")
        return Header.of(values)
    except FileNotFoundError as error:
        raise StoreError(
            f"a stored teacher must have a file {HEADER}, got none in {folder}: nothing was stored there, or it was "
            "deleted (every shard repeats it in its metadata)"
        ) from error


def settle_header(folder: Path, header: Header) -> None:
    """Write a folder's header, or check that the one it has says the same.

    Raises:
        ValueError: If the folder has another header.
    """
    if not (folder / HEADER).exists():
        write_json(folder / HEADER, asdict(header))
    check_same(f"what is added to {folder} must be like what it has", header, read_header(folder))


def check_same(what: str, got: Header, wanted: Header, error: type[ValueError] = ValueError) -> None:
    """Raise an error that names the first thing in which two headers differ, with both values."""
    for field in fields(Header):
        have, want = getattr(got, field.name), getattr(wanted, field.name)
        if have == want:
            continue
        name = field.name
        if name == "parts":
            name = next(part for part in [*want, *have] if want.get(part) != have.get(part))
            have, want = have.get(name), want.get(name)
        raise error(f"{what}: {name} must be {want}, got {have}")
