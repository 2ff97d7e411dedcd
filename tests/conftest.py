"""For tests of more than one folder."""

import gc
import math
import os
from pathlib import Path

import pytest

from fresh import Fresh

# Inductor's own processes would take longer to start than what they compile here.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# A garbage collection after each compilation frees nothing that tests wait for.
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")

# What is imported stays: no garbage collection looks through it before `pytest_collection_finish`.
gc.disable()

# What they load from the Hub's library is made here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The processes that tests start import the tree under test, installed or not.
_ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [*(str(_ROOT / folder) for folder in ("src", "examples", "benchmarks", "tests/support"))]
    + [path for path in [os.environ.get("PYTHONPATH", "")] if path]
)


@pytest.fixture(scope="session")
def fresh():
    """A Python that has imported torch and nothing of ours, to run code in."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    python = Fresh()
    yield python
    python.close()


@pytest.fixture
def fused(monkeypatch):
    """As if every input were large, in blocks of at most 64 elements or one row."""
    from distill._engine import fused as engine

    monkeypatch.setattr(engine, "SMALL", 0)
    monkeypatch.setattr(engine, "FEW", 0)
    monkeypatch.setattr(engine, "SHORT", 1)
    monkeypatch.setattr(engine, "_block_elements", lambda device: 64)


@pytest.fixture(params=["plain", "blocks"])
def form(request, monkeypatch):
    """Each of the two forms of a loss of rows, whatever the size: the plain formula, or blocks of a few rows."""
    from distill._engine import fused as engine

    monkeypatch.setattr(engine, "SMALL", 0 if request.param == "blocks" else math.inf)
    monkeypatch.setattr(engine, "FEW", 0)
    monkeypatch.setattr(engine, "SHORT", 1)
    monkeypatch.setattr(engine, "_block_elements", lambda device: 16)
    return request.param


def pytest_collection_modifyitems(items):
    """Mark what is slow by what it does, so that `-m "not subprocess"` leaves out all of it."""
    from marks import compiles, starts_processes  # not above: what only hands out tests to workers needs no torch

    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        if "tests/examples/" in item.path.as_posix():
            item.add_marker("study")
        fixtures = [found[-1].func for found in item._fixtureinfo.name2fixturedefs.values()]
        if any(map(starts_processes, [item.function, *fixtures])):
            item.add_marker("subprocess")
        if item.path.name == "test_compile.py" or compiles(item.function):
            item.add_marker("compile")


def pytest_collection_finish():
    """What is there now stays to the end: let no garbage collection look through it again."""
    gc.collect()
    gc.freeze()
    gc.enable()
