"""For tests and doctests alike."""

from collections.abc import Iterator

import pytest

from distill import _registry


@pytest.fixture(autouse=True)
def _registry_as_it_was() -> Iterator[None]:
    """A loss that a test or an example registers is gone after it."""
    table = dict(_registry._registered)
    yield
    _registry._registered.clear()
    _registry._registered.update(table)
