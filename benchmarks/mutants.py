"""How many faults put into src on purpose the tests find: a mutation run.

A coverage run first notes which tests run which line. Then each mutant (one small change of one place, see
`mutation.py`) is put into a copy of the tree, and the tests that run its line must fail. The mutants are drawn with a
seed, as many of each operator. Survivors are listed; each gets a test, or a reason on the page.

    python benchmarks/mutants.py --mutants 330 --jobs 2 --out docs/results/mutants

The tests marked compile, subprocess and study are left out, and so is Triton. What was measured is kept in `--work` and
`--out`: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import collections
import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import coverage

from mutation import Mutant, mutants

ROOT = Path(__file__).resolve().parents[1]
_SOUND = set[str]()  # tests that were seen to pass without a mutant
MARKS = "not compile and not subprocess and not study"
FIELDS = ["file", "line", "operator", "change", "verdict", "tests", "seconds"]
FIRST = 40  # tests that are tried first; only a mutant that survives them meets all that run its line


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=330, help="how many, drawn over all operators")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time, each with one thread")
    parser.add_argument("--only", default="", help="a part of the path of the files to change")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of a mutant; more decides nothing")
    parser.add_argument("--work", type=Path, default=ROOT / ".mutants", help="keeps the coverage")
    parser.add_argument("--out", type=Path, required=True, help="folder of mutants.csv and mutants.md")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    tests = which_tests(options.work / "coverage")
    chosen = draw(options.mutants, options.seed, options.only)
    table = options.out / "mutants.csv"
    done = read(table)
    left = [pair for pair in chosen if key(*pair) not in done]
    print(f"{len(chosen)} mutants, {len(left)} to run", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool, tempfile.TemporaryDirectory() as folder:
        copies = [copy_tree(Path(folder) / str(n)) for n in range(options.jobs)]

        def work(pair: tuple[Path, Mutant]) -> dict[str, Any]:
            copy = copies.pop()
            try:
                return run_mutant(copy, *pair, tests, options.limit)
            finally:
                copies.append(copy)

        for row in pool.map(work, left):
            done[row["file"], str(row["line"]), row["operator"], row["change"]] = row
            write(table, [done[key(*pair)] for pair in chosen if key(*pair) in done])
            print(*(row[field] for field in FIELDS), sep="  ", flush=True)
    rows = [done[key(*pair)] for pair in chosen]
    (options.out / "mutants.md").write_text(report(rows), encoding="utf-8")
    print(report(rows))


def which_tests(data: Path) -> coverage.CoverageData:
    """Return which tests run which line; measured where it has not been."""
    if not data.exists():
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "-m", MARKS]
        command += ["-p", "no:cacheprovider", "--cov=distill", "--cov-context=test", "--cov-report="]
        partial = data.with_suffix(".partial")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COVERAGE_FILE": str(partial)}
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        partial.replace(data)
    found = coverage.CoverageData(str(data))
    found.read()
    return found


def draw(count: int, seed: int, only: str) -> list[tuple[Path, Mutant]]:
    """Draw mutants of all operators in turn, so that the rare ones that matter are among them."""
    by_operator = collections.defaultdict(list)
    for path in sorted((ROOT / "src/distill").rglob("*.py")):
        if path.name not in ("triton.py", "__init__.py") and only in str(path.relative_to(ROOT)):
            for mutant in mutants(path.read_text(encoding="utf-8")):
                by_operator[mutant.operator].append((path.relative_to(ROOT), mutant))
    generator = random.Random(seed)
    for group in by_operator.values():
        generator.shuffle(group)
    chosen: list[tuple[Path, Mutant]] = []
    while len(chosen) < count and any(by_operator.values()):
        for operator in sorted(by_operator):
            if by_operator[operator] and len(chosen) < count:
                chosen.append(by_operator[operator].pop())
    return chosen


def key(path: Path, mutant: Mutant) -> tuple[str, str, str, str]:
    """What names a mutant in the table."""
    source = (ROOT / path).read_text(encoding="utf-8")
    return path.as_posix(), str(mutant.line), mutant.operator, mutant.show(source)


def copy_tree(folder: Path) -> Path:
    """Copy what git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def run_mutant(copy: Path, path: Path, mutant: Mutant, tests: coverage.CoverageData, limit: float) -> dict[str, Any]:
    """Put a mutant into the copy, run the tests of its line until one fails, and take it out."""
    source = (ROOT / path).read_text(encoding="utf-8")
    first, others = select(tests, path, mutant.line)
    start = time.monotonic()
    (copy / path).write_text(mutant.apply(source), encoding="utf-8")
    try:
        verdict, ran = "survived" if first else "no test", 0
        for part in (first, others):
            if part and verdict == "survived":
                verdict, ran = run_tests(copy, part, limit), ran + len(part)
    finally:
        (copy / path).write_text(source, encoding="utf-8")
    if verdict == "found":
        check_sound(copy, limit)
    file, line, operator, change = key(path, mutant)
    seconds = f"{time.monotonic() - start:.1f}"
    values = [file, int(line), operator, change, verdict, ran, seconds]
    return dict(zip(FIELDS, values, strict=True))


def select(tests: coverage.CoverageData, path: Path, line: int) -> tuple[list[str], list[str]]:
    """The tests that run a line, those of the file's twin first; of a line that runs on import, those of the file."""
    by_line = tests.contexts_by_lineno(str(ROOT / path))
    names = {name for name in by_line.get(line, ()) if name}
    if not names:
        names = {name for found in by_line.values() for name in found if name}
    ids = sorted({name.rpartition("|")[0] for name in names})
    ids.sort(key=lambda name: (f"test_{path.stem}.py" not in name, f"/{path.parent.name}/" not in name))
    twins = [name for name in ids if f"test_{path.stem}.py" in name]
    rest = ids[len(twins) :]
    first = twins[:: max(1, len(twins) // (FIRST // 2))] + rest[:: max(1, len(rest) // (FIRST // 2))]
    return first, [name for name in ids if name not in set(first)]


def run_tests(copy: Path, ids: Sequence[str], limit: float) -> str:
    """Run tests in a process of their own until one fails."""
    listed = copy / "ids.txt"
    listed.write_text("\n".join(ids), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "@ids.txt"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = str(copy / "src")
    with (copy / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=copy, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "time"
    if code == 0:
        return "survived"
    if code == 1:
        return "found"
    text = (copy / "output.txt").read_text(errors="replace")
    return "found (import)" if "Error" in text else f"exit {code}"


def check_sound(copy: Path, limit: float) -> None:
    """Raise SystemExit if what has just failed fails without the mutant, too: it would find any."""
    output = (copy / "output.txt").read_text(errors="replace")
    failed = set(re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)) - _SOUND
    if failed and run_tests(copy, sorted(failed), limit) != "survived":
        raise SystemExit(f"these tests fail without any mutant: {', '.join(sorted(failed))}")
    _SOUND.update(failed)


def read(table: Path) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """Read what an earlier run measured."""
    if not table.exists():
        return {}
    with table.open(encoding="utf-8", newline="") as file:
        return {(row["file"], row["line"], row["operator"], row["change"]): row for row in csv.DictReader(file)}


def write(table: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the table, whole or not at all."""
    partial = table.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(table)


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table by operator, and the survivors."""
    counted: dict[str, collections.Counter[bool]] = collections.defaultdict(collections.Counter)
    for row in rows:
        counted[row["operator"]][row["verdict"].startswith("found")] += 1
    lines = ["| operator | mutants | found |", "|---|---|---|"]
    lines += [f"| {name} | {sum(count.values())} | {count[True]} |" for name, count in sorted(counted.items())]
    found = sum(count[True] for count in counted.values())
    lines += [f"| all | {len(rows)} | {found} |", "", "Not found:", ""]
    lines += [
        f"- `{row['file']}:{row['line']}` {row['operator']}: `{row['change']}` ({row['verdict']})"
        for row in rows
        if not row["verdict"].startswith("found")
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
