"""For tests of more than one folder."""

import functools
import gc
import inspect
import math
import os
from pathlib import Path

import pytest

from distill._engine import fused as engine

# Inductor's own processes would take longer to start than what they compile here.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# What they load from the Hub's library is made here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Tests leave few cycles behind: collect garbage a tenth as often, for a tenth of the time that tracing takes.
gc.set_threshold(20_000, 20, 20)

# The processes that tests start import the tree under test, installed or not.
_ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [*(str(_ROOT / folder) for folder in ("src", "examples", "benchmarks", "tests/support"))]
    + [path for path in [os.environ.get("PYTHONPATH", "")] if path]
)


@pytest.fixture
def fused(monkeypatch):
    """As if every input were large, in blocks of at most 64 elements or one row."""
    monkeypatch.setattr(engine, "SMALL", 0)
    monkeypatch.setattr(engine, "FEW", 0)
    monkeypatch.setattr(engine, "SHORT", 1)
    monkeypatch.setattr(engine, "_block_elements", lambda device: 64)


@pytest.fixture(params=["plain", "blocks"])
def form(request, monkeypatch):
    """Each of the two forms of a loss of rows, whatever the size: the plain formula, or blocks of a few rows."""
    monkeypatch.setattr(engine, "SMALL", 0 if request.param == "blocks" else math.inf)
    monkeypatch.setattr(engine, "FEW", 0)
    monkeypatch.setattr(engine, "SHORT", 1)
    monkeypatch.setattr(engine, "_block_elements", lambda device: 16)
    return request.param


def pytest_collection_modifyitems(items):
    """Mark what is slow by what it does, so that `-m "not subprocess"` leaves out all of it."""
    read = functools.cache(inspect.getsource)  # thousands of items are of hundreds of functions
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        if "tests/examples/" in item.path.as_posix():
            item.add_marker("study")
        source = read(item.module)
        if "subprocess" in source or "from workers import" in source:
            item.add_marker("subprocess")
        if "torch.compile(" in read(item.function):
            item.add_marker("compile")
        if item.path.name == "test_compile.py":
            item.add_marker("compile")


def pytest_collection_finish():
    """What is there now stays to the end: let no garbage collection look through it again."""
    gc.collect()
    gc.freeze()
