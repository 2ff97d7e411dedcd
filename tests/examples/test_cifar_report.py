"""Tables, picture and files of the CIFAR example against numbers worked out by hand."""

import io
import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from cifar import report
from cifar.report import EpochRecord, RunResult, read_results, write_report

FILES = ("results.csv", "curves.csv", "results.md", "curves.png")
EXAMPLES = str(Path(report.__file__).parents[1])


@pytest.fixture(autouse=True)
def _draw_only_where_it_matters(request, monkeypatch):
    """Drawing takes most of a report's time: the tests without "picture" in their name write a text in its place."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(report, "_picture", lambda results: repr(results).encode())


def epoch(number: int, test_acc: float, **changes) -> EpochRecord:
    values = {"lr": 0.1, "loss": 1.5, "terms": {"task": 1.25}, "train_acc": 50.0, "test_acc_all": test_acc}
    values |= {"images_per_second": 640.0, "seconds": 2.5} | changes
    return EpochRecord(epoch=number, test_acc=test_acc, **values)


def run(method: str = "baseline", accs: tuple[float, ...] = (90.0,), last: float | None = None, **changes) -> RunResult:
    """A run with the given `test_acc` per epoch and the given `acc_last`."""
    history = [epoch(number, acc) for number, acc in enumerate(accs, 1)]
    history[-1] = replace(history[-1], test_acc_all=accs[-1] if last is None else last)
    distilled = method not in ("teacher", "baseline")
    values = {"recipe": "pooled", "dataset": "cifar10", "student": "resnet20", "seed": 0}
    values |= {"teacher": "resnet20" if distilled else "-", "weight": 1.0 if distilled else None}
    values |= {"start_time": "2025-03-01T12:00:00+00:00", "lr": 0.1, "batch_size": 128}
    values |= {"device": "cpu", "torch": "2.9.0", "history": tuple(history)} | changes
    return RunResult(method=method, **values)


def course(method: str, epochs: int, seed: int, **changes) -> RunResult:
    """A run with a plausible course: steep, then noisy."""
    noise = random.Random(f"{method} {seed}")
    accs = tuple(90 - 50 * 0.9**number + noise.gauss(0, 2) for number in range(1, epochs + 1))
    return run(method, accs, seed=seed, **changes)


def markdown(tmp_path: Path, results: list[RunResult]) -> str:
    write_report(tmp_path, results)
    return (tmp_path / "results.md").read_text(encoding="utf-8")


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """The tables of a Markdown text by their heading, split at the pipes that are not escaped."""
    found: dict[str, list[dict[str, str]]] = {}
    for title, body in re.findall(r"^## (.*)\n\n((?:\|.*\n)+)", text, flags=re.MULTILINE):
        rows = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in body.splitlines()]
        assert rows[1] == ["---"] * len(rows[0])
        found[title] = [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    return found


def summary(tmp_path: Path, results: list[RunResult]) -> list[dict[str, str]]:
    """The first table of the report."""
    return next(iter(tables(markdown(tmp_path, results)).values()))


def test_properties_of_a_run():
    result = run(accs=(70.0, 88.5, 88.5, 80.0), last=81.25)
    assert (result.acc, result.epoch, result.nepoch, result.acc_last, result.seconds) == (88.5, 2, 4, 81.25, 10.0)


def test_json_gives_the_run_back():
    result = run("logit", accs=(0.1 + 0.2, 100 / 3), weight=0.1, device="gpu, «ü» | x")
    assert RunResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert RunResult.from_json(json.loads(json.dumps(run().to_json()))).weight is None
    assert EpochRecord.from_json(json.loads(json.dumps(result.history[0].to_json()))) == result.history[0]


def test_numbers_become_plain_ones():
    record = epoch(np.int64(1), np.float32(12.5), lr=1, terms={"task": np.float64(2)})
    assert json.dumps([record.epoch, record.test_acc, record.lr, record.terms]) == '[1, 12.5, 1.0, {"task": 2.0}]'


@pytest.mark.parametrize(
    ("record", "changes", "message"),
    [
        (run(), {"history": ()}, r"history must hold the epochs 1, 2, \.\.\., at least one of them, got \[\]"),
        (run(), {"history": (epoch(1, 9.0), epoch(3, 9.0))}, r"history must hold .* got \[1, 3\]"),
        (run(), {"history": (epoch(2, 9.0),)}, r"history must hold .* got \[2\]"),
        (run(), {"device": ""}, "device must be one line of text that is not empty, got ''"),
        (run(), {"device": "two\nlines"}, "device must be one line"),
        (run(), {"torch": "nul\0"}, "torch must be one line"),
        (run(), {"method": None}, "method must be one line of text that is not empty, got None"),
        (run(), {"weight": float("inf")}, "weight must be a finite float, got inf"),
        (run(), {"seed": 0.5}, "seed must be a finite int, got 0.5"),
        (run(), {"batch_size": True}, "batch_size must be a finite int, got True"),
        (epoch(1, 50.0), {"loss": float("nan")}, "loss must be a finite float, got nan"),
        (epoch(1, 50.0), {"lr": None}, "lr must be a finite float, got None"),
        (epoch(1, 50.0), {"terms": {"task": float("inf")}}, "term:task must be a finite float, got inf"),
        (epoch(1, 50.0), {"terms": {"": 1.0}}, "terms must map names of one line to numbers, got {'': 1.0}"),
        (epoch(1, 50.0), {"terms": ["task"]}, r"terms must map names of one line to numbers, got \['task'\]"),
        (epoch(1, 50.0), {"train_acc": 100.5}, r"train_acc must be in 0\.\.100 \(%\), got 100.5"),
        (epoch(1, 50.0), {"test_acc": -0.5}, r"test_acc must be in 0\.\.100"),
        (epoch(1, 50.0), {"test_acc_all": 101}, r"test_acc_all must be in 0\.\.100"),
    ],
)
def test_rejects_bad_values(record, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(record, **changes)
    changed = {name: [it.to_json() for it in value] if name == "history" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        type(record).from_json(record.to_json() | changed)


@pytest.mark.parametrize("record", [epoch(1, 50.0), run()])
def test_rejects_json_with_a_missing_or_an_unknown_field(record):
    data = record.to_json()
    with pytest.raises(TypeError, match="colour"):
        type(record).from_json(data | {"colour": 1})
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'lr'"):
        type(record).from_json({name: value for name, value in data.items() if name != "lr"})


def test_csv_files_to_the_letter(tmp_path):
    one = epoch(1, 0.1 + 0.2, terms={"task": 1.0, "distillation": 1e-17})
    two = (epoch(1, 90.12345, terms={"task": 3}), epoch(2, 91.0, test_acc_all=90.9876, terms={"pool, x": 2.0}))
    student = run("logit", history=two, weight=0.1, seed=7, device="cpu (A, 2 threads)")
    write_report(tmp_path, [run("teacher", history=(one,)), student])
    assert (tmp_path / "results.csv").read_bytes().decode() == (
        "no,method,dataset,student,teacher,start_time,acc,epoch,nepoch,lr,batch_size,"
        "acc_last,recipe,weight,seed,seconds,device,torch\n"
        "1,teacher,cifar10,resnet20,-,2025-03-01T12:00:00+00:00,0.300,1,1,0.1,128,0.300,pooled,,0,2.5,cpu,2.9.0\n"
        "2,logit,cifar10,resnet20,resnet20,2025-03-01T12:00:00+00:00,91.000,2,2,0.1,128,"
        '90.988,pooled,0.1,7,5.0,"cpu (A, 2 threads)",2.9.0\n'
    )
    assert (tmp_path / "curves.csv").read_bytes().decode() == (
        "no,epoch,lr,loss,train_acc,test_acc,test_acc_all,images_per_second,seconds,"
        'term:distillation,"term:pool, x",term:task\n'
        "1,1,0.1,1.5,50.0,0.30000000000000004,0.30000000000000004,640.0,2.5,1e-17,,1.0\n"
        "2,1,0.1,1.5,50.0,90.12345,90.12345,640.0,2.5,,,3.0\n"
        "2,2,0.1,1.5,50.0,91.0,90.9876,640.0,2.5,,2.0,\n"
    )


def test_reading_and_writing_again_changes_no_byte(tmp_path):
    noise = random.Random(5)
    accs = [tuple(noise.uniform(0, 100) for _ in range(9)) for _ in range(3)]
    record = epoch(1, 100 / 3, lr=1, loss=5e-324, terms={"task": -0.0, "a|b": 1e300, "ü": 0.1 + 0.2}, seconds=1 / 3)
    odd = run("my_loss", device=' x, "y" | ż\tπ\u00a0µ; #=+ ', torch="2.9.0+cu128", weight=1e-05, history=(record,))
    runs = [run(accs=some, seed=seed, start_time=f"t{seed}") for some, seed in zip(accs, (3, 1, 2), strict=True)]
    runs += [odd, replace(odd, seed=10**12, weight=0.0), run("logit", accs=(0.0, 100.0), lr=1e-3)]
    write_report(tmp_path / "one", runs)
    back = read_results(tmp_path / "one")
    assert back == runs
    write_report(tmp_path / "two", back)
    for name in ("results.csv", "curves.csv", "results.md"):
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "two" / name).read_bytes()
        (tmp_path / "two" / name).write_bytes(content.replace(b"\n", b"\r\n"))
    assert read_results(tmp_path / "two") == runs  # as a checkout on Windows leaves them


@pytest.mark.parametrize("name", ["results.csv", "curves.csv"])
def test_an_empty_and_a_missing_file_are_named(tmp_path, name):
    write_report(tmp_path, [run()])
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=f"{name}, line 1: column 1 must be 'no', got None"):
        read_results(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("results.csv", "acc,epoch", "accuracy,epoch", "results.csv, line 1: column 7 must be 'acc', got 'accuracy'"),
        ("results.csv", ",torch\n", "\n", "results.csv, line 1: column 18 must be 'torch', got None"),
        ("results.csv", ",torch\n", ",torch,term:x\n", "results.csv, line 1: column 19 must be None, got 'term:x'"),
        ("results.csv", ",2.9.0\n", "\n", "results.csv, line 2: 17 cells, 18 expected; see column 'torch'"),
        ("results.csv", ",2.9.0\n", ",2.9.0,5\n", "results.csv, line 2: 19 cells, 18 expected; see column 'torch'"),
        ("results.csv", "2,logit", "5,logit", "results.csv, line 3: no must be 2, as curves.csv has it, got '5'"),
        ("results.csv", ",91.500,", ",99,", "results.csv, line 3: acc must be 91.500, as curves.csv .* got '99'"),
        ("results.csv", "pooled,1.0", "pooled,x", "results.csv, line 3: weight must be a finite float, got 'x'"),
        ("results.csv", "128", "12.8", "results.csv, line 2: batch_size must be a finite int, got '12.8'"),
        ("results.csv", "cpu", "", "results.csv, line 2: device must be one line of text that is not empty, got ''"),
        ("results.csv", "cpu", '"cpu', "results.csv, after line 3: "),
        ("results.csv", "cpu", "\udcff", "results.csv, after line "),
        ("curves.csv", "term:task", "task", "curves.csv, line 1: column 10 must be None, got 'task'"),
        ("curves.csv", "term:task", "seconds", "curves.csv, line 1: column 10 must be None, got 'seconds'"),
        ("curves.csv", "2,1,0.1", "3,1,0.1", "curves.csv, line 3: no must be that of a run in results.csv, got '3'"),
        ("curves.csv", "2,2,0.1", "2,3,0.1", "curves.csv, line 4: epoch must be 2, the run's next, got '3'"),
        ("curves.csv", "2,2,0.1,1.5", "2,2,0.1,low", "curves.csv, line 4: loss must be a finite float, got 'low'"),
        ("curves.csv", "2,2,0.1,1.5", "2,2,0.1,nan", "curves.csv, line 4: loss must be a finite float, got 'nan'"),
        ("curves.csv", "2.5,1.25\n2,2", "2.5,x\n2,2", "curves.csv, line 3: term:task must be a finite float, got 'x'"),
        ("curves.csv", "50.0", "150.0", r"curves.csv, line 2: train_acc must be in 0..100 \(%\), got 150.0"),
        ("curves.csv", "1,1,0.1,1.5,50.0,90.0,90.0,640.0,2.5,1.25\n", "", "results.csv, line 2: history must hold"),
        ("curves.csv", "2,2,0.1,1.5,50.0,91.5,91.5,640.0,2.5,1.25\n", "", "results.csv, line 3: acc must be 80.000"),
    ],
)
def test_a_malformed_file_is_refused_with_its_place(tmp_path, name, old, new, message):
    write_report(tmp_path, [run(), run("logit", accs=(80.0, 91.5))])
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / name).write_bytes(text.replace(old, new, 1).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path) + "/") + message):
        read_results(tmp_path)


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
    assert {title: [row["acc"] for row in rows] for title, rows in text.items()} == {
        "cifar10, recipe pooled, epochs 1, lr 0.1, batch size 128": ["90.00", "80.00", "70.00"],
        "cifar10, recipe pooled, epochs 2, lr 0.1, batch size 128": ["61.00"],
        "cifar10, recipe pooled, epochs 1, lr 0.1, batch size 64": ["50.00"],
        "cifar10, recipe logits, epochs 1, lr 0.1, batch size 128": ["40.00"],
    }
    assert [row["acc"] for row in every] == ["90.000", "80.000", "70.000", "61.000", "50.000", "40.000"]


def test_every_run_has_the_columns_of_the_reference(tmp_path):
    *_, (first, second) = tables(markdown(tmp_path, [run("teacher"), run("logit", (90.0, 91.5), last=91.25)])).values()
    columns = "no method dataset student teacher start_time acc epoch nepoch lr batch_size acc_last recipe weight seed"
    cells = "2 logit cifar10 resnet20 resnet20 2025-03-01T12:00:00+00:00 91.500 2 2 0.1 128 91.250 pooled 1.0 0"
    assert second == dict(zip([*columns.split(), "seconds"], [*cells.split(), "5.0"], strict=True))
    assert list(second)[:11] == columns.split()[:11]
    assert first["weight"] == "-"


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


def test_hardware_and_notes_stand_below_and_signs_are_escaped(tmp_path):
    odd = "a|b*c_d`e[f\\g<h>"
    text = markdown(tmp_path, [run(odd, device=odd), run(odd, seed=1), run(odd, seed=2, device=odd, dataset="x|y")])
    escaped = "a\\|b\\*c\\_d\\`e\\[f\\\\g&lt;h&gt;"
    assert f"- Runs 1, 3: {escaped}, torch 2.9.0.\n- Run 2: cpu, torch 2.9.0.\n- Accuracies" in text
    assert "`acc` is the best test accuracy over the epochs" in text
    assert "`acc_last` is that of the last epoch on all test images" in text
    first, *_, every = tables(text).values()
    assert first[0]["method"] == every[0]["method"] == escaped
    assert every[2]["dataset"] == "x\\|y"
    assert "- All runs: cpu, torch 2.9.0.\n" in markdown(tmp_path, [run()])


def test_no_run_is_refused_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="results must hold at least one run, got none"):
        write_report(tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


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
    (out / ".results.csv.tmp").write_text("left by a kill")
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


def picture(tmp_path: Path, results: list[RunResult]) -> np.ndarray:
    write_report(tmp_path, results)
    content = (tmp_path / "curves.png").read_bytes()
    assert len(content) < 200_000
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("epochs", [1, 2, 10, 200])
def test_picture_shows_every_line(tmp_path, epochs):
    image = picture(tmp_path, [course(method, epochs, 0) for method in ("teacher", "baseline", "logit")])
    assert image.shape == (500, 1200, 3)
    empty = picture(tmp_path, [course("teacher", epochs, 0)])
    for colour in report._COLOURS[1:3]:
        # A palette may round. Beside a marker or two of some 50 pixels, the end of a longer run stands on the right.
        shown, none = (abs(it - 255 * np.array(to_rgb(colour))).max(axis=-1) <= 3 for it in (image, empty))
        assert shown.sum() > 80 > 0 == none.sum()
        assert shown[:, 770:].sum() > 80 or epochs < 8


def test_picture_has_a_row_for_each_setting_and_stays_small(tmp_path):
    runs = [course(m, 200, seed) for m in ("teacher", "baseline", "logit") for seed in range(3)]
    runs += [replace(it, dataset="cifar100") for it in runs]
    assert picture(tmp_path, runs).shape == (1000, 1200, 3)
    assert (picture(tmp_path, [run(seed=5), run("logit")]) == picture(tmp_path, [run(), run("logit")])).all()


def drawn(runs: list[RunResult], shown_from: int = 1, fitted_from: int = 1):
    axes = Figure().add_subplot()
    report._draw(axes, runs, shown_from, fitted_from)
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


def test_picture_needs_no_pyplot(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {EXAMPLES!r})\n"
        "from pathlib import Path; from cifar.report import read_results, write_report\n"
        "write_report(Path(sys.argv[1]), read_results(Path(sys.argv[1])))\n"
        "assert 'matplotlib.figure' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    write_report(tmp_path, [run()])
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], check=True)
