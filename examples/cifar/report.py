"""Results of the CIFAR example: the record of a run, and the tables and the picture made from many runs."""

import csv
import dataclasses
import html
import io
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.special import stdtrit  # type: ignore[import-untyped]  # scipy ships no types

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
REFERENCE_WEIGHT = {"pooled": 1.0, "logits": 0.1}
NOTES = """\
- Accuracies are in %. `acc` is the best test accuracy over the epochs, on the test images that fill whole batches: the
  reference's number, its epoch chosen on the test set. `acc_last` is that of the last epoch on all test images.
- ± is the sample standard deviation over the runs; one run has none. A gain is the mean difference to the baseline of
  the same seed, in percentage points, with its 95% t-interval.
"""


def _number(name: str, kind: type[int] | type[float], value: object) -> float:
    """Reads a number, also from a CSV's text; by way of the text, so that 5.7 is no int and True no number."""
    try:
        number = kind(str(value))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite {kind.__name__}, got {value!r}")
    return number


def _check(record: "EpochRecord | RunResult") -> None:
    """Refuses what no table could hold, and makes plain numbers of what stands in the number fields."""
    for field in dataclasses.fields(record):
        name, kind, value = field.name, field.type, getattr(record, field.name)
        if kind is str and (not isinstance(value, str) or value.splitlines() != [value] or "\0" in value):
            raise ValueError(f"{name} must be one line of text that is not empty, got {value!r}")
        if kind in (int, float) or (kind == float | None and value is not None):
            object.__setattr__(record, name, _number(name, int if kind is int else float, value))


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch of a run measured; ValueError if a number is not finite or an accuracy not in 0..100."""

    epoch: int  # from 1
    lr: float
    loss: float  # mean training loss of the epoch
    terms: dict[str, float]  # mean of each unweighted term over the epoch, "task" among them
    train_acc: float  # % of the augmented training images
    test_acc: float  # % of the test images that fill whole batches: what the reference measured
    test_acc_all: float  # % of all test images
    images_per_second: float
    seconds: float

    def __post_init__(self) -> None:
        """Refuses what no table or picture could show."""
        _check(self)
        if not isinstance(self.terms, Mapping) or any(name.splitlines() != [name] for name in self.terms):
            raise ValueError(f"terms must map names of one line to numbers, got {self.terms!r}")
        object.__setattr__(self, "terms", {it: _number(f"term:{it}", float, self.terms[it]) for it in self.terms})
        for name in ("train_acc", "test_acc", "test_acc_all"):
            if not 0 <= getattr(self, name) <= 100:
                raise ValueError(f"{name} must be in 0..100 (%), got {getattr(self, name)!r}")

    def to_json(self) -> dict[str, Any]:
        """Returns the record as a plain dict that `json` can write."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "EpochRecord":
        """Returns the record of a dict made by `to_json`; TypeError or ValueError names what is missing or wrong."""
        return cls(**data)


@dataclass(frozen=True)
class RunResult:
    """A run: what was trained, how, and what each epoch measured; ValueError if the history is empty or has gaps."""

    method: str  # "teacher", "baseline" (cross-entropy only) or the registry name of the loss
    recipe: str  # "pooled" or "logits"
    dataset: str
    student: str  # the network that was trained, such as "resnet20"
    teacher: str  # "-" for a teacher's own run and for a baseline
    seed: int
    weight: float | None  # of the loss; None where there is no teacher
    start_time: str  # ISO 8601 to the second, UTC
    lr: float  # at the start
    batch_size: int
    device: str  # hardware and precision in words
    torch: str
    history: tuple[EpochRecord, ...]  # the epochs 1, 2, ...
    revision: str = "-"  # of the code in git
    agreement: float | None = None  # % of all test images on which the network says what its teacher says

    def __post_init__(self) -> None:
        """Refuses what no table or picture could show."""
        _check(self)
        epochs = [record.epoch for record in self.history]
        if not epochs or epochs != list(range(1, len(epochs) + 1)):
            raise ValueError(f"history must hold the epochs 1, 2, ..., at least one of them, got {epochs}")

    @property
    def acc(self) -> float:
        """Best `EpochRecord.test_acc` over the epochs, in %: the reference's number."""
        return max(record.test_acc for record in self.history)

    @property
    def epoch(self) -> int:
        """Epoch of `acc`, the first of them if several share it."""
        return next(record.epoch for record in self.history if record.test_acc == self.acc)

    @property
    def nepoch(self) -> int:
        """Number of epochs."""
        return len(self.history)

    @property
    def acc_last(self) -> float:
        """Accuracy after the last epoch on all test images, in %."""
        return self.history[-1].test_acc_all

    @property
    def seconds(self) -> float:
        """Duration of all epochs together."""
        return math.fsum(record.seconds for record in self.history)

    def to_json(self) -> dict[str, Any]:
        """Returns the run as a plain dict that `json` can write."""
        return dataclasses.asdict(self) | {"history": [record.to_json() for record in self.history]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RunResult":
        """Returns the run of a dict made by `to_json`; TypeError or ValueError names what is missing or wrong."""
        return cls(**{**data, "history": tuple(map(EpochRecord.from_json, data.get("history", ())))})


RUN_COLUMNS = (
    *("no", "method", "dataset", "student", "teacher", "start_time", "acc", "epoch", "nepoch", "lr", "batch_size"),
    *("acc_last", "recipe", "weight", "seed", "seconds", "device", "torch"),
)
CURVE_COLUMNS = ("no", *(field.name for field in dataclasses.fields(EpochRecord) if field.name != "terms"))
_DERIVED = ("no", "acc", "epoch", "nepoch", "acc_last", "seconds")
_KIND = ("method", "student", "teacher", "weight")  # runs alike in these and in the setting differ by their seed
_SETTING = ("dataset", "recipe", "nepoch", "lr", "batch_size")
_TITLE = "{}, recipe {}, epochs {}, lr {:g}, batch size {}"
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito: colour-blind safe


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
    runs = [_run_cells(no, run) for no, run in enumerate(results, 1)]
    curves = [
        {"no": str(no)}
        | {name: str(getattr(record, name)) for name in CURVE_COLUMNS[1:]}
        | {f"term:{name}": str(value) for name, value in record.terms.items()}
        for no, run in enumerate(results, 1)
        for record in run.history
    ]
    terms = sorted({name for row in curves for name in row if name.startswith("term:")})
    files = {
        "results.csv": _csv(RUN_COLUMNS, runs).encode(),
        "curves.csv": _csv([*CURVE_COLUMNS, *terms], curves).encode(),
        "results.md": _markdown(results, runs).encode(),
        "curves.png": _picture(results),
    }
    out.mkdir(parents=True, exist_ok=True)
    # Names that do not change: what a SIGKILL leaves behind, the next report overwrites and renames.
    temporary = {out / f".{name}.tmp": out / name for name in files}
    try:
        for path, content in zip(temporary, files.values(), strict=True):
            path.write_bytes(content)
        for path, final in temporary.items():
            path.replace(final)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def read_results(path: Path) -> list[RunResult]:
    """Reads back what `write_report` wrote; writing it again gives the same CSV and Markdown files, byte for byte.

    Args:
        path: Folder with `results.csv` and `curves.csv`.

    Returns:
        The runs in the order of the table.

    Raises:
        FileNotFoundError: If one of the two files is missing.
        ValueError: If a cell, row or header is malformed or the two files contradict each other; it says where.
    """
    runs = _read_csv(path / "results.csv", RUN_COLUMNS)
    curves = _read_csv(path / "curves.csv", CURVE_COLUMNS, more="term:")
    histories: dict[str, list[dict[str, object]]] = {str(no): [] for no in range(1, len(runs) + 1)}
    results: list[RunResult] = []
    try:
        for where, cells in curves:  # noqa: B007  # the error below tells it
            if cells["no"] not in histories:
                raise ValueError(f"no must be that of a run in results.csv, got {cells['no']!r}")
            history = histories[cells["no"]]
            if cells["epoch"] != str(len(history) + 1):
                raise ValueError(f"epoch must be {len(history) + 1}, the run's next, got {cells['epoch']!r}")
            terms = {name.removeprefix("term:"): cell for name, cell in cells.items() if name[:5] == "term:" and cell}
            values = {name: cells[name] for name in CURVE_COLUMNS[1:]}
            history.append(EpochRecord.from_json(values | {"terms": terms}).to_json())
        for where, cells in runs:  # noqa: B007  # the error below tells it
            given = {name: cells[name] for name in RUN_COLUMNS if name not in _DERIVED}
            history = histories[str(len(results) + 1)]
            results.append(RunResult.from_json(given | {"weight": given["weight"] or None, "history": history}))
            for name, cell in _run_cells(len(results), results[-1]).items():
                if name in _DERIVED and cell != cells[name]:
                    raise ValueError(f"{name} must be {cell}, as curves.csv has it, got {cells[name]!r}")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return results


def _run_cells(no: int, run: RunResult) -> dict[str, str]:
    cells = {name: str(getattr(run, name)) for name in RUN_COLUMNS if name != "no"}
    cells |= {"acc": f"{run.acc:.3f}", "acc_last": f"{run.acc_last:.3f}", "seconds": f"{run.seconds:.1f}"}
    return cells | {"no": str(no), "weight": "" if run.weight is None else str(run.weight)}


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _read_csv(path: Path, columns: Sequence[str], more: str = "no other") -> list[tuple[str, dict[str, str]]]:
    """Returns the place and the cells of each row; after the given columns stand those that start with `more`."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            lines = [(f"{path}, line {reader.line_num}", cells) for cells in reader]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {reader.line_num}: {error}") from None
    header = lines[0][1] if lines else []
    expected = dict.fromkeys([*columns, *(name for name in header if name.startswith(more))])
    for no, (name, got) in enumerate(zip_longest(expected, header), 1):
        if name != got:
            raise ValueError(f"{path}, line 1: column {no} must be {name!r}, got {got!r}")
    for where, cells in lines[1:]:
        if len(cells) != len(header):
            at = header[min(len(cells), len(header) - 1)]
            raise ValueError(f"{where}: {len(cells)} cells, {len(header)} expected; see column {at!r}")
    return [(where, dict(zip(header, cells, strict=True))) for where, cells in lines[1:]]


def _group(runs: Iterable[RunResult], *fields: str) -> dict[tuple[Any, ...], list[RunResult]]:
    groups: dict[tuple[Any, ...], list[RunResult]] = {}
    for run in runs:
        groups.setdefault(tuple(getattr(run, field) for field in fields), []).append(run)
    return groups


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _gain(runs: Sequence[RunResult], baselines: Sequence[RunResult], field: str) -> str:
    """Mean difference to the baseline of the same seed, with its 95% t-interval."""
    ours, theirs = (
        {seed: statistics.fmean(getattr(run, field) for run in same) for (seed,), same in _group(side, "seed").items()}
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


def _reference(run: RunResult) -> str:
    published = REFERENCE.get((run.recipe, run.method, run.student, run.teacher), ())
    values = dict(zip(("cifar10", "cifar100"), published, strict=False)).get(run.dataset)
    if values is None:
        return "-"
    notes = [] if run.nepoch == 200 else [f"{run.nepoch} of 200 epochs"]
    settings = [("lr", run.lr, 0.1), ("batch size", run.batch_size, 128)]
    settings += [] if run.weight is None else [("weight", run.weight, REFERENCE_WEIGHT[run.recipe])]
    notes += [f"{name} {ours:g}, not {theirs:g}" for name, ours, theirs in settings if ours != theirs]
    return _mean(values) + (f" (not comparable: {'; '.join(notes)})" if notes else "")


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_\[|])", r"\\\1", html.escape(text, quote=False))


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    cells = [map(_escape, row.values()) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in ([*rows[0]], ["---"] * len(rows[0]), *cells)) + "\n"


def _summary(runs: Sequence[RunResult]) -> Iterator[dict[str, str]]:
    for (method, student, teacher, weight), same in _group(runs, *_KIND).items():
        baselines = [run for run in runs if run.method == "baseline" and run.student == student]
        yield {
            **{"method": method, "student": student, "teacher": teacher},
            "weight": "-" if weight is None else f"{weight:g}",
            "runs": str(len(same)),
            "acc": _mean([run.acc for run in same]),
            "reference acc": _reference(same[0]),
            "acc_last": _mean([run.acc_last for run in same]),
            "best epoch": ", ".join(str(run.epoch) for run in same),
            "seconds per run": f"{statistics.fmean(run.seconds for run in same):.1f}",
            "gain in acc": "-" if teacher == "-" else _gain(same, baselines, "acc"),
            "gain in acc_last": "-" if teacher == "-" else _gain(same, baselines, "acc_last"),
        }


def _markdown(results: Sequence[RunResult], cells: Sequence[Mapping[str, str]]) -> str:
    parts = ["# Results\n"]
    for setting, runs in _group(results, *_SETTING).items():
        parts += [f"## {_escape(_TITLE.format(*setting))}\n", _table([*_summary(runs)])]
    shown = [name for name in RUN_COLUMNS if name not in ("device", "torch")]
    parts += ["## Every run\n", _table([{name: row[name] or "-" for name in shown} for row in cells])]
    for device, torch in dict.fromkeys((row["device"], row["torch"]) for row in cells):
        nos = [row["no"] for row in cells if (row["device"], row["torch"]) == (device, torch)]
        which = "All runs" if len(nos) == len(cells) else f"Run{'s' * (len(nos) > 1)} {', '.join(nos)}"
        parts.append(f"- {which}: {_escape(device)}, torch {_escape(torch)}.")
    return "\n".join([*parts, NOTES])


def _picture(results: Sequence[RunResult]) -> bytes:
    panels = _group(results, *_SETTING)
    figure = Figure(figsize=(12, 5 * len(panels)), dpi=100, layout="constrained")
    grid = figure.add_gridspec(len(panels), 2, width_ratios=(3, 2))
    for row, (setting, runs) in enumerate(panels.items()):
        nepoch = runs[0].nepoch
        # The whole course but for its steep start and, of a longer one, the last quarter: there the lines differ.
        last = nepoch + 1 - math.ceil(nepoch / 4) if nepoch >= 8 else 0
        whole = figure.add_subplot(grid[row, 0] if last else grid[row, :])
        _draw(whole, runs, shown_from=1, fitted_from=1 + nepoch // 20)
        whole.set(title=_TITLE.format(*setting), ylabel="accuracy on all test images (%)")
        band = "; line: mean, band: range of seeds" * any(len(same) > 1 for same in _group(runs, *_KIND).values())
        whole.legend(title=f"% after the last epoch{band}", loc="lower right" if last else "best")
        if last:
            _draw(figure.add_subplot(grid[row, 1], title=f"epochs {last} to {nepoch}"), runs, last, last)
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi="figure")
    # A palette (by Pillow, which matplotlib brings) makes the file a third as large; octrees keep the lines' colours.
    Image.open(full).convert("RGB").quantize(128, Image.Quantize.FASTOCTREE).save(small, "png", optimize=True)
    return small.getvalue()


def _draw(axes: Axes, runs: Sequence[RunResult], shown_from: int, fitted_from: int) -> None:
    """Draws the mean and the range over seeds of each kind of run; the y axis is fitted to the later epochs."""
    nepoch, epochs = runs[0].nepoch, range(1, runs[0].nepoch + 1)
    for no, ((method, student, teacher, weight), same) in enumerate(_group(runs, *_KIND).items()):
        seeds = list(zip(*([record.test_acc_all for record in run.history] for run in same), strict=True))
        style = ("-", "--", ":")[no // len(_COLOURS) % 3] + "o" * (nepoch <= 20)  # markers: one epoch is one point
        colour = _COLOURS[no % len(_COLOURS)]
        label = f"{method} {student}" + ("" if weight is None else f" from {teacher}, weight {weight:g}")
        axes.plot(epochs, [*map(statistics.fmean, seeds)], style, color=colour, label=f"{label}: {_mean(seeds[-1])}")
        if len(same) > 1:
            axes.fill_between(epochs, [*map(min, seeds)], [*map(max, seeds)], color=colour, alpha=0.2, linewidth=0)
    fitted = [record.test_acc_all for run in runs for record in run.history[fitted_from - 1 :]]
    margin, pad = 0.05 * (max(fitted) - min(fitted)) + 0.1, max(0.5, 0.02 * (nepoch - shown_from))
    axes.set(ylim=(min(fitted) - margin, max(fitted) + margin), xlim=(shown_from - pad, nepoch + pad), xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
