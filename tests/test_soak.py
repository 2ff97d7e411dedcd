"""The soak run in short; `python benchmarks/soak.py` does 10,000 steps."""

import pytest
import torch

import commands
import soak


@pytest.mark.subprocess  # what other tests left in cycles may come free at any time, and would be counted
def test_steps_leave_nothing_behind_and_two_runs_are_equal(tmp_path):
    process = commands.start(soak.main, ["--steps", "40", "--growth", "50"], log=tmp_path / "log")
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()


def test_a_tensor_that_a_step_leaves_in_a_cycle_is_found(monkeypatch, capsys):
    def leave(tensor):
        cycle = [tensor]
        cycle.append(cycle)
        return tensor

    of_net = soak.Net.forward
    monkeypatch.setattr(soak.Net, "forward", lambda self, x: leave(of_net(self, x)))
    assert soak.main(["--steps", "20", "--growth", "50"]) == 1
    assert "no tensor must be in a cycle" in capsys.readouterr().out


def test_objects_that_steps_keep_and_bits_that_differ_are_found(monkeypatch, capsys):
    kept = []
    of_net = soak.Net.forward

    def keep(self, x):
        kept.extend([[x.detach()] for _ in range(4)])
        return of_net(self, x) + 1e-6 * len(kept)

    monkeypatch.setattr(soak.Net, "forward", keep)
    assert soak.main(["--steps", "30", "--growth", "50"]) == 1
    out = capsys.readouterr().out
    assert "steps must leave no objects" in out
    assert "two runs must end with the same bits" in out
    assert torch.is_tensor(kept[0][0])
