"""Writes into `src/distill/__init__.py` what follows from the files: the imports of the losses, and the lists of names.

All else stands there by hand; a public name that is no loss is one more import, under `TYPE_CHECKING` if it is to be
imported when it is first asked for. `make format` runs this script, and a test asks whether it would change something.
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
    imports = _imports(tree.body)
    by_hand = _names(imports)
    (later,) = (_names(_imports(node.body)) for node in tree.body if isinstance(node, ast.If))
    modules = {module: names for module, names in by_hand.items() if not module.startswith("distill.losses.")}
    for path in (package / "losses").glob("[a-z]*.py"):
        modules[f"distill.losses.{path.stem}"] = _public(path)

    lists = {ast.unparse(node.targets[0]): node for node in tree.body if isinstance(node, ast.Assign)}
    module_of = {name: module for module, names in later.items() for name in names}
    everything = sorted([*module_of, *(name for names in modules.values() for name in names)], key=_order)
    pairs = (f'    "{name}": "{module_of[name]}",' for name in sorted(module_of, key=_order))
    written = [
        (imports[0], imports[-1], [_line(*entry) for entry in sorted(modules.items())]),
        (lists["__all__"], lists["__all__"], ["__all__ = [", *(f'    "{name}",' for name in everything), "]"]),
        (lists["_LATER"], lists["_LATER"], ["_LATER = {", *pairs, "}"]),
    ]
    lines = text.splitlines()
    for first, last, new in sorted(written, key=lambda part: -part[0].lineno):
        lines[first.lineno - 1 : last.end_lineno] = new
    return "\n".join(lines) + "\n"


def _imports(nodes: list[ast.stmt]) -> list[ast.ImportFrom]:
    """What is imported from the package itself."""
    found = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return [node for node in found if (node.module or "").partition(".")[0] == "distill"]


def _names(imports: list[ast.ImportFrom]) -> dict[str, list[str]]:
    return {node.module or "": [alias.name for alias in node.names] for node in imports}


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
