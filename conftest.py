"""For tests and doctests alike."""

import gc

import pytest

# They import Triton, which a machine without a GPU may lack, and which would make this process look for one.
collect_ignore = [f"src/distill/_engine/{name}.py" for name in ("triton", "triton_topk")]
collect_ignore += ["tests/support/triton_worker.py"]

# Tests leave few cycles behind: collect garbage a tenth as often, for a tenth of the time that tracing takes.
gc.set_threshold(20_000, 20, 20)

_table: dict[str, type] = {}


def pytest_collectstart() -> None:
    """Import the package by its name, before its files are collected, which would else be other modules.

    Not above: the process that only hands out tests to workers collects none and needs no torch.
    """
    import distill  # noqa: F401 - see above


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Note which losses are registered: a hook and no fixture, as it comes before each of thousands of tests."""
    from distill import _registry

    _table.clear()
    _table.update(_registry._registered)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A loss that a test or an example registers is gone after it, and denormal numbers are numbers again."""
    from distill import _registry

    if item.get_closest_marker("compile"):
        import torch

        torch.set_flush_denormal(
            False
        )  # which the code that PyTorch 2.5 compiles (-ffast-math) switches on when loaded

    if _registry._registered != _table:
        _registry._registered.clear()
        _registry._registered.update(_table)
