"""Commands of the study in processes of their own, which start in no time: forks of one that only imports."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from cifar.crew import PRELOADED, STOPPING


def start(target, *args, log):
    """Call a function in a new process.

    Args:
        target: A function of a module; what it returns, if a number, is the exit code.
        *args: What it takes.
        log: A file that gets what the process prints, errors too.

    Returns:
        The process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_work, args=(target, args, str(log)))
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


def command(arguments):
    """The command itself, for `start`."""
    import cifar_resnet

    return cifar_resnet.main(arguments)


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
