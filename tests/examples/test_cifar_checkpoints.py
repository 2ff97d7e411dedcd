"""Tests of examples/cifar/checkpoints.py: runs that are killed go on, and files that cannot be used are named."""

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from cifar import engine, losses
from cifar.checkpoints import CheckpointError, RunFiles, save_state
from cifar.files import write_atomically
from cifar.settings import RECIPES, find_precision
from cifar.training import train
from cifar_runs import make_config, make_data, train_all, train_and_die
from commands import start

HAS_BFLOAT16 = find_precision("auto", torch.device("cpu")) == "bfloat16"
PRECISIONS = [
    "float32",
    pytest.param("bfloat16", marks=pytest.mark.skipif(not HAS_BFLOAT16, reason="the CPU has no bfloat16")),
]


def killed(where: str, count: int, precision: str, out: Path) -> None:
    """Run `train_all` in a process that gets SIGKILL at the given call."""
    process = start(train_and_die, where, count, precision, out, log=out.with_suffix(".log"))
    process.join()
    assert process.exitcode == -signal.SIGKILL, out.with_suffix(".log").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that nobody stops ends with, by its precision."""
    made = {}

    def get(precision: str) -> Path:
        if precision not in made:
            made[precision] = tmp_path_factory.mktemp(precision)
            train_all(made[precision], precision)
        return made[precision]

    return get


def assert_same_weights(first: Path, second: Path) -> None:
    names = sorted(path.name for path in (first / "weights").iterdir())
    assert len(names) == 2
    assert names == sorted(path.name for path in (second / "weights").iterdir())
    for name in names:
        a, b = (torch.load(out / "weights" / name, weights_only=True)["model"] for out in (first, second))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.subprocess
def test_a_run_killed_in_mid_epoch_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, precision, whole, capsys):
    # Step 14 is the second of the student's third epoch: 4 teacher epochs and 2 student epochs of 2 steps come before.
    killed("step", 14, precision, tmp_path / "killed")
    config = make_config(epochs=4, precision=precision)
    state = RunFiles.of(tmp_path / "killed", config).load_checkpoint(config)
    assert len(state["history"]) == 2
    train_all(tmp_path / "killed", precision)
    assert "logit seed 0: goes on after epoch 2" in capsys.readouterr().out
    assert_same_weights(tmp_path / "killed", whole(precision))
    results = [RunFiles.of(out, config).load_result(config) for out in (tmp_path / "killed", whole(precision))]
    first, second = ([(r.loss, r.terms, r.test_acc) for r in result.history] for result in results)
    assert first == second


@pytest.mark.subprocess
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(tmp_path, whole):
    # The teacher writes 4 checkpoints, weights and a result; the 8th file is the student's second checkpoint.
    killed("fsync", 8, "float32", tmp_path / "killed")
    config = make_config(epochs=4)
    assert len(RunFiles.of(tmp_path / "killed", config).load_checkpoint(config)["history"]) == 1
    assert len(list((tmp_path / "killed" / "checkpoints").glob(".*.tmp"))) == 1
    train_all(tmp_path / "killed", "float32")
    assert not list(tmp_path.rglob("*.tmp"))
    assert_same_weights(tmp_path / "killed", whole("float32"))


class Noisy(nn.Module):
    """A loss with a learned weight and noise, both drawn from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()))

    def forward(self, student, teacher, target=None):
        return ((student - teacher * self.scale) ** 2).mean() * (1 + torch.rand(()))


def test_a_loss_that_draws_random_numbers_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "create_loss", lambda _: Noisy())
    train_all(tmp_path / "whole", "float32")
    torch.rand(3)  # whatever the global generator is at must not matter
    train_step, steps = engine.train_step, []

    def interrupted(*args):
        steps.append(None)
        if len(steps) == 14:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(engine, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_all(tmp_path / "stopped", "float32")
    train_all(tmp_path / "stopped", "float32")
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    path = tmp_path / "run.pt"
    save_state(path, make_config(), {key: {} for key in ("model", "optimizer", "random", "history", "start_time")})
    files = dataclasses.replace(RunFiles.of(tmp_path, make_config()), checkpoint=path)
    assert files.load_checkpoint(make_config())["model"] == {}
    other = make_config(precision="bfloat16", recipe=dataclasses.replace(RECIPES["pooled"], lr=0.2))
    wanted = r"run.pt .*: precision is 'float32', asked for 'bfloat16', recipe.lr is 0.1, asked for 0.2; .*--out"
    with pytest.raises(CheckpointError, match=wanted):
        files.load_checkpoint(other)


def test_finished_runs_of_other_settings_are_refused_too(tmp_path):
    config = make_config("baseline", epochs=1)
    train(config, make_data(), tmp_path)
    with pytest.raises(CheckpointError, match="precision is 'float32', asked for 'bfloat16'"):
        train(dataclasses.replace(config, precision="bfloat16"), make_data(), tmp_path)


class Intruder:
    """A pickle that runs code when it is read without weights_only."""

    def __reduce__(self):
        return os.system, ("touch intruded",)


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "flipped":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif how == "list":
        torch.save([1, 2], path)
    elif how == "settings":
        torch.save({"config": [1]}, path)
    elif how == "no settings":
        torch.save({"model": {}}, path)
    else:
        torch.save({"config": Intruder()}, path)


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "text", "flipped", "list", "no settings", "settings", "intruder"]
)
def test_a_damaged_checkpoint_is_named_with_what_to_do(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    config = make_config("baseline")
    files = RunFiles.of(tmp_path, config)
    save_state(files.checkpoint, config, {"model": {"weight": torch.zeros(10_000)}})
    damage(files.checkpoint, how)
    with pytest.raises(CheckpointError, match=rf"{files.checkpoint.name} is not a readable checkpoint .*delete it"):
        train(config, make_data(), tmp_path)
    assert not Path("intruded").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"method": "baseline"}'])
def test_a_damaged_result_is_named_with_what_to_do(tmp_path, text):
    config = make_config("baseline")
    files = RunFiles.of(tmp_path, config)
    save_state(files.weights, config, {"model": {}})
    write_atomically(files.result, lambda file: file.write(text.encode()))
    with pytest.raises(CheckpointError, match=rf"{files.result.name} is no readable result .*delete it"):
        train(config, make_data(), tmp_path)


def test_weights_lost_from_a_finished_run_are_named(tmp_path):
    config = make_config("baseline", epochs=1)
    train(config, make_data(), tmp_path)
    files = RunFiles.of(tmp_path, config)
    files.weights.unlink()
    with pytest.raises(CheckpointError, match=rf"{files.weights.name} is missing although .*{files.result.name}"):
        train(config, make_data(), tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_content_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.exists()))
    write_atomically(path, lambda file: file.write(b"new"))
    assert seen == [False]
