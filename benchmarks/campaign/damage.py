"""Damaged files: bytes that are cut or changed, and sound checkpoints with wrong content."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from campaign.ends import Ends, Tries
from campaign.processes import forked, wait
from cifar.checkpoints import CheckpointError, RunFiles, save_state, unusable
from cifar.states import identity
from cifar.training import Run, train
from cifar_runs import make_config, make_data  # type: ignore[import-not-found]  # of the tests

# What is done to the content of a checkpoint; each must be refused by name.
WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "no network": lambda s: s.pop("model"),
    "a tensor is missing": lambda s: s["model"].pop(next(iter(s["model"]))),
    "a tensor too many": lambda s: s["model"].update(extra=torch.zeros(1)),
    "another shape": lambda s: s["model"].update({next(iter(s["model"])): torch.zeros(2, 3)}),
    "another type": lambda s: s["model"].update({k: v.double() for k, v in s["model"].items()}),
    "no tensor": lambda s: s["model"].update({next(iter(s["model"])): 3}),
    "the network is a list": lambda s: s.update(model=[1, 2]),
    "an unknown field": lambda s: s.update(surprise=1),
    "no history": lambda s: s.update(history=[]),
    "history with a gap": lambda s: s.update(history=[{**s["history"][0], "epoch": 2}]),
    "history too long": lambda s: s.update(history=[{**s["history"][0], "epoch": n} for n in range(1, 100)]),
    "history of text": lambda s: s.update(history="abc"),
    "a record without a field": lambda s: s["history"][0].pop("loss"),
    "a record with nan": lambda s: s["history"][0].update(loss=float("nan")),
    "no optimizer": lambda s: s.pop("optimizer"),
    "no momentum": lambda s: s["optimizer"].update(state={}),
    "momentum of another shape": lambda s: s["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(1)),
    "another momentum": lambda s: s["optimizer"]["param_groups"][0].update(momentum=0.5),
    "no groups": lambda s: s["optimizer"].update(param_groups=[]),
    "an optimizer without groups": lambda s: s["optimizer"].pop("param_groups"),
    "a parameter too many": lambda s: s["optimizer"]["state"].update({99: {}}),
    "groups are a number": lambda s: s["optimizer"].update(param_groups=3),
    "no random state": lambda s: s.pop("random"),
    "random states are a list": lambda s: s.update(random=[]),
    "a short random state": lambda s: s["random"].update(data=torch.zeros(3, dtype=torch.uint8)),
    "no random state of the data": lambda s: s["random"].pop("data"),
    "a start that is no time": lambda s: s.update(start_time="yesterday"),
    "a start that is a number": lambda s: s.update(start_time=7),
    "of a later format": lambda s: s.update(format=99),
    "a format that is text": lambda s: s.update(format="2"),
    "parts that are none": lambda s: s.update(parts=[]),
    "parts without an epoch": lambda s: s["parts"][0].pop("from"),
    "other threads": lambda s: s["parts"][-1].update(threads=99),
    "another engine": lambda s: s["parts"][-1].update(engine="graph"),
}


def rewritten(content: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A checkpoint that is sound, and holds something else."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    change(state)
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def damaged(content: bytes, seed: int) -> bytes:
    """A checkpoint whose bytes are cut, changed, repeated or mixed up, in a way that the seed decides."""
    draw = random.Random(seed)
    at, size = draw.randrange(len(content)), draw.choice([1, 2, 16, 512, 4096])
    kind = seed % 6
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
    if kind == 2:
        return content[:at] + bytes(min(size, len(content) - at)) + content[at + size :]
    if kind == 3:
        return content[:at] + draw.randbytes(size) + content[at:]
    if kind == 4:
        return content[:at] + content[at + size :]
    return draw.randbytes(draw.choice([0, 1, 100, len(content)]))


def damage(count: int, where: Path, before: Sequence[Ends] = ()) -> Tries:
    """Damage checkpoints, networks and numbers; each must be refused by name, or have lost nothing."""
    data, config = make_data(128, 128), make_config(epochs=2)
    small(where)
    run = Run(config, data, _teacher(where))
    out = where / "again"
    shutil.copytree(where / "weights", out / "weights")
    shutil.copytree(where / "runs", out / "runs")
    files = RunFiles.of(out, config)
    sound = {"weights": files.weights.read_bytes(), "result": files.result.read_bytes()}
    sound["checkpoint"] = _checkpoint(where / "stopped")
    kept = identity(torch.load(io.BytesIO(sound["checkpoint"]), weights_only=True)["model"])
    changes = list(WRONG.values())
    for seed in range(len(before), count):
        kind = ("checkpoint", "checkpoint", "weights", "result")[seed % 4]
        path = getattr(files, kind)
        if kind == "checkpoint" and seed % 8 == 0:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(rewritten(sound[kind], changes[seed // 8 % len(changes)]))
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(damaged(sound[kind], seed))
        try:
            if kind == "checkpoint":
                state = files.load_checkpoint(config)
                with unusable(path):
                    run.load_state(state or {})
                end = "read, nothing lost" if identity((state or {})["model"]) == kept else "SILENT"
            else:
                files.load_result(config)
                end = "read, nothing lost"
        except CheckpointError:
            end = "refused by name"
        except Exception as error:
            end = f"RAISED {type(error).__name__}"
        if kind != "checkpoint":
            path.write_bytes(sound[kind])
        yield Counter([end])


def small(out: Path) -> None:
    """A teacher of one epoch and its student of two, on random images."""
    data, config = make_data(128, 128), make_config(epochs=2)
    with contextlib.redirect_stdout(io.StringIO()):
        train(config.teacher_config(), data, out)
        train(config, data, out)


def _teacher(where: Path) -> dict[str, torch.Tensor]:
    teacher = make_config(epochs=2).teacher_config()
    return RunFiles.of(where, teacher).load_weights(teacher)


def _checkpoint(out: Path) -> bytes:
    """The checkpoint of a student that was killed in its second epoch."""
    config = make_config(epochs=2)
    path = RunFiles.of(out, config).checkpoint

    def until_the_first_epoch() -> None:
        def save_and_die(where: Path, *rest: object) -> None:
            save_state(where, *rest)  # type: ignore[arg-type]
            if where == path:
                os.kill(os.getpid(), signal.SIGKILL)

        mock.patch("cifar.training.save_state", save_and_die).start()
        small(out)

    wait(forked(until_the_first_epoch))
    return path.read_bytes()
