"""Writes the table of the losses for vision: paper, what each gives and needs, how fast it is; `conf.py` calls it."""

from __future__ import annotations

import csv
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import distill
import losses_page

PAGES = Path(__file__).parent
MARK = "<!-- vision -->"
MEASURED = PAGES / "results/performance/cpu-2-cores/losses.csv"


def fill(text: str) -> str:
    """Replace the mark of a page.

    Args:
        text: The page, in Markdown.
    """
    return text.replace(MARK, table()) if MARK in text else text


def names() -> list[str]:
    """The losses that the page for choosing has before its sections on language models."""
    vision = (PAGES / "choosing.md").read_text().partition("\n## A language model")[0]
    return re.findall(r"^\| `(\w+)` \|", vision, re.MULTILINE)


def table() -> str:
    """One row for each loss, in the order of the alphabet."""
    with MEASURED.open() as file:
        measured = {
            row["loss"]: row for row in csv.DictReader(file) if (row["table"], row["way"]) == ("losses", "eager")
        }
    rows = ["| loss | from | gives | reads | learns | eager / ours, shape |", "|---|---|---|---|---|---|"]
    return "\n".join([*rows, *(_row(name, measured.get(name)) for name in sorted(names()))])


def _row(name: str, measured: dict[str, str] | None) -> str:
    cls = distill.get_loss(name)
    function = inspect.getdoc(getattr(distill, f"{name}_loss")) or ""
    source = (sys.modules[cls.__module__].__doc__ or "").partition("\n")[0].removesuffix(".")
    gives = "one value a batch" if issubclass(cls, distill.losses._base.BatchLoss) else "one a sample"
    other = {"fgd": "boxes", "crd": "places in the training set"}
    reads = other[name] if name in other else "labels" if losses_page._reads_target(cls, function) else ""
    speed = "not measured yet"
    if measured is not None:
        low, median, high = (float(measured[f"over_ours{part}"]) for part in ("_low", "", "_high"))
        speed = f"{median:.2f} [{low:.2f}, {high:.2f}], {measured['shape'].replace('x', ' x ')}"
    cells = [f"{{py:obj}}`{name} <distill.{cls.__name__}>`", source, gives, reads, "yes" if _learns(cls) else "", speed]
    return f"| {' | '.join(cells)} |"


def _learns(cls: Any) -> bool:
    """Whether a loss has parameters, at least where student and teacher differ in size."""
    return cls.size is not None or re.search(r"= nn\.(Linear|Parameter)\(", inspect.getsource(cls)) is not None
