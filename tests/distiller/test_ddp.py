"""Two processes under DistributedDataParallel and FSDP against one process on the joined batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

WORKER = Path(__file__).parents[1] / "support/ddp_worker.py"


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo")
def test_two_processes_get_the_gradients_of_one_on_the_joined_batch(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [(0, 1), (0, 2), (1, 2)]
    processes = [
        subprocess.Popen([sys.executable, str(WORKER), str(rank), str(world), str(tmp_path)], env=environment)
        for rank, world in runs
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
    single, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("single.pt", "0.pt", "1.pt"))
    student = {
        name.removeprefix("student."): gradient
        for name, gradient in single["distiller"].items()
        if name.startswith("student.")
    }
    for process in (first, second):
        torch.testing.assert_close(process["distiller"], single["distiller"])
        scale = single["distiller"]["losses.hint.scale"]
        torch.testing.assert_close(process["student"], {**student, "scale": scale})
        for refused in ("refused", "refused sharded"):
            assert "the learned part of term 'hint' must get the gradients of all processes" in process[refused]
        torch.testing.assert_close(process["sharded"], single["distiller"])
        torch.testing.assert_close(process["as one"], single["distiller"])
        assert process["size"] == sum(gradient.numel() for gradient in single["distiller"].values())
    assert "losses.hint.scale" in first["distiller"]
