"""Tests of runs side by side: examples/cifar/crew.py, agreement.py, and what the Overview says of them."""

import json
import os
import re
import shutil
import signal
import sys

import pytest
import torch

import cifar_resnet
from cifar import crew
from cifar.agreement import measure_agreement
from cifar.checkpoints import RunFiles
from cifar.claims import read_claim
from cifar.crew import Place
from cifar.data import normalize
from cifar.progress import Overview
from cifar.report import read_results
from cifar.training import build_student, train
from cifar_runs import make_config, make_data
from commands import alive, few_images, small, small_and_waiting, small_work, start, until, waiting_work, workers

OPTIONS = ["--student", "8", "--teacher", "8", "--epochs", "2", "--device", "cpu", "--threads", "1"]


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    monkeypatch.setattr(cifar_resnet, "load_dataset", few_images)
    monkeypatch.setattr(crew, "_work", small_work)


def weights(out):
    return {path.name: torch.load(path, weights_only=True)["model"] for path in sorted((out / "weights").glob("*.pt"))}


def assert_same_weights(out, other):
    ours, theirs = weights(out), weights(other)
    assert ours.keys() == theirs.keys()
    for name, model in ours.items():
        assert all(torch.equal(model[key], theirs[name][key]) for key in model), name


def measured(out):
    """The table without clocks, in any order of the runs."""
    return sorted((r.method, r.seed, r.acc, r.acc_last, r.agreement) for r in read_results(out))


def here(capfd, out, *options):
    """Runs the command in this process, which saves it a start of Python: exit code, output, errors."""
    capfd.readouterr()
    code = cifar_resnet.main([*OPTIONS, "--out", str(out), *options])
    return (code, *capfd.readouterr())


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "runs"
    assert small([*OPTIONS, "--out", str(out)]) == 0
    return out


@pytest.mark.subprocess
def test_side_by_side_gives_the_same_networks_and_table_as_one_by_one(one_by_one, tmp_path, capfd):
    code, output, errors = here(capfd, tmp_path, "--jobs", "3")
    assert (code, errors) == (0, "")
    assert "3 (0 done), 3 side by side" in output
    lines = [line for line in output.splitlines() if "  epoch " in line]
    assert len(lines) == 3 * 2
    assert all(", all runs " in line for line in lines)
    assert lines[-1].startswith("logit seed 0  epoch 2/2")  # it waits for its teacher, though there is room for three
    assert_same_weights(tmp_path, one_by_one)
    assert measured(tmp_path) == measured(one_by_one)


@pytest.mark.subprocess
def test_killed_side_by_side_it_goes_on_and_ends_the_same(one_by_one, tmp_path, capfd):
    process = start(small_and_waiting, [*OPTIONS, "--out", str(tmp_path), "--jobs", "2"], log=tmp_path / "log")
    try:
        until(lambda: len(list(tmp_path.glob("checkpoints/*.pt"))) == 2 or not process.is_alive())
        children = workers(process)
    finally:
        process.kill()
    process.join()
    # The processes that train must end too, or they would train beside those of the next call.
    assert len(children) == 2, (tmp_path / "log").read_text()
    until(lambda: not any(map(alive, children)))
    code, output, errors = here(capfd, tmp_path, "--jobs", "2")
    assert (code, errors) == (0, "")
    assert output.count("goes on after epoch 1") == 2
    assert_same_weights(tmp_path, one_by_one)
    assert measured(tmp_path) == measured(one_by_one)


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.subprocess)])
def test_a_loss_that_is_not_finite_keeps_no_other_run_from_its_end(one_by_one, tmp_path, jobs, capfd):
    # With such a weight the first step overflows.
    shutil.copytree(one_by_one, tmp_path / "runs")
    code, output, errors = here(capfd, tmp_path / "runs", "--weight", "1e38", "--runs", "2", "--jobs", jobs)
    assert code == 1
    diverged = r"logit seed \d: the loss must stay finite, got [^;]*"
    assert re.fullmatch(rf"error: {diverged}; {diverged}\n", errors)
    assert [line for line in output.splitlines() if line.startswith("baseline seed 1  epoch 2/2")]
    methods = [(result.method, result.seed, result.weight) for result in read_results(tmp_path / "runs")]
    assert sorted(methods[1:]) == [("baseline", 0, None), ("baseline", 1, None), ("logit", 0, 1.0)]


@pytest.mark.parametrize(("device", "chosen"), [("cuda:1", [1]), ("cuda", []), ("cpu", [])])
def test_a_device_with_a_number_becomes_the_current_one(monkeypatch, tmp_path, device, chosen):
    # Where a graph is captured.
    seen, kept = [], []
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(crew, "keep_freed_memory", lambda: kept.append(True))
    Place(tmp_path, tmp_path, device, None, "eager", tensorboard=False).prepare()
    assert seen == chosen
    assert kept == [True]
    assert torch.backends.cudnn.benchmark is True


@pytest.fixture
def both_waiting(monkeypatch, tmp_path):
    """Calls a function with both workers as soon as each has trained an epoch and waits."""

    def set_up(call):
        class Watched(crew._Processes):
            def messages(self):
                if len(self.active) == 2 and len(seen) == 0:
                    until(lambda: len(list(tmp_path.glob("checkpoints/*.pt"))) == 2)
                    seen.extend(process for process, _run in self.active.values())
                    call([process.pid for process in seen])
                return super().messages()

        monkeypatch.setattr(crew, "_Processes", Watched)
        monkeypatch.setattr(crew, "_work", waiting_work)
        return seen

    seen = []
    return set_up


@pytest.mark.subprocess
def test_workers_leave_the_answer_to_a_signal_to_the_command(both_waiting, tmp_path, capfd):
    def send(children):
        for pid in children:
            for number in crew.STOPPING:
                os.kill(pid, number)
        (tmp_path / "go").touch()

    assert both_waiting(send) == []
    code, output, errors = here(capfd, tmp_path, "--jobs", "2")
    assert (code, errors) == (0, "")
    assert output.count("  epoch 2/2") == 3


@pytest.mark.subprocess
@pytest.mark.usefixtures("_heard")
def test_what_a_batch_system_sends_stops_every_process(both_waiting, tmp_path, capfd):
    # Ctrl-C takes the same way.
    def send(children):
        # So that, were only the command killed, the next one would wait until they have ended.
        claims = {read_claim(it.read_bytes())[1] for it in tmp_path.glob("checkpoints/*.claim")}
        assert claims == {*children}
        for pid in (*children, os.getpid()):  # to all of them
            os.kill(pid, signal.SIGTERM)

    workers = both_waiting(send)
    code, _, errors = here(capfd, tmp_path, "--jobs", "2")
    assert code == 128 + signal.SIGTERM
    assert errors == "\nStopped. The same command goes on after the last whole epoch.\n"
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * 2
    assert not list(tmp_path.rglob("*.claim"))


def test_a_worker_never_has_another_answer(monkeypatch, tmp_path):
    # It would end, were one sent to all processes before its first line.
    answers = []

    class Process:
        pid = 1

        def __init__(self, **_):
            pass

        def start(self):
            answers.append([signal.getsignal(number) for number in crew.STOPPING])

    before = [signal.getsignal(number) for number in crew.STOPPING]
    processes = crew._Processes(Place(tmp_path, tmp_path, "cpu", 1, "eager", tensorboard=False))
    monkeypatch.setattr(processes._context, "Process", Process)
    processes.start(make_config(), "logit")
    assert answers == [[signal.SIG_IGN] * len(crew.STOPPING)]
    assert [signal.getsignal(number) for number in crew.STOPPING] == before


@pytest.mark.subprocess
def test_a_run_that_fails_is_named_and_ends_the_command(one_by_one, tmp_path, capfd):
    # A checkpoint of other settings, which only the process that trains that run opens.
    name = next((one_by_one / "weights").glob("*baseline*")).name
    (tmp_path / "checkpoints").mkdir(parents=True)
    torch.save({"config": {}}, tmp_path / "checkpoints" / name)
    code, _, errors = here(capfd, tmp_path, "--jobs", "2")
    assert code == 1
    assert errors.startswith("error: baseline seed 0: ")
    assert f"{name} belongs to a run with other settings" in errors
    assert errors.count("\n") == 1


@pytest.mark.subprocess
def test_a_process_that_dies_is_named(monkeypatch, tmp_path, capsys):
    class Killing(crew._Processes):
        def messages(self):
            os.kill(next(iter(self.active.values()))[0].pid, signal.SIGKILL)
            return super().messages()

    monkeypatch.setattr(crew, "_Processes", Killing)
    assert cifar_resnet.main([*OPTIONS, "--jobs", "2", "--out", str(tmp_path / "runs")]) == 1
    assert "ended with exit code -9; the same command goes on after its last whole epoch" in capsys.readouterr().err


# --- agreement


def test_agreement_is_the_share_of_equal_predictions(tmp_path):
    data = make_data(test=200)
    student, baseline = make_config(epochs=1), make_config("baseline", epochs=1)
    runs = [student.teacher_config(), baseline, student]
    for run in runs[:2]:
        train(run, data, tmp_path)
    measure_agreement(runs, tmp_path, {"tiny": data})
    train(student, data, tmp_path)
    measure_agreement(runs, tmp_path, {"tiny": data})

    def predictions(run):
        model = build_student(run, data).eval()
        model.load_state_dict(RunFiles.of(tmp_path, run).load_weights(run))
        with torch.no_grad():
            return model(normalize(data.test_images, data.mean, data.std)).argmax(1)

    for run in runs[1:]:
        expected = 100 * (predictions(run) == predictions(runs[0])).double().mean()
        assert RunFiles.of(tmp_path, run).load_result(run).agreement == pytest.approx(float(expected))
    assert RunFiles.of(tmp_path, runs[0]).load_result(runs[0]).agreement is None


def test_agreement_waits_for_the_teacher_and_is_measured_once(tmp_path, monkeypatch):
    data, config = make_data(), make_config("baseline", epochs=1)
    train(config, data, tmp_path)
    measure_agreement([config], tmp_path, {"tiny": data})
    result = RunFiles.of(tmp_path, config).result
    assert json.loads(result.read_text())["agreement"] is None
    train(config.teacher_config(), data, tmp_path)
    measure_agreement([config], tmp_path, {"tiny": data})
    before = result.stat().st_mtime_ns
    assert 0 <= json.loads(result.read_text())["agreement"] <= 100
    monkeypatch.setattr("cifar.agreement.predict", None)
    measure_agreement([config], tmp_path, {"tiny": data})
    assert result.stat().st_mtime_ns == before


# --- overview


def test_the_time_left_follows_the_work_and_not_what_was_done_before(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("cifar.progress.time.perf_counter", lambda: now)
    small, large = make_config("baseline", student=20, epochs=10), make_config("baseline", student=110, epochs=10)
    done = make_config("baseline", seed=5, student=20, epochs=10)
    overview = Overview([small, large, done], {done.run_id})
    assert overview.left() == "?"
    overview.show(small, 4)  # by an earlier invocation
    assert overview.left() == "?"
    now = 100.0
    overview.show(small, 6, "line")
    # 2 epochs of 18 blocks' work each took 100 s; 4 such epochs and 10 of 108 remain: 200 s and 3000 s.
    assert overview.left() == "53:20"
    assert capsys.readouterr().out == "line, all runs 53:20\n"
    overview.show(large, 0)
    overview.show(large, 10)
    overview.show(small, 10)
    assert overview.left() == "00:00"


def test_nobody_waits_for_a_run_that_was_dropped(monkeypatch, capsys):
    runs = [make_config(seed=seed, epochs=10) for seed in range(3)]
    monkeypatch.setattr("cifar.progress.time.perf_counter", lambda: 0.0)
    overview = Overview(runs)
    monkeypatch.setattr("cifar.progress.time.perf_counter", lambda: 60.0)
    overview.show(runs[0], 0)
    overview.show(runs[0], 5, "half")
    overview.drop(runs[1], "lost")
    assert overview.left() == "03:00"  # 5 and 10 epochs
    assert capsys.readouterr().out == "half, all runs 05:00\nlost\n"


def test_names_tell_runs_of_several_settings_apart():
    student = make_config(student=8, teacher=14, epochs=1)
    assert list(Overview([student.teacher_config(), student]).names.values()) == ["teacher", "logit seed 0"]
    other = make_config(student=8, teacher=14, dataset="large")
    names = Overview([student.teacher_config(), student, other]).names
    assert names[student.run_id] == "tiny resnet8 from resnet14 logit seed 0"
    assert len(set(names.values())) == 3


def test_one_bar_shows_what_is_under_way(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    first, second = make_config("baseline", epochs=4), make_config("baseline", seed=1, epochs=4)
    overview = Overview([first, second])
    with overview.bar():
        overview.show(first, 0)
        overview.show(second, 0)
        overview.show(first, 1.5)
        overview.show(second, 4)
    screen = capsys.readouterr().err
    assert "baseline seed 0 1.5/4" in screen
    assert " 69%|" in screen
    assert "baseline seed 1 4" not in screen
