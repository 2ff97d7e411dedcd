"""Runs tests in forks of one process that has imported PyTorch and pytest, but nothing of this library.

To start Python and to import PyTorch takes longer than most of what a mutation run wants to know. A fork has both at
once, and starts as clean as a new process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

PRELOADED = ["torch", "torch.fx.experimental.symbolic_shapes", "torch.distributed.fsdp", "numpy", "pytest"]
PRELOADED += ["_pytest.doctest", "safetensors.torch", "accelerate", "peft", "transformers.trainer"]
PRELOADED += [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gpt2", "bert", "vit", "swin", "t5")]
MEMORY = 16 << 30  # bytes of address space


class Forked:
    """A process that waits in a copy of the tree, and runs the tests that it is given in a fork of itself."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seconds = folder, 0.0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = str(folder / "src")
        self._process = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._ask, self._answer = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)

    def run(self, ids: Sequence[str], limit: float) -> str:
        """Run tests until one fails, for at most `limit` seconds of the processor; say how it ended."""
        self._ask.write(json.dumps([list(ids), limit]).encode() + b"\n")
        self._ask.flush()
        code, seconds = json.loads(self._answer.readline())
        self.seconds += seconds
        if code == 0:
            return "survived"
        if code == 1 and failed(self.output()):
            return "found"
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return "time"
        return "found (import)" if "Error" in self.output() else f"exit {code}"

    def output(self) -> str:
        """What the last run printed."""
        return (self.folder / "output.txt").read_text(errors="replace")

    def close(self) -> None:
        """End the process."""
        self._ask.close()
        self._process.wait()


def failed(output: str) -> set[str]:
    """The tests that failed, as pytest names them."""
    return set(re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE))


def serve() -> None:
    """Answer each line of stdin, tests and a limit, with the exit code and the processor time of a fork."""
    for module in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    if (
        any(module.partition(".")[0] == "distill" for module in sys.modules)
        or len([*Path("/proc/self/task").iterdir()]) > 1
    ):
        raise SystemExit("the library was imported, or a thread started, before the fork")
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        ids, limit = json.loads(line)
        pid = os.fork()
        if not pid:
            _child(ids, limit)
        print(json.dumps(_wait(pid, 20 * limit)), flush=True)


def _child(ids: Sequence[str], limit: float) -> None:
    os.setpgid(0, 0)
    output = os.open("output.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    import pytest

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # pytest wants to load them before they are there
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin", *ids])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))


def _wait(pid: int, limit: float) -> tuple[int, float]:
    """Wait for a fork; one that sleeps for ever is killed."""
    end = time.monotonic() + limit
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            break
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what it started itself
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    serve()
