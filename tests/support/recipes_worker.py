"""One process of several: runs the pages for several processes, then what losses that gather promise.

Called as `python recipes_worker.py RANK WORLD_SIZE PORT FOLDER`; saves what `outcome` finds on each page.
"""

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp

import gather_worker
from distill import Distiller, KLLoss, LinearLoss, Term

RECIPES = Path(__file__).parents[2] / "docs/recipes"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HAS_FSDP2 = hasattr(torch.distributed.fsdp, "fully_shard")  # from PyTorch 2.6 on, which shards on a CPU too


def blocks(page: Path) -> list[tuple[Any, str]]:
    """The code of a page, compiled with the page's own line numbers, and its text."""
    text = page.read_text()
    lines = [(text[: found.start(1)].count("\n"), found[1]) for found in BLOCK.finditer(text)]
    return [(compile("\n" * line + code, str(page), "exec"), code) for line, code in lines]


def full(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors, sharded or not, as they are on one process."""
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in tensors}


def look(names: dict[str, Any], factor: int) -> dict[str, Any]:
    """What a block of a page left: the last loss, and the Distiller's state and gradients."""
    distiller = names["distiller"]
    gradients = ((name, p.grad) for name, p in distiller.named_parameters() if p.grad is not None)
    seen = {"loss": names["out"].loss.detach() * factor, "state": full(distiller.state_dict().items())}
    seen["gradients"] = {name: value.clone() for name, value in full(gradients).items()}
    if hasattr(distiller.teacher, "lm_head"):
        tables = distiller.teacher.model.embed_tokens, distiller.teacher.lm_head
        seen["sharded"] = [hasattr(table.weight, "full_tensor") for table in tables]
    return seen


def more_heads(names: dict[str, Any]) -> dict[str, Any]:
    """What the page on processes says of heads: tied ones work in the root, a sharded one is refused."""

    def build(**root: Any) -> Distiller:
        torch.manual_seed(3)
        student, teacher = names["llama"](16, tie_word_embeddings=True), names["llama"](32, tie_word_embeddings=True)
        soft = LinearLoss(KLLoss(2.0), student.lm_head, teacher.lm_head, cross_entropy=0.5)
        distiller = Distiller(student, teacher, Term(soft, at="model.norm"), task_loss=None)
        names["shard"](student)
        names["shard"](teacher, **root)
        return distiller

    mine = names["target"][names["mine"]], names["mask"][names["mine"]]
    batch = {**names["batch"], "logits_to_keep": 1}
    distiller = build()
    for _ in range(2):  # the second time the teacher was sharded again
        distiller.zero_grad()
        out = distiller(batch, mine[0], mask=mine[1])
        out.loss.backward()
        distiller.teacher.reshard()
    found = look({"distiller": distiller, "out": out}, 1)
    try:
        build(reshard_after_forward=True)(batch, mine[0], mask=mine[1])
    except ValueError as error:
        found["refused"] = str(error)
    return found


def run(name: str, world: int) -> list[dict[str, Any]]:
    """Run a page block by block, and look at what each left."""
    names: dict[str, Any] = {"__name__": "page"}
    found = []
    for code, text in blocks(RECIPES / f"{name}.md"):
        if "import fully_shard" in text and not HAS_FSDP2:
            break
        exec(code, names)
        if "backward(" in text:
            found.append(look(names, world if "* world)" in text else 1))
    if "shard" in names:
        found.append(more_heads(names))
    return found


def main(rank: int, world: int, port: str, folder: Path) -> None:
    """Run all in one group of processes, which the pages believe to be theirs."""
    os.chdir(folder)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    found: dict[str, Any] = {name: run(name, world) for name in ("distributed", "accelerate")}
    if world > 1:
        found["refused"] = gather_worker.check(rank, world)
    dist.destroy_process_group = destroy
    destroy()
    torch.save(found, folder / f"{world}-{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
