"""Tables, picture and files of the CIFAR example against numbers worked out by hand."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cifar.report import RunResult, read_results, write_report
from cifar_results import run

FILES = ("results.csv", "curves.csv", "results.md", "curves.png")
BESIDE = "Beside the reference"


def markdown(tmp_path: Path, results: list[RunResult]) -> str:
    write_report(tmp_path, results)
    return (tmp_path / "results.md").read_text(encoding="utf-8")


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """The tables of a Markdown text by their heading, split at the pipes that are not escaped."""
    found: dict[str, list[dict[str, str]]] = {}
    for title, body in re.findall(r"^### (.*)\n\n((?:\|.*\n)+)", text, flags=re.MULTILINE):
        rows = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in body.splitlines()]
        assert rows[1] == ["---"] * len(rows[0])
        found[title] = [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    return found


def summary(tmp_path: Path, results: list[RunResult]) -> list[dict[str, str]]:
    """The table of the first setting."""
    return next(table for title, table in tables(markdown(tmp_path, results)).items() if title != BESIDE)


def beside(tmp_path: Path, results: list[RunResult]) -> list[dict[str, str]]:
    """The table beside the reference; empty if the report has none."""
    return tables(markdown(tmp_path, results)).get(BESIDE, [])


def whole(method: str, acc: float, seed: int = 0, **changes) -> RunResult:
    """A run of the reference's 200 epochs with this best accuracy, and 1 less at its end."""
    return run(method, (50.0,) * 198 + (acc, 40.0), acc - 1, seed=seed, **changes)


def test_the_report_that_was_read_back_is_written_again_byte_for_byte(tmp_path):
    odd = run("my_loss", device='x, "y" | ż', revision="9a25a33-dirty", agreement=100 / 3)
    write_report(tmp_path / "one", [whole("baseline", 90.0), whole("logit", 91.0, agreement=0.1 + 0.2), odd])
    write_report(tmp_path / "two", read_results(tmp_path / "one"))
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_summary_of_three_pairs(tmp_path):
    rows = [("teacher", 5, 92.0, 92.0), ("baseline", 0, 90.0, 89.0), ("baseline", 1, 91.0, 88.0)]
    rows += [("baseline", 2, 92.0, 87.0), ("logit", 2, 93.1, 88.0), ("logit", 0, 90.5, 90.0), ("logit", 1, 91.2, 89.0)]
    runs = [run(method, (50.0, acc, 60.0), last, seed=seed) for method, seed, acc, last in rows]
    teacher, baseline, student = summary(tmp_path, runs)
    assert student == {
        **{"method": "logit", "student": "resnet20", "teacher": "resnet20", "weight": "1", "runs": "3"},
        # (93.1 + 90.5 + 91.2) / 3 = 91.6 and sqrt((1.5^2 + 1.1^2 + 0.4^2) / 2) = sqrt(1.81) = 1.345
        "acc": "91.60 ± 1.35",
        "reference acc": "92.51 ± 0.02 (not comparable: 3 of 200 epochs)",
        "acc_last": "89.00 ± 1.00",
        "best epoch": "2, 2, 2",
        "seconds per run": "7.5",
        # Mean 0.6, deviation sqrt((0.1^2 + 0.4^2 + 0.5^2) / 2) = 0.45826; the 97.5% quantile of t with two degrees of
        # freedom is 4.30265, so that half the interval is 4.30265 * 0.45826 / sqrt(3) = 1.1384.
        "gain in acc": "+0.60 (-0.54 to +1.74, 3 pairs)",
        "gain in acc_last": "+1.00 (+1.00 to +1.00, 3 pairs)",
        "agreement": "-",
    }
    assert (baseline["acc"], baseline["acc_last"], baseline["runs"]) == ("91.00 ± 1.00", "88.00 ± 1.00", "3")
    assert (baseline["gain in acc"], baseline["gain in acc_last"], baseline["weight"]) == ("-", "-", "-")
    assert (teacher["method"], teacher["acc"], teacher["gain in acc"]) == ("teacher", "92.00", "-")


def test_one_run_shows_neither_deviation_nor_interval(tmp_path):
    student = summary(tmp_path, [run("baseline", (90.0,)), run("logit", (90.75,), last=90.25)])[1]
    assert (student["runs"], student["acc"], student["acc_last"]) == ("1", "90.75", "90.25")
    assert (student["gain in acc"], student["gain in acc_last"]) == ("+0.75 (1 pair)", "+0.25 (1 pair)")


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"student": "resnet32"}, {"dataset": "cifar100"}, {"recipe": "logits"}, {"lr": 0.2}, {}]
)
def test_without_its_baseline_a_student_has_no_gain(tmp_path, other):
    baselines = [run("baseline", (80.0,), **other)] if other else [run("teacher"), run("kl", (80.0,))]
    rows = summary(tmp_path, [run("logit", (90.0,)), *baselines])
    assert {row["gain in acc"] for row in rows if row["method"] == "logit"} == {"no baseline of the same seed"}


def test_only_pairs_of_seeds_count(tmp_path):
    runs = [run(seed=0), run(seed=8), run("logit", (91.0,), seed=0), run("logit", (99.0,), seed=9)]
    student = summary(tmp_path, runs)[1]
    assert (student["runs"], student["acc"], student["gain in acc"]) == ("2", "95.00 ± 5.66", "+1.00 (1 pair)")
    again = [run(), run(accs=(91.0,)), run("logit", (92.0,)), run("logit", (94.0,))]
    assert summary(tmp_path, again)[1]["gain in acc"] == "+2.50 (1 pair)"
    # Gains of 1 and 3: mean 2, deviation sqrt(2), t quantile tan(0.475 pi) = 12.7062, over sqrt(2).
    two = [*runs[:3], run("logit", (93.0,), seed=8)]
    assert summary(tmp_path, two)[1]["gain in acc"] == "+2.00 (-10.71 to +14.71, 2 pairs)"


def test_ties_take_the_first_epoch_of_each_run(tmp_path):
    runs = [run(accs=(80.0, 90.0, 90.0)), run(accs=(70.0, 71.0, 90.0), seed=1), run(accs=(90.0, 90.0, 1.0), seed=2)]
    assert summary(tmp_path, runs)[0]["best epoch"] == "2, 3, 1"


def test_runs_that_are_not_alike_are_not_averaged(tmp_path):
    runs = [run("logit", (90.0,)), run("logit", (80.0,), weight=0.5), run("logit", (70.0,), teacher="resnet110")]
    runs += [run("logit", (60.0, 61.0)), run("logit", (50.0,), batch_size=64), run("logit", (40.0,), recipe="logits")]
    text = tables(markdown(tmp_path, runs))
    every = text.pop("Every run")
    assert [row["acc"] for row in text.pop(BESIDE)] == ["90.00", "80.00", "61.00", "50.00", "40.00"]
    assert {title: [row["acc"] for row in rows] for title, rows in text.items()} == {
        "cifar10, recipe pooled, epochs 1, lr 0.1, batch size 128": ["90.00", "80.00", "70.00"],
        "cifar10, recipe pooled, epochs 2, lr 0.1, batch size 128": ["61.00"],
        "cifar10, recipe pooled, epochs 1, lr 0.1, batch size 64": ["50.00"],
        "cifar10, recipe logits, epochs 1, lr 0.1, batch size 128": ["40.00"],
    }
    assert [row["acc"] for row in every] == ["90.000", "80.000", "70.000", "61.000", "50.000", "40.000"]


def test_every_run_has_the_columns_of_the_reference(tmp_path):
    student = run("logit", (90.0, 91.5), last=91.25, agreement=87.5)
    *_, (first, second) = tables(markdown(tmp_path, [run("teacher"), student])).values()
    columns = "no method dataset student teacher start_time acc epoch nepoch lr batch_size acc_last recipe weight seed"
    cells = "2 logit cifar10 resnet20 resnet20 2025-03-01T12:00:00+00:00 91.500 2 2 0.1 128 91.250 pooled 1.0 0"
    assert second == dict(
        zip([*columns.split(), "seconds", "agreement"], [*cells.split(), "5.0", "87.50"], strict=True)
    )
    assert list(second)[:11] == columns.split()[:11]
    assert first["weight"] == first["agreement"] == "-"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "92.51 ± 0.02"),
        ({"method": "teacher", "teacher": "-", "weight": None}, "92.00"),
        ({"recipe": "logits", "weight": 0.1}, "93.30"),
        ({"student": "resnet110", "teacher": "resnet110"}, "94.19 ± 0.14"),
        ({"student": "resnet110", "teacher": "resnet110", "dataset": "cifar100"}, "71.77 ± 0.62"),
        ({"recipe": "logits", "weight": 0.1, "teacher": "resnet110", "dataset": "cifar100"}, "69.78"),
        ({"weight": 5.0}, "92.51 ± 0.02 (not comparable: weight 5, not 1)"),
        ({"history": run(accs=(50.0,) * 9).history}, "92.51 ± 0.02 (not comparable: 9 of 200 epochs)"),
        ({"weight": 0.0}, "92.51 ± 0.02 (not comparable: weight 0, not 1)"),
        ({"lr": 0.05, "batch_size": 64}, "92.51 ± 0.02 (not comparable: lr 0.05, not 0.1; batch size 64, not 128)"),
        ({"method": "kl"}, "-"),
        ({"dataset": "digits"}, "-"),
        ({"recipe": "logits", "student": "resnet110", "teacher": "resnet20"}, "-"),
    ],
)
def test_reference_beside_our_number(tmp_path, changes, expected):
    result = replace(run("logit", tuple([50.0] * 199 + [92.0])), **changes)
    assert summary(tmp_path, [result])[0]["reference acc"] == expected


def test_students_beside_the_reference(tmp_path):
    runs = [whole("teacher", 92.0), run("kl"), whole("logit+batch-statistics", 93.0), run("logit", dataset="digits")]
    for seed, (theirs, ours) in enumerate([(90.0, 92.5), (91.0, 92.6), (92.0, 92.7)]):
        runs += [whole("baseline", theirs, seed, agreement=93.0 + seed)]
        runs += [whole("logit", ours, seed, agreement=95.0 + seed, device="H|200", revision="9a25a33")]
    (row,) = beside(tmp_path, runs)
    assert row == {
        **{"data set": "cifar10", "recipe": "pooled", "student ← teacher": "resnet20 ← resnet20"},
        **{"epochs": "200", "weight": "1", "lr": "0.1", "batch size": "128", "runs": "3"},
        "acc": "92.60 ± 0.10",
        "reference acc": "92.51 ± 0.02",
        "difference": "+0.09",
        "verdict": "met",
        # Gains of 2.5, 1.6, 0.7: mean 1.6, deviation 0.9; half the interval is 4.30265 * 0.9 / sqrt(3) = 2.2357.
        "gain in acc": "+1.60 (-0.64 to +3.84, 3 pairs)",
        "acc_last": "91.60 ± 0.10",
        "gain in acc_last": "+1.60 (-0.64 to +3.84, 3 pairs)",
        "agreement": "96.00 ± 1.00",
        "baseline's agreement": "94.00 ± 1.00",
        "time per run": "8:20",  # 200 epochs of 2.5 s
    }
    text = markdown(tmp_path, runs)
    assert "\n\n- Every student above: H\\|200, torch 2.9.0, revision 9a25a33.\n- `difference` is" in text
    assert text.index(f"### {BESIDE}") < text.index("### cifar10, recipe pooled, epochs 200")


@pytest.mark.parametrize(
    ("accs", "changes", "difference", "verdict"),
    [
        # The reference's mean is 92.51133.
        ((92.518, 92.488, 92.528), {}, "+0.00", "met"),
        ((92.507,), {}, "+0.00", "met"),
        ((92.506,), {}, "-0.01", "short by 0.01 (one run: no standard error)"),
        ((93.0,), {}, "+0.49", "met"),
        # Deviation 0.2, so the standard error is 0.2 / sqrt(3) = 0.11547, and 0.31 / 0.11547 = 2.68.
        ((92.0, 92.2, 92.4), {}, "-0.31", "short by 0.31 (2.7 standard errors)"),
        # Deviation 2, standard error 1.1547: far less than one.
        ((90.2, 92.2, 94.2), {}, "-0.31", "short by 0.31 (0.3 standard errors)"),
        ((92.0, 92.0), {}, "-0.51", "short by 0.51 (our runs are equal)"),
        ((93.0, 93.1), {"weight": 5.0}, "+0.54", "not comparable: weight 5, not 1"),
        ((90.0,), {"lr": 0.05, "batch_size": 64}, "-2.51", "not comparable: lr 0.05, not 0.1; batch size 64, not 128"),
        ((90.0,), {"recipe": "logits", "weight": 0.1}, "-3.30", "short by 3.30 (one run: no standard error)"),
        ((90.0,), {"dataset": "cifar100"}, "+20.79", "met"),
    ],
)
def test_verdict(tmp_path, accs, changes, difference, verdict):
    (row,) = beside(tmp_path, [whole("logit", acc, seed, **changes) for seed, acc in enumerate(accs)])
    assert (row["difference"], row["verdict"]) == (difference, verdict)


def test_a_short_course_is_not_comparable_however_good(tmp_path):
    (row,) = beside(tmp_path, [run("logit", (99.0,) * 15)])
    assert (row["difference"], row["verdict"]) == ("+6.49", "not comparable: 15 of 200 epochs")


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "kl"},
        {"method": "logit+batch-statistics"},
        {"dataset": "digits"},
        {"student": "resnet32"},
        {"method": "baseline", "recipe": "logits", "teacher": "-", "weight": None},
    ],
)
def test_no_section_beside_the_reference_without_a_published_student(tmp_path, changes):
    text = markdown(tmp_path, [replace(run("logit"), **changes)])
    assert BESIDE not in text
    assert "`difference`" not in text


def test_runs_that_differ_have_rows_of_their_own_beside_the_reference(tmp_path):
    ours = [
        {},
        {"weight": 2.0},
        {"lr": 0.2},
        {"batch_size": 64},
        {"dataset": "cifar100"},
        {"student": "resnet110", "teacher": "resnet110"},
        {"recipe": "logits"},
        {"recipe": "logits", "teacher": "resnet110"},
    ]
    runs = [whole("logit", 60.0 + no, seed, **one) for seed in (0, 1) for no, one in enumerate(ours)]
    rows = beside(tmp_path, [*runs, run("logit", (50.0,)), run("logit", (52.0,), seed=1)])
    shown = [(row["acc"], row["runs"]) for row in rows]
    assert shown == [*((f"{60 + no}.00 ± 0.00", "2") for no in range(8)), ("51.00 ± 1.41", "2")]


def test_rows_made_on_different_machines_or_code_say_so(tmp_path):
    runs = [whole("logit", 92.0, 0, revision="9a25a33"), whole("logit", 92.0, 1, revision="9a25a33-dirty")]
    runs += [whole("logit", 70.0, 0, dataset="cifar100", device="H200", torch="2.10", revision="9a25a33")]
    one, two = beside(tmp_path, runs)
    assert one["made with"] == "cpu, torch 2.9.0, revision 9a25a33; cpu, torch 2.9.0, revision 9a25a33-dirty"
    assert two["made with"] == "H200, torch 2.10, revision 9a25a33"
    assert "Every student above" not in markdown(tmp_path, runs)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (90, "1:30"), (3599.6, "1:00:00"), (11_999, "3:19:59")]
)
def test_time_per_run_in_minutes_or_hours(tmp_path, seconds, shown):
    first, *others = run("logit", (90.0, 90.0)).history
    history = (replace(first, seconds=seconds - others[0].seconds), *others)
    (row,) = beside(tmp_path, [run("logit", history=history)])
    assert row["time per run"] == shown


def test_agreement_is_averaged_over_the_runs_where_it_was_measured(tmp_path):
    runs = [run("teacher"), run(agreement=80.0), run(seed=1, agreement=81.0), run(seed=2)]
    runs += [run("logit", agreement=90.0), run("kl", agreement=70.0), run("kl", seed=1, agreement=74.0)]
    shown = {row["method"]: row["agreement"] for row in summary(tmp_path, runs)}
    assert shown == {"teacher": "-", "baseline": "80.50 ± 0.71 (2 of 3 runs)", "logit": "90.00", "kl": "72.00 ± 2.83"}
    (row,) = beside(tmp_path, runs)
    assert (row["agreement"], row["baseline's agreement"]) == ("90.00", "80.50 ± 0.71 (2 of 3 runs)")


def test_a_baseline_compared_with_another_teacher_is_not_set_beside_the_student(tmp_path):
    common = {"recipe": "logits", "agreement": 90.0}
    other = [run(recipe="logits", student="resnet110", agreement=70.0), run(agreement=60.0)]
    runs = [run(**common), run("logit", **common), run("logit", teacher="resnet110", **common), *other]
    shown = [(row["student ← teacher"], row["baseline's agreement"]) for row in beside(tmp_path, runs)]
    assert shown == [("resnet20 ← resnet20", "90.00"), ("resnet20 ← resnet110", "-")]


def test_hardware_and_notes_stand_below_and_signs_are_escaped(tmp_path):
    odd = "a|b*c_d`e[f\\g<h>"
    text = markdown(tmp_path, [run(odd, device=odd), run(odd, seed=1), run(odd, seed=2, device=odd, dataset="x|y")])
    unknown = "revision not recorded"
    escaped = "a\\|b\\*c\\_d\\`e\\[f\\\\g&lt;h&gt;"
    assert (
        f"- Runs 1, 3: {escaped}, torch 2.9.0, {unknown}.\n- Run 2: cpu, torch 2.9.0, {unknown}.\n- Accuracies" in text
    )
    assert "`agreement` is the share, in %, of all test images" in text
    assert "`acc` is the best test accuracy over the epochs" in text
    assert "`acc_last` is that of the last epoch on all test images" in text
    first, *_, every = tables(text).values()
    assert first[0]["method"] == every[0]["method"] == escaped
    assert every[2]["dataset"] == "x\\|y"
    assert f"- All runs: cpu, torch 2.9.0, {unknown}.\n" in markdown(tmp_path, [run()])
    assert "- All runs: cpu, torch 2.9.0, revision 9a25a33.\n" in markdown(tmp_path, [run(revision="9a25a33")])
    two = markdown(tmp_path, [run(revision="9a25a33"), run(seed=1, revision="9a25a33-dirty")])
    assert "- Run 1: cpu, torch 2.9.0, revision 9a25a33.\n- Run 2: cpu, torch 2.9.0, revision 9a25a33-dirty.\n" in two


def test_no_run_is_refused_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="results must hold at least one run, got none"):
        write_report(tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


def test_two_processes_may_report_into_one_folder(tmp_path, monkeypatch):
    results, original, others = [run(accs=(90.0, 91.0))], Path.replace, iter([os.getpid() + 1])

    def replace(self, target):  # another process reports between this one's writes and its first rename
        for pid in others:
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda pid=pid: pid)
                write_report(tmp_path, results)
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    write_report(tmp_path, results)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_a_failure_leaves_whole_files_and_nothing_else(tmp_path, monkeypatch, method, call):
    def contents(folder):
        return [(folder / name).read_bytes() for name in FILES]

    old, new, out = [run(accs=(80.0,))], [run(accs=(90.0, 91.0)), run("logit", (92.0, 93.0))], tmp_path / "out"
    write_report(tmp_path / "new", new)
    write_report(out, old)
    before, after = contents(out), contents(tmp_path / "new")
    assert all(one != other for one, other in zip(before, after, strict=True))
    original, calls = getattr(Path, method), []

    def fail(self, argument):  # the given call writes half and fails, as on a full disk
        calls.append(self)
        if len(calls) < call:
            return original(self, argument)
        if method == "write_bytes":
            original(self, argument[: len(argument) // 2])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, fail)
        with pytest.raises(OSError, match="disk full"):
            write_report(out, new)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    replaced = call - 1 if method == "replace" else 0
    assert contents(out) == after[:replaced] + before[replaced:]
    write_report(out, new)
    assert contents(out) == after
