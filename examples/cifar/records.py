"""The record of a run of the CIFAR example, and the two CSV files that keep the records of many."""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any


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
    teacher: str  # "-" for a teacher's own run and for a baseline; "resnet20 of 50 epochs" if the student has others
    seed: int
    weight: float | None  # of the loss; None where there is no teacher
    start_time: str  # ISO 8601 to the second, UTC
    lr: float  # at the start
    batch_size: int
    device: str  # hardware and precision in words
    torch: str
    history: tuple[EpochRecord, ...]  # the epochs 1, 2, ...
    revision: str = "-"  # of the code in git, such as "9a25a33" or "9a25a33-dirty"; "-": unknown
    # After the last epoch, the % of all test images that network and teacher class alike; of a baseline, with the
    # teacher of its own depth, recipe, data set and length. None for a teacher, and where it was not measured.
    agreement: float | None = None
    identity: str = "-"  # of the network's last weights; "-": not recorded, as in a table
    taught_by: str = "-"  # the identity of the teacher

    def __post_init__(self) -> None:
        """Refuses what no table or picture could show."""
        _check(self)
        if self.agreement is not None and not 0 <= self.agreement <= 100:
            raise ValueError(f"agreement must be in 0..100 (%), got {self.agreement!r}")
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
    *("acc_last", "recipe", "weight", "seed", "seconds", "device", "torch", "revision", "agreement"),
)
CURVE_COLUMNS = ("no", *(field.name for field in dataclasses.fields(EpochRecord) if field.name != "terms"))
KIND = ("method", "student", "teacher", "weight")  # runs alike in these and in the setting differ by their seed
SETTING = ("dataset", "recipe", "nepoch", "lr", "batch_size")
TITLE = "{}, recipe {}, epochs {}, lr {:g}, batch size {}"  # of a setting
_DERIVED = ("no", "acc", "epoch", "nepoch", "acc_last", "seconds")
_OPTIONAL = ("weight", "agreement")  # an empty cell is None


def run_cells(no: int, run: RunResult) -> dict[str, str]:
    """Returns the cells of a run's row in `results.csv` by their column.

    Args:
        no: Number of the row, from 1.
        run: The run.

    Returns:
        A text for each of `RUN_COLUMNS`.
    """
    cells = {name: str(getattr(run, name)) for name in RUN_COLUMNS if name != "no"}
    cells |= {name: "" for name in _OPTIONAL if getattr(run, name) is None}
    cells |= {"acc": f"{run.acc:.3f}", "acc_last": f"{run.acc_last:.3f}", "seconds": f"{run.seconds:.1f}"}
    return cells | {"no": str(no)}


def to_csv(results: Sequence[RunResult]) -> tuple[str, str]:
    """Returns the texts of `results.csv`, a row per run, and of `curves.csv`, a row per epoch.

    Args:
        results: The runs, in the order in which the rows number them.

    Returns:
        The two texts.
    """
    curves = [
        {"no": str(no)}
        | {name: str(getattr(record, name)) for name in CURVE_COLUMNS[1:]}
        | {f"term:{name}": str(value) for name, value in record.terms.items()}
        for no, run in enumerate(results, 1)
        for record in run.history
    ]
    terms = sorted({name for row in curves for name in row if name.startswith("term:")})
    runs = [run_cells(no, run) for no, run in enumerate(results, 1)]
    return _csv(RUN_COLUMNS, runs), _csv([*CURVE_COLUMNS, *terms], curves)


def read_results(path: Path) -> list[RunResult]:
    """Reads back what `to_csv` gave; writing a report of it again gives the same CSV and Markdown, byte for byte.

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
            given: dict[str, Any] = {name: cells[name] for name in RUN_COLUMNS if name not in _DERIVED}
            history = histories[str(len(results) + 1)]
            given |= {name: given[name] or None for name in _OPTIONAL}
            results.append(RunResult.from_json(given | {"history": history}))
            for name, cell in run_cells(len(results), results[-1]).items():
                if name in _DERIVED and cell != cells[name]:
                    raise ValueError(f"{name} must be {cell}, as curves.csv has it, got {cells[name]!r}")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return results


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


def group_runs(runs: Iterable[RunResult], *fields: str) -> dict[tuple[Any, ...], list[RunResult]]:
    """Returns the runs by their values of these fields, groups and runs in the order given.

    Args:
        runs: The runs.
        *fields: Names of fields or properties.

    Returns:
        The runs alike in all of these fields, by their values.
    """
    groups: dict[tuple[Any, ...], list[RunResult]] = {}
    for run in runs:
        groups.setdefault(tuple(getattr(run, field) for field in fields), []).append(run)
    return groups


def mean_and_deviation(values: Sequence[float]) -> str:
    """Returns such as "91.60 ± 1.35": the mean and, of two or more values, their sample standard deviation.

    Args:
        values: At least one number.

    Returns:
        The text.
    """
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
