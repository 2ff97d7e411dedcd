"""The house: which rooms a file may import from, and how large a file may be."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src/distill"
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}

# Each room and the rooms that it may import from, beside itself; "" is the index, distill/__init__.py.
BASE = {"_checks", "_hidden", "_layouts", "_merged", "_options", "_reduction", "_registry", "_table", "_values", "topk"}
LIBRARY = {*BASE, "_engine", "losses"}
OVER_LOSSES = {"adapt", "language", "linear", "task", "teachers"}
MAY_IMPORT = {
    **dict.fromkeys(BASE, BASE),
    "_engine": BASE,
    "losses": {*BASE, "_engine"},
    **dict.fromkeys(OVER_LOSSES, LIBRARY),
    "_distiller": {*BASE, *OVER_LOSSES},
    "diagnostics": {*BASE, "_distiller"},
    "gradients": {*BASE, "_distiller"},
    "balance": {*BASE, "_distiller", "diagnostics", "gradients"},
    "_stages": {*BASE, "diagnostics"},
    "pairing": {*LIBRARY, *OVER_LOSSES, "_distiller", "_stages", "diagnostics"},
    "_store": {*BASE, "_distiller"},
    "store": {"_store"},
    "integrations": {*LIBRARY, *OVER_LOSSES, "", "_distiller", "_store", "diagnostics"},
    "__init__": {*LIBRARY, *OVER_LOSSES, "_distiller", "_store", "diagnostics", "pairing", "gradients", "balance"},
}


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, as `losses/kl`, also inside functions and for types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} must import by full names"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    ours = {name.removeprefix("distill").removeprefix(".").replace(".", "/") for name in found if name[:7] == "distill"}
    return {name for name in ours if name in FILES or name == "" or f"{name}/__init__" in FILES}


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_flow_one_way(name):
    room = name.split("/")[0]
    wanted = imports(FILES[name])
    rooms = {module.split("/")[0] for module in wanted} - {room}
    if {module for module in wanted if module}:
        rooms -= {""}  # `from distill.losses.kl import ...` names the package too
    assert rooms <= MAY_IMPORT[room], f"{name} must not import from {sorted(rooms - MAY_IMPORT[room])}"
    if room == "losses":
        siblings = {module for module in wanted if module.startswith("losses/") and "/_" not in module}
        assert not siblings, f"{name} must not import another loss: what two share stands in a file with an underscore"


def test_no_files_import_each_other():
    left = {name: imports(path) - {""} for name, path in FILES.items()}
    while free := [name for name, wanted in left.items() if not wanted & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"each of these is in a circle of imports, or needs one that is: {sorted(left)}"


def test_files_are_short_and_folders_say_what_they_are():
    assert {name: lines for name, path in FILES.items() if (lines := path.read_text().count("\n")) > 350} == {}
    for folder in {path.parent for path in FILES.values()}:
        doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert doc, f"{folder.relative_to(PACKAGE.parent)}/__init__.py must say what the folder is"
        assert doc.splitlines()[0].endswith("."), folder
