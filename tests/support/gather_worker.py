"""What each process of several does with losses that gather: values and DDP's gradients against those of one process.

`check(rank, world)` raises where they differ; it is called by `recipes_worker.py`, in a group of two processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from contract import make_pair
from distill import (
    CCLoss,
    CRDLoss,
    DISTLoss,
    DISTPlusLoss,
    ICKDLoss,
    PearsonLoss,
    PKTLoss,
    RKDLoss,
    SKDLoss,
    SPLoss,
    SRDLoss,
)

N = 8
FEATURES = (N, 6), (N, 7)
MAPS = (N, 6, 4), (N, 6, 2)  # maps with one dimension of positions


def contrast(num_samples: int | None = None, **options: Any) -> CRDLoss:
    """CRD with seeded embeddings and, with `num_samples`, a seeded memory and seeded negatives."""
    torch.manual_seed(5)
    if num_samples is not None:
        options |= {"num_negatives": 5, "generator": torch.Generator().manual_seed(1)}
    return CRDLoss(6, 7, num_samples, dim=4, temperature=0.5, **options)


LOSSES = {
    "rkd": (RKDLoss, FEATURES),
    "sp": (SPLoss, FEATURES),
    "pkt": (PKTLoss, FEATURES),
    "cc": (CCLoss, FEATURES),
    "crd": (contrast, FEATURES),
    "crd with a memory": (lambda **options: contrast(20, **options), FEATURES),
    "dist": (DISTLoss, ((N, 6), (N, 6))),
    "dist of tokens": (DISTLoss, ((N, 3, 6), (N, 3, 6))),
    "dist_plus": (DISTPlusLoss, MAPS),
    "ickd": (ICKDLoss, MAPS),
    "pearson": (PearsonLoss, MAPS),
    "skd": (SKDLoss, ((N, 6), (N, 6))),
    "srd": (lambda **options: SRDLoss(6, 7, **options), FEATURES),
}
PLACES = torch.tensor([3, 11, 5, 2, 0, 19, 7, 8])
KEPT = torch.tensor([True, False, True, True, True, False, True, True])


class Step(nn.Module):
    """A student of one layer along the last dimension but positions, and a loss."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.scale, self.shift, self.loss = nn.Parameter(torch.full((6,), 1.5)), nn.Parameter(torch.rand(6)), loss

    def forward(self, inputs: Tensor, teacher: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        maps = isinstance(self.loss, (DISTPlusLoss, ICKDLoss, PearsonLoss))
        student = inputs.mT if maps else inputs
        student = (student * self.scale + self.shift).tanh()
        return self.loss(student.mT if maps else student, teacher, target, mask=mask)


def step(name: str, *, gather: bool) -> Step:
    torch.manual_seed(4)
    return Step(LOSSES[name][0](gather=gather)).double()


def compare(name: str, mine: slice, kept: Tensor | None) -> None:
    """One step on a part of the batch under DDP against one step on all of it."""
    student, teacher = make_pair(*LOSSES[name][1][0], teacher_shape=LOSSES[name][1][1])
    batch = student.detach(), teacher, PLACES, kept
    if kept is not None and name == "dist of tokens":
        batch = *batch[:3], kept[:, None].expand(N, 3)
    alone, together = step(name, gather=False), step(name, gather=True)
    value = alone(*batch)
    value.backward()
    parts = (None if part is None else part[mine] for part in batch)
    wrapped = DistributedDataParallel(together)
    gathered = wrapped(*parts)
    gathered.backward()
    torch.testing.assert_close(gathered, value, rtol=1e-10, atol=1e-12)
    ours = {path: parameter.grad for path, parameter in together.named_parameters()}
    theirs = {path: parameter.grad for path, parameter in alone.named_parameters()}
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(dict(together.named_buffers()), dict(alone.named_buffers()), equal_nan=True)


def check_evaluation(rank: int) -> None:
    """In eval mode a process waits for nobody: one of them asks twice, the other once."""
    loss = SPLoss(gather=True).eval()
    student, teacher = make_pair(4, 6, teacher_shape=(4, 7), seed=rank)
    for _ in range(1 + rank):
        torch.testing.assert_close(loss(student, teacher), SPLoss()(student, teacher))


def check_low_precision(mine: slice) -> None:
    student, teacher = (tensor.bfloat16() for tensor in make_pair(N, 6, teacher_shape=(N, 7)))
    torch.testing.assert_close(SPLoss(gather=True)(student[mine], teacher[mine]), SPLoss()(student, teacher))


def refused(*arguments: Any, mask: Tensor | None = None, loss: nn.Module | None = None) -> str:
    try:
        (loss or SPLoss(gather=True))(*arguments, mask=mask)
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def check_refusals(rank: int) -> list[str]:
    """What the processes do not agree on is refused on all of them."""
    student, teacher = torch.rand(4, 6), torch.rand(4, 7)
    return [
        refused(student[:, : 6 - rank], teacher),
        refused(student.double() if rank else student, teacher),
        refused(student, teacher, mask=torch.ones(4, dtype=torch.bool) if rank else None),
        refused(student[: 4 - rank], teacher),
    ]


def check(rank: int, world: int) -> list[str]:
    """All of it, in a group of processes that exists."""
    for name in LOSSES:
        compare(name, slice(rank * N // world, (rank + 1) * N // world), None)
        unequal = slice(0, 5) if rank == 0 else slice(5, N)
        compare(name, unequal, None)
        compare(name, unequal, KEPT)
    nothing = slice(0, 0) if rank == 0 else slice(0, N)
    student, teacher = make_pair(N, 6, teacher_shape=(N, 7))
    torch.testing.assert_close(RKDLoss(gather=True)(student[nothing], teacher[nothing]), RKDLoss()(student, teacher))
    check_evaluation(rank)
    check_low_precision(unequal)
    messages = check_refusals(rank)
    dist.barrier()
    return messages
