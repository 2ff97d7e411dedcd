"""Commands of the study in processes of their own, which start in no time: forks of one that only imports."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import cifar_resnet
from cifar import crew, engine
from cifar.crew import PRELOADED, STOPPING
from cifar_runs import make_data

WORK = crew._work


def preloaded():
    """The context whose processes are forks of one that has imported what the study needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start(target, *args, log):
    """Call a function in a new process.

    Args:
        target: A function of a module; what it returns, if a number, is the exit code.
        *args: What it takes.
        log: A file that gets what the process prints, errors too.

    Returns:
        The process.
    """
    process = preloaded().Process(target=_work, args=(target, args, str(log)))
    process.start()
    return process


def _work(target, args, log):
    for number in STOPPING:  # as a shell leaves them; the process that forks may ignore them
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(opened, stream)
    sys.exit(target(*args))


def few_images(*_):
    """The data set of a small command, whatever it asks for: one step an epoch."""
    return make_data(128, 128)


def small_work(*args):
    """What a worker of a small command does."""
    crew.load_dataset = few_images
    WORK(*args)


def waiting_work(run, name, place, connection):
    """The same, but it waits after its first epoch until the output folder has a file `go`."""
    for number in STOPPING:  # as after a fork of a process that answers them
        signal.signal(number, signal.SIG_DFL)
    step, steps = engine.train_step, []

    def waiting(*args):
        steps.append(args)
        if len(steps) == 2:
            until((place.out / "go").exists, 3600)  # longer than any test waits for its end
        return step(*args)

    engine.train_step = waiting
    small_work(run, name, place, connection)


def small(arguments, *, work=small_work, context=None):
    """The command on a few random images, without a picture: a tenth of the time, all the files.

    Args:
        arguments: Of the command.
        work: What its workers do.
        context: Where its workers come from, if not from where they do otherwise.

    Returns:
        Its exit code.
    """
    replaced = {"cifar_resnet.load_dataset": few_images, "cifar.crew._work": work}
    replaced["cifar.crew.PRELOADED"] = ["torch", "torch._dynamo", "distill"]  # no data, no picture
    replaced["cifar.report.draw_picture"] = lambda _: b"which takes longer than everything else"
    if context is not None:
        replaced["cifar.crew.multiprocessing.get_context"] = lambda _: context
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch(name, value))
        return cifar_resnet.main(arguments)


def small_and_waiting(arguments):
    """The same with workers that wait, for `start`."""
    return small(arguments, work=waiting_work)


def alive(pid):
    """Whether there is such a process; one that nobody has asked for its exit code is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers(process):
    """The processes that train for a living command: children of its child that forks."""

    def children(pid):
        try:
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except OSError:  # it has just ended
            return []

    return [worker for child in children(process.pid) for worker in children(child)]


def until(condition, seconds=120):
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return value
