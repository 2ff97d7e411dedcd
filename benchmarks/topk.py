"""What a teacher's top-k costs: `python benchmarks/topk.py errors`, `time` or `dense`.

`errors` compares the gradient of a divergence from a teacher's k largest probabilities with that from all of them, for
`TopK` and for the forms that people write. Teachers are rows of V random logits, normal with a standard deviation
("spread") of 3, 4 and 6: the larger, the more peaked. Students are the teacher itself, the teacher with noise of
standard deviation 1 on every logit, and another random row. Reported is the norm of the difference over the norm of the
exact gradient, row by row, as median and quartiles, and the median cosine of the two; for the student that agrees,
whose exact gradient is 0, the norm is that of the exact gradient of a student that knows nothing.

`time` runs `LinearLoss` forward and backward on the CPU, the student's head trains, from the teacher's hidden states
and from its `TopK`, and divides by the bare products of both heads (the dense floor). Processor time of one thread,
interleaved.

`dense` runs losses of the student's logits forward and backward, from a `TopK` and from all logits of the teacher, and
divides by PyTorch's cross-entropy: `dense --device cuda` on a GPU, where the logits are in bfloat16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from distill import JSLoss, KLLoss, LinearLoss, ReverseKLLoss, TopK, kl_loss, reverse_kl_loss
from measure import describe_machine, find_clock, quartiles, settle_allocator, time_steps

KS = (8, 32, 50, 128)
SPREADS = (3.0, 4.0, 6.0)  # of the logits: how peaked a teacher is
NOISE = 1.0  # on the logits of the student that is near
Form = Callable[[Tensor, Tensor, int], Tensor]


def tail(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """One class for the rest, in both."""
    return kl_loss(student, TopK.of(teacher, k), temperature=1.0)


def renormalised(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """The teacher normalised over its k classes, the student left whole."""
    values, indices = teacher.topk(k, -1)
    log_p, log_q = values.log_softmax(-1), student.log_softmax(-1).gather(-1, indices)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def both_renormalised(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Both normalised over the teacher's k classes: nothing is said of the others."""
    values, indices = teacher.topk(k, -1)
    log_p, log_q = values.log_softmax(-1), student.gather(-1, indices).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def cut(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """The k terms of the sum, nothing normalised."""
    log_p, indices = teacher.log_softmax(-1).topk(k, -1)
    return (log_p.exp() * (log_p - student.log_softmax(-1).gather(-1, indices))).sum(-1)


def drawn(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Half of the k exact, the other half drawn from the rest."""
    generator = torch.Generator().manual_seed(0)
    return kl_loss(student, TopK.of(teacher, k // 2, samples=k - k // 2, generator=generator), temperature=1.0)


def reverse_tail(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Reverse KL of the teacher's own classes and the rest."""
    return reverse_kl_loss(student, TopK.of(teacher, k))


def reverse_own(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Reverse KL of the student's own classes and the rest."""
    return reverse_kl_loss(student, TopK.of(student, k).gather(teacher))


def reverse_renormalised(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Reverse KL of both normalised over the teacher's k classes."""
    values, indices = teacher.topk(k, -1)
    log_p, log_q = values.log_softmax(-1), student.gather(-1, indices).log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


FORMS: dict[str, Form] = {
    "TopK": tail,
    "teacher renormalised": renormalised,
    "both renormalised": both_renormalised,
    "cut off": cut,
    "TopK, half of it drawn": drawn,
}
REVERSE: dict[str, Form] = {
    "TopK of the student, gathered": reverse_own,
    "TopK of the teacher": reverse_tail,
    "both renormalised ": reverse_renormalised,
}


def gradient(form: Callable[..., Tensor], student: Tensor, *rest: object) -> Tensor:
    """The gradient of each row's value."""
    student = student.detach().requires_grad_()
    (result,) = torch.autograd.grad(form(student, *rest).sum(), student)
    return result


def make_rows(spread: float, rows: int, vocabulary: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Teachers, and students by name."""
    generator = torch.Generator().manual_seed(0)
    teacher, noise, other = (torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) for _ in range(3))
    teacher = spread * teacher
    return teacher, {"agrees": teacher, "near": teacher + NOISE * noise, "far": spread * other}


def errors(name: str, spread: float, rows: int, vocabulary: int) -> dict[tuple[str, int], tuple[list[float], float]]:
    """The relative errors of every row and the median cosine, by student and k."""
    form = {**FORMS, **REVERSE}[name]
    dense = reverse_kl_loss if name in REVERSE else kl_loss
    teacher, students = make_rows(spread, rows, vocabulary)
    found = {}
    for kind, student in students.items():
        exact = gradient(lambda s: dense(s, teacher, temperature=1.0), student)
        ignorant = torch.zeros_like(teacher) if kind == "agrees" else student
        size = gradient(lambda s: dense(s, teacher, temperature=1.0), ignorant).norm(dim=-1)
        for k in KS:
            slope = gradient(form, student, teacher, k)
            cosine = torch.nn.functional.cosine_similarity(slope, exact, dim=-1).median()
            found[kind, k] = ((slope - exact).norm(dim=-1) / size).tolist(), cosine.item()
    return found


def print_errors(rows: int, vocabulary: int, picture: Path | None) -> None:
    """Print the table, and draw it."""
    print(f"torch {torch.__version__}, {rows} rows of {vocabulary} classes, float64, median [quartiles], cosine")
    results = {}
    for spread in SPREADS:
        teacher, _ = make_rows(spread, rows, vocabulary)
        kept = [TopK.of(teacher, k).log_probs.exp().sum(-1).median().item() for k in KS]
        print(f"\nspread {spread:g}: the k largest have {', '.join(f'{share:.3f}' for share in kept)} (k = {KS})\n")
        print(f"| form | student | {' | '.join(f'k = {k}' for k in KS)} |\n|---|---|{'---|' * len(KS)}")
        for name in (*FORMS, *REVERSE):
            found = results[name, spread] = errors(name, spread, rows, vocabulary)
            for kind in ("agrees", "near", "far"):
                cells = [cell(*found[kind, k], direction=kind != "agrees") for k in KS]
                label = f"reverse KL: {name.strip()}" if name in REVERSE else name
                print(f"| {label} | {kind} | {' | '.join(cells)} |", flush=True)
    if picture is not None:
        draw(results, picture)


def cell(found: list[float], cosine: float, *, direction: bool) -> str:
    """One number of the table, with its direction where there is one."""
    text = "{:.3f} [{:.3f}, {:.3f}]".format(*quartiles(found))
    return f"{text}, cos {cosine:.2f}" if direction else text


def draw(results: dict[tuple[str, float], dict[tuple[str, int], tuple[list[float], float]]], picture: Path) -> None:
    """Errors over k, a column for each student that is not far, a row for each spread."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(SPREADS), figsize=(11, 6), sharex=True, sharey="row", layout="constrained")
    for row, kind in zip(axes, ("agrees", "near"), strict=True):
        for axis, spread in zip(row, SPREADS, strict=True):
            for name in FORMS:
                found = results[name, spread]
                middle = [max(quartiles(found[kind, k][0])[0], 1e-4) for k in KS]
                ours = {"markersize": 9, "linewidth": 3, "zorder": 1} if name == "TopK" else {}  # seen beneath another
                axis.plot(KS, middle, marker="o", label=name, **ours)
            axis.set(xscale="log", yscale="log", xticks=KS, xticklabels=KS)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_title(f"spread {spread:g}, student {'equal to the teacher' if kind == 'agrees' else 'near'}")
        row[0].set_ylabel("error of the gradient (0 drawn at 1e-4)")
    for axis in axes[-1]:
        axis.set_xlabel("k")
    axes[0][-1].legend(fontsize="small")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def print_times(shape: tuple[int, int, int, int], k: int, repetitions: int) -> None:
    """Print what each way takes over the bare products of both heads."""
    n, vocabulary, ours, theirs = shape
    generator = torch.Generator().manual_seed(0)
    heads = [nn.Linear(width, vocabulary, bias=False) for width in (ours, theirs)]
    states = [torch.randn(n, width, generator=generator) for width in (ours, theirs)]
    student = states[0].requires_grad_()
    with torch.no_grad():
        topk = TopK.of(heads[1](states[1]), k)

    def products(*, teacher: bool) -> None:  # a chunk at a time, as `LinearLoss` does
        weight, other = heads[0].weight.detach(), heads[1].weight.detach()
        gradient = torch.zeros_like(weight)
        for start in range(0, n, 256):
            rows = student.detach()[start : start + 256]
            logits = rows @ weight.T
            if teacher:
                states[1][start : start + 256] @ other.T
            logits @ weight
            gradient.addmm_(logits.T, rows)

    def step(linear: LinearLoss, given: Tensor | TopK) -> Callable[[], None]:
        def run() -> None:
            student.grad = heads[0].weight.grad = None
            torch.autograd.backward(linear(student, given))

        return run

    ways: dict[str, Callable[[], None]] = {
        "dense floor": lambda: products(teacher=True),
        "products of the student alone": lambda: products(teacher=False),
        "kl, hidden states": step(LinearLoss(KLLoss(1.0), *heads), states[1]),
        "kl, TopK": step(LinearLoss(KLLoss(1.0), heads[0]), topk),
        "reverse_kl, TopK": step(LinearLoss(ReverseKLLoss(), heads[0]), topk),
        "js, TopK": step(LinearLoss(JSLoss(), heads[0]), topk),
    }

    def clock(function: Callable[[], object], runs: int) -> float:
        start = time.process_time()
        for _ in range(runs):
            function()
        return (time.process_time() - start) / runs

    seconds = time_steps(ways, repetitions + 1, 1, clock)
    print(f"\n(N, V, d_s, d_t) = {shape}, k = {k}, n = {repetitions}\n\n| way | over the dense floor |\n|---|---|")
    for name, times in seconds.items():
        pairs = zip(times[1:], seconds["dense floor"][1:], strict=True)  # the first of each sets things up
        print("| {} | {:.2f} [{:.2f}, {:.2f}] |".format(name, *quartiles([a / b for a, b in pairs])), flush=True)


def plain(student: Tensor, topk: TopK) -> Tensor:
    """KL of a `TopK` in plain PyTorch."""
    log_q = student.float().log_softmax(-1)
    given = log_q.gather(-1, topk.indices)
    rest = log_q.scatter(-1, topk.indices, -torch.inf).logsumexp(-1, keepdim=True)
    log_p = torch.cat([topk.log_probs, topk.log_tail.unsqueeze(-1)], -1)
    return nn.functional.kl_div(torch.cat([given, rest], -1), log_p, log_target=True, reduction="none").sum(-1).mean()


def print_dense(rows: int, vocabulary: int, k: int, repetitions: int, device: torch.device) -> None:
    """Print what losses of formed logits take over PyTorch's cross-entropy."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (4 * torch.randn(rows, vocabulary, device=device, generator=generator) for _ in range(2))
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    labels, topk = teacher.argmax(-1), TopK.of(teacher, k)

    def step(loss: Callable[..., Tensor], given: Tensor | TopK) -> Callable[[], None]:
        def run() -> None:
            student.grad = None
            torch.autograd.backward(loss(student, given))

        return run

    ways = {
        "cross-entropy": step(nn.functional.cross_entropy, labels),
        "kl, all logits": step(KLLoss(1.0), teacher),
        "kl, TopK": step(KLLoss(1.0), topk),
        "reverse_kl, TopK": step(ReverseKLLoss(), topk),
        "js, TopK": step(JSLoss(), topk),
        "kl, TopK, plain PyTorch": step(plain, topk),
    }
    seconds = time_steps(ways, repetitions + 1, 1, find_clock(device))
    print(f"\n{describe_machine(device)}, {dtype}, (N, V) = ({rows}, {vocabulary}), k = {k}, n = {repetitions}\n")
    print("| loss | over cross-entropy |\n|---|---|")
    for name, times in seconds.items():
        pairs = zip(times[1:], seconds["cross-entropy"][1:], strict=True)  # the first of each sets things up
        print("| {} | {:.2f} [{:.2f}, {:.2f}] |".format(name, *quartiles([a / b for a, b in pairs])), flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("what", choices=("errors", "time", "dense"))
    parser.add_argument("--rows", type=int, default=64, help="rows of the error table and the dense one")
    parser.add_argument("--vocabulary", type=int, default=32000, help="classes of both")
    parser.add_argument("--picture", type=Path, help="where to draw the error table")
    parser.add_argument("--shape", type=int, nargs=4, default=(1024, 32000, 512, 1024), help="N V d_s d_t")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="of dense")
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    if options.what == "errors":
        print_errors(options.rows, options.vocabulary, options.picture)
        return
    torch.set_num_threads(1)
    settle_allocator()
    if options.what == "dense":
        print(f"torch {torch.__version__}")
        print_dense(options.rows, options.vocabulary, options.k, options.repetitions, options.device)
        return
    print(f"torch {torch.__version__}, 1 thread, float32")
    print_times(tuple(options.shape), options.k, options.repetitions)


if __name__ == "__main__":
    main()
