"""What a test does, read off the names in its code: much cheaper than its source, and nobody has to remember a mark."""

import functools
import inspect
import multiprocessing
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import commands
import workers

_ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = tuple(f"{_ROOT / folder}/" for folder in ("tests", "benchmarks"))
_STARTS = (subprocess, multiprocessing, commands.start, workers.run_workers, workers.workers)


@functools.cache
def names(code: CodeType) -> frozenset[str]:
    """All names that some code uses, of attributes too, and those of the functions within it."""
    inner = (names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


@functools.cache
def compiles(function: FunctionType) -> bool:
    """Whether a function calls `torch.compile`."""
    return {"torch", "compile"} <= names(function.__code__) and "torch.compile(" in inspect.getsource(function)


@functools.cache
def starts_processes(function: FunctionType) -> bool:
    """Whether a function, or one of the tests or benchmarks that it uses, names what starts processes."""
    reached = list(_reached(function, set()))
    return any(value in _STARTS for each in reached for value in _used(each)) or any(
        {"os", "fork"} <= names(each.__code__) for each in reached
    )


def _reached(function: FunctionType, seen: set[FunctionType]) -> Iterator[FunctionType]:
    """The function, and those of ours that it uses, and so on."""
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType) or function in seen or not _is_ours(function.__code__.co_filename):
        return
    seen.add(function)
    yield function
    for value in _used(function):
        for part in vars(value).values() if isinstance(value, type) else [value]:
            yield from _reached(part, seen) if callable(part) else ()


@functools.cache
def _used(function: FunctionType) -> list[Any]:
    """Modules, functions and classes that a function uses by name, those of our modules too."""
    used = names(function.__code__)
    found = [function.__globals__[name] for name in used if name in function.__globals__]
    for module in [
        value for value in found if isinstance(value, ModuleType) and _is_ours(getattr(value, "__file__", None) or "")
    ]:
        found += [vars(module)[name] for name in used if name in vars(module)]
    return [value for value in found if isinstance(value, (ModuleType, FunctionType, type))]


def _is_ours(path: str) -> bool:
    return path.startswith(_FOLDERS)
