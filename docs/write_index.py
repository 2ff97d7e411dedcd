"""Writes into `src/distill/__init__.py` what follows from the files: the imports of the losses, and `__all__`.

All else stands there by hand; a public name that is no loss is one more import. `make format` runs this script, and a
test asks whether it would change something.
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src/distill"
WIDTH = 120


def render(package: Path = PACKAGE) -> str:
    """Give the text that `__init__.py` must have.

    Args:
        package: The folder of the package.
    """
    text = (package / "__init__.py").read_text()
    tree = ast.parse(text)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    by_hand = {node.module or "": [alias.name for alias in node.names] for node in imports}
    modules = {module: names for module, names in by_hand.items() if not module.startswith("distill.losses.")}
    for path in (package / "losses").glob("[a-z]*.py"):
        modules[f"distill.losses.{path.stem}"] = _public(path)

    (index,) = (
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    everything = sorted((name for names in modules.values() for name in names), key=_order)
    written = [
        (imports[0].lineno, imports[-1].end_lineno, [_line(*entry) for entry in sorted(modules.items())]),
        (index.lineno, index.end_lineno, ["__all__ = [", *(f'    "{name}",' for name in everything), "]"]),
    ]
    lines = text.splitlines()
    for first, last, new in reversed(written):
        lines[first - 1 : last] = new
    return "\n".join(lines) + "\n"


def _public(path: Path) -> list[str]:
    """The functions and classes of a file of losses."""
    nodes = ast.parse(path.read_text()).body
    names = [node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [name for name in names if not name.startswith("_")]


def _order(name: str) -> tuple[bool, bool, str]:
    """Constants, classes, functions: as ruff sorts them."""
    return not name.isupper(), not name[0].isupper(), name


def _line(module: str, names: list[str]) -> str:
    names = sorted(names, key=_order)
    line = f"from {module} import {', '.join(names)}"
    wrapped = "".join(f"    {name},\n" for name in names)
    return line if len(line) <= WIDTH else f"from {module} import (\n{wrapped})"


if __name__ == "__main__":
    (PACKAGE / "__init__.py").write_text(render())
