"""For the losses of rows: every test in both forms."""

import pytest

from distill._engine import fused as engine


@pytest.fixture(params=["plain", "blocks"])
def form(request, monkeypatch):
    """The plain formula, which small inputs get, or blocks of a few rows, as if the inputs were large."""
    if request.param == "blocks":
        monkeypatch.setattr(engine, "SMALL", 0)
        monkeypatch.setattr(engine, "SHORT", 1)
        monkeypatch.setattr(engine, "_block_elements", lambda device: 16)
    return request.param
