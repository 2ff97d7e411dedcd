"""What the library finds out about models, by name, printed as a table."""

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from typing_extensions import override

_Entry = TypeVar("_Entry")


class Entries(Mapping[str, _Entry]):
    """Entries by name, in their order; a subclass prints them as a table."""

    def __init__(self, entries: Mapping[str, _Entry]) -> None:
        self._entries = dict(entries)

    @override
    def __getitem__(self, name: str) -> _Entry:
        return self._entries[name]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    @override
    def __len__(self) -> int:
        return len(self._entries)

    def _repr_html_(self) -> str:
        return as_html(repr(self))


def as_html(text: str) -> str:
    """A printed table for a notebook, which would break its lines where the window ends."""
    return f'<pre style="white-space: pre; overflow-x: auto">{html.escape(text)}</pre>'


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows of texts, the first of them the heading, in columns as wide as their longest text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
