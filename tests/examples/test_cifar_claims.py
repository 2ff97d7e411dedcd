"""Tests of examples/cifar/claims.py: commands on one folder share the runs, and no dead one keeps any."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from cifar import claims, crew, training
from cifar.checkpoints import RunFiles
from cifar.claims import EMPTY, SETTLED, SILENT, Claims, read_claim
from cifar.crew import Place, train_all
from cifar.files import has_ended, host
from cifar.progress import Overview
from cifar.training import train
from cifar_runs import make_config, make_data
from commands import until

RUN = make_config(epochs=1)
ALIVE, ENDED = 1, 999_999_999  # numbers of processes


class Clock:
    """The time as claims see it: nobody waits, and somebody may do something meanwhile."""

    def __init__(self):
        self.now = 1000.0
        self.time = time.time
        self.meanwhile = lambda: None

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(claims, "time", clock)
    monkeypatch.setattr(crew, "time", clock)
    return clock


def claim(out, run=RUN, *, where=None, pid=ALIVE, content=None):
    """A claim of another command."""
    path = out / "checkpoints" / f"{run.run_id}.claim"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"host": where or host(), "pid": pid, "id": "theirs"}) if content is None else content)
    return path


def test_a_claim_is_there_while_it_is_held_and_names_who_holds_it(tmp_path):
    path = claim(tmp_path)
    path.unlink()
    with Claims(tmp_path) as ours:
        assert ours.take(RUN)
        assert json.loads(path.read_text()) | {"id": ""} == {"host": host(), "pid": os.getpid(), "id": ""}
        assert ours.holder(RUN) == f"process {os.getpid()} on {host()}"
        ours.release(RUN)
        assert not path.exists()
        assert ours.take(RUN)
    assert not path.exists()
    with Claims(tmp_path) as ours:
        assert ours.take(RUN)
        claim(tmp_path)  # another command has taken it over, while this one was asleep
    assert path.exists()


def test_a_run_that_another_process_trains_is_left_to_it(tmp_path, clock):
    path = claim(tmp_path)
    before = path.read_bytes()
    with Claims(tmp_path) as ours:
        for _ in range(10):
            clock.now += SILENT / 2
            os.utime(path, ns=(0, time.time_ns()))  # a sign of life
            assert not ours.take(RUN)
        ours.release(RUN)  # of others: nothing
    assert path.read_bytes() == before


def test_the_claim_of_a_process_that_has_ended_is_taken_at_once(tmp_path, clock):
    path = claim(tmp_path, pid=ENDED)
    ours = Claims(tmp_path)
    assert ours.take(RUN)
    assert json.loads(path.read_text())["pid"] == os.getpid()
    claim(tmp_path, pid=os.getpid())  # of an earlier process with this number, as in a container that started again
    assert ours.take(RUN)
    assert clock.now == 1000 + 2 * SETTLED


def test_a_run_in_a_process_of_its_own_is_claimed_until_that_one_has_ended(tmp_path, clock):
    # When the command is killed, the process may still write for a moment.
    with Claims(tmp_path) as ours:
        ours.take(RUN)
        ours.hand_over(RUN, ALIVE)
        (path,) = ours._held
        assert json.loads(path.read_text())["pid"] == ALIVE
        assert not Claims(tmp_path).take(RUN)
        ours.hand_over(RUN, ENDED)
        assert Claims(tmp_path).take(RUN)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_process_that_nobody_has_waited_for_has_ended():
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert has_ended(process.pid)
    assert not has_ended(os.getpid())
    assert not has_ended(0)


def test_what_an_ended_process_has_claimed_does_not_stay(tmp_path):
    paths = [claim(tmp_path, pid=ENDED), claim(tmp_path, make_config(seed=5))]
    with Claims(tmp_path):
        assert [path.exists() for path in paths] == [False, True]
        claim(tmp_path, pid=ENDED)  # killed meanwhile
    assert [path.exists() for path in paths] == [False, True]


@pytest.mark.parametrize(("content", "limit"), [(None, SILENT), ("", EMPTY), ("{not JSON", SILENT), ("[]", SILENT)])
def test_who_gives_no_sign_of_life_has_ended(tmp_path, clock, content, limit):
    # Of another machine, or nobody can tell of which: killed before it said so.
    path, ours = claim(tmp_path, where="elsewhere", content=content), Claims(tmp_path)
    assert not ours.take(RUN)
    clock.now += limit - 1
    assert not ours.take(RUN)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # one sign, whatever the clock of the folder says
    for _ in range(2):
        assert not ours.take(RUN)
        clock.now += limit - 1
    clock.now += 2
    assert ours.take(RUN)


def test_a_claim_of_days_ago_is_taken_at_once(tmp_path, clock):
    os.utime(claim(tmp_path, where="elsewhere"), (0, time.time() - 2 * 24 * 3600))
    assert Claims(tmp_path).take(RUN)
    assert clock.now == 1000 + SETTLED


def test_of_two_that_find_a_claim_abandoned_the_last_one_has_it(tmp_path, clock):
    claim(tmp_path, pid=ENDED)
    first, second = Claims(tmp_path), Claims(tmp_path)
    taken = []

    def meanwhile():
        clock.meanwhile = lambda: None
        claim(tmp_path, pid=ENDED)  # as the second one saw it
        taken.append(second.take(RUN))

    clock.meanwhile = meanwhile
    assert not first.take(RUN)
    assert taken == [True]
    second.release(RUN)
    assert not list(tmp_path.rglob("*.claim"))


def test_a_held_claim_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RENEWED", 0.001)
    with Claims(tmp_path) as ours:
        ours.take(RUN)
        (path,) = ours._held
        os.utime(path, (0, 0))
        until(lambda: path.stat().st_mtime > 0)


def crew_of(out, runs):
    """Train runs in this process; which were trained here, in their order."""
    trained = []

    def finished(run):
        ours = [it.stem for it in out.glob("checkpoints/*.claim") if read_claim(it.read_bytes())[1] == os.getpid()]
        assert ours == [run.run_id]  # those of earlier runs are given back
        trained.append(run)

    place, data = Place(out, out, "cpu", None, "eager", tensorboard=False), make_data(128, 128)
    train_all(runs, place, {"tiny": data}, jobs=1, overview=Overview(runs), finished=finished)
    return trained


def test_other_runs_go_first_and_what_another_command_has_trained_is_taken_over(tmp_path, clock, capsys):
    teacher, baseline, student = runs = [RUN.teacher_config(), make_config("baseline", epochs=1), RUN]
    path = claim(tmp_path, baseline)

    def they_finish():
        if clock.now > 1010:
            train(baseline, make_data(128, 128), tmp_path)
            path.unlink(missing_ok=True)
            clock.meanwhile = lambda: None

    clock.meanwhile = they_finish
    assert crew_of(tmp_path, runs) == [teacher, student]
    assert clock.now > 1010
    said = f"baseline seed 0: is being trained by process {ALIVE} on {host()}; other runs go first\n"
    assert capsys.readouterr().out.count(said) == 1
    assert all(RunFiles.of(tmp_path, run).result.exists() for run in runs)


def test_a_student_waits_for_a_teacher_that_another_command_trains_and_goes_on_with_it_when_that_is_killed(
    tmp_path, clock
):
    teacher, student = runs = [RUN.teacher_config(), RUN]
    claim(tmp_path, teacher)

    def they_are_killed():
        if clock.now > 1010:
            claim(tmp_path, teacher, pid=ENDED)
            clock.meanwhile = lambda: None

    clock.meanwhile = they_are_killed
    assert crew_of(tmp_path, runs) == [teacher, student]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_of_two_that_train_one_run_the_first_to_finish_counts(tmp_path, monkeypatch):
    config, data = make_config("baseline", epochs=1), make_data(128, 128)
    theirs = train(config, data, tmp_path / "theirs")
    before = {}

    def save(path, *rest):
        save_state(path, *rest)
        shutil.copytree(tmp_path / "theirs", tmp_path / "ours", dirs_exist_ok=True)
        before.update({it: it.stat().st_mtime_ns for it in (tmp_path / "ours").rglob("*.*") if it != path})

    save_state = training.save_state
    monkeypatch.setattr(training, "save_state", save)
    assert train(config, data, tmp_path / "ours") == theirs
    assert {it: it.stat().st_mtime_ns for it in (tmp_path / "ours").rglob("*.*")} == before
    assert len(before) == 2
