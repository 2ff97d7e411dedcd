"""The study under faults: kills, damaged files and bad command lines, counted.

    python benchmarks/faults.py                       # everything; an hour on 2 cores
    python benchmarks/faults.py --only damage,lines   # minutes
    python benchmarks/faults.py --kills 20            # fewer kills
    python benchmarks/faults.py --log faults.jsonl    # keeps each try: the same command goes on where it was stopped

Each part prints one line: how often it was tried, and how each try ended. The command exits with 1 if any ended badly:
with other weights than a run that nobody disturbs, with a traceback, with a file half written or left behind, with a
process that goes on. Only for Linux: it forks. docs/reliability.md has the figures.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from campaign.damage import damage
from campaign.ends import Ends, Tries, count_bad, in_words, read_log, write_log
from campaign.kills import kill_at_operations, kill_at_random, pairs, small_command, whole_command
from campaign.lines import bad_lines
from campaign.processes import inherit_orphans


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign.

    Args:
        arguments: The arguments; those of the process by default.

    Returns:
        0, or 1 if any try ended badly.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="kills,small,operations,pairs,damage,lines", help="parts, with commas between them"
    )
    parser.add_argument("--kills", type=int, default=200, help="half of them with 2 jobs; default: 200")
    parser.add_argument("--pairs", type=int, default=40, help="of commands; default: 40")
    parser.add_argument("--damaged", type=int, default=1000, help="default: 1000")
    parser.add_argument("--lines", type=int, default=150, help="default: 150")
    parser.add_argument("--log", type=Path, help="a file that each try is added to; the tries in it are not done again")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    inherit_orphans()
    both, half = (1, 2), args.kills // 2
    parts: dict[str, list[tuple[str, Callable[[Path, Sequence[Ends]], Tries]]]] = {
        "lines": [("bad command lines", functools.partial(bad_lines, args.lines))],
        "damage": [("damaged files", functools.partial(damage, args.damaged))],
        "operations": [
            (f"kills at each operation on a file, --jobs {jobs}", functools.partial(kill_at_operations, jobs))
            for jobs in both
        ],
        "pairs": [("two commands on one folder", functools.partial(pairs, args.pairs))],
        "small": [
            (
                f"random kills of a small run, --jobs {jobs}",
                functools.partial(kill_at_random, half, small_command, jobs),
            )
            for jobs in both
        ],
        "kills": [
            (f"random kills, --jobs {jobs}", functools.partial(kill_at_random, half, whole_command, jobs))
            for jobs in both
        ],
    }
    bad = 0
    for name in parts:
        for title, part in parts[name] if name in args.only.split(",") else []:
            before = read_log(args.log, title)
            ends, told = sum(before, Counter[str]()), time.monotonic()
            with tempfile.TemporaryDirectory() as where:
                for end in part(Path(where), before):
                    ends += end
                    write_log(args.log, title, end)
                    if time.monotonic() - told > 10:
                        told = time.monotonic()
                        print(f"{time.strftime('%H:%M:%S')} {title}: {in_words(ends)}", file=sys.stderr, flush=True)
            bad += count_bad(ends)
            print(f"{title}: {in_words(ends)}", flush=True)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
