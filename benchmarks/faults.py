"""The study under faults: kills, damaged files and bad command lines, counted.

    python benchmarks/faults.py                       # everything; an hour on 2 cores
    python benchmarks/faults.py --only damage,lines   # minutes
    python benchmarks/faults.py --kills 20            # fewer kills
    python benchmarks/faults.py --log faults.jsonl    # keeps each try: the same command goes on where it was stopped

Each part prints one line: how often it was tried, and how each try ended. The command exits with 1 if any ended badly:
with other weights than a run that nobody disturbs, with a traceback, with a file half written or left behind, with a
process that goes on. Only for Linux: it forks. docs/reliability.md has the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # as the first optimizer does: a fork then has it

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("examples", "tests/support")]

import cifar_resnet  # noqa: E402
from cifar.checkpoints import CheckpointError, RunFiles, save_state, unusable  # noqa: E402
from cifar.states import identity  # noqa: E402
from cifar.training import Run, train  # noqa: E402
from cifar_runs import make_config, make_data  # type: ignore[import-not-found]  # noqa: E402  # of the tests

Ends = Counter[str]  # how tries ended; what is not in order is in capitals
Tries = Iterator[Ends]
OPERATIONS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.utime", "fsync")
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


def weights(out: Path) -> dict[str, str]:
    """The identity of each network under a folder."""
    return {
        path.name: identity(torch.load(path, weights_only=True)["model"]) for path in sorted(out.glob("weights/*.pt"))
    }


def leftovers(out: Path) -> list[str]:
    """What should not lie there when everything is done."""
    return [str(path) for path in (*out.rglob("*.tmp"), *out.glob("checkpoints/*"))]


def forked(call: Callable[[], int | None], log: str | Path = os.devnull) -> int:
    """Call a function in a fork of this process, whose output a file gets; gives its process number."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 1)
        os.dup2(1, 2)
        code = call() or 0
    finally:
        os._exit(code)


def wait(pid: int, limit: float = math.inf) -> tuple[float, int]:
    """Wait for a command, and kill it when it and its workers have used so much processor time.

    Not so many seconds: how many it takes depends on what else the machine does.

    Returns:
        The time that they used, and the exit code.
    """
    used = 0.0
    while used < limit:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return used, os.waitstatus_to_exitcode(status)
        used = max(used, _used(pid))
        time.sleep(0.03)
    os.kill(pid, signal.SIGKILL)
    return used, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _used(pid: int) -> float:
    """Seconds of processor time of a command and of what it has started."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(_used(int(child)) for child in children)


def small(out: Path) -> None:
    """A teacher of one epoch and its student of two, on random images."""
    data, config = make_data(128, 128), make_config(epochs=2)
    with contextlib.redirect_stdout(io.StringIO()):
        train(config.teacher_config(), data, out)
        train(config, data, out)


def kill_at_random(
    count: int, train: Callable[[int, Path], int], jobs: int, where: Path, before: Sequence[Ends]
) -> Tries:
    """Kill the command at random moments, up to three times in a row; then let it come to its end."""

    def command(out: Path) -> int:
        return forked(lambda: train(jobs, out))

    takes, _ = wait(command(where / "whole"))
    expected = weights(where / "whole")
    kills = sum(ends["kills"] for ends in before)
    for number in itertools.count(len(before)):
        if kills >= count:
            return
        draw, out, ends = random.Random(f"{jobs} {number}"), where / f"killed{number}", Counter[str]()
        for row in range(min(3, count - kills)):  # the second has less to do
            if wait(command(out), draw.uniform(0, takes / (1 + row)))[1] != -signal.SIGKILL:
                break  # it came to its end before
            ends["kills"] += 1
        kills += ends["kills"]
        yield ends + went_on(out, command(out), expected)


def kill_at_operations(jobs: int, where: Path, before: Sequence[Ends]) -> Tries:
    """Kill the command at each of its operations on files, one after the other; then let it come to its end.

    With two jobs, two processes train, and one that started them writes the tables. The one that is about to do the
    operation is killed; the others must end, and lose nothing.
    """
    command_that_dies(jobs, where / "whole", 0)
    expected = weights(where / "whole")
    for operation in itertools.count(len(before) + 1):
        out = where / f"operation{operation}"
        if not command_that_dies(jobs, out, operation):
            return
        yield Counter(kills=1) + went_on(out, forked(lambda out=out: small_command(jobs, out)), expected)  # type: ignore[misc]


def whole_command(jobs: int, out: Path) -> int:
    """The command as people start it."""
    return cifar_resnet.main([*COMMAND, "--jobs", str(jobs), "--out", str(out)])


def small_command(jobs: int, out: Path) -> int:
    """The same on a few random images, without a picture, its workers forks: a tenth of the time, all the files."""
    replaced = {
        "cifar_resnet.load_dataset": make_data(128, 128),
        "cifar.crew.load_dataset": make_data(128, 128),
        "cifar.report.draw_picture": b"which takes longer than everything else",
        # What is replaced here must be replaced in the workers too.
        "cifar.crew.multiprocessing.get_context": multiprocessing.get_context("fork"),
    }
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch(name, return_value=value))
        return whole_command(jobs, out)


def command_that_dies(jobs: int, out: Path, operation: int) -> bool:
    """Run the command, and kill whichever of its processes is about to do its n-th operation on a file.

    Args:
        jobs: How many runs are trained side by side.
        out: The output folder; what is done elsewhere does not count.
        operation: The number of the operation, from 1; 0 for none.

    Returns:
        Whether it has that many operations.
    """
    # Each operation takes one byte, in whichever process: no lock that somebody could die with.
    orders, written = os.pipe()
    os.set_blocking(orders, False)
    os.write(written, b"." * (operation - 1) + b"x" * (operation > 0))

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in OPERATIONS and (event == "fsync" or str(out) in str(arguments[0])):
            with contextlib.suppress(BlockingIOError):
                if os.read(orders, 1) == b"x":
                    os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync

    def counted(file: int) -> None:
        hook("fsync", ())
        fsync(file)

    def dying() -> int:
        sys.addaudithook(hook)
        with mock.patch.object(os, "fsync", counted):
            return small_command(jobs, out)

    wait(forked(dying))
    left = b""
    with contextlib.suppress(BlockingIOError):
        left = os.read(orders, 1 << 16)
    os.close(orders)
    os.close(written)
    return b"x" not in left


def pairs(count: int, where: Path, before: Sequence[Ends]) -> Tries:
    """Start two commands on one folder; one of them is killed every other time. The other must do what is left.

    Where none is killed, no epoch may be trained twice.
    """
    takes, _ = wait(forked(lambda: small_command(1, where / "whole")))
    expected = weights(where / "whole")
    for number in range(len(before), count):
        draw, out, log = random.Random(f"pair {number}"), where / f"pair{number}", where / f"log{number}"
        killed, other = (forked(functools.partial(small_command, jobs, out), log) for jobs in draw.sample([1, 2], 2))
        ends: Ends = Counter(pairs=1)
        if number % 2:
            ends["kills"] += wait(killed, draw.uniform(0, takes / 2))[1] == -signal.SIGKILL
        ends["OTHER"] += wait(other)[1] != 0 or weights(out) != expected
        # The killed one may have died after the other's end: what it leaves is for the next command to remove.
        ends += went_on(out, forked(functools.partial(small_command, 1, out)), expected)
        if not ends["kills"]:
            epochs = Counter(re.findall(r"^(.+ epoch [ \d]+)/", log.read_text(), re.MULTILINE))
            ends["EPOCHS TWICE OR NEVER"] += len(epochs) != 3 * 2 or set(epochs.values()) != {1}
        yield +ends


def went_on(out: Path, pid: int, expected: dict[str, str]) -> Ends:
    """Wait for a command that goes on after a kill, and say how it ended."""
    ends: Ends = Counter()
    same = wait(pid)[1] == 0 and weights(out) == expected
    ends["bitwise equal" if same else "OTHER"] += 1
    ends["PROCESSES LEFT"] += not all_ended()
    ends["LEFT BEHIND"] += bool(leftovers(out))
    shutil.rmtree(out)
    return +ends


def all_ended(seconds: float = 120.0) -> bool:
    """Whether what a killed command had started comes to its end by itself; this process inherits it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.05)
        except ChildProcessError:
            return True
    return False


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


def bad_lines(count: int, where: Path, before: Sequence[Ends] = ()) -> Tries:
    """Give the command options that it must refuse before anything is trained."""
    lines = [[option, value] for option, values in BAD.items() for value in values]
    lines += [[option] for option in BAD if option not in ("--tensorboard", "--no-baseline", "--reproduce")]
    for line in random.Random(0).sample(lines, min(count, len(lines)))[len(before) :]:
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
        ends = Counter(["refused by name" if code in (1, 2) and named else f"ENDED WITH {code} {line[:2]}"[:80]])
        ends["TRAINED"] += (where / "lines" / "weights").exists()
        yield +ends


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign.

    Args:
        arguments: The arguments; those of the process by default.

    Returns:
        0, or 1 if any try ended badly.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="kills,small,operations,pairs,damage,lines", help="parts, with commas between them"
    )
    parser.add_argument("--kills", type=int, default=200, help="half of them with 2 jobs; default: 200")
    parser.add_argument("--pairs", type=int, default=40, help="of commands; default: 40")
    parser.add_argument("--damaged", type=int, default=1000, help="default: 1000")
    parser.add_argument("--lines", type=int, default=150, help="default: 150")
    parser.add_argument("--log", type=Path, help="a file that each try is added to; the tries in it are not done again")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    inherit_orphans()
    both, half = (1, 2), args.kills // 2
    parts: dict[str, list[tuple[str, Callable[[Path, Sequence[Ends]], Tries]]]] = {
        "lines": [("bad command lines", functools.partial(bad_lines, args.lines))],
        "damage": [("damaged files", functools.partial(damage, args.damaged))],
        "operations": [
            (f"kills at each operation on a file, --jobs {jobs}", functools.partial(kill_at_operations, jobs))
            for jobs in both
        ],
        "pairs": [("two commands on one folder", functools.partial(pairs, args.pairs))],
        "small": [
            (
                f"random kills of a small run, --jobs {jobs}",
                functools.partial(kill_at_random, half, small_command, jobs),
            )
            for jobs in both
        ],
        "kills": [
            (f"random kills, --jobs {jobs}", functools.partial(kill_at_random, half, whole_command, jobs))
            for jobs in both
        ],
    }
    bad = 0
    for name in parts:
        for title, part in parts[name] if name in args.only.split(",") else []:
            before = read_log(args.log, title)
            ends, told = sum(before, Counter[str]()), time.monotonic()
            with tempfile.TemporaryDirectory() as where:
                for end in part(Path(where), before):
                    ends += end
                    if args.log is not None:
                        with args.log.open("a") as log:
                            log.write(json.dumps({"part": title, "ends": end}) + "\n")
                    if time.monotonic() - told > 10:
                        told = time.monotonic()
                        print(f"{time.strftime('%H:%M:%S')} {title}: {in_words(ends)}", file=sys.stderr, flush=True)
            bad += sum(number for end, number in ends.items() if end.split()[0].isupper())
            print(f"{title}: {in_words(ends)}", flush=True)
    return bool(bad)


def in_words(ends: Ends) -> str:
    """How often each end was met."""
    return ", ".join(f"{number} {end}" for end, number in sorted(ends.items())) or "none"


def read_log(path: Path | None, title: str) -> list[Ends]:
    """How the tries of a part ended that an earlier command has made."""
    if path is None or not path.exists():
        return []
    return [Counter(made["ends"]) for made in map(json.loads, path.open()) if made["part"] == title]


def inherit_orphans() -> None:
    """Become the parent of the processes that a killed command leaves, so that they can be waited for."""
    set_child_subreaper = 36
    if ctypes.CDLL(None, use_errno=True).prctl(set_child_subreaper, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the system lets no process inherit orphans")


if __name__ == "__main__":
    sys.exit(main())
