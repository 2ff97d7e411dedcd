"""Results of the CIFAR example: the tables made from many runs, beside the numbers that are to be reproduced."""

import html
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from scipy.special import stdtrit  # type: ignore[import-untyped]  # scipy ships no types

from cifar.files import temporary_name
from cifar.picture import draw_picture
from cifar.records import (
    KIND,
    RUN_COLUMNS,
    SETTING,
    TITLE,
    EpochRecord,
    RunResult,
    group_runs,
    mean_and_deviation,
    read_results,
    run_cells,
    to_csv,
)

__all__ = ["EpochRecord", "RunResult", "read_results", "write_report"]

# The `acc` in % of the runs to be reproduced, on CIFAR-10 and on CIFAR-100, by (recipe, method, student, teacher). One
# number: only the mean or one run is known. "pooled" is of 2021, torch 1.9; "logits" of the Knowledge-Distillation-Zoo.
REFERENCE: dict[tuple[str, str, str, str], tuple[tuple[float, ...], tuple[float, ...]]] = {
    ("pooled", "teacher", "resnet20", "-"): ((92.0,), (67.6,)),
    ("pooled", "teacher", "resnet110", "-"): ((92.5,), (71.6,)),
    ("pooled", "logit", "resnet20", "resnet20"): ((92.518, 92.488, 92.528), (69.261, 69.271, 69.101)),
    ("pooled", "logit", "resnet110", "resnet110"): ((94.231, 94.311, 94.030), (72.496, 71.404, 71.424)),
    ("logits", "baseline", "resnet20", "-"): ((92.37,), (68.92,)),
    ("logits", "baseline", "resnet110", "-"): ((93.86,), (73.15,)),
    ("logits", "logit", "resnet20", "resnet20"): ((93.30,), (70.36,)),
    ("logits", "logit", "resnet20", "resnet110"): ((92.98,), (69.78,)),
    ("logits", "logit", "resnet110", "resnet110"): ((94.38,), (74.89,)),
}
REFERENCE_EPOCHS, REFERENCE_LR, REFERENCE_BATCH_SIZE = 200, 0.1, 128
REFERENCE_WEIGHT = {"pooled": 1.0, "logits": 0.1}
NOTES = """\
- Accuracies are in %. `acc` is the best test accuracy over the epochs, on the test images that fill whole batches: the
  reference's number, its epoch chosen on the test set. `acc_last` is that of the last epoch on all test images.
- ± is the sample standard deviation over the runs; one run has none. A gain is the mean difference to the baseline of
  the same seed, in percentage points, with its 95% t-interval.
"""
NOTES_REFERENCE = """\
- `difference` is our mean `acc` minus the reference's, in percentage points. It is *met* if it is not negative when
  rounded to 0.01, which is one test image. A shortfall is also counted in standard errors of our mean: the standard
  deviation over the square root of the number of runs. A run with other settings than the reference is not comparable.
- `time per run` is the mean duration of the student's epochs, evaluation included. Runs side by side share the machine:
  together they take less time than this times their number.
"""
NOTES_AGREEMENT = """\
- `agreement` is the share, in %, of all test images that the network after its last epoch puts into the same class as
  its teacher, right or wrong. A baseline, which has no teacher, is compared with the teacher of its own depth.
"""


def write_report(out: Path, results: Sequence[RunResult]) -> None:
    """Writes `results.csv`, `curves.csv`, `results.md` and `curves.png`; a kill leaves no file half written.

    Args:
        out: Folder of the files; made if it is missing.
        results: The runs, in the order in which the tables number them.

    Raises:
        ValueError: If there is no run.
    """
    if not results:
        raise ValueError("results must hold at least one run, got none")
    runs, curves = to_csv(results)
    files = {
        "results.csv": runs.encode(),
        "curves.csv": curves.encode(),
        "results.md": _markdown(results).encode(),
        "curves.png": draw_picture(results),
    }
    out.mkdir(parents=True, exist_ok=True)
    # Each process has names of its own: two commands may write the report of one folder.
    temporary = {out / temporary_name(name): out / name for name in files}
    try:
        for path, content in zip(temporary, files.values(), strict=True):
            path.write_bytes(content)
        for path, final in temporary.items():
            path.replace(final)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def _gain(runs: Sequence[RunResult], baselines: Sequence[RunResult], field: str) -> str:
    """Mean difference to the baseline of the same seed, with its 95% t-interval."""
    ours, theirs = (
        {
            seed: statistics.fmean(getattr(run, field) for run in same)
            for (seed,), same in group_runs(side, "seed").items()
        }
        for side in (runs, baselines)
    )
    gains = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if len(gains) < 2:
        return f"{gains[0]:+.2f} (1 pair)" if gains else "no baseline of the same seed"
    mean = statistics.fmean(gains)
    # SciPy's quantile, since scikit-learn (the digits) brings SciPy anyway: one special function, right for any number
    # of pairs, where a table of our own would end somewhere and scipy.stats takes a second to import.
    half = float(stdtrit(len(gains) - 1, 0.975)) * statistics.stdev(gains) / math.sqrt(len(gains))
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f}, {len(gains)} pairs)"


def _published(run: RunResult) -> tuple[float, ...]:
    """Returns the reference's numbers for such a run; none if it has none."""
    published = REFERENCE.get((run.recipe, run.method, run.student, run.teacher), ())
    return dict(zip(("cifar10", "cifar100"), published, strict=False)).get(run.dataset, ())


def _deviations(run: RunResult) -> str:
    """Says in what a run's settings differ from the reference's; empty if in nothing."""
    notes = [] if run.nepoch == REFERENCE_EPOCHS else [f"{run.nepoch} of {REFERENCE_EPOCHS} epochs"]
    settings = [("lr", run.lr, REFERENCE_LR), ("batch size", run.batch_size, REFERENCE_BATCH_SIZE)]
    settings += [] if run.weight is None else [("weight", run.weight, REFERENCE_WEIGHT[run.recipe])]
    notes += [f"{name} {ours:g}, not {theirs:g}" for name, ours, theirs in settings if ours != theirs]
    return "; ".join(notes)


def _reference(run: RunResult) -> str:
    if not (published := _published(run)):
        return "-"
    deviations = _deviations(run)
    return mean_and_deviation(published) + (f" (not comparable: {deviations})" if deviations else "")


def _verdict(runs: Sequence[RunResult], difference: float) -> str:
    """Says whether runs of one kind reach the reference; `difference` is rounded to 0.01."""
    if deviations := _deviations(runs[0]):
        return f"not comparable: {deviations}"
    if difference >= 0:
        return "met"
    short = f"short by {-difference:.2f}"
    if len(runs) < 2:
        return f"{short} (one run: no standard error)"
    error = statistics.stdev(run.acc for run in runs) / math.sqrt(len(runs))
    # One test image is 0.01: an error below that is an accident of few runs, and no unit to count in.
    return f"{short} ({-difference / error:.1f} standard errors)" if error >= 0.001 else f"{short} (our runs are equal)"


def _agreement(runs: Sequence[RunResult]) -> str:
    measured = [run.agreement for run in runs if run.agreement is not None]
    if not measured:
        return "-"
    return mean_and_deviation(measured) + (f" ({len(measured)} of {len(runs)} runs)" * (len(measured) < len(runs)))


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _made_with(run: RunResult) -> str:
    return f"{run.device}, torch {run.torch}, " + (
        "revision not recorded" if run.revision == "-" else f"revision {run.revision}"
    )


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_\[|])", r"\\\1", html.escape(text, quote=False))


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    cells = [map(_escape, row.values()) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in ([*rows[0]], ["---"] * len(rows[0]), *cells)) + "\n"


def _beside_reference(results: Sequence[RunResult]) -> Iterator[str]:
    """Yields the section that sets students beside the reference; nothing if there is none with a published number."""
    students = [run for run in results if run.method == "logit" and _published(run)]
    made_with = dict.fromkeys(map(_made_with, students))
    rows = []
    for same in group_runs(students, *SETTING, *KIND).values():
        first, setting = same[0], [getattr(same[0], name) for name in SETTING]
        baselines = [
            run
            for run in results
            if (run.method, run.student) == ("baseline", first.student)
            and [getattr(run, name) for name in SETTING] == setting
        ]
        published = _published(first)
        difference = round(statistics.fmean(run.acc for run in same) - statistics.fmean(published), 2)
        row = {
            "data set": first.dataset,
            "recipe": first.recipe,
            "student ← teacher": f"{first.student} ← {first.teacher}",
            "epochs": str(first.nepoch),
            "weight": "-" if first.weight is None else f"{first.weight:g}",
            "lr": f"{first.lr:g}",
            "batch size": str(first.batch_size),
            "runs": str(len(same)),
            "acc": mean_and_deviation([run.acc for run in same]),
            "reference acc": mean_and_deviation(published),
            "difference": f"{difference + 0:+.2f}",
            "verdict": _verdict(same, difference),
            "gain in acc": _gain(same, baselines, "acc"),
            "acc_last": mean_and_deviation([run.acc_last for run in same]),
            "gain in acc_last": _gain(same, baselines, "acc_last"),
            "agreement": _agreement(same),
            # With a teacher of another depth, the baseline was compared with another network than the student.
            "baseline's agreement": _agreement(baselines) if first.student == first.teacher else "-",
            "time per run": _duration(statistics.fmean(run.seconds for run in same)),
        }
        if len(made_with) > 1:
            row["made with"] = "; ".join(dict.fromkeys(map(_made_with, same)))
        rows.append(row)
    if rows:
        yield "### Beside the reference\n"
        yield _table(rows)
        if len(made_with) == 1:
            yield f"- Every student above: {_escape(*made_with)}."
        yield NOTES_REFERENCE


def _summary(runs: Sequence[RunResult]) -> Iterator[dict[str, str]]:
    for (method, student, teacher, weight), same in group_runs(runs, *KIND).items():
        baselines = [run for run in runs if run.method == "baseline" and run.student == student]
        yield {
            **{"method": method, "student": student, "teacher": teacher},
            "weight": "-" if weight is None else f"{weight:g}",
            "runs": str(len(same)),
            "acc": mean_and_deviation([run.acc for run in same]),
            "reference acc": _reference(same[0]),
            "acc_last": mean_and_deviation([run.acc_last for run in same]),
            "best epoch": ", ".join(str(run.epoch) for run in same),
            "seconds per run": f"{statistics.fmean(run.seconds for run in same):.1f}",
            "gain in acc": "-" if teacher == "-" else _gain(same, baselines, "acc"),
            "gain in acc_last": "-" if teacher == "-" else _gain(same, baselines, "acc_last"),
            "agreement": _agreement(same),
        }


def _markdown(results: Sequence[RunResult]) -> str:
    cells = [run_cells(no, run) for no, run in enumerate(results, 1)]
    parts = ["# Results\n", *_beside_reference(results)]
    for setting, runs in group_runs(results, *SETTING).items():
        parts += [f"### {_escape(TITLE.format(*setting))}\n", _table([*_summary(runs)])]
    shown = [name for name in RUN_COLUMNS if name not in ("device", "torch", "revision")]
    for row, run in zip(cells, results, strict=True):
        row["agreement"] = _agreement([run])
    parts += ["### Every run\n", _table([{name: row[name] or "-" for name in shown} for row in cells])]
    made_with = [_made_with(run) for run in results]
    for one in dict.fromkeys(made_with):
        nos = [str(no) for no, other in enumerate(made_with, 1) if other == one]
        which = "All runs" if len(nos) == len(cells) else f"Run{'s' * (len(nos) > 1)} {', '.join(nos)}"
        parts.append(f"- {which}: {_escape(one)}.")
    return "\n".join([*parts, NOTES + NOTES_AGREEMENT])
