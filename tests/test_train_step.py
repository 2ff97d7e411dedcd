"""The benchmark of the training step, on a tiny network and batch."""

import multiprocessing
import re

import pytest
import torch

import train_step
from commands import preloaded, until


@pytest.fixture
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # with more it starts processes, which takes longer than all the rest
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_every_way_is_timed_on_the_batch_that_was_asked_for(monkeypatch, capsys):
    sizes = []
    build = train_step.build_steps
    monkeypatch.setattr(
        train_step, "build_steps", lambda config, data: sizes.append(len(data.train_labels)) or build(config, data)
    )
    monkeypatch.setattr("sys.argv", ["train_step.py", "--depth", "8", "--batch-size", "4", "--repeats", "2"])
    train_step.main()
    text = capsys.readouterr().out
    assert sizes == [4]
    assert text.startswith("ResNet-8 -> 8, batch 4, ")
    assert re.findall(r"^(\w+(?: \w+)?) +[\d.]+ ms per step", text, re.MULTILINE) == [
        "plain",
        "hand",
        "example",
        "engine eager",
    ]
    assert re.search(r"^plain .* 1\.00 times plain \(1\.00 to 1\.00\)$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "1"], "--repeats and --batch-size must be at least 2, got None and 1"),
        (["--repeats", "1"], "must be at least 2, got 1 and 128"),
        (["--depth", "9"], "6n"),
        (["--engine", "graph", "--device", "cpu"], "a graph needs a CUDA device, got cpu"),
    ],
)
def test_rejects_arguments(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["train_step.py", *arguments])
    with pytest.raises(SystemExit):
        train_step.main()
    assert message in capsys.readouterr().err


@pytest.mark.subprocess
def test_with_several_threads_engines_side_by_side_are_timed_too(monkeypatch, capsys):
    context = preloaded()  # its processes start in no time
    monkeypatch.setattr(train_step.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("sys.argv", ["train_step.py", "--depth", "8", "--batch-size", "4", "--repeats", "2"])
    train_step.main()
    text, errors = capsys.readouterr()
    assert errors == ""
    assert re.search(r"^2 jobs +[\d.]+ ms per step .* times plain \(", text, re.MULTILINE)
    assert re.search(r"^the Distiller's overhead over hand: [+-]", text, re.MULTILINE)
    until(lambda: not multiprocessing.active_children())  # they end with the benchmark
