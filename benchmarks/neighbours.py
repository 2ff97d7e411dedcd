"""Times a loss beside busy processes on the same cores: `python benchmarks/neighbours.py`.

    python benchmarks/neighbours.py --loss logit --rows 1024 --classes 128256 --neighbours 0 1 2

It starts the neighbours itself, endless loops on one thread each, and times the library's module and the plain form in
turns, forward and backward. Printed is how many times as long the plain form takes, for each number of neighbours: the
median of the ratios within a repetition and their quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch

import distill
from loss_cases import PLAIN, pair
from measure import describe_machine, quartiles, settle_allocator, time_steps, wall_clock
from plain_forms.form import Form

OURS, EAGER = "ours", "eager"


@contextlib.contextmanager
def neighbours(number: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Keep so many processes busy, and give them."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        time.sleep(0.5 if number else 0.0)  # until they have started
        yield busy
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(loss: str, shape: Sequence[int], number: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of forward and backward beside so many neighbours, by way, one for each repetition."""
    student, teacher = pair(tuple(shape), torch.float32, torch.Generator().manual_seed(0))
    student.requires_grad_()

    def step(form: Form) -> None:
        form(student, teacher).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        student.grad = None

    forms: dict[str, Form] = {OURS: distill.create_loss(loss), EAGER: PLAIN[loss].form}
    steps = {way: partial(step, form) for way, form in forms.items()}
    clock = wall_clock(torch.device("cpu"))
    with neighbours(number):
        time_steps(steps, 1, 1, clock)
        return time_steps(steps, repeats, 1, clock)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--loss", default="logit", choices=sorted(x for x in PLAIN if PLAIN[x].inputs is pair))
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=128256)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args(argv)
    if min(args.neighbours) < 0 or args.repeats < 2:
        parser.error(f"--neighbours must not be negative, --repeats at least 2, got {args.neighbours}, {args.repeats}")
    settle_allocator()
    machine = describe_machine(torch.device("cpu"))
    print(f"{args.loss} ({args.rows}, {args.classes}), {machine}, torch {torch.__version__}")
    for number in args.neighbours:
        seconds = measure(args.loss, (args.rows, args.classes), number, args.repeats)
        ratio = quartiles([eager / ours for ours, eager in zip(seconds[OURS], seconds[EAGER], strict=True)])
        ours = quartiles(seconds[OURS])[0]
        print(
            f"{number} neighbours: eager / ours {ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f}), "
            f"ours {1e3 * ours:.0f} ms, n {args.repeats}",
            flush=True,
        )


if __name__ == "__main__":
    main()
