"""The picture of many runs: accuracy over the epochs, and how often student and teacher agree after the last one.

Where there are more kinds of runs than curves can be told apart, only the last epoch is shown, a row for each kind.
"""

import io
import math
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from cifar.records import KIND, SETTING, TITLE, RunResult, group_runs, mean_and_deviation

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito: colour-blind safe


def draw_picture(results: Sequence[RunResult]) -> bytes:
    """Draws a row for each setting: the accuracy curves and, where it was measured, the agreement with the teacher.

    Args:
        results: At least one run.

    Returns:
        A PNG file.
    """
    settings = group_runs(results, *SETTING)
    agreement = any(run.agreement is not None for run in results)
    widths = (6.5, 4.5, 4.5) if agreement else (7.2, 4.8)  # in inches: the whole course, its end, the agreement
    kinds = [len(group_runs(runs, *KIND)) for runs in settings.values()]
    ranked = [count > len(COLOURS) for count in kinds]
    heights = [1.5 + 0.35 * count if many else 5.0 for count, many in zip(kinds, ranked, strict=True)]
    figure = Figure(figsize=(sum(widths), sum(heights)), dpi=100, layout="constrained")
    grid = figure.add_gridspec(len(settings), len(widths), width_ratios=widths, height_ratios=heights)
    for row, (setting, runs) in enumerate(settings.items()):
        if ranked[row]:
            axes = figure.add_subplot(grid[row, :2], title=TITLE.format(*setting))
            draw_ranking(
                axes,
                runs,
                "acc_last",
                "accuracy on all test images after the last epoch (%); dot: seed, bar: mean, grey: baselines",
            )
            if any(run.agreement is not None for run in runs):
                axes = figure.add_subplot(grid[row, 2], title="agreement with the teacher")
                draw_ranking(axes, runs, "agreement", "test images in the same class (%)")
            continue
        nepoch = runs[0].nepoch
        # The whole course but for its steep start and, of a longer one, the last quarter: there the lines differ.
        last = nepoch + 1 - math.ceil(nepoch / 4) if nepoch >= 8 else 0
        whole = figure.add_subplot(grid[row, 0] if last else grid[row, :2])
        draw_curves(whole, runs, shown_from=1, fitted_from=1 + nepoch // 20)
        whole.set(title=TITLE.format(*setting), ylabel="accuracy on all test images (%)")
        band = "; line: mean, band: range of seeds" * any(len(same) > 1 for same in group_runs(runs, *KIND).values())
        whole.legend(title=f"% after the last epoch{band}", loc="lower right" if last else "best", fontsize="small")
        if last:
            draw_curves(figure.add_subplot(grid[row, 1], title=f"epochs {last} to {nepoch}"), runs, last, last)
        if any(run.agreement is not None for run in runs):
            draw_agreement(figure.add_subplot(grid[row, 2]), runs)
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="rgba", dpi="figure")
    width, height = map(int, figure.bbox.size)
    # A palette (by Pillow, which matplotlib brings) makes the file a third as large; octrees keep the lines' colours.
    image = Image.frombytes("RGBA", (width, height), full.getvalue())
    image.convert("RGB").quantize(128, Image.Quantize.FASTOCTREE).save(small, "png", optimize=True)
    return small.getvalue()


def draw_curves(axes: Axes, runs: Sequence[RunResult], shown_from: int, fitted_from: int) -> None:
    """Draws the mean and the range over seeds of each kind of run.

    Args:
        axes: Where to draw.
        runs: The runs of one setting.
        shown_from: The first epoch that is shown.
        fitted_from: The first epoch that the y axis is fitted to.
    """
    nepoch, epochs = runs[0].nepoch, range(1, runs[0].nepoch + 1)
    for no, ((method, student, teacher, weight), same) in enumerate(group_runs(runs, *KIND).items()):
        seeds = list(zip(*([record.test_acc_all for record in run.history] for run in same), strict=True))
        style = ("-", "--", ":")[no // len(COLOURS) % 3] + "o" * (nepoch <= 20)  # markers: one epoch is one point
        colour = COLOURS[no % len(COLOURS)]
        name = f"{method} {student}" + ("" if weight is None else f" from {teacher}, weight {weight:g}")
        label = f"{name}: {mean_and_deviation(seeds[-1])}"
        axes.plot(epochs, [*map(statistics.fmean, seeds)], style, color=colour, label=label)
        if len(same) > 1:
            axes.fill_between(epochs, [*map(min, seeds)], [*map(max, seeds)], color=colour, alpha=0.2, linewidth=0)
    fitted = [record.test_acc_all for run in runs for record in run.history[fitted_from - 1 :]]
    margin, pad = 0.05 * (max(fitted) - min(fitted)) + 0.1, max(0.5, 0.02 * (nepoch - shown_from))
    axes.set(ylim=(min(fitted) - margin, max(fitted) + margin), xlim=(shown_from - pad, nepoch + pad), xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)


def draw_agreement(axes: Axes, runs: Sequence[RunResult]) -> None:
    """Draws the agreement with the teacher: a row for each kind of run, in it a dot per seed and a bar at the mean.

    Args:
        axes: Where to draw.
        runs: The runs of one setting; those without a measured agreement are left out.
    """
    shown = 0
    for no, ((method, student, teacher, _), same) in enumerate(group_runs(runs, *KIND).items()):
        values = [run.agreement for run in same if run.agreement is not None]
        if not values:
            continue
        colour = COLOURS[no % len(COLOURS)]  # that of the kind's curve
        # The text stands above its dots: as a tick label beside them it would take half of the panel.
        text = f"{method} {student}, teacher {student if teacher == '-' else teacher}: {mean_and_deviation(values)}"
        left = axes.get_yaxis_transform()  # x in parts of the panel's width
        axes.annotate(text, (0.03, shown), (0, 13), left, "offset points", fontsize="small")
        _draw_seeds(axes, values, shown, colour)
        shown += 1
    axes.set(
        title="agreement with the teacher, last epoch",
        xlabel="test images in the same class (%); dot: seed, bar: mean",
        ylim=(shown - 0.5, -0.5),
        yticks=[],
    )
    axes.margins(x=0.12)
    axes.grid(alpha=0.3, axis="x")


def draw_ranking(axes: Axes, runs: Sequence[RunResult], field: str, name: str) -> None:
    """Draws a row for each kind of run, the most accurate above, and the baselines' range behind all of them.

    Args:
        axes: Where to draw.
        runs: The runs of one setting.
        field: What is drawn: `"acc_last"`, with the kinds' names beside it, or `"agreement"`.
        name: The field in words.
    """
    kinds = group_runs(runs, *KIND)
    ranked = sorted(kinds, key=lambda kind: statistics.fmean(run.acc_last for run in kinds[kind]), reverse=True)
    labels = []
    for row, kind in enumerate(ranked):
        method, student, _, weight = kind
        values = [value for run in kinds[kind] if (value := getattr(run, field)) is not None]
        if method == "baseline" and values:
            axes.axvspan(min(values), max(values), color="#bbbbbb", alpha=0.4, linewidth=0)
        _draw_seeds(axes, values, row, "#555555" if method in ("teacher", "baseline") else "#0072B2")
        text = mean_and_deviation(values) if values else "-"
        label = f"{method} {student}" + ("" if weight is None else f", weight {weight:g}")
        labels.append(f"{label}: {text}" if field == "acc_last" else text)
    axes.set(xlabel=name, ylim=(len(ranked) - 0.5, -0.5))
    axes.set_yticks(range(len(ranked)), labels)
    axes.margins(x=0.05)
    axes.grid(alpha=0.3)


def _draw_seeds(axes: Axes, values: Sequence[float], row: int, colour: str) -> None:
    axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.6, markersize=7, markeredgewidth=0)
    if len(values) > 1:
        axes.plot([statistics.fmean(values)], [row], "|", color=colour, markersize=18, markeredgewidth=2)
