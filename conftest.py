"""For tests and doctests alike."""

from collections.abc import Iterator

import pytest

from distill import _registry

# They import Triton, which a machine without a GPU may lack, and which would make this process look for one.
collect_ignore = [f"src/distill/_engine/{name}.py" for name in ("triton", "triton_topk")]
collect_ignore += ["tests/support/triton_worker.py"]


@pytest.fixture(autouse=True)
def _registry_as_it_was() -> Iterator[None]:
    """A loss that a test or an example registers is gone after it."""
    table = dict(_registry._registered)
    yield
    _registry._registered.clear()
    _registry._registered.update(table)
