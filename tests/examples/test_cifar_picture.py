"""Picture of the CIFAR example: what its lines, bands and dots show, and that they are seen."""

import io
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from cifar.picture import COLOURS, draw_agreement, draw_curves, draw_picture, draw_ranking
from cifar.records import RunResult
from cifar_results import course, run
from commands import start


def picture(results: list[RunResult]) -> np.ndarray:
    content = draw_picture(results)
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        assert len(content) < 150_000 * image.height // 500  # a row, 500 pixels high, for each setting
        return np.asarray(image.convert("RGB")).astype(int)


def size(results: list[RunResult]) -> tuple[int, ...]:
    """Height and width of the picture, which is laid out and not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        blank = lambda figure, file, **_: file.write(bytes(4 * math.prod(map(int, figure.bbox.size))))  # noqa: E731
        patch.setattr(Figure, "savefig", blank)
        return picture(results).shape[:2]


@pytest.mark.parametrize("epochs", [1, 2, 10, 200])
def test_picture_shows_every_line(epochs):
    image = picture([course(method, epochs, 0) for method in ("teacher", "baseline", "logit")])
    assert image.shape == (500, 1200, 3)
    empty = picture([course("teacher", epochs, 0)])
    for colour in COLOURS[1:3]:
        # A palette may round. Beside a marker or two of some 50 pixels, the end of a longer run stands on the right.
        shown, none = (abs(it - 255 * np.array(to_rgb(colour))).max(axis=-1) <= 3 for it in (image, empty))
        assert shown.sum() > 80 > 0 == none.sum()
        assert shown[:, 770:].sum() > 80 or epochs < 8


def test_picture_has_a_row_for_each_setting_and_stays_small():
    runs = [course(m, 200, seed) for m in ("teacher", "baseline", "logit") for seed in range(3)]
    runs = [it if it.method == "teacher" else agreed(it) for it in runs]
    runs += [replace(it, dataset="cifar100") for it in runs]
    assert picture(runs).shape == (1000, 1550, 3)
    assert (picture([run(seed=5), run("logit")]) == picture([run(), run("logit")])).all()


def drawn(runs: list[RunResult], shown_from: int = 1, fitted_from: int = 1):
    axes = Figure().add_subplot()
    draw_curves(axes, runs, shown_from, fitted_from)
    return axes


def test_lines_are_means_and_bands_ranges():
    runs = [run(accs=(80.0, 90.0)), run(accs=(86.0, 91.0), seed=1), run(accs=(80.5, 95.0), seed=2)]
    axes = drawn([*runs, run("logit", (70.0, 80.0), last=88.0)])
    baseline, student = axes.lines
    assert baseline.get_xdata().tolist() == [1, 2]
    assert baseline.get_ydata() == pytest.approx([82 + 1 / 6, 92.0])
    assert baseline.get_label() == "baseline resnet20: 92.00 ± 2.65"
    assert student.get_label() == "logit resnet20 from resnet20, weight 1: 88.00"
    assert student.get_ydata().tolist() == [70.0, 88.0]
    (band,) = axes.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
    assert corners == {(1, 80.0), (1, 86.0), (2, 90.0), (2, 95.0)}


def test_limits_leave_out_the_steep_start_only():
    runs = [run(accs=(10.0, 80.0, 70.0, 90.0))]
    (left, right), (bottom, top) = drawn(runs, fitted_from=2).get_xlim(), drawn(runs, fitted_from=2).get_ylim()
    assert 0 <= left < 1 < 4 < right <= 5
    assert 65 < bottom < 70 < 90 < top < 95
    assert drawn(runs, 3, 3).get_xlim() == (2.5, 4.5)


def test_one_epoch_is_a_marked_point_on_a_whole_number():
    axes = drawn([run(accs=(50.0,))])
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert axes.lines[0].get_marker() == "o"
    assert [tick for tick in axes.get_xticks() if left <= tick <= right] == [1]
    assert bottom < 50.0 < top
    assert drawn([course("teacher", 21, 0)]).lines[0].get_marker() == "None"


def test_many_kinds_of_runs_have_lines_of_their_own():
    axes = drawn([run(f"loss{number}") for number in range(15)])
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 15


def agreeing(runs: list[RunResult]):
    axes = Figure().add_subplot()
    draw_agreement(axes, runs)
    return axes


def test_agreement_has_a_row_for_each_kind_a_dot_for_each_seed_and_a_bar_at_the_mean():
    runs = [run("teacher", seed=1000), run(agreement=80.0), run("logit", agreement=88.0)]
    runs += [run(seed=1, agreement=81.0), run("logit", seed=1, agreement=91.0), run(seed=2)]
    runs += [run("logit", teacher="resnet110", agreement=70.0)]
    axes = agreeing(runs)
    shown = [
        (line.get_marker(), COLOURS.index(line.get_color()), line.get_xdata().tolist(), set(line.get_ydata()))
        for line in axes.lines
    ]
    # Colours are those of the curves, where the teacher has the first; one seed needs no mean.
    baseline = [("o", 1, [80.0, 81.0], {0}), ("|", 1, [80.5], {0})]
    assert shown == [*baseline, ("o", 2, [88.0, 91.0], {1}), ("|", 2, [89.5], {1}), ("o", 3, [70.0], {2})]
    assert [(text.get_text(), text.xy[1]) for text in axes.texts] == [
        ("baseline resnet20, teacher resnet20: 80.50 ± 0.71", 0),
        ("logit resnet20, teacher resnet20: 89.50 ± 2.12", 1),
        ("logit resnet20, teacher resnet110: 70.00", 2),
    ]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert left < 70 < 91 < right
    assert top < 0 < 2 < bottom  # the first row is the upper one


def agreed(run: RunResult) -> RunResult:
    return replace(run, agreement=80 + random.Random(f"{run.method} {run.seed}").uniform(0, 10))


def test_picture_has_a_panel_of_agreement_only_where_it_was_measured():
    bare = [course(method, 15, seed) for method in ("baseline", "logit") for seed in range(2)]
    assert size(bare) == (500, 1200)
    measured = [agreed(it) for it in bare]
    other = [replace(it, dataset="cifar100") for it in bare]
    image = picture(measured + other)
    assert image.shape == (1000, 1550, 3)
    panel = image[:, 1160:]
    for colour in COLOURS[:2]:
        near = abs(panel - 255 * np.array(to_rgb(colour))).max(axis=-1) <= 3
        assert near[:500].sum() > 20  # the bar alone has some 50 pixels
    assert (panel[510:] == panel[-1, -1]).all()  # nothing was measured on the second data set
    moved = [replace(it, agreement=None if it.agreement is None else it.agreement / 2) for it in measured]
    # The curves do not depend on it, but the palette does.
    assert abs(picture(moved + other)[:, :1110] - image[:, :1110]).max() <= 3


@pytest.mark.parametrize("epochs", [1, 15])
def test_texts_of_the_agreement_stay_inside_the_picture(epochs, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    kinds = [{"student": "resnet110", "teacher": "resnet110", "weight": 0.1, "seed": seed} for seed in range(3)]
    draw_picture([run("logit", (90.0,) * epochs, agreement=90.0 + kind["seed"], **kind) for kind in kinds])
    panel = figures[0].axes[-1]
    assert panel.texts
    for text in (*panel.texts, panel.title, panel.xaxis.label):
        assert text.get_window_extent().x1 < figures[0].bbox.x1


def ranked(runs: list[RunResult], field: str = "acc_last"):
    axes = Figure().add_subplot()
    draw_ranking(axes, runs, field, "name")
    return axes


def test_a_ranking_has_the_most_accurate_above_and_the_range_of_the_baselines_behind():
    runs = [run("teacher", (91.0,), seed=1000)]
    runs += [run(accs=(accuracy,), seed=seed, agreement=80.0 + seed) for seed, accuracy in enumerate((88.0, 90.0))]
    runs += [run("kl", (90.0,), agreement=85.0, weight=0.9), run("at", (85.0,), weight=1000.0)]
    axes = ranked(runs)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [
        "teacher resnet20: 91.00",
        "kl resnet20, weight 0.9: 90.00",
        "baseline resnet20: 89.00 ± 1.41",
        "at resnet20, weight 1000: 85.00",
    ]
    dots = {tuple(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines}
    assert dots == {((91.0, 0),), ((90.0, 1),), ((88.0, 2), (90.0, 2)), ((89.0, 2),), ((85.0, 3),)}
    (band,) = axes.patches
    assert (band.get_x(), band.get_width()) == (88.0, 2.0)
    agreement = ranked(runs, "agreement")  # its rows are those of the accuracies
    assert [label.get_text() for label in agreement.get_yticklabels()] == ["-", "85.00", "80.50 ± 0.71", "-"]
    assert [band.get_x() for band in agreement.patches] == [80.0]
    (bottom, top) = agreement.get_ylim()
    assert top < 0 < 3 < bottom


def test_more_kinds_than_colours_are_ranked_and_fewer_have_curves():
    few = [agreed(course(f"loss{number}", 15, 0)) for number in range(len(COLOURS))]
    assert size(few) == (500, 1550)
    many = [agreed(course(f"loss{number}", 15, 0)) for number in range(len(COLOURS) + 1)]
    assert size(many) == (430, 1550)
    assert size([replace(it, dataset="cifar100") for it in few] + many) == (930, 1550)
    assert size([replace(it, agreement=None) for it in many]) == (430, 1200)


@pytest.mark.subprocess
def test_picture_needs_no_pyplot(tmp_path):
    code = (
        "import sys, warnings; from cifar_results import run; from cifar.picture import draw_picture\n"
        "warnings.simplefilter('error'); draw_picture([run(agreement=90.0)])\n"
        "assert 'matplotlib.figure' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    process = start(exec, code, {}, log=tmp_path / "log")  # which has imported no more than the command
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
