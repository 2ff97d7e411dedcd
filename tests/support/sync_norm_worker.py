"""One process of the tests of what looks at all processes: batch norms, and a queue of embeddings.

Called as `python sync_norm_worker.py RANK WORLD_SIZE FOLDER`; with a world of one it runs the whole batch.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contract import make_pair, with_weights
from distill import OFDLoss, QueueKLLoss, ReviewLoss

BORDERS = (0, 3, 8)  # samples per process: unequal


def losses() -> dict[str, nn.Module]:
    built = {
        "ofd": OFDLoss(3, 4, -torch.arange(4.0), reduction="sum"),
        "review": ReviewLoss((3, 3), (4, 4), reduction="sum"),
    }
    return {name: nn.SyncBatchNorm.convert_sync_batchnorm(with_weights(loss)) for name, loss in built.items()}


def results(name: str, loss: nn.Module, mine: slice, mask: Tensor | None) -> dict[str, Tensor]:
    """Value and gradients for this process's samples."""
    student, teacher = (x[mine].detach() for x in make_pair(8, 3, 4, 5, teacher_shape=(8, 4, 4, 5)))
    student.requires_grad_()
    sides = [(x, x[..., :2, :2]) if name == "review" else x for x in (student, teacher)]
    value = loss.double()(*sides, mask=None if mask is None else mask[mine])
    value.backward()
    own = {parameter: weight.grad for parameter, weight in loss.named_parameters()}
    loss.zero_grad()
    return {"value": value.detach(), "student": student.grad, **own}


def queue(rank: int, world: int) -> dict[str, Tensor]:
    """The queue after two batches of four, of which a mask hides one sample, and one that is no number."""
    loss = QueueKLLoss(3, 4, 6)
    for step in range(2):
        student, teacher = make_pair(4, 3, teacher_shape=(4, 4), seed=step, dtype=torch.float32)
        teacher[1, 0] = torch.nan
        mask = torch.tensor([True, True, False, True])
        mine = slice(0, 4) if world == 1 else slice(rank, 1 + 3 * rank)  # one sample and three
        loss(student[mine], teacher[mine], mask=mask[mine])
    return {"queue": loss.queue, "entered": loss.entered}


def main(rank: int, world: int, folder: Path) -> None:
    mine = slice(0, 8)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
        mine = slice(BORDERS[rank], BORDERS[rank + 1])
    found = {}
    for name, loss in losses().items():
        found[name] = results(name, loss, mine, None)
        found[f"{name} masked"] = results(name, loss, mine, torch.tensor([0, 0, 0, 1, 1, 0, 1, 1]))
        # In eval mode a process is on its own: the other one does not take part.
        found[f"{name} alone"] = results(name, loss.eval(), mine, None) if rank == 0 else {}
    found["queue"] = queue(rank, world)
    torch.save(found, folder / f"{rank} of {world}.pt")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
