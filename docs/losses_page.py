"""Fills in what the pages say of every loss and every name, from the registry and the docstrings.

A page has marks: `<!-- losses: FAMILY -->` becomes a short table of a family's losses and their entries, `<!-- losses
-->` a short table of all losses, `<!-- family tree -->` a picture of them, `<!-- names -->` the list of all public
names. `conf.py` calls `fill` for each page.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

import distill
import family_tree
from distill import _registry

PAGES = Path(__file__).parent
MARK = re.compile(r"^<!-- losses: ([a-z ]+) -->$", re.MULTILINE)
TABLE = "<!-- losses -->"
TREE = "<!-- family tree -->"
NAMES = "<!-- names -->"
ROW = re.compile(r"^\| `(\w+)` \|")
HEAD = ("| name | what it computes | labels |", "|---|---|---|")
KINDS: dict[str, Callable[[object], bool]] = {
    "automodule": inspect.ismodule,
    "autoclass": inspect.isclass,
    "autofunction": inspect.isfunction,
}


def fill(text: str) -> str:
    """Replace the marks of a page, and link the first mention of a public name in each of its sections.

    Args:
        text: The page, in Markdown.

    Raises:
        ValueError: If a loss has no family, or one that no page shows.
    """
    text = link(text)
    if TREE in text:
        text = text.replace(TREE, family_tree.render(members(), families()))
    if TABLE in text:
        text = text.replace(TABLE, table())
    if MARK.search(text):
        losses = members()
        text = MARK.sub(lambda mark: section(losses[mark[1]]), text)
    return text.replace(NAMES, names()) if NAMES in text else text


def families() -> dict[str, tuple[str, str]]:
    """The families in the order of the pages' navigation: the word in a loss's file, its page and that page's title."""
    found = {}
    for page in re.findall(r"^(losses/[\w-]+)$", (PAGES / "losses.md").read_text(), re.MULTILINE):
        text = (PAGES / f"{page}.md").read_text()
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        found.update(dict.fromkeys(MARK.findall(text), (page, title[1] if title else page)))
    return found


def members() -> dict[str, list[str]]:
    """The names of our losses by family."""
    found: dict[str, list[str]] = {word: [] for word in families()}
    for name, cls in sorted(_registry._registered.items()):
        if not cls.__module__.startswith("distill.losses."):
            continue
        family = getattr(sys.modules[cls.__module__], "FAMILY", None)
        if family not in found:
            raise ValueError(f"FAMILY in the file of {name!r} must be one of {', '.join(found)}, got {family!r}")
        found[family].append(name)
    return found


def table() -> str:
    """All losses by family: the name, what is compared, and whether the loss reads the labels."""
    of_family = members()
    parts = []
    for word, (page, title) in families().items():
        rows = (_row(name, _entry(name)) for name in of_family[word])
        parts.append("\n".join([f"### [{title}]({page}.md)", "", *HEAD, *rows]))
    return "\n\n".join(parts)


def section(names: list[str]) -> str:
    """What a page has of its losses: a table whose names lead to the entries, and the entries."""
    contents = "\n".join([*HEAD, *(_row(name, f"[`{name}`](#{name})") for name in names)])
    return "\n\n".join([contents, *(f"## {name}\n\n{entries(name)}" for name in names)])


def names() -> str:
    """Every public name with the first line of its docstring, in the order of the alphabet."""
    rows = ["| name | what it is |", "|---|---|"]
    for name in sorted(distill.__all__, key=lambda name: (name.lower().replace("_", ""), name)):
        value = getattr(distill, name)
        line = "What a loss takes as `reduction`." if name == "Reduction" else _first_line(value)
        rows.append(f"| {_reference(name)} | {_cell(line)} |")
    return "\n".join(rows)


def entries(name: str) -> str:
    """What Sphinx is told to show of a loss: the public functions and classes of its file."""
    module = _class(name).__module__
    public = [each for each in distill.__all__ if getattr(getattr(distill, each), "__module__", None) == module]
    shown = sorted(public, key=lambda each: (each[0].isupper(), each))  # functions first
    lines = (f".. {_kind(getattr(distill, each))}:: distill.{each}" for each in shown)
    return "```{eval-rst}\n" + "\n\n".join(lines) + "\n```"


def link(text: str) -> str:
    """Link the first mention of a public name under each heading, and a loss at the start of a table's row.

    The table's first heading is *loss*. Code blocks, headings and links stay as they are.

    Args:
        text: The page, in Markdown.
    """
    code = re.compile(r"(?<![\[`}])`(" + "|".join(distill.__all__) + r")`(?![\]`])")
    lines, seen, fenced, of_losses = [], set[str](), False, False

    def reference(match: re.Match[str]) -> str:
        known = match[1] in seen
        seen.add(match[1])
        return match[0] if known else _reference(match[1])

    for line in text.split("\n"):
        if line.startswith("```"):
            fenced = not fenced
        if line.startswith("#") and not fenced:
            seen.clear()
        of_losses = line.startswith("| loss |") or (of_losses and line.startswith("|"))
        row = ROW.sub(_linked_row, line) if of_losses else line
        lines.append(line if fenced or line.startswith("#") else code.sub(reference, row))
    return "\n".join(lines)


def _linked_row(row: re.Match[str]) -> str:
    known = row[1] in _registry._registered
    return f"| {_entry(row[1])} |" if known else row[0]


def _entry(name: str) -> str:
    return f"{{py:obj}}`{name} <distill.{_class(name).__name__}>`"


def _reference(name: str) -> str:
    return f"{{py:obj}}`{name} <distill.{name}>`"


def _class(name: str) -> type[nn.Module]:
    return _registry._registered[name]


def _row(name: str, link: str) -> str:
    function = getattr(distill, f"{name}_loss")
    what = re.sub(r", one value (?:per|for).*$", "", _cell(_first_line(function)))
    reads = "yes" if _reads_target(_class(name), inspect.getdoc(function) or "") else ""
    return f"| {link} | {what} | {reads} |"


def _reads_target(loss: type[nn.Module], function: str) -> bool:
    """Whether the loss uses the target: by a method of the class where one says it, else by the function."""
    methods = (inspect.getdoc(vars(loss).get(name)) or "" for name in ("forward", "per_sample", "whole"))
    doc = next((doc for doc in methods if "Args:" in doc), function)
    return re.search(r"^ +target: (?!Not used)", doc, re.MULTILINE) is not None


def _first_line(value: object) -> str:
    return (inspect.getdoc(value) or "").partition("\n")[0]


def _kind(value: object) -> str:
    return next((kind for kind, fits in KINDS.items() if fits(value)), "autodata")


def _cell(text: str) -> str:
    return text.replace("|", r"\|").removesuffix(".")
