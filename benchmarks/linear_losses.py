"""LinearLoss against formed logits and the bare products, in one run: `python benchmarks/linear_losses.py`.

Each loss at N hidden states of width d_s and d_t, and V words: forward and backward, the student's head trains.
`products` are the matrix products alone, which no exact form can spare; `formed` is the plain form on formed logits.
Ratios are medians over repetitions in which all are timed in turn; memory is the most beyond the gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import JSLoss, KLLoss, LinearLoss, ReverseKLLoss, SkewKLLoss
from distill.losses._base import RowLoss
from measure import peak_extra_bytes, quartiles, settle_allocator, time_steps, wall_clock

SHAPES = ((256, 8000, 128, 128), (1024, 32000, 512, 1024), (1024, 128256, 1024, 2048))


def formed_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """What people write."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def formed_js(student: Tensor, teacher: Tensor) -> Tensor:
    """The same for the Jensen-Shannon divergence."""
    log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    log_m = torch.logsumexp(torch.stack([log_p, log_q]), 0) - torch.log(torch.tensor(2.0))
    both = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    return (both + F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)) / 2


LOSSES: dict[str, tuple[RowLoss, float, Callable[[Tensor, Tensor], Tensor]]] = {
    "kl": (KLLoss(1.0), 0.0, formed_kl),
    "kl + cross-entropy": (KLLoss(1.0), 1.0, formed_kl),
    "reverse_kl": (ReverseKLLoss(), 0.0, lambda s, t: formed_kl(t, s)),
    "js": (JSLoss(), 0.0, formed_js),
    "skew_kl": (SkewKLLoss(), 0.0, formed_kl),
}


def measure(shape: tuple[int, int, int, int], name: str, dtype: torch.dtype, repetitions: int) -> str:
    """One row of the table."""
    n, vocabulary, ours, theirs = shape
    loss, share, formed = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    heads = [nn.Linear(width, vocabulary, bias=False, dtype=dtype) for width in (ours, theirs)]
    states = [torch.randn(n, width, generator=generator).to(dtype) for width in (ours, theirs)]
    labels = torch.randint(vocabulary, (n,), generator=generator)
    student = states[0].requires_grad_()
    linear = LinearLoss(loss, *heads, cross_entropy=share)

    def by_linear() -> None:
        torch.autograd.backward(linear(student, states[1], labels))

    def by_formed() -> None:
        logits = heads[0](student)
        with torch.no_grad():
            teacher = heads[1](states[1])
        value = formed(logits, teacher)
        torch.autograd.backward(value + F.cross_entropy(logits, labels) if share else value)

    def products() -> None:  # a chunk at a time, as `LinearLoss` does
        weight, other = heads[0].weight.detach(), heads[1].weight.detach()
        gradient = torch.zeros_like(weight)
        for start in range(0, n, 256):
            rows = student.detach()[start : start + 256]
            logits = rows @ weight.T
            states[1][start : start + 256] @ other.T
            logits @ weight
            gradient.addmm_(logits.T, rows)

    def fresh(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            student.grad = heads[0].weight.grad = None
            step()

        return run

    ways = {"ours": fresh(by_linear), "formed": fresh(by_formed), "products": fresh(products)}
    times = time_steps(ways, repetitions + 1, 1, wall_clock(student.device))

    def ratio(first: str, second: str) -> str:
        pairs = zip(times[first][1:], times[second][1:], strict=True)  # the first of each sets things up
        middle, low, high = quartiles([a / b for a, b in pairs])
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]"

    gradients = (student.numel() + heads[0].weight.numel()) * dtype.itemsize
    extra = []
    for way in ("ours", "formed"):
        student.grad = heads[0].weight.grad = None
        peak = peak_extra_bytes(ways[way], student.device)
        extra.append("" if peak is None else str(round((peak - gradients) / 1e6)))
    kind = str(dtype).removeprefix("torch.")
    ratios = ratio("ours", "products"), ratio("formed", "ours")
    return f"| {' | '.join([str(shape), name, kind, *ratios, *extra])} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shapes", type=int, nargs="*", default=[0, 1, 2], help="which of the three")
    parser.add_argument("--losses", nargs="*", choices=LOSSES, default=list(LOSSES))
    options = parser.parse_args()
    settle_allocator()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, n={options.repetitions}")
    print("| (N, V, d_s, d_t) | loss | dtype | ours / products | formed / ours | extra MB, ours | extra MB, formed |")
    print("|---|---|---|---|---|---|---|")
    for index in options.shapes:
        for name in options.losses:
            print(measure(SHAPES[index], name, getattr(torch, options.dtype), options.repetitions), flush=True)


if __name__ == "__main__":
    main()
