"""For tests of more than one file."""

import pytest

from distill import _rowwise


@pytest.fixture
def fused(monkeypatch):
    """As if every input were large, in blocks of at most 64 elements or one row."""
    monkeypatch.setattr(_rowwise, "SMALL", 0)
    monkeypatch.setattr(_rowwise, "SHORT", 1)
    monkeypatch.setattr(_rowwise, "_block_elements", lambda device: 64)
