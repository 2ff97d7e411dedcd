"""For the tests of the study."""

import pytest


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """The command draws a picture after every run, which takes longer than the tiny runs of the tests.

    What starts a process of its own still draws, and test_cifar_picture.py calls what draws by itself.
    """
    monkeypatch.setattr("cifar.report.draw_picture", lambda results: repr(results).encode())
