"""Tests of --reproduce: which runs the published tables take, and the table at the end."""

import re
import shutil

import pytest
import torch

import cifar_resnet
from cifar.checkpoints import RunFiles
from cifar.records import read_results
from cifar.report import REFERENCE
from cifar.reproduce import published_settings
from cifar_runs import make_data


def parse(*options):
    return cifar_resnet.parse_arguments(["--reproduce", *options])[1]


def plan(*options):
    return cifar_resnet.plan(parse(*options))


@pytest.mark.parametrize("recipe", ["pooled", "logits"])
def test_the_settings_are_the_rows_of_the_published_table(recipe):
    settings = {(f"resnet{s.student}", f"resnet{s.teacher}", s.dataset) for s in published_settings(recipe)}
    published = {key[2:] for key in REFERENCE if key[:2] == (recipe, "logit")}
    assert settings == {(*pair, dataset) for pair in published for dataset in ("cifar10", "cifar100")}


def test_each_setting_has_one_teacher_and_three_seeds_of_baseline_and_student():
    runs = plan()
    assert len(runs) == 4 * (1 + 3 + 3)
    assert [(run.student, run.dataset) for run in runs if run.method == "teacher"] == [
        (20, "cifar10"),
        (20, "cifar100"),
        (110, "cifar10"),
        (110, "cifar100"),
    ]
    for method in ("baseline", "logit"):
        assert [run.seed for run in runs if run.method == method] == [0, 1, 2] * 4
    assert {(run.recipe.name, run.epochs) for run in runs} == {("pooled", 200)}
    assert {(run.weight, run.at) for run in runs if run.method == "logit"} == {(1.0, "fc:input")}


def test_settings_that_share_a_teacher_or_a_baseline_train_it_once():
    runs = plan("--recipe", "logits", "--only", "20-110/cifar10,110/cifar10, 20/cifar10")
    kinds = [(run.method, run.student, run.teacher) for run in runs if run.seed in (0, 1000)]
    assert kinds == [
        ("teacher", 20, None),
        ("baseline", 20, None),
        ("logit", 20, 20),
        ("teacher", 110, None),
        ("logit", 20, 110),
        ("baseline", 110, None),
        ("logit", 110, 110),
    ]
    assert len(runs) == 2 + 3 * 2 + 3 * 3


def test_epochs_seeds_and_runs_can_be_changed():
    runs = plan("--only", "20/cifar10", "--epochs", "15", "--runs", "2", "--seed", "5")
    assert [(run.method, run.seed) for run in runs[1:]] == [
        ("baseline", 5),
        ("logit", 5),
        ("baseline", 6),
        ("logit", 6),
    ]
    assert {run.epochs for run in runs} == {15}


@pytest.mark.parametrize(
    ("options", "jobs", "threads"),
    [
        ([], 8, 1),
        (["--threads", "2"], 4, 2),
        (["--jobs", "3"], 3, 2),
        (["--jobs", "2", "--threads", "1"], 2, 1),
        (["--jobs", "100"], 28, 1),
    ],
)
def test_on_a_cpu_every_core_gets_a_run(monkeypatch, options, jobs, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    args = parse("--device", "cpu", *options)
    cifar_resnet.share_out(args, 28, 28)
    assert (args.jobs, args.threads) == (jobs, threads)


def test_threads_do_not_depend_on_what_is_left_to_do(monkeypatch):
    # With other threads the same command would end with other weights.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for options, runs, expected in [
        ([], 28, {28: (8, 1), 3: (3, 1), 1: (1, 1), 0: (1, 1)}),
        (["--jobs", "2"], 28, {28: (2, 4), 1: (1, 4)}),
        ([], 3, {3: (3, 2), 1: (1, 2)}),
    ]:
        for unfinished, jobs_and_threads in expected.items():
            args = parse("--device", "cpu", *options)
            cifar_resnet.share_out(args, runs, unfinished)
            assert (args.jobs, args.threads) == jobs_and_threads
    args = cifar_resnet.parse_arguments(["--dataset", "cifar10", "--device", "cpu"])[1]
    cifar_resnet.share_out(args, 3, 3)
    assert (args.jobs, args.threads) == (1, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--only", "20/cifar10,32/cifar10"],
            r"--only: a row of recipe pooled must be one of 20/cifar10, .*'32/cifar10'",
        ),
        (["--only", "20-110/cifar10"], "--only: a row of recipe pooled must be one of"),
        (["--dataset", "cifar10"], "--dataset: fixed by --reproduce, got 'cifar10'"),
        (["--dataset", "digits"], "--dataset: fixed by --reproduce, got 'digits'"),
        (["--student", "20"], "--student: fixed by --reproduce, got 20"),
        (["--student", "110"], "--student: fixed by --reproduce, got 110"),
        (["--loss", "kl"], "--loss: fixed by --reproduce, got 'kl'"),
        (["--warmup", "0.1"], "--warmup: fixed by --reproduce, got 0.1"),
        (["--task-weight", "0.5"], "--task-weight: fixed by --reproduce, got 0.5"),
        (["--weight", "2"], "--weight: fixed by --reproduce, got '2'"),
        (["--teacher-epochs", "50"], "--teacher-epochs: fixed by --reproduce, got 50"),
        (["--no-baseline"], "--no-baseline: fixed by --reproduce, got True"),
        (["--engine", "graph", "--device", "cpu"], "--engine: a graph needs a CUDA device, got cpu"),
        (["--jobs", "0"], "--jobs: must be at least 1, got 0"),
        (["--jobs", "257"], "--jobs: must be at most 256, got 257"),
    ],
)
def test_rejects_what_does_not_go_with_a_published_table(capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        parse(*options)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_rejects_rows_without_a_table(capsys):
    with pytest.raises(SystemExit):
        cifar_resnet.parse_arguments(["--only", "20/cifar10"])
    assert "--only: needs --reproduce" in capsys.readouterr().err


@pytest.fixture
def small(monkeypatch):
    """Both data sets and all networks, made small."""
    depths = {"pooled": ((8, 8), (14, 14))}
    monkeypatch.setattr("cifar.reproduce.DEPTHS", depths)
    monkeypatch.setattr(cifar_resnet, "load_dataset", lambda name, _data_dir: make_data(128, 128))


def test_it_can_be_stopped_row_by_row_and_ends_with_one_table(small, tmp_path, capsys):
    out = tmp_path / "runs"
    options = ["--reproduce", "--epochs", "1", "--runs", "1", "--jobs", "1", "--device", "cpu", "--out", str(out)]
    assert cifar_resnet.main([*options, "--only", "14/cifar100"]) == 0
    first = {path: path.stat().st_mtime_ns for path in out.glob("runs/*")}
    assert len(first) == 3
    capsys.readouterr()
    assert cifar_resnet.main(options) == 0
    text = capsys.readouterr().out
    assert "runs:     12 (3 done)" in text
    assert "cifar10 resnet8 from resnet8 logit seed 0  epoch 1/1" in text
    assert "resnet14 from resnet14" not in text.replace("cifar10 resnet14 from resnet14", "")
    assert {path: path.stat().st_mtime_ns for path in first} == first
    results = read_results(out)
    assert len(results) == 12
    assert all((result.agreement is None) == (result.method == "teacher") for result in results)
    assert len({result.revision for result in results}) == 1

    # A finished run whose numbers were lost is trained again; everything else stays.
    lost = next(run for run in cifar_resnet.plan(cifar_resnet.parse_arguments(options)[1]) if run.method == "logit")
    RunFiles.of(out, lost).result.unlink()
    assert cifar_resnet.main(options) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if "  epoch " in line]) == 1


def test_the_table_stands_beside_the_reference(small, tmp_path):
    # The networks are renamed to those of the table, which nobody trains in a test.
    assert cifar_resnet.main(["--reproduce", "--epochs", "1", "--runs", "2", "--jobs", "1", "--device", "cpu",
                              "--only", "8/cifar10", "--out", str(tmp_path / "small")]) == 0  # fmt: skip
    out = tmp_path / "runs"
    (out / "runs").mkdir(parents=True)
    for path in (tmp_path / "small/runs").glob("*.json"):
        (out / "runs" / path.name).write_text(path.read_text().replace("resnet8", "resnet20"))
    results, _ = cifar_resnet.read_finished(out)
    cifar_resnet.write_report(out, results)
    table = (out / "results.md").read_text()
    row = next(line for line in table.splitlines() if "resnet20 ← resnet20" in line)
    assert "92.51 ± 0.02" in row
    assert "not comparable: 1 of 200 epochs" in row
    assert results[0].revision in table
    shutil.rmtree(tmp_path / "small")
