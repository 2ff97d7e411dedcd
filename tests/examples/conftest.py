"""For the tests of the study."""

import signal

import pytest


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """The command draws a picture after every run, which takes longer than the tiny runs of the tests.

    What starts a process of its own still draws, and test_cifar_picture.py calls what draws by itself.
    """
    monkeypatch.setattr("cifar.report.draw_picture", lambda results: repr(results).encode())


@pytest.fixture(autouse=True)
def _memory_as_it_was(monkeypatch):
    """A run in the process of the tests must not change how it gives memory back, which other tests measure."""
    monkeypatch.setattr("cifar.crew.keep_freed_memory", lambda: None)


@pytest.fixture
def _heard():
    """Signals mean what they usually do, also where the tests run in the background of a shell, which ignores them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, answer in before.items():
        signal.signal(number, answer)
