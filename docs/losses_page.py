"""Writes what docs/losses.md says of each loss from the registry and the docstrings, whenever the pages are built."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from torch import nn

import distill
from distill import _registry

MARK = "<!-- the losses -->"

# The families in their order: the word that a loss's file has as FAMILY, the heading, what is said of all of them.
FAMILIES = {
    "logits": ("Logits", "What the networks say of each class, at every sample, token or pixel."),
    "refined logits": (
        "Logits, more than one divergence",
        "These treat the labelled class apart, standardise the logits, or compare the samples of a batch too.",
    ),
    "language models": (
        "Language models",
        "For tokenizers that differ, and for tokens that the student wrote itself.",
    ),
    "embeddings": (
        "Embeddings and scores",
        "For hidden states and sentence embeddings, and for the scores that rankers give to documents.",
    ),
    "maps": (
        "Feature maps",
        "What the networks see inside. Nothing is learned here but the hint's map, where the channels differ.",
    ),
    "learned maps": (
        "Feature maps through learned layers",
        "These losses own parameters. Inside a `Distiller` they are in `distiller.parameters()`; elsewhere give "
        "`loss.parameters()` to the optimizer.",
    ),
    "relations": (
        "Relations between samples",
        "What is compared is how the samples of a batch stand to each other, so the widths of the two networks are "
        "free. There is one value for the whole batch and no reduction; a mask selects samples.",
    ),
}


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put the losses where the page has its mark; mkdocs calls this for every page."""
    return markdown.replace(MARK, render()) if page.file.src_uri == "losses.md" else markdown


def render() -> str:
    """Tables and references of all families, in Markdown.

    Raises:
        ValueError: If a loss has no family, or one that is not known here.
    """
    losses = {name: cls for name, cls in _registry._registered.items() if cls.__module__.startswith("distill.losses.")}
    members: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name, cls in sorted(losses.items()):
        family = getattr(sys.modules[cls.__module__], "FAMILY", None)
        if family not in members:
            raise ValueError(f"FAMILY in the file of {name!r} must be one of {', '.join(FAMILIES)}, got {family!r}")
        members[family].append(name)
    return "\n\n".join(_family(*FAMILIES[family], names, losses) for family, names in members.items())


def _family(title: str, text: str, names: list[str], losses: dict[str, type[nn.Module]]) -> str:
    rows = ["| name | formula | inputs | published with, at which scale | reference |", "|---|---|---|---|---|"]
    rows += [_row(name, losses[name]) for name in names]
    shown = [f"::: distill.{public}" for name in names for public in _public(losses[name].__module__)]
    return "\n\n".join([f"## {title}", text, "\n".join(rows), *shown])


def _row(name: str, loss: type[nn.Module]) -> str:
    function = inspect.getdoc(getattr(distill, f"{name}_loss")) or ""
    doc = f"{function}\n\n{inspect.getdoc(loss)}"
    published = re.search(r"Published with (.*?)\.(?=\s+[A-Z]|\s*$|\n\n)", doc, re.DOTALL)
    inputs = _inputs(loss, function)
    reference = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", _section(function, "Reference"))
    cells = [
        f"[`{name}`][distill.{loss.__name__}]",
        f"`{_formula(function)}`",
        "<br>".join(f"*{side}:* {said}" for side, said in inputs.items()),
        "<br>".join([_line(published[1]) if published else "no weight of its own", *_said_of_the_scale(doc)]),
        _line(reference),
    ]
    return f"| {' | '.join(cells)} |"


def _formula(doc: str) -> str:
    """The line of the formula that says what the loss is, with the lines that go on with it."""
    start = next(line for line in doc.splitlines() if line.startswith("    loss = "))
    further = doc.split(start, 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    return _line(" ".join([start, *(line for line in further if line.startswith(" " * 7))]))


def _said_of_the_scale(doc: str) -> list[str]:
    """The paragraphs that say which file fixed the scale, and what is not certain of it."""
    said = re.findall(r"^(Scale|Doubt): (.*?)(?=\n\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    return [f"*{kind}:* {_line(text)}" for kind, text in said]


def _inputs(loss: type[nn.Module], function: str) -> dict[str, str]:
    """What is said of student, teacher and target: by a method of the class where one says it, else by the function."""
    methods = (inspect.getdoc(vars(loss).get(name)) or "" for name in ("forward", "per_sample", "whole"))
    doc = next((doc for doc in methods if "Args:" in doc), function)
    said = re.finditer(r"^(\w+): (.*?)(?=^\w|\Z)", _section(doc, "Args"), re.MULTILINE | re.DOTALL)
    first = {match[1]: _line(re.split(r"\.\s", match[2], maxsplit=1)[0]) for match in said}
    return {
        side: first[side]
        for side in ("student", "teacher", "target")
        if not first.get(side, "Not used").startswith("Not used")
    }


def _section(doc: str, name: str) -> str:
    body = re.search(rf"^{name}:\n((?:    .*\n?)+)", doc, re.MULTILINE)
    if body is None:
        raise ValueError(f"a docstring must have the section {name!r}, got:\n{doc}")
    return inspect.cleandoc(body[1])


def _public(module: str) -> list[str]:
    """The public names of a loss's file: functions first, as the file has them."""
    names = [name for name in distill.__all__ if getattr(getattr(distill, name), "__module__", None) == module]
    return sorted(names, key=lambda name: (name[0].isupper(), name))


def _line(text: str) -> str:
    return " ".join(text.split()).removesuffix(".")
