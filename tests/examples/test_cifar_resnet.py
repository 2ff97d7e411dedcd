"""Tests of the command examples/cifar_resnet.py, on the bundled digits."""

import csv
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import cifar_resnet
from cifar import engine
from cifar.files import temporary_name
from cifar.settings import RECIPES
from cifar_runs import few_digits

COMMAND = Path(cifar_resnet.__file__)
SMALL = ["--student", "8", "--teacher", "8", "--epochs", "1"]
COLUMNS = "no,method,dataset,student,teacher,start_time,acc,epoch,nepoch,lr,batch_size,acc_last"
CONTROL = re.compile(r"[^\n\x20-\x7e\u00b1]")  # besides printable ASCII: the plus-minus sign of the table


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """What runs in this process trains on two batches of digits an epoch, not on eleven."""
    monkeypatch.setattr(cifar_resnet, "load_dataset", lambda *_: few_digits())


def run(out: Path, *options: str) -> int:
    return cifar_resnet.main([*SMALL, "--out", str(out), *options])


def plan(*options: str) -> list:
    return cifar_resnet.plan(cifar_resnet.parse_arguments(list(options))[1])


def read_runs(out: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((out / "runs").glob("*.json"))]


def trained(text: str) -> list[str]:
    """The runs whose epochs the command printed."""
    return list(dict.fromkeys(line.split("  epoch ")[0] for line in text.splitlines() if "  epoch " in line))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A small run of the command as people start it, its output folder and what it printed."""
    out = tmp_path_factory.mktemp("first") / "runs"
    # At exit, Python 3.10 complains about a temporary folder of torch's own.
    warnings = ["-W", "error", "-W", "ignore::ResourceWarning"]
    command = [sys.executable, *warnings, str(COMMAND), *SMALL, "--epochs", "2", "--out", str(out)]
    return out, subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=out.parent)


def test_the_command_trains_three_networks_and_writes_table_curves_and_weights(first):
    out, done = first
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    with (out / "results.csv").open(newline="") as file:
        header = file.readline()
        file.seek(0)
        rows = list(csv.DictReader(file))
    assert header.startswith(COLUMNS)
    assert [row["method"] for row in rows] == ["teacher", "baseline", "logit"]
    assert {(row["dataset"], row["student"], row["nepoch"]) for row in rows} == {("digits", "resnet8", "2")}
    assert [row["teacher"] for row in rows] == ["-", "-", "resnet8"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "curves.csv").read_text().splitlines()) == 1 + 3 * 2
    assert len(list((out / "weights").iterdir())) == 3
    assert not list((out / "checkpoints").iterdir())
    assert {path.name for path in out.parent.iterdir()} == {"runs"}


def test_without_a_terminal_the_output_is_plain_lines_one_per_epoch(first):
    text = first[1].stdout
    assert not CONTROL.search(text)
    assert len([line for line in text.splitlines() if "  epoch " in line]) == 3 * 2
    assert re.search(r"^logit seed 0  epoch 2/2  lr 0.01  loss \d+\.\d+ \(task \d+\.\d+, logit \d+\.\d+\)", text, re.M)
    assert "recipe:   pooled, 7x7 stem, SGD lr 0.1 momentum 0.9 weight decay 0.0001, batch 128, 2 epochs" in text
    assert "loss = cross-entropy + 1 * logit, compared at fc:input" in text
    assert "teacher:  resnet8, its last epoch, in eval mode" in text
    assert (first[0] / "results.md").read_text().strip() in text


def test_the_same_command_again_trains_nothing(first, capsys, monkeypatch):
    out, _ = first
    left = out / temporary_name("results.md").replace(f".{os.getpid()}.", ".999999999.")
    # Another command is killed while it writes its report.
    monkeypatch.setattr(cifar_resnet, "measure_agreement", lambda *_: left.write_text("half"))
    before = {path: path.stat().st_mtime_ns for path in (*out.glob("runs/*"), *out.glob("weights/*"))}
    (out / "runs" / "notes.json").write_text("[1]")
    assert run(out, "--epochs", "2") == 0
    (out / "runs" / "notes.json").unlink()
    text, warning = capsys.readouterr()
    assert re.fullmatch(r"warning: left out of the table: \S+notes.json is no readable result .*\n", warning)
    assert "3 (3 done)" in text
    assert trained(text) == []
    assert not left.exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_losses_use_the_same_teacher_and_baseline_and_join_the_table(first, capsys):
    out, _ = first
    assert run(out, "--epochs", "2", "--loss", "logit,kl,sp,dkd") == 0
    text = capsys.readouterr().out
    assert trained(text) == ["kl+task0.1 seed 0", "sp seed 0", "dkd+warm-up seed 0"]
    assert "loss = 0.1 * cross-entropy + 0.9 * kl, compared at the class logits" in text
    assert "loss = cross-entropy + 3000 * sp, compared at relu3" in text
    assert "1 * dkd, compared at the class logits, its weight rising over 8.3% of the run" in text
    assert {result["method"] for result in read_runs(out)} == {
        "teacher",
        "baseline",
        "logit",
        "kl+task0.1",
        "sp",
        "dkd+warm-up",
    }
    assert "| kl+task0.1 |" in (out / "results.md").read_text()


def test_two_weights_and_a_teacher_of_other_epochs_are_told_apart(tmp_path, capsys):
    options = ["--no-baseline", "--teacher-epochs", "2", "--loss", "kl,kl", "--weight"]
    assert run(tmp_path, *options, "default,3") == 0
    text = capsys.readouterr().out
    assert trained(text) == ["teacher", "kl+task0.1 weight 0.9 seed 0", "kl+task0.1 weight 3 seed 0"]
    assert "teacher:  resnet8, its last epoch of 2, in eval mode" in text
    assert "loss = 0.1 * cross-entropy + 3 * kl, compared at the class logits" in text
    assert "| kl+task0.1 | resnet8 | resnet8 of 2 epochs | 0.9 | 1 |" in text
    assert "| kl+task0.1 | resnet8 | resnet8 of 2 epochs | 3 | 1 |" in text
    teacher, *students = sorted(read_runs(tmp_path), key=lambda result: result["weight"] or 0)
    assert [len(result["history"]) for result in (teacher, *students)] == [2, 1, 1]
    assert {result["taught_by"] for result in students} == {teacher["identity"]}
    assert run(tmp_path, *options, "3,4") == 0
    assert trained(capsys.readouterr().out) == ["kl+task0.1 weight 4 seed 0"]  # nothing is trained twice
    assert run(tmp_path, "--no-baseline", "--loss", "kl") == 0
    assert trained(capsys.readouterr().out) == ["teacher", "kl+task0.1 seed 0"]  # another teacher, another student


def test_calibrate_trains_the_teacher_alone_and_prints_the_options_of_a_command(tmp_path, capsys):
    assert run(tmp_path, "--loss", "kl,srd", "--calibrate", "0.3") == 0
    told = capsys.readouterr().out
    assert trained(told) == ["teacher"]
    given = told.splitlines()[-1].split()
    assert given[:3] == ["--loss", "kl,srd", "--weight"]
    used = {run.method: run.weight for run in plan(*SMALL, *given) if run.teacher is not None}
    assert used.keys() == {"kl", "srd"}
    for method, default in (("kl", "0.9"), ("srd", "2")):
        assert re.search(rf"^{method} +{default} +{re.escape(f'{used[method]:.3g}')}$", told, re.MULTILINE)


def test_on_a_terminal_a_bar_shows_the_epoch(tmp_path, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    class Unhurried(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options, mininterval=0, miniters=1)

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    for name in ("COLUMNS", "LINES"):  # what tqdm takes for the terminal's size where it cannot ask
        monkeypatch.setenv(name, "120")
    monkeypatch.setattr("cifar.progress.REFRESH_SECONDS", 0.0)
    monkeypatch.setattr("cifar.progress.tqdm", Unhurried)  # else a run this short would show none
    assert run(tmp_path, "--no-baseline") == 0
    last = screen.getvalue().split("logit seed 0 1/1")[-1]
    assert re.search(r"\d img/s .*loss \d+\.\d+ task \d+\.\d+ logit \d+\.\d+ acc \d+\.\d%", last)
    assert re.search(r"run \d\d:\d\d", last)
    assert trained(capsys.readouterr().out) == ["teacher", "logit seed 0"]


def test_runs_have_their_seeds_and_the_teacher_its_own(tmp_path):
    assert run(tmp_path, "--runs", "2", "--seed", "3") == 0
    seeds = sorted((result["method"], result["seed"]) for result in read_runs(tmp_path))
    assert seeds == [("baseline", 3), ("baseline", 4), ("logit", 3), ("logit", 4), ("teacher", 1000)]


def test_teacher_and_student_may_differ_in_depth_and_the_study_option_is_named(tmp_path, capsys):
    assert run(tmp_path, "--teacher", "14", "--no-baseline", "--teacher-batch-statistics", "--recipe", "logits") == 0
    results = {result["method"]: result for result in read_runs(tmp_path)}
    assert set(results) == {"teacher", "logit+batch-statistics"}
    student = results["logit+batch-statistics"]
    assert (student["student"], student["teacher"], student["recipe"]) == ("resnet8", "resnet14", "logits")
    text = capsys.readouterr().out
    assert "batch norms on batch statistics" in text
    assert "cross-entropy + 0.1 * logit, compared at the class logits" in text


def test_tensorboard_events_hold_every_epoch(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(tmp_path, "--no-baseline", "--epochs", "2", "--tensorboard") == 0
    (folder,) = (tmp_path / "tensorboard").glob("*logit*")
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    assert {"loss/total", "loss/task", "loss/logit", "accuracy/test", "lr"} <= set(events.Tags()["scalars"])
    history = next(result for result in read_runs(tmp_path) if result["method"] == "logit")["history"]
    points = [(event.step, event.value) for event in events.Scalars("accuracy/test")]
    assert points == [(record["epoch"], pytest.approx(record["test_acc_all"])) for record in history]


def test_plan_follows_the_recipe_for_logit_and_the_logits_for_other_losses():
    teacher, baseline, student = plan("--dataset", "cifar10", "--teacher", "110")
    assert (teacher.method, teacher.student, teacher.seed) == ("teacher", 110, 1000)
    assert (baseline.method, baseline.student, baseline.teacher) == ("baseline", 20, None)
    assert (student.epochs, student.teacher, student.weight, student.at) == (200, 110, 1.0, "fc:input")
    assert {run.recipe for run in (teacher, baseline, student)} == {RECIPES["pooled"]}
    assert [(r.weight, r.at) for r in plan("--recipe", "logits")[2:]] == [(0.1, None)]
    assert [(r.weight, r.at) for r in plan("--loss", "kl")[2:]] == [(0.9, None)]
    assert [(r.weight, r.at) for r in plan("--recipe", "logits", "--loss", "kl")[2:]] == [(0.9, None)]
    several = plan("--loss", "kl,logit,at", "--runs", "2")[1:]
    assert [(run.method, run.seed) for run in several] == [
        (method, seed) for seed in (0, 1) for method in ("baseline", "kl", "logit", "at")
    ]
    assert [(r.weight, r.at) for r in several[1:4]] == [(0.9, None), (1.0, "fc:input"), (1000.0, "relu1,relu2,relu3")]
    assert [(r.weight, r.at) for r in plan("--weight", "2", "--at", "layer2")[2:]] == [(2.0, "layer2")]
    assert [(r.weight, r.at) for r in plan("--at", "logits")[2:]] == [(1.0, None)]
    weights = plan("--loss", "at, kl,at,kl", "--weight", "default,2, 90,default", "--no-baseline")[1:]
    assert [(r.method, r.weight) for r in weights] == [("at", 1000.0), ("kl", 2.0), ("at", 90.0), ("kl", 0.9)]
    same = ["--loss", "kl,kl,kl", "--weight", "0.9,default,0.9"]
    assert len(plan(*same)) == 3  # one run, and teacher and baseline
    assert len(cifar_resnet.parse_arguments(same)[1].use) == 1  # and said once


def test_plan_gives_the_teacher_epochs_of_its_own():
    teacher, baseline, student = plan("--epochs", "15", "--teacher-epochs", "50")
    assert [run.epochs for run in (teacher, baseline, student)] == [50, 15, 15]
    assert student.teacher_config() == teacher
    assert plan("--epochs", "50")[0] == teacher  # which a command with longer students has trained already
    assert plan("--epochs", "15")[1] == baseline
    assert plan("--epochs", "50", "--teacher-epochs", "50") == plan("--epochs", "50")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss", "logits"], r"--loss: a loss name must be a registered one, got 'logits'; did you mean 'logit'\?"),
        (["--loss", "kl,at,"], r"--loss: a loss name must be a registered one, got ''"),
        (["--loss", "kl,at", "--weight", "2"], "--weight: must be one for each --loss, 2, got 1"),
        (["--weight", "2,3"], "--weight: must be one for each --loss, 1, got 2"),
        (["--loss", "kl,at", "--weight", "2,"], "--weight: must be a number, got ''"),
        (["--loss", "kl,at", "--weight", "default,0"], "--weight: must be positive and finite, got 0"),
        (["--teacher-epochs", "0"], "--teacher-epochs: must be at least 1, got 0"),
        (["--loss", "kl,at", "--at", "fc"], "--at: only with one --loss, got kl,at"),
        (["--loss", "kl,at", "--warmup", "0.1"], "--warmup: only with one --loss, got kl,at"),
        (["--warmup", "-0.1"], "--warmup: must be from 0 to 1, got -0.1"),
        (["--warmup", "1.5"], "--warmup: must be from 0 to 1, got 1.5"),
        (["--loss", "kl,at", "--task-weight", "0.5"], "--task-weight: only with one --loss, got kl,at"),
        (["--task-weight", "0"], "--task-weight: must be positive and finite, got 0"),
        (["--student", "21"], r"--student: must be 6n\+2 with n >= 1 .* got 21"),
        (["--teacher", "2"], r"--teacher: must be 6n\+2"),
        (["--student", "deep"], "--student: must be an integer, got 'deep'"),
        (["--epochs", "1.5"], "--epochs: must be an integer, got '1.5'"),
        (["--warmup", "abc"], "--warmup: must be a number, got 'abc'"),
        (["--at", ""], "--at: must be logits, or module paths with commas or plus signs, got ''"),
        (["--at", "relu1,,relu2"], "--at: must be logits, or module paths"),
        (["--at", "relu1, relu1"], "--loss logit at relu1,relu1 does not work here: .* must differ, got relu1,relu1"),
        (["--loss", "vid", "--at", "relu1,relu2,relu3,fc"], "vid takes at most 3 places, got relu1,relu2,relu3,fc"),
        (["--out", "/dev/null/runs"], "--out: must be a folder that can be written, got /dev/null/runs: Not a dir"),
        (["--recipe", "pool"], "--recipe: invalid choice: 'pool'"),
        (["--dataset", "mnist"], "--dataset: invalid choice: 'mnist'"),
        (["--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["--runs", "0"], "--runs: must be at least 1, got 0"),
        (["--runs", "1001"], "--runs: must be at most 1,000, got 1001"),
        (["--epochs", "9" * 400], "--epochs: must be at most 1,000,000, got 9"),
        (["--threads", "100000000"], "--threads: must be at most 256, got 100000000"),
        (["--student", "999999998"], "--student: must be at most 1202, got 999999998"),
        (["--device", "cpu:3"], "--device: device must be cpu without a number, got 'cpu:3'"),
        (["--device", "meta"], "--device: device must be one that PyTorch can use here, got 'meta'"),
        (["--out", "x" * 300], "--out: must be a folder that can be searched, got x+: File name too long"),
        (["--seed", "-1"], "--seed: must be in 0.* got -1"),
        (["--seed", "999", "--runs", "2"], "--seed: 1000 is the teacher's, got 999 and 2 runs"),
        (["--weight", "nan"], "--weight: must be positive and finite, got nan"),
        (["--weight", "0"], "--weight: must be positive and finite, got 0"),
        (["--device", "cuda:77"], "--device: device must be one that PyTorch can use here, got 'cuda:77'"),
        (["--data-dir", "."], "--data-dir: only for CIFAR"),
        (["--tea", "14"], "unrecognized arguments: --tea"),
        (["--at", "fc:inputs"], "--loss logit at fc:inputs does not work here: .*'fc:inputs'"),
        (["--calibrate", "1"], "--calibrate: must be above 0 and below 1, got 1"),
        (["--calibrate", "--weight", "2"], "--weight: not with --calibrate, which trains no student, got '2'"),
        (["--calibrate", "--reproduce"], "--reproduce: not with --calibrate"),
        (
            ["--calibrate", "--loss", "kl,at"],
            "--calibrate: a loss must compare one place, .* got at at relu1,relu2,relu3",
        ),
        (["--at", "layer4"], "--loss logit at layer4 does not work here: .*'layer4'.*'layer1'"),
    ],
)
def test_rejects_options_that_cannot_be_run_before_anything_is_trained(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "runs", *options)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def test_rejects_tensorboard_without_the_package(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        plan("--tensorboard")
    assert stopped.value.code == 2
    assert 'the package tensorboard is missing; pip install -e ".[examples]"' in capsys.readouterr().err


@pytest.mark.usefixtures("_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_and_its_like_say_how_to_go_on(tmp_path, capsys, monkeypatch, number):
    def interrupted(*_):
        signal.raise_signal(number)

    monkeypatch.setattr(engine, "train_step", interrupted)
    before = signal.getsignal(number)
    assert run(tmp_path, "--no-baseline") == 128 + number
    assert capsys.readouterr().err.strip() == "Stopped. The same command goes on after the last whole epoch."
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("_heard")
def test_after_ctrl_c_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    steps = 0

    def interrupted(*args):
        nonlocal steps
        steps += 1
        if steps == 4:  # in the teacher's second epoch of 2 steps
            signal.raise_signal(signal.SIGINT)
        return train_step(*args)

    train_step = engine.train_step
    monkeypatch.setattr(engine, "train_step", interrupted)
    assert run(tmp_path, "--epochs", "2", "--no-baseline") == 130
    assert capsys.readouterr().err.strip() == "Stopped. The same command goes on after the last whole epoch."
    assert run(tmp_path, "--epochs", "2", "--no-baseline") == 0
    assert "teacher: goes on after epoch 1" in capsys.readouterr().out


def test_a_checkpoint_of_other_settings_ends_the_command_with_a_message(first, capsys):
    out, _ = first
    used = next(out.glob("weights/*-teacher-*"))
    saved = torch.load(used, weights_only=True)["config"]["precision"]
    other = {"float32": "bfloat16", "bfloat16": "float32"}[saved]
    assert run(out, "--epochs", "2", "--precision", other) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert f"precision is '{saved}', asked for '{other}'" in error


def test_a_loss_that_is_not_finite_ends_the_command_with_a_message(tmp_path, capsys, monkeypatch):
    train_step = engine.train_step
    monkeypatch.setattr(engine, "train_step", lambda m, o, images, *rest: train_step(m, o, images / 0, *rest))
    assert run(tmp_path) == 1
    assert re.fullmatch(
        r"error: the loss must stay finite, got nan in epoch 1, step 1 \(task nan\)\n", capsys.readouterr().err
    )


@pytest.mark.parametrize("error", [FileNotFoundError, ValueError, ModuleNotFoundError])
def test_data_that_cannot_be_had_end_the_command_with_a_message(tmp_path, capsys, monkeypatch, error):
    def fail(*_args, **_options):
        raise error("data/cifar-10-batches-bin is not there")

    monkeypatch.setattr(cifar_resnet, "load_dataset", fail)
    assert run(tmp_path, "--dataset", "cifar10") == 1
    assert capsys.readouterr().err == "error: data/cifar-10-batches-bin is not there\n"
