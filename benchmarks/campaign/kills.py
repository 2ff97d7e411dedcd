"""Kills: at random moments, at each operation on a file, and of one of two commands on one folder."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # as the first optimizer does: a fork then has it

import cifar_resnet
from campaign.ends import Ends, Tries
from campaign.processes import all_ended, forked, wait
from cifar.states import identity
from commands import small  # type: ignore[import-not-found]  # of the tests

OPERATIONS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.utime", "fsync")
COMMAND = ["--student", "8", "--teacher", "8", "--epochs", "2", "--device", "cpu", "--threads", "1"]


def whole_command(jobs: int, out: Path) -> int:
    """The command as people start it."""
    return cifar_resnet.main([*COMMAND, "--jobs", str(jobs), "--out", str(out)])


def small_command(jobs: int, out: Path) -> int:
    """The same on a few random images, its workers forks, which inherit what is replaced here."""
    arguments = [*COMMAND, "--jobs", str(jobs), "--out", str(out)]
    code: int = small(arguments, context=multiprocessing.get_context("fork"))
    return code


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


def weights(out: Path) -> dict[str, str]:
    """The identity of each network under a folder."""
    return {
        path.name: identity(torch.load(path, weights_only=True)["model"]) for path in sorted(out.glob("weights/*.pt"))
    }


def leftovers(out: Path) -> list[str]:
    """What should not lie there when everything is done."""
    return [str(path) for path in (*out.rglob("*.tmp"), *out.glob("checkpoints/*"))]
