"""How many faults put into src on purpose the tests find: a mutation run.

A coverage run first notes which tests run which line. Then each mutant (one small change of one place, see
`mutation.py`) is put into a copy of the tree, and the tests that run its line must fail. The mutants are drawn with a
seed, as many of each operator. Survivors are listed; each gets a test, or a reason on the page.

    python benchmarks/mutants.py --mutants 330 --jobs 2 --out docs/results/mutants

The tests marked compile, subprocess and study are left out, and so is Triton. `reasons.csv` in `--out` says why a
mutant may survive. What was measured is kept in `--work`: the same command goes on where it was stopped. Where a test
has changed, the survivors are run again; where the source has, all are. A change of the source leaves the rest of the
draw as it is.
"""

from __future__ import annotations

import argparse
import collections
import csv
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import coverage

from forked import Forked, failed
from mutation import Mutant, mutants

ROOT = Path(__file__).resolve().parents[1]
MARKS = "not compile and not subprocess and not study"
NAMES = ["file", "line", "operator", "code", "change"]  # what names a mutant
FIELDS = [*NAMES, "verdict", "tests", "seconds", "found by"]
DEFAULTS = "tests/losses/test_defaults.py|run"  # reads signatures: coverage does not see it
FIRST = 40  # tests that are tried first; only a mutant that survives them meets all that run its line


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=330, help="how many, drawn over all operators")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time, each with one thread")
    parser.add_argument("--only", default="", help="a part of the path of the files to change")
    parser.add_argument("--limit", type=float, default=60.0, help="processor seconds of a mutant, and 0.3 a test")
    parser.add_argument("--work", type=Path, default=ROOT / ".mutants", help="keeps what was measured")
    parser.add_argument("--out", type=Path, required=True, help="folder of mutants.csv and mutants.md")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = draw(options.mutants, options.seed, options.only)
    table = options.work / f"{digest('src')}.csv"
    data = options.work / f"{digest('src', 'tests')}.coverage"
    done = {key: row for key, row in read(table).items() if data.exists() or row["verdict"].startswith("found")}
    tests = which_tests(data)
    left = [pair for pair in chosen if name(*pair) not in done]
    print(f"{len(chosen)} mutants, {len(left)} to run", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool, tempfile.TemporaryDirectory() as folder:
        copies = copy_tree(Path(folder), options.jobs)

        def work(pair: tuple[Path, Mutant]) -> dict[str, Any]:
            copy = copies.pop()
            try:
                return run_mutant(copy, *pair, tests, options.limit)
            finally:
                copies.append(copy)

        for row in pool.map(work, left):
            done[tuple(str(row[field]) for field in NAMES)] = row
            write(table, [done[name(*pair)] for pair in chosen if name(*pair) in done])
            print(*(row[field] for field in FIELDS), sep="  ", flush=True)
        rows = [done[name(*pair)] for pair in chosen]
        check_sound(copies[0], rows, options.limit)
        for copy in copies:
            copy.close()
    write(options.out / "mutants.csv", rows)
    text = report(rows, read_reasons(options.out / "reasons.csv")) + made_with(options)
    (options.out / "mutants.md").write_text(text, encoding="utf-8")
    print(text)


def digest(*folders: str) -> str:
    """Name what the files of some folders contain."""
    found = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


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
        if path.stem not in ("triton", "triton_topk", "__init__") and only in str(path.relative_to(ROOT)):
            for mutant in mutants(path.read_text(encoding="utf-8")):
                by_operator[mutant.operator].append((path.relative_to(ROOT), mutant))
    for group in by_operator.values():  # in an order that a change of another place leaves as it is
        group.sort(key=lambda pair: hashlib.sha256(repr((seed, pair[0].name, name(*pair)[2:])).encode()).digest())
    chosen: list[tuple[Path, Mutant]] = []
    while len(chosen) < count and any(by_operator.values()):
        for operator in sorted(by_operator):
            if by_operator[operator] and len(chosen) < count:
                chosen.append(by_operator[operator].pop())
    return chosen


def name(path: Path, mutant: Mutant) -> tuple[str, ...]:
    """What names a mutant in the table: the values of `NAMES`."""
    source = (ROOT / path).read_text(encoding="utf-8")
    return path.as_posix(), str(mutant.line), mutant.operator, mutant.code(source), mutant.show(source)


def copy_tree(folder: Path, count: int) -> list[Forked]:
    """Copy what git knows, compiled, and start a process in each copy."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    first = folder / "0"
    for file in filter(None, listed.split("\0")):
        (first / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, first / file)
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(first / "src")}
    subprocess.run(command, check=True, cwd=first, env=environment, stdout=subprocess.DEVNULL)
    for number in range(1, count):
        shutil.copytree(first, folder / str(number))  # with the times of the files, so that what is compiled is valid
    return [Forked(folder / str(number)) for number in range(count)]


def run_mutant(copy: Forked, path: Path, mutant: Mutant, tests: coverage.CoverageData, limit: float) -> dict[str, Any]:
    """Put a mutant into the copy, run the tests of its line until one fails, and take it out."""
    source = (ROOT / path).read_text(encoding="utf-8")
    first, others = select(tests, path, mutant.line)
    changed = copy.folder / path
    for compiled in (changed.parent / "__pycache__").glob(f"{changed.stem}.*"):
        compiled.unlink()  # nothing compiles it again: it is never read in place of what was changed
    seconds = copy.seconds
    changed.write_text(mutant.apply(source), encoding="utf-8")
    try:
        verdict, ran = "survived" if first else "no test", 0
        for part in (first, others):
            if part and verdict == "survived":
                verdict, ran = copy.run(part, limit + 0.3 * len(part)), ran + len(part)
                if verdict == "exit 4":  # the mutant has renamed the cases of a test
                    verdict = copy.run(sorted({test.partition("[")[0] for test in part}), limit + len(part))
    finally:
        changed.write_text(source, encoding="utf-8")
    seconds = copy.seconds - seconds
    by = min(failed(copy.output()), default="") if verdict == "found" else ""
    return dict(zip(FIELDS, [*name(path, mutant), verdict, ran, f"{seconds:.1f}", by], strict=True))


def select(tests: coverage.CoverageData, path: Path, line: int) -> tuple[list[str], list[str]]:
    """The tests that run a line, those of the file's twin first; of a line that runs on import, those of the file."""
    by_line = tests.contexts_by_lineno(str(ROOT / path))
    names = {name for name in by_line.get(line, ()) if name}
    if not names:
        names = {DEFAULTS, *(name for found in by_line.values() for name in found if name)}
    ids = sorted({name.rpartition("|")[0] for name in names if "[spawn]" not in name})  # a fork cannot spawn
    ids.sort(key=lambda name: (f"test_{path.stem}.py" not in name, f"/{path.parent.name}/" not in name))
    twins = [name for name in ids if f"test_{path.stem}.py" in name]
    rest = ids[len(twins) :]
    first = twins[:: max(1, len(twins) // (FIRST // 2))] + rest[:: max(1, len(rest) // (FIRST // 2))]
    return first, [name for name in ids if name not in set(first)]


def check_sound(copy: Forked, rows: Sequence[Mapping[str, Any]], limit: float) -> None:
    """Raise SystemExit if a test that found a mutant fails without one, too: it would find any."""
    tests = sorted({row["found by"] for row in rows} - {""})
    if tests and copy.run(tests, limit + len(tests)) != "survived":
        raise SystemExit(f"these tests fail without any mutant: {', '.join(failed(copy.output()))}")


def read(table: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Read what an earlier run measured."""
    if not table.exists():
        return {}
    with table.open(encoding="utf-8", newline="") as file:
        return {tuple(row[field] for field in NAMES): row for row in csv.DictReader(file)}


def read_reasons(table: Path) -> dict[tuple[str, ...], str]:
    """Read why mutants may survive: by file, code and change, so that lines may move."""
    if not table.exists():
        return {}
    with table.open(encoding="utf-8", newline="") as file:
        return {(row["file"], row["code"], row["change"]): row["reason"] for row in csv.DictReader(file)}


def write(table: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the table, whole or not at all."""
    partial = table.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(table)


def report(rows: Sequence[Mapping[str, Any]], reasons: Mapping[tuple[str, ...], str]) -> str:
    """Return the table by operator, and the survivors with the reason of each."""
    counted: dict[str, collections.Counter[bool]] = collections.defaultdict(collections.Counter)
    for row in rows:
        counted[row["operator"]][row["verdict"].startswith("found")] += 1
    lines = ["| operator | mutants | found |", "|---|---|---|"]
    lines += [f"| {operator} | {sum(count.values())} | {count[True]} |" for operator, count in sorted(counted.items())]
    found = sum(count[True] for count in counted.values())
    lines += [f"| all | {len(rows)} | {found} |", ""]
    survivors = [row for row in rows if not row["verdict"].startswith("found")]
    explained = [reasons.get((row["file"], row["code"], row["change"]), "") for row in survivors]
    lines += [f"{len(survivors)} were not found; {sum(map(bool, explained))} of them have a reason:", ""]
    for row, reason in zip(survivors, explained, strict=True):
        place = f"`{row['file'].removeprefix('src/distill/')}:{row['line']}`"
        verdict = "" if row["verdict"] == "survived" else f" ({row['verdict']})"
        text = row["change"].partition(" -> ")[2]
        lines += [f"- {place} `{row['code']}` becomes `{text}`{verdict}. {reason or '**No reason yet.**'}"]
    return "\n".join(lines) + "\n"


def made_with(options: argparse.Namespace) -> str:
    """Return the command, the last revision of the source, and the versions."""
    command = f"python benchmarks/mutants.py --mutants {options.mutants} --seed {options.seed}"
    command += f" --only {options.only}" if options.only else ""
    last = ["git", "log", "-1", "--format=%h", "--", "src"]
    revision = subprocess.run(last, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    versions = f"Python {platform.python_version()}, PyTorch {metadata.version('torch')}"
    return f"\nMade with `{command}`, the source of revision {revision}, {versions}.\n"


if __name__ == "__main__":
    main()
