"""The benchmark of ideas for the training step, on a tiny network and batch."""

import io
import re

import pytest
import torch

import step_ideas
from step_ideas import Bench

CALLED = ("today", "the plain loop", "contiguous", "batch norm, addition", "denormal", "SGD")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(step_ideas, "keep_freed_memory", lambda: None)  # for good in this process
    yield
    torch.set_num_threads(before)


def test_the_ideas_take_the_same_steps_and_the_bounds_leave_something_out():
    ideas = step_ideas.step_ideas(Bench(8, 4))
    losses = {name: [float(step()) for _ in range(3)] for name, step in ideas.items() if "sums" not in name}
    today = losses.pop("today")
    assert today[2] < today[0]
    for name, values in losses.items():
        same = values == pytest.approx(today, rel=1e-3)
        assert same == (not name.startswith("bound")), name


def test_every_group_has_a_table_of_ratios_to_its_first_line(monkeypatch, capsys):
    monkeypatch.setattr(step_ideas, "STAGES", step_ideas.STAGES[:1])
    step_ideas.main(["--groups", "teacher", "convolutions", "--depth", "8", "--batch-size", "4", "--repeats", "1"])
    text = capsys.readouterr().out
    assert text.startswith("ResNet-8 from 8, batch 4, float32, ")
    assert re.findall(r"^(\w+): ", text, re.MULTILINE) == ["teacher", "convolutions"]
    assert len(re.findall(r"^\| today \| [\d.]+ \| 1\.00 \[1\.00, 1\.00\] \| 1 \|$", text, re.MULTILINE)) == 2
    assert len(re.findall(r"^\| .* \| [\d.]+ \| [\d.]+ \[[\d.]+, [\d.]+\] \| 1 \|$", text, re.MULTILINE)) == 14


def test_two_batches_at_once_count_as_two(monkeypatch, capsys):
    step_ideas.show("teacher", {"today": lambda: 3.0, "two batches at once": lambda: 4.0}, 3, lambda step, _: step())
    assert "| two batches at once | 2000.0 | 1.50 [1.50, 1.50] | 3 |" in capsys.readouterr().out


def test_a_process_of_the_memory_group_answers_each_line_with_seconds(monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(step_ideas, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    step_ideas.main(["--serve", "--keep", "--depth", "8", "--batch-size", "4"])
    assert kept == [True]
    answers = capsys.readouterr().out.split()
    assert len(answers) == 2
    assert all(0 < float(answer) < 60 for answer in answers)


def test_rejects_arguments(capsys):
    with pytest.raises(SystemExit):
        step_ideas.main(["--repeats", "0"])
    assert "must be at least 1 and --batch-size 2, got 0 and 128" in capsys.readouterr().err
