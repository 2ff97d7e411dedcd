"""Many steps of one Distiller: memory stays flat, nothing is left behind, and a second run gives the same bits.

The Distiller has what keeps state or could leave something behind: taps on a module's second call and on an input,
a copy of what is overwritten, adapters that learn, a learned loss, a queue, a memory of all samples, a loss of a whole
batch, and a teacher on disk.

    python benchmarks/soak.py --steps 10000

It fails if the process grows by more than `--growth` MB after the first tenth of the steps, if the number of objects
that Python's garbage collector knows grows, if steps have left a tensor in a cycle, or if the two runs differ in
any bit of the weights. (Cycles without tensors there are: PyTorch's `tree_flatten` leaves one of seven objects a call.)
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from distill import (
    CRDLoss,
    Distiller,
    HintLoss,
    KLLoss,
    LogitLoss,
    QueueKLLoss,
    RKDLoss,
    StoredTeacher,
    TeacherWriter,
    Term,
    record,
)
from measure import STATUS

SAMPLES, BATCH, CLASSES = 256, 16, 5


class Net(nn.Module):
    """Layers of which one is called twice and one writes over its input."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.stem, self.block = nn.Linear(8, width), nn.Linear(width, width)
            self.norm, self.head = nn.BatchNorm1d(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, 8)` to logits."""
        x = self.block(self.stem(x))
        x = self.block(x)
        x = self.norm(x)
        x.relu_()
        logits: Tensor = self.head(x)
        return logits


def build(folder: Path) -> tuple[Distiller, Tensor, Tensor]:
    """The Distiller, the inputs and the labels."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, 8, generator=generator)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    student, teacher = Net(6, 1), Net(12, 2).eval()
    if not folder.exists():
        with TeacherWriter(folder, model=teacher) as writer:
            writer.add(torch.arange(SAMPLES), record(teacher, inputs, at=["norm", "block#1", "head:input"]), inputs)
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        draws = torch.Generator().manual_seed(4)
        terms: dict[str, nn.Module | Term] = {
            "kl": KLLoss(),
            "hint": Term(HintLoss(6, 12), at="block#1"),
            "copied": Term(LogitLoss(), at="norm", student=nn.Linear(6, 12), copy=True),
            "queue": Term(QueueKLLoss(6, 12, queue_size=64), at="head:input", weight=0.1),
            "memory": Term(CRDLoss(6, 12, SAMPLES, num_negatives=8, generator=draws), at="head:input", weight=0.1),
            "relations": Term(RKDLoss(), at="head:input"),
        }
        return Distiller(student, StoredTeacher(folder, model=teacher), terms), inputs, labels


def run(folder: Path, steps: int, growth: float) -> tuple[list[Tensor], list[str]]:
    """Train, and return all weights and buffers at the end, and what went wrong."""
    distiller, inputs, labels = build(folder)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3, momentum=0.9)
    order = torch.Generator().manual_seed(5)
    warm, before, faults = max(1, steps // 10), (0.0, 0), []
    settle()
    gc.disable()  # so that our own collections find all that was left in cycles
    kept = 0
    try:
        for step in range(1, steps + 1):
            ids = torch.randint(SAMPLES, (BATCH,), generator=order)
            target = {"task": labels[ids], "memory": ids}
            optimizer.zero_grad()
            loss = distiller(inputs[ids], target, teacher_inputs=(ids, inputs[ids])).loss
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % 100 == 0 or step in (warm, steps):
                kept += tensors_in_cycles()
            if step == warm:
                before = memory(), len(gc.get_objects())
        grown, objects = memory() - before[0], len(gc.get_objects()) - before[1]
    finally:
        gc.enable()
    print(
        f"{steps - warm} steps after the first {warm}: {grown:+.1f} MB, {objects:+d} objects, {kept} tensors in cycles"
    )
    if grown > growth:
        faults.append(f"memory must stay flat, but grew by {grown:.1f} MB")
    if objects > 50:
        faults.append(f"steps must leave no objects, but {objects} are left")
    if kept:
        faults.append(f"no tensor must be in a cycle, but {kept} were")
    return [tensor.clone() for tensor in distiller.state_dict().values()], faults


def settle(passes: int = 20) -> None:
    """Collect what came before the run. A finalizer may let go of more, which only the next pass finds."""
    for _ in range(passes):
        if not gc.collect():
            return


def tensors_in_cycles() -> int:
    """Collect what was left in cycles, and count the tensors among it."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    found = sum(isinstance(thing, Tensor) for thing in gc.garbage)
    gc.garbage.clear()
    gc.collect()
    return found


def memory() -> float:
    """What the process holds, in MB; 0 where the system does not say."""
    if not STATUS.exists():
        return 0.0
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return float(line.split()[1]) / 1e3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if all is as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--growth", type=float, default=5.0, help="MB that the process may grow by")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(Path(folder) / "teacher", options.steps, options.growth) for _ in range(2)]
    faults = [fault for _, found in runs for fault in found]
    if not all(map(torch.equal, runs[0][0], runs[1][0])):
        faults.append("two runs must end with the same bits, but differ")
    print(
        f"two runs of {options.steps} steps, {time.perf_counter() - start:.0f} s: {'; '.join(faults) or 'as promised'}"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
