"""One process of a step over token batches of unequal length: by hand under DDP, and through DistillTrainer.

Called as `python tokens_worker.py RANK WORLD_SIZE PORT FOLDER`; saves gradients and what the Trainer's step changed.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from distill import DISTLoss, KLLoss, next_tokens
from distill.integrations.transformers import DistillTrainer
from language_models import arguments, build, rows, stack


def by_hand(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Gradients of four micro-batches of unequal numbers of tokens, shared out over the processes."""
    distiller = build({"kl": KLLoss(2.0)})
    student = DistributedDataParallel(distiller.student) if world > 1 else distiller.student
    mine = [stack(rows()[start : start + 2]) for start in range(0, 8, 2)][rank::world]
    shifted = [next_tokens(batch.pop("labels")) for batch in mine]
    count = torch.tensor(sum(int(mask.sum()) for _, mask in shifted))
    if world > 1:
        dist.all_reduce(count)
    for batch, (target, mask) in zip(mine, shifted, strict=True):
        out = distiller(batch, target, mask=mask, denominator=count, student=student)
        (out.loss * world).backward()
    return {name: parameter.grad for name, parameter in distiller.student.named_parameters()}


def by_trainer(world: int, folder: Path) -> dict[str, torch.Tensor]:
    """What one step of SGD changed, a learned loss among it."""
    distiller = build()
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    args = arguments(folder / f"run{world}", gradient_accumulation_steps=4 // world)
    DistillTrainer(distiller=distiller, args=args, train_dataset=rows()).train()
    return {name: before[name] - value for name, value in distiller.state_dict().items()}


def gathered(world: int, folder: Path) -> dict[str, torch.Tensor]:
    """The same with a loss that compares the samples of all processes, in one batch."""
    distiller = build({"kl": KLLoss(2.0), "dist": DISTLoss(gather=True)})
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    args = arguments(folder / f"gathered{world}", per_device_train_batch_size=8 // world)
    DistillTrainer(distiller=distiller, args=args, train_dataset=rows()).train()
    return {name: before[name] - value for name, value in distiller.state_dict().items()}


def main(rank: int, world: int, port: str, folder: Path) -> None:
    """Do both; the Trainer starts the group of processes."""
    if world > 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    changed = by_trainer(world, folder)
    changed |= {f"gathered {name}": value for name, value in gathered(world, folder).items()}
    torch.save({"trainer": changed, "hand": by_hand(rank, world)}, folder / f"{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
