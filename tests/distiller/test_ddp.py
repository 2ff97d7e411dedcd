"""Two processes under DistributedDataParallel and FSDP against one process on the joined batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp

from workers import needs_gloo, run_workers

WORKER = Path(__file__).parents[1] / "support/ddp_worker.py"


@needs_gloo
def test_two_processes_get_the_gradients_of_one_on_the_joined_batch(tmp_path):
    run_workers(WORKER, [(rank, world, tmp_path) for rank, world in ((0, 1), (0, 2), (1, 2))])
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
        for refused in {"refused", "refused sharded"} & process.keys():
            assert "the learned part of term 'hint' must get the gradients of all processes" in process[refused]
        for ours, whole in zip(process["calibrated"], single["calibrated"], strict=True):
            assert ours == pytest.approx(whole, rel=1e-5)
        if hasattr(torch.distributed.fsdp, "fully_shard"):  # from PyTorch 2.6 on
            torch.testing.assert_close(process["sharded"], single["distiller"])
            torch.testing.assert_close(process["as one"], single["distiller"])
            assert "calibrate before they are" in process["refused calibration"]
            assert "refused sharded" in process
        assert process["size"] == sum(gradient.numel() for gradient in single["distiller"].values())
    assert first["calibrated"] == second["calibrated"]
    assert "losses.hint.scale" in first["distiller"]
    # Each process logs its own terms: their mean is that of the batch, with a denominator their sum.
    for name, whole in single["terms"].items():
        torch.testing.assert_close((first["terms"][name] + second["terms"][name]) / 2, whole)
        assert first["terms"][name] != second["terms"][name]
    for name in ("task", "kl", "pool"):
        torch.testing.assert_close(first["shares"][name] + second["shares"][name], single["terms"][name])
