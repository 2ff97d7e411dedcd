"""For the losses of rows: every test in both forms."""

import pytest

from distill import _rowwise


@pytest.fixture(params=["plain", "blocks"])
def form(request, monkeypatch):
    """The plain formula, which small inputs get, or blocks of a few rows, as if the inputs were large."""
    if request.param == "blocks":
        monkeypatch.setattr(_rowwise, "SMALL", 0)
        monkeypatch.setattr(_rowwise, "SHORT", 1)
        monkeypatch.setattr(_rowwise, "_block_elements", lambda device: 16)
