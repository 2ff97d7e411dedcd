"""Shows the losses by what they compare, as boxes in the colours of the page; every name is a link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

GROUPS = {  # what is compared, and the families that do
    "outputs": ("divergences", "logits", "logits and more", "language models", "embeddings"),
    "layers inside the networks": ("maps", "learned maps"),
    "relations between samples": ("relations",),
}


def render(members: Mapping[str, Sequence[str]], families: Mapping[str, tuple[str, str]]) -> str:
    """Write the tree, as one line of HTML that `extra.css` lays out; a family that no group names is its own group.

    Args:
        members: The names of the losses by family.
        families: The page and the title of each family.
    """
    named = [word for words in GROUPS.values() for word in words]
    groups = {**GROUPS, **{word: (word,) for word in members if word not in named}}
    parts = []
    for label, words in groups.items():
        boxes = "".join(_box(*families[word], members[word]) for word in words)
        side = f'<div class="compared">{label}</div><div class="families">{boxes}</div>'
        parts.append(f'<div class="branch">{side}</div>')
    return f'<div class="family-tree">{"".join(parts)}</div>'


def _box(page: str, title: str, names: Sequence[str]) -> str:
    links = " ".join(f'<a href="{page}.html#{name.replace("_", "-")}">{name}</a>' for name in names)
    return f'<div class="family"><a class="title" href="{page}.html">{title}</a><div class="names">{links}</div></div>'
