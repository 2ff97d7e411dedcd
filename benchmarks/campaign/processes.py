"""Processes of a command: forked, waited for and killed, with what they have started. Only for Linux."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path


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


def inherit_orphans() -> None:
    """Become the parent of the processes that a killed command leaves, so that they can be waited for."""
    set_child_subreaper = 36
    if ctypes.CDLL(None, use_errno=True).prctl(set_child_subreaper, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the system lets no process inherit orphans")
