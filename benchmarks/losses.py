"""Times the losses against plain PyTorch and measures their memory: tables and a picture from one command.

    python benchmarks/losses.py
    python benchmarks/losses.py --full --out runs/performance-full
    python benchmarks/losses.py --only logits/kl --only float32

Each case (a loss, a shape, a dtype) runs in a process of its own. There the ways to compute it, forward and backward,
are timed in turns:

    ours           the library's module
    eager          the plain form, as people write it
    torch.compile  the plain form, compiled
    floor          reads both inputs and writes a fresh tensor of the gradient's size: what any way must do
    first call     of `LinearLogitLoss` with frozen heads: with the factor that later calls find ready
    Liger          Liger-Kernel's loss, on CUDA and where it is installed
    as published   the form of the authors' code, where it takes far more memory than the plain form need

Printed and written are medians over the repetitions and their quartiles; a ratio is taken within a repetition. After
the timing each way runs once more to measure its peak of extra memory, the gradient included. After 25 minutes, or what
--time-limit says, no further case is started, but with --full. What the folder's `losses.csv` already has of the same
commit, machine and PyTorch is not measured again: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from loss_cases import Case, Problem, list_cases
from loss_report import FLOOR, OURS, Row, read_rows, write_report
from measure import (
    describe_machine,
    find_clock,
    find_repeats,
    limit_memory,
    peak_extra_bytes,
    quartiles,
    settle_allocator,
    time_steps,
)

ROOT = Path(__file__).resolve().parents[1]


def measure_case(case: Case, device: torch.device, budget: float) -> list[Row]:
    """Time the ways of one case and measure their memory; call it in a fresh process.

    Args:
        case: What to measure.
        device: Where.
        budget: Seconds for the timing; five repetitions are made whatever it says.

    Returns:
        One row for each way; one that failed for lack of memory or a compiler has no numbers but a note.

    Raises:
        RuntimeError: If the ways do not compute the same loss and gradient.
    """
    settle_allocator()
    problem = case.build(case, device)
    notes = _try_all(problem, case, device) | problem.notes
    steps, clock = problem.steps(), find_clock(device)
    first = time_steps(steps, 2, 1, clock)
    if sum(map(min, first.values())) < budget / 10:  # the first calls of short steps say little
        first = time_steps(steps, 5, 1, clock)
    repeats, inner = find_repeats({way: min(values) for way, values in first.items()}, budget)
    seconds = time_steps(steps, repeats, inner, clock)
    gradient = sum(leaf.numel() * leaf.element_size() for leaf in problem.leaves)

    described = {
        **{"case": case.name, "table": case.table, "loss": case.loss, "shape": "x".join(map(str, case.shape))},
        **{"dtype": str(case.dtype).removeprefix("torch."), "gradient_mb": gradient / 1e6, "revision": _revision()},
        **{"device": describe_machine(device), "torch": torch.__version__, "python": platform.python_version()},
        **{"date": date.today().isoformat()},
    }
    rows = []
    for way, values in seconds.items():
        extra = None if way == FLOOR else peak_extra_bytes(steps[way], device)
        ratios = [mine / own for mine, own in zip(values, seconds[OURS], strict=True)]
        numbers = {
            **dict(zip(("ms", "ms_low", "ms_high"), (1e3 * value for value in quartiles(values)), strict=True)),
            **dict(zip(("over_ours", "over_ours_low", "over_ours_high"), quartiles(ratios), strict=True)),
            **{"repeats": repeats, "inner": inner[way], "extra_mb": None if extra is None else extra / 1e6},
        }
        rows.append(Row.from_dict({**described, "way": way, "note": notes.pop(way, ""), **numbers}))
    return rows + [Row.from_dict({**described, "way": way, "note": note}) for way, note in notes.items()]


def _try_all(problem: Problem, case: Case, device: torch.device) -> dict[str, str]:
    """Run every way once and compare; those that cannot run are dropped, and their first line of complaint returned."""
    notes, results = {}, {}
    for way in list(problem.forward):
        try:
            results[way] = problem.result(way)
        except (RuntimeError, MemoryError) as error:  # what allocators and compilers raise, torch's own included
            if way == OURS:
                raise
            del problem.forward[way]
            problem.forget()
            notes[way] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    tolerance = 1e-3 if case.dtype == torch.float32 else 5e-2  # plain forms round to bfloat16 on the way
    for way, result in results.items():
        for got, expected in zip(result, results[OURS], strict=True):
            if way not in problem.other and not abs(got - expected) <= tolerance * abs(expected):
                raise RuntimeError(
                    f"{case.name}: {way} must compute the same (loss, norm of gradient) as ours to be compared, "
                    f"got {result} and {results[OURS]}"
                )
    return notes


def _revision() -> str:
    """Name the commit that was measured, with `+changes` if its code was changed."""
    try:
        commit, changes = (
            subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
            for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "src", "benchmarks"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + "+changes" * bool(changes)


def measure_in_child(case: Case, device: str, budget: float) -> list[Row]:
    """Measure one case in a process of its own.

    Args:
        case: What to measure.
        device: Where, such as `"cpu"`.
        budget: Seconds for the timing.

    Returns:
        Its rows.

    Raises:
        RuntimeError: If the process fails; with the end of what it said.
    """
    command = [sys.executable, __file__, "--child", case.name, "--device", device, "--seconds", str(budget)]
    # One thread: Inductor's pool of compilers would still be starting up while the losses are timed.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    child = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if child.returncode:
        said = "\n".join(child.stderr.splitlines()[-5:])
        raise RuntimeError(f"{case.name}: its process must end with 0, got {child.returncode}:\n{said}")
    return [Row.from_dict(row) for row in json.loads(child.stdout.splitlines()[-1])]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; exits with 2 if it refuses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="all cases: the sweep over classes and the largest, too")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT",
                        help="of all cases those with this in their name; given again, it narrows down")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the names of the cases and end")
    parser.add_argument("--again", action="store_true", help="measure also what is in the folder's losses.csv")
    parser.add_argument("--seconds", type=float, default=4.0, help="for the timing of a case, about; default 4")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS",
                        help="start no case after so long; default 1500, with --full none")  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu or cuda; default: a CUDA GPU if there is one")
    parser.add_argument("--out", type=Path, default=Path("runs/performance"), help="default runs/performance")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device not in ("cpu", "cuda"):
        parser.error(f"--device must be auto, cpu or cuda, got {args.device!r}")
    if args.time_limit is None and not args.full:
        args.time_limit = 1500.0
    if not 0 <= args.seconds < float("inf"):
        parser.error(f"--seconds must be finite and not negative, got {args.seconds}")
    args.cases = [
        case
        for case in list_cases(torch.device(args.device))
        if (args.full or args.only or not case.full) and all(text in case.name for text in args.only)
    ]
    if not args.cases:
        parser.error(f"--only must leave at least one case (--list shows them), got {args.only}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cases that are asked for and not measured yet, and write the report after each."""
    args = parse_arguments(argv)
    if args.child:
        limit_memory()
        device = torch.device(args.device)
        case = next(case for case in list_cases(device) if case.name == args.child)
        print(json.dumps([row.to_dict() for row in measure_case(case, device, args.seconds)]))
        return
    if args.list:
        print("\n".join(case.name for case in args.cases))
        return
    rows = read_rows(args.out) if (args.out / "losses.csv").exists() else []
    here = (_revision(), describe_machine(torch.device(args.device)), torch.__version__)
    fresh = not args.again and not here[0].endswith(("+changes", "unknown"))
    done = {row.case for row in rows if fresh and (row.revision, row.device, row.torch) == here}
    wanted = [case for case in args.cases if case.name not in done]
    order = {case.name: no for no, case in enumerate(list_cases(torch.device(args.device)))}
    print(f"{len(args.cases)} cases, {len(wanted)} of them to measure, into {args.out}", flush=True)
    start = time.monotonic()
    for no, case in enumerate(wanted):
        if args.time_limit is not None and time.monotonic() - start > args.time_limit:
            print(f"time limit: {len(wanted) - no} cases remain; run again to go on")
            break
        measured = measure_in_child(case, args.device, args.seconds)
        rows = [row for row in rows if row.case != case.name] + measured
        rows.sort(key=lambda row: order.get(row.case, len(order)))
        write_report(args.out, rows)
        print(case.name, *(f"  {row.describe()}" for row in measured), sep="\n", flush=True)


if __name__ == "__main__":
    main()
