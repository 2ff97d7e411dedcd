"""Starts the processes of a test over several of them, and ends them whatever happens.

They are forked from one process that has imported what they need, which takes longer than what most of them do.
"""

import contextlib
import multiprocessing
import runpy
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"
)

_server = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    _server.set_forkserver_preload(
        ["torch.distributed.fsdp", "torch.distributed.tensor", "transformers.trainer", "distill", "contract", "workers"]
    )


@contextlib.contextmanager
def workers(worker: Path, calls: Iterable[Iterable[object]], *, timeout: float = 300) -> Iterator[None]:
    """Run a worker's file once for the arguments of each call, all at a time, beside the block; each must end well."""
    processes = [
        _server.Process(target=_work, args=([str(worker), *map(str, arguments)],), daemon=True) for arguments in calls
    ]
    for process in processes:
        process.start()
    try:
        yield
        for process in processes:
            process.join(timeout)
        assert [process.exitcode for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()


def run_workers(worker: Path, calls: Iterable[Iterable[object]], *, timeout: float = 300) -> None:
    """Run a worker's file once for the arguments of each call, all at a time; each must end well."""
    with workers(worker, calls, timeout=timeout):
        pass


def _work(command: list[str]) -> None:
    torch.set_num_threads(1)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
