"""LinearLoss against formed logits, peers and the bare products, in one run: `python benchmarks/linear_losses.py`.

Each loss at N hidden states of width d_s and d_t, and V words: forward and backward, the student's head trains.
`products` are the matrix products alone, as many rows at a time as `LinearLoss` takes: no exact form can spare them.
`formed` is the plain form on formed logits. Peers take part where they can be imported: `liger`, the chunked losses of
liger-kernel in plain PyTorch (not compiled), and `trl`, the chunked divergence of its DistillationTrainer, which gives
the student's entropy as well. Ratios are medians over repetitions in which all are timed in turn, with quartiles;
memory is the most beyond the gradients. On a GPU:

python benchmarks/linear_losses.py --device cuda --shapes 3 --dtypes bfloat16 float32
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import AlphaBetaLoss, JSLoss, KLLoss, LinearLoss, ReverseKLLoss, SkewKLLoss
from distill.losses._base import RowLoss
from measure import describe_machine, peak_extra_bytes, quartiles, settle_allocator, time_steps, wall_clock

# (N, V, d_s, d_t); the last is for a GPU.
SHAPES = ((256, 8000, 128, 128), (1024, 32000, 512, 1024), (1024, 128256, 1024, 2048), (8192, 128256, 2048, 4096))
_ROWS = {"cpu": 256, "cuda": 2048}


def formed_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """What people write."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def formed_js(student: Tensor, teacher: Tensor) -> Tensor:
    """The same for the Jensen-Shannon divergence."""
    log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    log_m = torch.logsumexp(torch.stack([log_p, log_q]), 0) - torch.log(torch.tensor(2.0))
    both = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    return (both + F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)) / 2


def formed_skew(student: Tensor, teacher: Tensor) -> Tensor:
    """The same for the divergence from the mixture, of which a tenth is the teacher's."""
    mixture = torch.lerp(student.softmax(-1), p := teacher.softmax(-1), 0.1)
    return F.kl_div(mixture.log(), p, reduction="batchmean")


class Case(NamedTuple):
    """A loss: ours, the cross-entropy's weight beside it, on formed logits, and the peers' parameter for it."""

    ours: RowLoss
    share: float
    formed: Callable[[Tensor, Tensor], Tensor]
    beta: float | None = None  # 0 is the KL, 1 the reverse KL, 0.5 the Jensen-Shannon divergence


LOSSES = {
    "kl": Case(KLLoss(1.0), 0.0, formed_kl, 0.0),
    "kl + cross-entropy": Case(KLLoss(1.0), 1.0, formed_kl),
    "reverse_kl": Case(ReverseKLLoss(), 0.0, lambda s, t: formed_kl(t, s), 1.0),
    "js": Case(JSLoss(), 0.0, formed_js, 0.5),
    "skew_kl": Case(SkewKLLoss(0.1), 0.0, formed_skew),
    "alpha_beta": Case(AlphaBetaLoss(0.5, 0.5), 0.0, formed_kl),
}


# What is measured if nothing is chosen, in about six minutes on two free cores: shape, dtype, losses, repetitions.
PLAN: tuple[tuple[int, str, tuple[str, ...], int], ...] = (
    (0, "float32", tuple(LOSSES), 15),
    (0, "bfloat16", ("kl", "js"), 5),
    (1, "float32", tuple(name for name in LOSSES if name != "js"), 3),
    (1, "float32", ("js",), 5),
    (2, "float32", ("kl",), 3),
)
_PEERS_UP_TO = 2**26  # logits; the peers need many times the memory of those


def load_peers() -> tuple[dict[str, Any], list[str]]:
    """The modules of the peers that can be imported, by name, and in words what there is of each."""
    found: dict[str, Any] = {}
    words = []
    for name, package, module in (
        ("liger", "liger-kernel", "liger_kernel.chunked_loss.jsd_loss"),
        ("trl", "trl", "trl.kernels.chunked_divergence"),
    ):
        try:
            found[name] = importlib.import_module(module)
            words.append(f"{package} {importlib.metadata.version(package)}")
        except ImportError as error:
            words.append(f"{package} absent ({type(error).__name__}: {error})")
    return found, words


def peer(
    name: str, module: Any, student: Tensor, teacher: Tensor, heads: list[Any], labels: Tensor, beta: float
) -> Any:
    """A peer's loss, the mean over the samples."""
    weights = [head.weight for head in heads]
    if name == "liger":
        loss = module.LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, compiled=False)
        return loss(student, weights[0], teacher, weights[1], labels)
    arguments = student, weights[0], None, teacher, weights[1].detach(), None, beta
    return module.ChunkedDivergenceFunction.apply(*arguments)[0].mean()


def measure(
    shape: tuple[int, int, int, int],
    name: str,
    dtype: torch.dtype,
    repetitions: int,
    peers: dict[str, Any],
    device: torch.device,
) -> str:
    """One row of the table."""
    n, vocabulary, ours, theirs = shape
    case = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    heads = [nn.Linear(width, vocabulary, bias=False, dtype=dtype, device=device) for width in (ours, theirs)]
    states = [torch.randn(n, width, generator=generator).to(device, dtype) for width in (ours, theirs)]
    labels = torch.randint(vocabulary, (n,), generator=generator).to(device)
    student = states[0].requires_grad_()
    linear = LinearLoss(case.ours, *heads, cross_entropy=case.share)

    def by_linear() -> None:
        torch.autograd.backward(linear(student, states[1], labels))

    def by_formed() -> None:
        logits = heads[0](student)
        with torch.no_grad():
            teacher = heads[1](states[1])
        value = case.formed(logits, teacher)
        torch.autograd.backward(value + F.cross_entropy(logits, labels) if case.share else value)

    def products() -> None:
        weight, other = heads[0].weight.detach(), heads[1].weight.detach()
        gradient = torch.zeros_like(weight)
        step = _ROWS[device.type]
        for start in range(0, n, step):
            rows = student.detach()[start : start + step]
            logits = rows @ weight.T
            states[1][start : start + step] @ other.T
            logits @ weight
            gradient.addmm_(logits.T, rows)

    def by_peer(peer_name: str, module: Any) -> Callable[[], None]:
        beta = case.beta or 0.0
        return lambda: torch.autograd.backward(peer(peer_name, module, student, states[1], heads, labels, beta))

    def fresh(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            student.grad = heads[0].weight.grad = None
            step()

        return run

    ways = {"ours": fresh(by_linear), "formed": fresh(by_formed), "products": fresh(products)}
    if case.beta is not None:
        ways |= {peer_name: fresh(by_peer(peer_name, module)) for peer_name, module in peers.items()}
    gradients = (student.numel() + heads[0].weight.numel()) * dtype.itemsize
    extra = []
    for way in ("ours", "formed"):  # before the allocator's memory is in pieces
        ways[way]()
        peaks = []
        for _ in range(3):  # a call may count what another has not yet given back
            student.grad = heads[0].weight.grad = None
            peaks.append(peak_extra_bytes(ways[way], device))
        told = sorted(peak for peak in peaks if peak is not None)
        extra.append(str(round((told[len(told) // 2] - gradients) / 1e6)) if told else "")
    times = time_steps(ways, repetitions + 1, 1, wall_clock(device))

    def ratio(first: str, second: str) -> str:
        if first not in times:
            return ""
        pairs = zip(times[first][1:], times[second][1:], strict=True)  # the first of each sets things up
        middle, low, high = quartiles([a / b for a, b in pairs])
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]"

    kind = str(dtype).removeprefix("torch.")
    ratios = ratio("ours", "products"), *(ratio(other, "ours") for other in ("formed", "liger", "trl"))
    return f"| {' | '.join([str(shape), name, kind, str(repetitions), *ratios, *extra])} |"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dtypes", nargs="*", choices=("float32", "bfloat16"))
    parser.add_argument("--shapes", type=int, nargs="*", help=f"which of {SHAPES}")
    parser.add_argument("--losses", nargs="*", choices=LOSSES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args(arguments)
    if options.repetitions < 2:
        parser.error(f"--repetitions must be at least 2, got {options.repetitions}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    peers, words = ({}, ["peers left out"]) if options.no_peers else load_peers()
    settle_allocator()
    print(f"torch {torch.__version__}, {describe_machine(device)}; {', '.join(words)}")
    print(
        "| (N, V, d_s, d_t) | loss | dtype | n | ours / products | formed / ours | liger / ours | trl / ours "
        "| extra MB, ours | extra MB, formed |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    plan: Sequence[tuple[int, str, Sequence[str], int]] = PLAN
    if options.shapes or options.dtypes or options.losses:
        names, dtypes = options.losses or [*LOSSES], options.dtypes or ["float32"]
        plan = [(index, dtype, names, options.repetitions) for index in options.shapes or [1] for dtype in dtypes]
    for index, dtype, names, repetitions in plan:
        shape = SHAPES[index]
        beside = peers if shape[0] * shape[1] <= _PEERS_UP_TO else {}
        for name in names:
            print(measure(shape, name, getattr(torch, dtype), repetitions, beside, device), flush=True)


if __name__ == "__main__":
    main()
