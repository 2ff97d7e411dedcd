"""One process of the DistributedDataParallel and FSDP tests: takes a step on its half of a batch, saves gradients.

Called as `python ddp_worker.py RANK WORLD_SIZE FOLDER`; with a world of one it runs the whole batch without DDP.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from distill import Distiller, KLLoss, LogitLoss, Term, calibrate
from models import batch

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # PyTorch 2.5 shards on GPUs only
    fully_shard = None


class Regressor(nn.Module):
    """A loss with a weight of its own, that DDP must average too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, student, teacher, target=None):
        return (self.scale * student - teacher).square().mean()


def model(seed: int) -> nn.Module:
    """Without batch norm, whose statistics DDP keeps per process by design."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


SHARES = {"task": 0.5, "hint": 0.2, "kl": 0.2, "pool": 0.1}
REST = {"kl": Term(KLLoss(), weight=0.5), "pool": Term(LogitLoss(), at="2:input")}


def build() -> Distiller:
    return Distiller(model(0), model(1), {"hint": Term(Regressor(), at="1"), **REST})


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def main(rank: int, world: int, folder: Path) -> None:
    inputs, target = batch(8)
    if world == 1:
        distiller = build()
        out = distiller(inputs, target)
        out.loss.backward()
        calibrated = [calibrate(build(), [(inputs, target)], SHARES, by=by) for by in ("gradient", "value")]
        state = {"distiller": gradients(distiller), "terms": out.terms, "calibrated": calibrated}
        torch.save(state, folder / "single.pt")
        return
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)

    # The whole Distiller inside DDP: averages the losses' own weights as well.
    distiller = build()
    wrapped = DistributedDataParallel(distiller)
    out = wrapped(inputs[mine], target[mine])
    out.loss.backward()
    buckets = sum(p.numel() for p in wrapped.parameters())
    whole = gradients(distiller)
    batches = [(inputs[mine], target[mine])] * (1 + rank)  # of the second batch there is none on the other process
    calibrated = [calibrate(DistributedDataParallel(build()), batches, SHARES, by=by) for by in ("gradient", "value")]
    with torch.no_grad():
        shares = distiller(inputs[mine], target[mine], denominator=8).terms

    # The student inside DDP, handed over in the call, and so must be the loss that learns.
    distiller = build()
    student = DistributedDataParallel(distiller.student)
    try:
        distiller(inputs[mine], target[mine], student=student)
    except ValueError as error:
        refused = str(error)
    terms = {"hint": Term(DistributedDataParallel(Regressor()), at="1"), **REST}
    distiller = Distiller(model(0), model(1), terms)
    student = DistributedDataParallel(distiller.student)
    distiller(inputs[mine], target[mine], student=student).loss.backward()
    replicated = {**gradients(distiller.student), "scale": distiller.losses["hint"].module.scale.grad.clone()}

    state = {"distiller": whole, "student": replicated, "size": buckets, "terms": out.terms, "shares": shares}
    state |= {"refused": refused, "calibrated": calibrated}
    if fully_shard is not None:
        state |= shard(inputs[mine], target[mine], batches, world)
    torch.save(state, folder / f"{rank}.pt")
    dist.destroy_process_group()


def shard(inputs, target, batches, world):
    """The gradients under FSDP2, and what it refuses."""
    # The student's layers sharded over the processes in place, and so must be the loss that learns.
    distiller = build()
    mesh = init_device_mesh("cpu", (world,))
    for layer in (distiller.student[0], distiller.student[2], distiller.student):
        fully_shard(layer, mesh=mesh)
    try:
        distiller(inputs, target)
    except ValueError as error:
        refused_sharded = str(error)
    try:
        calibrate(distiller, batches, SHARES)
    except ValueError as error:
        refused_calibration = str(error)
    fully_shard(distiller.losses["hint"], mesh=mesh)
    distiller(inputs, target).loss.backward()
    sharded = {name: gradient.full_tensor() for name, gradient in gradients(distiller).items()}

    # All of it sharded as one.
    distiller = build()
    fully_shard(distiller, mesh=mesh)
    distiller(inputs, target).loss.backward()
    as_one = {name: gradient.full_tensor() for name, gradient in gradients(distiller).items()}

    refusals = {"refused sharded": refused_sharded, "refused calibration": refused_calibration}
    return {"sharded": sharded, "as one": as_one, **refusals}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
