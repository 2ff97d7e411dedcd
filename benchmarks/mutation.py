"""The mutations that matter in a library of losses: small changes of one place, found in the syntax tree of a file."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SWAPPED = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*"}
ORDER = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
TWINS = {"mean": "sum", "sum": "mean", "amax": "amin", "amin": "amax", "exp": "expm1", "log": "log1p"}
DROPPED = {"detach", "clone", "contiguous", "float", "clamp_min_", "clamp_min", "masked_fill", "masked_fill_"}
Target = ast.AST | tuple[ast.AST, ast.AST]  # a node, or the operator between two


@dataclass(frozen=True)
class Mutant:
    """One change of one place: the characters from `start` to `stop` of the file become `text`.

    `line` is where the statement begins, as coverage counts it.
    """

    operator: str
    line: int
    start: int
    stop: int
    text: str

    def apply(self, source: str) -> str:
        """Return the source with the change made."""
        return source[: self.start] + self.text + source[self.stop :]

    def code(self, source: str) -> str:
        """Return the line of the change, with the place in guillemets."""
        begin, end = source.rfind("\n", 0, self.start) + 1, source.find("\n", self.stop)
        parts = source[begin : self.start], "«", source[self.start : self.stop], "»", source[self.stop : end]
        return " ".join("".join(parts).split())

    def show(self, source: str) -> str:
        """Return the change as a person reads it, on one line."""
        before = " ".join(source[self.start : self.stop].split())
        return f"{before[:60]} -> {self.text[:60] or '(nothing)'}"


def mutants(source: str) -> list[Mutant]:
    """Return every mutant of a source file, in order of place. Annotations, docstrings and messages have none."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines = source.splitlines(keepends=True)

    def place(line: int, column: int) -> int:  # columns of ast count bytes
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def span(node: ast.AST) -> tuple[int, int]:
        node_end = (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        return place(node.lineno, node.col_offset), place(*node_end)  # type: ignore[attr-defined]

    def text_of(node: ast.AST) -> str:
        text = source[slice(*span(node))]
        return f"({text})" if isinstance(node, ast.BinOp | ast.UnaryOp | ast.Compare | ast.BoolOp | ast.IfExp) else text

    found = []
    for node, at in _walk(ast.parse(source), 1):
        for operator, target, text in _changes(node, text_of):
            if isinstance(target, ast.AST):
                start, stop = span(target)
            else:
                start, stop = span(target[0])[1], span(target[1])[0]  # the operator between two operands
                between = source[start:stop]
                symbol = between.strip(" ()\n")
                start += between.index(symbol)
                stop = start + len(symbol)
            if source[start:stop] != text and compiles(source[:start] + text + source[stop:]):
                found.append(Mutant(operator, at, start, stop, text))
    return sorted(found, key=lambda mutant: (mutant.start, mutant.stop, mutant.operator))


def compiles(source: str) -> bool:
    """Whether Python takes the source."""
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _walk(node: ast.AST, line: int) -> Iterator[tuple[ast.AST, int]]:
    """The nodes whose change can change what the code does, with the line where their statement begins.

    Annotations, docstrings, messages and what only type checkers read are left out.
    """
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases"):
            continue
        if isinstance(node, ast.Raise):  # dropped as a whole; what it says is no behaviour
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.Import, ast.ImportFrom, ast.JoinedStr)):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Assign) and ast.unparse(child.targets[0]) in ("FAMILY", "__all__", "__version__"):
                continue
            at = child.lineno if isinstance(child, ast.stmt) else line
            if isinstance(child, ast.stmt | ast.expr):
                yield child, at
            yield from _walk(child, at)


def _changes(node: ast.AST, text_of: Callable[[ast.AST], str]) -> Iterator[tuple[str, Target, str]]:
    match node:
        case ast.BinOp(left=left, op=op, right=right) if type(op) in SWAPPED and not _is_text(left, right):
            yield ("sign" if isinstance(op, ast.Add | ast.Sub) else "factor"), (left, right), SWAPPED[type(op)]
        case ast.BinOp(left=left, op=ast.Pow()):
            yield "power", node, text_of(left)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(n))) if n > 0:
            yield "dim", node, "0" if n == 1 else f"-{n - 1}"
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield "sign", node, text_of(operand)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "condition", node, f"bool({text_of(operand)})"
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            if type(op) in ORDER:
                yield "boundary", (left, right), ORDER[type(op)]
            elif isinstance(op, ast.Is | ast.IsNot):
                negated = "is not" if isinstance(op, ast.Is) else "is"
                yield "condition", node, f"{text_of(left)} {negated} {text_of(right)}"
        case ast.BoolOp(op=op, values=[first, second]):
            yield "condition", (first, second), "or" if isinstance(op, ast.And) else "and"
        case ast.IfExp(body=body, orelse=orelse):
            yield "condition", node, text_of(body)
            yield "condition", node, text_of(orelse)
        case ast.If(test=test):
            yield "condition", test, "False"
            yield "condition", test, "True"
        case ast.Constant(value=bool(flag)):
            yield "option", node, str(not flag)
        case ast.Constant(value=int(n)) if not isinstance(n, bool):
            yield "off by one", node, str(n + 1)
        case ast.Constant(value=float(n)) if n not in (float("inf"),):
            yield "constant", node, repr(n * 2 if n else 1.0)
        case ast.Expr(value=ast.Call() as call):
            name = ast.unparse(call.func)
            if name.split(".")[-1].startswith("check") or "refuse" in name:
                yield "dropped check", node, "pass"
            else:
                yield "dropped call", node, "pass"
        case ast.Raise():
            yield "dropped check", node, "pass"
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="no_grad")):
            yield "no_grad", node, "torch.enable_grad()"
        case ast.Call(func=ast.Attribute(value=value, attr=attr) as method) if text_of(value) not in ("F", "math"):
            if attr in DROPPED and text_of(value) != "torch":
                yield ("detach" if attr == "detach" else "dropped method"), node, text_of(value)
            if attr in TWINS:
                yield "reduction", method, f"{text_of(value)}.{TWINS[attr]}"
        case ast.Return(value=value) if value is not None and not isinstance(value, ast.Constant):
            if isinstance(value, ast.Name):
                yield "result", value, "None"


def _is_text(*nodes: ast.expr) -> bool:
    return any(isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str) for node in nodes)
