"""The study under faults: kills, damaged files and bad command lines, counted.

    python benchmarks/faults.py                       # everything; an hour on 2 cores
    python benchmarks/faults.py --only damage,lines   # minutes
    python benchmarks/faults.py --kills 20            # fewer kills

Each part prints one line: how often it was tried, and how each try ended. The command exits with 1 if any ended badly:
with other weights than a run that nobody disturbs, with a traceback, with a file half written or left behind.
Only for Linux: it forks. docs/reliability.md has the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("examples", "tests/support")]

import cifar_resnet  # noqa: E402
from cifar.checkpoints import CheckpointError, RunFiles, save_state, unusable  # noqa: E402
from cifar.states import identity  # noqa: E402
from cifar.training import Run, train  # noqa: E402
from cifar_runs import make_config, make_data  # type: ignore[import-not-found]  # noqa: E402  # of the tests

COMMAND = ["--student", "8", "--teacher", "8", "--epochs", "2", "--device", "cpu", "--threads", "1"]
BAD: dict[str, list[str]] = {
    "--student": ["", "0", "-20", "21", "20.0", "1e3", "nan", "999999998", "9" * 5000, "\u0662\u0660x", "20 20"],
    "--teacher": ["", "2", "-8", "109", "deep", "1208", "inf", "0x14"],
    "--epochs": ["", "0", "-1", "1.5", "1e9", "nan", "9" * 400, "1000001"],
    "--runs": ["", "0", "-3", "2.5", "1001", "9" * 300, "many"],
    "--jobs": ["", "0", "-1", "257", "100000000", "two"],
    "--threads": ["", "0", "-1", "257", "100000000", "1.0", "all"],
    "--seed": ["", "-1", "1.5", "1073741824", "1000", "9" * 300, "x"],
    "--weight": ["", "0", "-1", "nan", "inf", "-inf", "1e999", "one"],
    "--task-weight": ["", "0", "-1", "nan", "inf", "x"],
    "--warmup": ["", "-0.1", "1.1", "nan", "inf", "x"],
    "--dataset": ["", "mnist", "CIFAR10", "cifar10 ", "../cifar10", "None"],
    "--recipe": ["", "pool", "Logits", "0"],
    "--engine": ["", "fast", "graph", "Eager"],
    "--precision": ["", "float16", "double", "32", "bf16"],
    "--device": ["", "cpu:3", "cuda:77", "meta", "gpu", "cpu:-1", "cpu:x", "no_such", "meta:0", "cuda:", "-1", " cpu"],
    "--loss": ["", ",", "logits", "KL", "kl,", "kl,at,zz", "kl;at", "../kl", "None", "hint2", "os.system", "kl\x1b[0m"],
    "--at": ["", ",", "+", "layer4", "relu1,,relu2", "relu1+", "fc:inputs", "fc:", ":input", "relu1,relu1", "a.b.c"],
    "--out": ["/dev/null", "/dev/null/x", "/proc/nowhere/x", "x" * 300, "/" + "y/" * 2100],
    "--data-dir": ["", ".", "/nowhere"],
    "--only": ["", "20/cifar10", "x"],
    "--tensorboard": ["yes"],
    "--no-baseline": ["1"],
    "--unknown": ["1"],
    "--reproduce": ["--student=20", "--loss=kl", "--only=32/cifar10", "--dataset=digits", "--no-baseline", "--at=fc"],
}


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
    "groups are a number": lambda s: s["optimizer"].update(param_groups=3),
    "no random state": lambda s: s.pop("random"),
    "a short random state": lambda s: s["random"].update(data=torch.zeros(3, dtype=torch.uint8)),
    "no random state of the data": lambda s: s["random"].pop("data"),
    "a start that is no time": lambda s: s.update(start_time="yesterday"),
    "a start that is a number": lambda s: s.update(start_time=7),
    "of a later format": lambda s: s.update(format=99),
    "a format that is text": lambda s: s.update(format="2"),
    "parts that are none": lambda s: s.update(parts=[]),
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


def weights(out: Path) -> dict[str, str]:
    """The identity of each network under a folder."""
    return {
        path.name: identity(torch.load(path, weights_only=True)["model"]) for path in sorted(out.glob("weights/*.pt"))
    }


def leftovers(out: Path) -> list[str]:
    """What should not lie there when everything is done."""
    return [str(path) for path in (*out.rglob("*.tmp"), *out.glob("checkpoints/*"))]


def forked(call: Callable[[], int | None]) -> int:
    """Call a function in a fork of this process, whose output nobody sees; gives its process number."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        code = call() or 0
    finally:
        os._exit(code)


def small(out: Path) -> None:
    """A teacher of one epoch and its student of two, on random images."""
    data, config = make_data(128, 128), make_config(epochs=2)
    with contextlib.redirect_stdout(io.StringIO()):
        train(config.teacher_config(), data, out)
        train(config, data, out)


def kill_at_random(count: int, jobs: int, where: Path) -> Counter[str]:
    """Kill the command at random moments, three times in a row; then let it come to its end."""
    ends: Counter[str] = Counter()
    draw = random.Random(jobs)

    def command(out: Path) -> int:
        return forked(lambda: cifar_resnet.main([*COMMAND, "--jobs", str(jobs), "--out", str(out)]))

    begin = time.monotonic()
    os.waitpid(command(where / "whole"), 0)
    takes, expected = time.monotonic() - begin, weights(where / "whole")
    kills = 0
    while kills < count:
        out = where / f"killed{kills}"
        for _ in range(min(3, count - kills)):
            pid = command(out)
            time.sleep(draw.uniform(0, takes))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
        _, status = os.waitpid(command(out), 0)
        same = os.waitstatus_to_exitcode(status) == 0 and weights(out) == expected
        ends["bitwise equal" if same else "OTHER"] += 1
        ends["LEFT BEHIND"] += bool(leftovers(out))
        shutil.rmtree(out)
    return ends


def kill_at_operations(where: Path) -> Counter[str]:
    """Kill a run at each of its operations on files, one after the other; then let it come to its end."""
    ends: Counter[str] = Counter()
    small(where / "whole")
    expected = weights(where / "whole")

    def dying(out: Path, operation: int) -> None:
        seen = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "fsync"):
                seen += event == "fsync" or str(out) in str(arguments[0])
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        fsync = os.fsync

        def counted(file: int) -> None:
            hook("fsync", ())
            fsync(file)

        mock.patch.object(os, "fsync", counted).start()
        sys.addaudithook(hook)
        small(out)

    operation = 1
    while True:
        out = where / f"operation{operation}"
        pid = forked(lambda out=out, operation=operation: dying(out, operation))  # type: ignore[misc]
        killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        small(out)
        ends["bitwise equal" if weights(out) == expected else "OTHER"] += 1
        ends["LEFT BEHIND"] += bool(leftovers(out))
        shutil.rmtree(out)
        if not killed:
            return ends
        operation += 1


def damage(count: int, where: Path) -> Counter[str]:
    """Damage checkpoints, networks and numbers; each must be refused by name, or have lost nothing."""
    ends: Counter[str] = Counter()
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
    for seed in range(count):
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
                ends["read, nothing lost" if identity((state or {})["model"]) == kept else "SILENT"] += 1
            else:
                files.load_result(config)
                ends["read, nothing lost"] += 1
        except CheckpointError:
            ends["refused by name"] += 1
        except Exception as error:
            ends[f"RAISED {type(error).__name__}"] += 1
        if kind != "checkpoint":
            path.write_bytes(sound[kind])
    return ends


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

    os.waitpid(forked(until_the_first_epoch), 0)
    return path.read_bytes()


def bad_lines(count: int, where: Path) -> Counter[str]:
    """Give the command options that it must refuse before anything is trained."""
    ends: Counter[str] = Counter()
    lines = [[option, value] for option, values in BAD.items() for value in values]
    lines += [[option] for option in BAD if option not in ("--tensorboard", "--no-baseline", "--reproduce")]
    for line in random.Random(0).sample(lines, min(count, len(lines))):
        told = io.StringIO()
        out = [] if line[0] == "--out" else ["--out", str(where / "lines")]
        try:
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
                code: object = cifar_resnet.main(["--student", "8", "--teacher", "8", "--epochs", "1", *out, *line])
        except SystemExit as stopped:
            code = stopped.code
        except BaseException as error:
            code = f"{type(error).__name__}"
        named = "error:" in told.getvalue() and "Traceback" not in told.getvalue()
        ends["refused by name" if code in (1, 2) and named else f"ENDED WITH {code} {line[:2]}"[:80]] += 1
        ends["TRAINED"] += (where / "lines" / "weights").exists()
    return ends


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign.

    Args:
        arguments: The arguments; those of the process by default.

    Returns:
        0, or 1 if any try ended badly.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="kills,operations,damage,lines", help="parts, with commas between them")
    parser.add_argument("--kills", type=int, default=200, help="half of them with 2 jobs; default: 200")
    parser.add_argument("--damaged", type=int, default=1000, help="default: 1000")
    parser.add_argument("--lines", type=int, default=150, help="default: 150")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    parts: dict[str, list[tuple[str, Callable[[Path], Counter[str]]]]] = {
        "lines": [("bad command lines", lambda where: bad_lines(args.lines, where))],
        "damage": [("damaged files", lambda where: damage(args.damaged, where))],
        "operations": [("kills at each operation on a file", kill_at_operations)],
        "kills": [
            (f"{args.kills // 2} random kills, --jobs {jobs}", functools.partial(kill_at_random, args.kills // 2, jobs))
            for jobs in (1, 2)
        ],
    }
    bad = 0
    for name in parts:
        for title, part in parts[name] if name in args.only.split(",") else []:
            with tempfile.TemporaryDirectory() as where:
                ends = +part(Path(where))
            bad += sum(number for end, number in ends.items() if end.split()[0].isupper())
            print(f"{title}: " + ", ".join(f"{number} {end}" for end, number in sorted(ends.items())), flush=True)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
