"""Starts the processes of a test over several of them, and ends them whatever happens."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"
)


def run_workers(worker: Path, calls: Iterable[Iterable[object]], *, timeout: float = 300) -> None:
    """Run a worker's file once for the arguments of each call, all at a time; each must end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, str(worker), *map(str, arguments)], env=environment) for arguments in calls
    ]
    try:
        assert [process.wait(timeout=timeout) for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()
