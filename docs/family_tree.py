"""Draws the losses by what they compare, as an SVG in the colours of the page; every name is a link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

GROUPS = {  # what is compared, and the families that do
    "outputs": ("logits", "refined logits", "language models", "embeddings"),
    "inside of the networks": ("maps", "learned maps"),
    "samples with each other": ("relations",),
}
WIDTH, LEFT, GAP, LINE, LETTER = 700, 150, 12, 22, 8.5
STYLE = 'class="family-tree" role="img" aria-label="The losses by family" font-family="inherit" font-size="14"'


def render(members: Mapping[str, Sequence[str]], families: Mapping[str, tuple[str, str]]) -> str:
    """Draw the tree, as one line of HTML; a family that no group names stands in a group of its own.

    Args:
        members: The names of the losses by family.
        families: The page and the title of each family.
    """
    named = [word for words in GROUPS.values() for word in words]
    groups = {**GROUPS, **{word: (word,) for word in members if word not in named}}
    parts, y = [], float(GAP)
    for label, words in groups.items():
        top = y
        for word in words:
            page, title = families[word]
            box, height = _box(title, page, members[word], y)
            parts.append(f'<path d="M{LEFT - 30} {y + height / 2}H{LEFT}" fill="none" stroke="currentColor"/>{box}')
            y += height + GAP
        middle, first, last = (top + y - GAP) / 2, top + GAP, y - 2 * GAP
        parts.append(f'<path d="M{LEFT - 30} {first}V{last}" stroke="currentColor"/>')
        folded = enumerate(_fold(label.split(), 14))
        lines = "".join(f'<tspan x="8" dy="{1.2 * bool(place)}em">{part}</tspan>' for place, part in folded)
        parts.append(f'<text y="{middle}" fill="currentColor" font-weight="600">{lines}</text>')
        y += GAP
    size = f'viewBox="0 0 {WIDTH} {y}"'
    return f'<div><svg xmlns="http://www.w3.org/2000/svg" {size} {STYLE}>{"".join(parts)}</svg></div>'


def _box(title: str, page: str, names: Sequence[str], y: float) -> tuple[str, float]:
    """The box of a family at this height, and how high it is."""
    lines = _fold(names, int((WIDTH - LEFT - 3 * GAP) / LETTER))
    height = LINE * (len(lines) + 1) + GAP
    place = f'x="{LEFT}" y="{y}" width="{WIDTH - LEFT - GAP}" height="{height}"'
    frame = f'<rect {place} rx="6" fill="currentColor" fill-opacity="0.06"/>'
    at = f'x="{LEFT + GAP}" y="{y + LINE}"'
    head = f'<a href="{page}.html"><text {at} font-weight="600" fill="currentColor">{title}</text></a>'
    rows = []
    for number, line in enumerate(lines, 2):
        links = " ".join(f'<a href="{page}.html#{name.replace("_", "-")}">{name}</a>' for name in line.split())
        at = f'x="{LEFT + GAP}" y="{y + LINE * number}"'
        rows.append(f'<text {at} font-family="monospace" fill="currentColor">{links}</text>')
    return frame + head + "".join(rows), height


def _fold(words: Sequence[str], width: int) -> list[str]:
    """The words in lines of at most that many letters."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
