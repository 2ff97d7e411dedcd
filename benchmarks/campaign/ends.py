"""How the tries of a part ended: counted, put into words, and kept in a log."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

Ends = Counter[str]  # how tries ended; what is not in order is in capitals
Tries = Iterator[Ends]


def count_bad(ends: Ends) -> int:
    """How many ended badly."""
    return sum(number for end, number in ends.items() if end.split()[0].isupper())


def in_words(ends: Ends) -> str:
    """How often each end was met."""
    return ", ".join(f"{number} {end}" for end, number in sorted(ends.items())) or "none"


def read_log(path: Path | None, title: str) -> list[Ends]:
    """How the tries of a part ended that an earlier command has made."""
    if path is None or not path.exists():
        return []
    return [Counter(made["ends"]) for made in map(json.loads, path.open()) if made["part"] == title]


def write_log(path: Path | None, title: str, ends: Ends) -> None:
    """Add a try of a part to the log, if there is one."""
    if path is not None:
        with path.open("a") as log:
            log.write(json.dumps({"part": title, "ends": ends}) + "\n")
