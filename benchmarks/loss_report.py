"""The record of what `losses.py` measured, and the tables and the picture made from it."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from PIL import Image

OURS, EAGER, COMPILED, FLOOR, FIRST = "ours", "eager", "torch.compile", "floor", "first call"
LIGER, PUBLISHED = "Liger", "as published"
WAYS = (OURS, EAGER, COMPILED, FLOOR, FIRST, LIGER, PUBLISHED)
TABLES = ("logits", "linear", "pixels", "losses")
HEADS = {
    "logits": "samples, classes",
    "linear": "samples, classes, widths",
    "pixels": "samples, channels, height, width",
    "losses": "shape",
}
BY_LOSS = ("pixels", "losses")  # one table of all losses, not one for each
TITLES = {"logit": "LogitLoss", "kl": "KLLoss", "trained": "student's head trained", "frozen": "both heads frozen"}
# Okabe-Ito: colour-blind safe; markers and dashes tell the lines apart without colours, too.
STYLES = {
    OURS: ("ours", "#D55E00", "o", "-"),
    "ours frozen": ("ours, both heads frozen", "#CC79A7", "D", "-"),
    EAGER: ("eager PyTorch", "#000000", "s", "--"),
    COMPILED: ("torch.compile of the plain form", "#0072B2", "^", "-."),
    FLOOR: ("floor: reading the inputs, writing the gradient", "#009E73", "v", ":"),
    LIGER: ("Liger-Kernel", "#E69F00", "P", "-."),
}


@dataclass(frozen=True)
class Row:
    """One way to compute one case; ValueError if a number is not finite or a text is not one line."""

    case: str
    table: str
    loss: str
    shape: str  # such as "1024x32000"
    dtype: str
    way: str  # one of WAYS
    ms: float | None = None  # forward and backward, median; None: not measured, and `note` says why
    ms_low: float | None = None  # quartiles
    ms_high: float | None = None
    over_ours: float | None = None  # its time over ours, median of the ratios within a repetition
    over_ours_low: float | None = None
    over_ours_high: float | None = None
    extra_mb: float | None = None  # peak of extra memory, the gradient included, in 10^6 bytes
    gradient_mb: float | None = None  # what the gradients alone take
    repeats: int | None = None
    inner: int | None = None  # runs in a row that made one measurement
    note: str = ""
    device: str = ""
    torch: str = ""
    python: str = ""
    revision: str = ""
    date: str = ""

    @classmethod
    def from_dict(cls, cells: Mapping[str, object]) -> Row:
        """Return the row of a dict of numbers and texts, or of a CSV's cells, where an empty one means None.

        Raises:
            ValueError: If a cell is malformed; it says which.
        """
        values: dict[str, object] = {}
        for field in dataclasses.fields(cls):
            cell = str("" if cells.get(field.name) is None else cells[field.name])
            if field.type == "str":
                if len(cell.splitlines()) > 1:
                    raise ValueError(f"{field.name} must be one line, got {cell!r}")
                values[field.name] = cell
            elif cell:
                values[field.name] = _number(field.name, cell, whole=field.type == "int | None")
        row = cls(**values)  # type: ignore[arg-type]  # each of its field's type
        if row.way not in WAYS or row.table not in TABLES:
            raise ValueError(f"way and table must be of {WAYS} and {TABLES}, got {row.way!r} and {row.table!r}")
        return row

    def to_dict(self) -> dict[str, str]:
        """Return the cells of the CSV; `from_dict` reads them back to the last digit that they show."""
        values = dataclasses.asdict(self)
        return {
            name: "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
            for name, value in values.items()
        }

    def describe(self) -> str:
        """Say on one line what was measured."""
        if self.ms is None:
            return f"{self.way:14} not measured: {self.note}"
        extra = "not measured" if self.extra_mb is None else f"{_megabytes(self.extra_mb)} MB"
        times = f"{_digits(self.ms):>8} ms ({_digits(self.ms_low)} to {_digits(self.ms_high)})"
        return f"{self.way:14} {times}, {_ratio(self)} of ours, extra memory {extra}, n {self.repeats} of {self.inner}"


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def write_report(out: Path, rows: Sequence[Row]) -> None:
    """Write `losses.csv`, a Markdown file for each table, `setup.md` and `vocabulary.png`.

    Args:
        out: Folder of the files; made if it is missing.
        rows: What was measured, in the order of the tables.

    Raises:
        ValueError: If there is no row.
    """
    if not rows:
        raise ValueError("rows must hold at least one measurement, got none")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.to_dict() for row in rows)
    rows = [Row.from_dict(row.to_dict()) for row in rows]  # the tables are those of the CSV, to the last digit
    files = {f"{table}.md": _tables(rows, table).encode() for table in TABLES}
    files |= {"losses.csv": text.getvalue().encode(), "setup.md": _setup(rows).encode()}
    files["vocabulary.png"] = _picture(rows)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():  # a kill leaves no file half written
        (out / f".{name}.tmp").write_bytes(content)
        (out / f".{name}.tmp").replace(out / name)


def read_rows(out: Path) -> list[Row]:
    """Read back `losses.csv`; writing it again gives the same files.

    Args:
        out: The folder that `write_report` wrote.

    Returns:
        The rows in the order of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the header, a row or a cell is malformed; it says where.
    """
    path = out / "losses.csv"
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            lines = [(f"{path}, line {reader.line_num}", cells) for cells in reader]
        except csv.Error as error:
            raise ValueError(f"{path}, after line {reader.line_num}: {error}") from None
    if not lines or lines[0][1] != [*COLUMNS]:
        raise ValueError(f"{path}, line 1: the columns must be {', '.join(COLUMNS)}, got {lines[:1]}")
    rows = []
    for where, cells in lines[1:]:
        if len(cells) != len(COLUMNS):
            raise ValueError(f"{where}: there must be {len(COLUMNS)} cells, got {len(cells)}")
        try:
            rows.append(Row.from_dict(dict(zip(COLUMNS, cells, strict=True))))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return rows


def _number(name: str, cell: str, *, whole: bool) -> float:
    try:
        number = int(cell) if whole else float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be {'a whole' if whole else 'a finite'} number, got {cell!r}")
    return number


def _digits(value: float | None) -> str:
    """Write three significant digits without an exponent."""
    if value is None:
        return "-"
    places = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{round(value, places):.{max(places, 0)}f}"


def _megabytes(value: float | None) -> str:
    """Write whole megabytes; smaller amounts drown in what the process does anyway."""
    return "-" if value is None else "< 1" if value < 1 else f"{value:.0f}"


def _ratio(row: Row, *, inverted: bool = False) -> str:
    """Write the ratio and its quartiles; of the floor the inverse, since ours is the longer one there."""
    values = (row.over_ours, row.over_ours_low, row.over_ours_high)
    known = [value for value in values if value is not None]
    if len(known) < 3:
        return "-"
    if inverted:
        known = [1 / known[0], 1 / known[2], 1 / known[1]]
    places = 2 if known[0] < 10 else 1
    middle, low, high = (f"{value:.{places}f}" for value in known)
    return f"{middle} ({low} to {high})"


def _by_case(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.way] = row
    return cases


def _tables(rows: Sequence[Row], table: str) -> str:
    """Write one table for each loss, or one of all losses; below it what was not measured."""
    chosen = [row for row in rows if row.table == table]
    if not chosen:
        return "Not measured.\n"
    groups: dict[str, list[Row]] = {}
    for row in chosen:
        groups.setdefault("" if table in BY_LOSS else row.loss, []).append(row)
    parts = []
    for loss, same in groups.items():
        lines = [*_lines(same, HEADS[table], by_loss=table in BY_LOSS)]
        cells = [[*lines[0]], ["---"] * len(lines[0]), *([*line.values()] for line in lines)]
        parts += [f"**{TITLES.get(loss, loss)}**\n"] if loss else []
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n")
        missing: dict[tuple[str, str], list[str]] = {}
        for row in same:
            if row.ms is None and row.note:
                missing.setdefault((row.way, row.note), []).append(row.case)
        for (way, note), cases in missing.items():
            where = "" if len(cases) == len({row.case for row in same}) else f" at {', '.join(cases)}"
            parts.append(f"- Not measured: {way}{where}: {note}\n")
    return "\n".join(parts)


def _lines(rows: Sequence[Row], head: str, *, by_loss: bool) -> Iterator[dict[str, str]]:
    ways = [way for way in WAYS if any(row.way == way and row.ms is not None for row in rows)]
    for case in _by_case(rows).values():
        ours = case[OURS]
        empty = dataclasses.replace(ours, ms=None, over_ours=None, extra_mb=None)
        line = {"loss": f"`{ours.loss}`"} if by_loss else {}
        line |= {head: ours.shape.replace("x", ", "), "dtype": ours.dtype, "ours, ms": _digits(ours.ms)}
        line |= {"form": ours.note} if ours.table == "linear" else {}
        for way in ways[1:]:
            row = case.get(way, empty)
            line["ours / floor" if way == FLOOR else f"{way} / ours"] = _ratio(row, inverted=way == FLOOR)
        line["extra MB: ours"] = _megabytes(ours.extra_mb)
        line |= {way: _megabytes(case.get(way, empty).extra_mb) for way in ways[1:] if way != FLOOR}
        yield line | {"gradients alone": _megabytes(ours.gradient_mb), "n": str(ours.repeats)}


def _setup(rows: Sequence[Row]) -> str:
    """Say what measured what, one line for each machine, version and revision."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.device, row.torch, row.python, row.revision), []).append(row)
    lines = []
    for (device, torch, python, revision), same in groups.items():
        cases, dates = {row.case for row in same}, sorted({row.date for row in same})
        which = "All cases" if len(groups) == 1 else f"{len(cases)} case{'s' * (len(cases) > 1)}"
        days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        lines.append(f"- {which}: {device}; PyTorch {torch}, Python {python}; revision {revision}; {days}.")
    return "\n".join(lines) + "\n"


def _picture(rows: Sequence[Row]) -> bytes:
    """Draw time and memory over the number of classes, at 1024 samples in float32."""
    sweep = [row for row in rows if row.shape.startswith("1024x") and row.dtype == "float32" and row.ms is not None]
    figure = Figure(figsize=(12, 7.5), dpi=110, layout="constrained")
    panels = (("logit", "LogitLoss"), ("kl", "KLLoss"), ("linear", "LinearLogitLoss, widths 256 and 512"))
    shown: dict[str, object] = {}
    for column, (loss, title) in enumerate(panels):
        lines: dict[str, list[Row]] = {}
        for row in sweep:
            if (row.table, row.loss) in (("logits", loss), (loss, "trained")):
                lines.setdefault(row.way, []).append(row)
            elif row.table == loss == "linear" and row.way == OURS:
                lines.setdefault("ours frozen", []).append(row)
        for place, (field, label) in enumerate(
            (("ms", "ms, forward and backward"), ("extra_mb", "extra memory, MB (1: at most 1)"))
        ):
            axes = figure.add_subplot(2, 3, 1 + column + 3 * place)
            for way in (way for way in STYLES if way in lines):
                shown |= {STYLES[way][0]: _draw(axes, lines[way], field, way)}
            axes.set(title=title if place == 0 else None, ylabel=label if column == 0 else None)
            axes.set(xlabel="classes" if place else None)
    handles = [shown[label] for label, *_ in STYLES.values() if label in shown]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi="figure")
    # A palette (by Pillow, which matplotlib brings) makes the file a third as large; octrees keep the lines' colours.
    Image.open(full).convert("RGB").quantize(128, Image.Quantize.FASTOCTREE).save(small, "png", optimize=True)
    return small.getvalue()


def _draw(axes: Axes, rows: Sequence[Row], field: str, way: str) -> object:
    """Draw one line over the classes and return it; less than 1 MB, which cannot be measured well, as 1 MB."""
    label, colour, marker, dashes = STYLES[way]
    points = sorted(
        (int(row.shape.split("x")[1]), getattr(row, field)) for row in rows if getattr(row, field) is not None
    )
    values = [max(value, 1.0) if field == "extra_mb" else value for _, value in points]
    (line,) = axes.loglog(
        [classes for classes, _ in points], values, dashes, color=colour, marker=marker, markersize=6, label=label
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks([10, 100, 1000, 10_000, 100_000], ["10", "100", "1,000", "10,000", "100,000"])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(alpha=0.3)
    return line
