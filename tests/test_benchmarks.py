"""The benchmarks' harness on tiny sizes and its statistics; docs/performance.md has the real figures."""

import contextlib
import dataclasses
import gc
import io
import json
import re
import subprocess
import sys
import types

import pytest
import torch
from torch.nn import functional as F

import distill
import loss_cases
import loss_report
import losses
import measure
import neighbours
from benchmark_rows import make_row
from commands import start
from loss_report import Row

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True, scope="module")
def _no_old_objects():
    """Each measurement of memory collects garbage: what other tests have left need not be looked through every time."""
    gc.collect()
    gc.freeze()


def tiny(case, shape):
    return dataclasses.replace(case, shape=shape)


def first_case(table, loss, dtype=torch.float32):
    cases = loss_cases.list_cases(CPU)
    return next(case for case in cases if (case.table, case.loss, case.dtype) == (table, loss, dtype))


def test_neighbours_are_busy_while_it_is_timed_and_gone_after(monkeypatch, capsys):
    monkeypatch.setattr(neighbours.time, "sleep", lambda seconds: None)
    with neighbours.neighbours(1) as busy:
        assert [process.poll() for process in busy] == [None]
    assert [process.poll() is None for process in busy] == [False]
    neighbours.main(["--rows=4", "--classes=10", "--neighbours", "0", "1", "--repeats=2", "--loss=kl"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("kl (4, 10), ")
    assert [line.partition(" neighbours: eager / ours ")[0] for line in lines[1:]] == ["0", "1"]


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda form: form)


# --- measure.py ---


def test_quartiles_of_known_numbers():
    assert measure.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0)
    assert measure.quartiles([1.0, 2.0]) == (1.5, 1.25, 1.75)


def test_steps_take_turns_and_keep_their_own_times():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}

    def clock(step, inner):
        for _ in range(inner):
            step()
        return float(len(calls))

    seconds = measure.time_steps(steps, 3, 2, clock)
    assert "".join(calls) == "aabbcc" + "bbccaa" + "ccaabb"
    assert seconds == {"a": [2, 12, 16], "b": [4, 8, 18], "c": [6, 10, 14]}


def test_wall_clock_divides_by_the_runs(monkeypatch):
    now = iter([10.0, 16.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))
    calls = []
    assert measure.wall_clock(CPU)(lambda: calls.append(1), 3) == 2.0
    assert len(calls) == 3


def test_cuda_is_timed_by_triton(monkeypatch):
    def do_bench(step, return_mode):
        step()
        return {"median": 250.0}[return_mode]

    monkeypatch.setitem(sys.modules, "triton.testing", types.SimpleNamespace(do_bench=do_bench))
    calls = []
    assert measure.find_clock(torch.device("cuda"))(lambda: calls.append(1), 7) == 0.25
    assert calls == [1]


@pytest.mark.parametrize(
    ("seconds", "budget", "expected"),
    [
        ([1e-5, 4e-5], 4.0, (101, [200, 50])),  # short: the most repetitions, of 2 ms each
        ([1e-5, 0.398], 4.0, (11, [200, 1])),  # the short one runs no more often because of the long one
        ([0.5, 0.5], 4.0, (5, [1, 1])),  # long: the fewest
        ([0.1, 0.1], 2.0, (11, [1, 1])),  # 10, made odd
        ([0.0], 0.0, (5, [2000])),  # a clock that did not move
    ],
)
def test_repetitions_fit_the_budget_and_are_odd(seconds, budget, expected):
    repeats, inner = measure.find_repeats(dict(enumerate(seconds)), budget)
    assert (repeats, [*inner.values()]) == expected


@linux
def test_peak_memory_counts_what_is_freed_before_the_end():
    def step():
        for _ in range(3):
            torch.ones(16 << 20)  # 64 MiB at a time
        return torch.ones(4 << 20)

    step()
    assert measure.peak_extra_bytes(step, CPU) == pytest.approx(64 << 20, abs=20 << 20)
    assert measure.peak_extra_bytes(lambda: None, CPU) < 4 << 20


def test_memory_is_not_measured_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert measure.peak_extra_bytes(lambda: None, CPU) is None
    monkeypatch.setattr(measure, "CLEAR_REFS", tmp_path / "clear_refs")
    monkeypatch.setattr(measure, "STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("VmRSS:\t 3 kB\n")
    assert measure.peak_extra_bytes(lambda: None, CPU) is None
    (tmp_path / "status").write_text("VmRSS:\t 3 kB\nVmHWM:\t 7 kB\n")
    assert measure.peak_extra_bytes(lambda: None, CPU) == 4 * 1024


def test_peak_memory_on_cuda_is_the_allocators(monkeypatch):
    held = {"now": 100, "peak": 900}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.update(peak=held["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["peak"])
    assert measure.peak_extra_bytes(lambda: held.update(peak=350), torch.device("cuda")) == 250


@linux
@pytest.mark.subprocess
def test_too_large_an_allocation_is_an_error_and_not_a_kill(tmp_path):
    code = (
        "import torch, measure\n"
        "measure.limit_memory(spare=1 << 60)\n"
        "try:\n    torch.ones(1 << 28)\n"
        "except RuntimeError as error:\n    print(error, flush=True)"
    )
    process = start(exec, code, {}, log=tmp_path / "log")
    process.join()
    assert process.exitcode == 0
    assert "allocate" in (tmp_path / "log").read_text()


def test_machine_is_named():
    assert re.search(r"\w.*, \d+ cores, \d+ threads$", measure.describe_machine(CPU))


# --- loss_cases.py and losses.py ---


def test_plain_forms_are_of_losses():
    assert set(loss_cases.PLAIN) <= set(distill.list_losses())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_names_of_their_own_and_known_losses(device):
    cases = loss_cases.list_cases(torch.device(device))
    assert len({case.name for case in cases}) == len(cases)
    assert {case.table for case in cases} == set(loss_report.TABLES)
    assert any(case.shape == (8192, 128256) for case in cases) == (device == "cuda")


def small_case(loss):
    return tiny(case := first_case("losses", loss), {2: (6, 8), 3: (3, 4, 8), 4: (4, 4, 16, 16)}[len(case.shape)])


@pytest.mark.parametrize("loss", sorted(loss_cases.PLAIN))
def test_a_loss_and_its_plain_forms_agree(loss, no_compiler):
    case = small_case(loss)
    problem = case.build(case, CPU)
    assert losses._try_all(problem, case, CPU) == {}  # it raises where loss or gradient differ
    problem = case.build(case, CPU)  # what has a memory begins anew
    results = [problem.result(way) for way in problem.forward if way not in problem.other]
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-5)
    assert {"ours", "eager", "torch.compile"} <= set(problem.forward)
    assert ("as published" in problem.forward) == (loss in ("crd", "nst", "rkd"))
    # Where it draws, a compiled form draws other numbers.
    assert problem.other == (("torch.compile",) if loss in ("crd", "mgd") else ())


@pytest.mark.parametrize("loss", ["kl", "mgd", "nst", "fsp"])
def test_a_loss_is_measured_beside_its_plain_form(loss, no_compiler):
    case = small_case(loss)
    rows = {row.way: row for row in losses.measure_case(case, CPU, 0.0)}
    size = torch.Size(case.shape).numel() * 4 / 1e6  # and more, where several maps or weights get a gradient
    for row in (rows["ours"], rows["eager"], rows["floor"]):
        assert (row.case, row.loss) == (case.name, loss)
        assert row.gradient_mb >= 0.999 * size
        assert 0 < row.ms_low <= row.ms <= row.ms_high
        assert row.repeats == 5
        assert row.over_ours_low <= row.over_ours <= row.over_ours_high
    assert rows["ours"].over_ours == 1.0
    assert rows["floor"].extra_mb is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", ["trained", "frozen"])
def test_linear_heads_are_measured_beside_formed_logits(heads, dtype, no_compiler):
    case = dataclasses.replace(first_case("linear", heads), shape=(16, 40, 4, 6), dtype=dtype)
    rows = {row.way: row for row in losses.measure_case(case, CPU, 0.0)}
    assert {"ours", "eager", "torch.compile"} <= set(rows)
    assert ("first call" in rows) == (heads == "frozen")
    assert rows["ours"].note == "logits"  # so few
    assert rows["ours"].gradient_mb == pytest.approx((16 * 4 + 40 * 4 * (heads == "trained")) * dtype.itemsize / 1e6)


def test_numbers_of_a_row_are_those_of_the_times(monkeypatch, no_compiler):
    times = {"ours": [1.0, 2.0, 3.0], "eager": [4.0, 2.0, 9.0], "torch.compile": [0.5, 1.0, 1.5], "floor": [0.1] * 3}
    monkeypatch.setattr(losses, "time_steps", lambda *_: times)
    monkeypatch.setattr(losses, "find_repeats", lambda *_: (3, {"ours": 6, "eager": 7, "torch.compile": 8, "floor": 9}))
    rows = {row.way: row for row in losses.measure_case(tiny(first_case("logits", "logit"), (4, 3)), CPU, 0.0)}
    eager = rows["eager"]
    assert (eager.ms, eager.ms_low, eager.ms_high) == (4000.0, 3000.0, 6500.0)
    assert (eager.over_ours, eager.over_ours_low, eager.over_ours_high) == (3.0, 2.0, 3.5)  # of 4, 1 and 3
    assert (eager.repeats, eager.inner, rows["torch.compile"].over_ours) == (3, 7, 0.5)


def test_ways_that_disagree_are_refused(monkeypatch, no_compiler):
    half = dataclasses.replace(loss_cases.PLAIN["logit"], form=lambda s, t: F.mse_loss(s, t) / 2)
    monkeypatch.setitem(loss_cases.PLAIN, "logit", half)
    with pytest.raises(RuntimeError, match=r"eager must compute the same \(loss, norm of gradient\) as ours"):
        losses.measure_case(tiny(first_case("logits", "logit"), (4, 3)), CPU, 0.0)


def test_a_gradient_that_disagrees_is_refused(monkeypatch, no_compiler):
    wrong = dataclasses.replace(
        loss_cases.PLAIN["logit"], form=lambda s, t: F.mse_loss(s, t) + s.sum() - s.sum().detach()
    )
    monkeypatch.setitem(loss_cases.PLAIN, "logit", wrong)
    with pytest.raises(RuntimeError, match="eager must compute the same"):
        losses.measure_case(tiny(first_case("logits", "logit"), (4, 3)), CPU, 0.0)


def test_a_way_that_cannot_run_is_a_note(monkeypatch):
    def compile_nothing(form):
        def broken(*inputs):
            raise RuntimeError("no compiler\nand a long story")

        return broken

    monkeypatch.setattr(torch, "compile", compile_nothing)
    rows = {row.way: row for row in losses.measure_case(tiny(first_case("logits", "kl"), (4, 3)), CPU, 0.0)}
    assert (rows["torch.compile"].ms, rows["torch.compile"].note) == (None, "no compiler")
    assert rows["Liger"].note == "its kernels need a GPU"
    assert rows["eager"].ms > 0


def test_ours_must_run(monkeypatch, no_compiler):
    def broken(*arguments, **options):
        raise RuntimeError("ours is broken")

    monkeypatch.setattr(distill.LogitLoss, "forward", broken)
    with pytest.raises(RuntimeError, match="ours is broken"):
        losses.measure_case(tiny(first_case("logits", "logit"), (4, 3)), CPU, 0.0)


def test_liger_says_why_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert loss_cases.why_no_liger(torch.device("cuda")).startswith("it does not import: ")
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", types.ModuleType("liger_kernel.transformers"))
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    assert loss_cases.why_no_liger(torch.device("cuda")) == ""


def run_here(command, *, env, capture_output, text, check):
    """Stands in for `subprocess.run`, which would take seconds to import everything once more."""
    assert command[:2] == [sys.executable, losses.__file__]
    assert env["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        losses.main(command[2:])
    return subprocess.CompletedProcess(command, 0, output.getvalue(), "")


def test_command_measures_writes_and_goes_on(tmp_path, monkeypatch, capsys, no_compiler):
    monkeypatch.setattr(losses.subprocess, "run", run_here)
    monkeypatch.setattr(losses, "limit_memory", lambda: None)
    monkeypatch.setattr(losses, "_revision", lambda: "abc1234")
    case = "logits/logit/128x10/float32"
    arguments = ["--device", "cpu", "--only", case, "--seconds", "0", "--out", str(tmp_path)]
    losses.main([*arguments, "--time-limit", "-1"])
    assert "1 cases remain; run again to go on" in capsys.readouterr().out
    assert not (tmp_path / "losses.csv").exists()
    losses.main(arguments)
    rows = loss_report.read_rows(tmp_path)
    assert [row.way for row in rows] == ["ours", "eager", "torch.compile", "floor"]
    assert (tmp_path / "vocabulary.png").read_bytes().startswith(b"\x89PNG")
    assert case in capsys.readouterr().out

    measured = []
    monkeypatch.setattr(loss_report, "_picture", lambda rows: b"")
    monkeypatch.setattr(losses, "measure_in_child", lambda case, *_: measured.append(case.name) or rows)
    threads = [dataclasses.replace(row, revision="abc1234", device=measure.describe_machine(CPU)) for row in rows]
    loss_report.write_report(tmp_path, threads)
    losses.main(arguments)
    assert measured == []
    losses.main([*arguments, "--again"])
    assert measured == [case]
    monkeypatch.setattr(losses, "_revision", lambda: "def5678")
    losses.main(arguments)
    assert measured == [case, case]
    monkeypatch.setattr(losses, "_revision", lambda: "abc1234+changes")
    losses.main(arguments)
    assert measured == [case, case, case]


def test_a_child_that_fails_is_told_with_its_reason(monkeypatch):
    died = subprocess.CompletedProcess([], -9, "", "a long story\n" * 9 + "killed")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: died)
    reason = "logits/logit/128x10/float32: its process must end with 0, got -9:\n" + "a long story\n" * 4 + "killed"
    with pytest.raises(RuntimeError, match=f"^{reason}$"):
        losses.measure_in_child(first_case("logits", "logit"), "cpu", 0.0)


def test_child_prints_its_rows(monkeypatch, capsys):
    rows = [make_row("ours", 1.0), make_row("eager", 2.0)]
    monkeypatch.setattr(losses, "measure_case", lambda *_: rows)
    monkeypatch.setattr(losses, "limit_memory", lambda: None)
    losses.main(["--child", "logits/logit/128x10/float32", "--device", "cpu"])
    assert [Row.from_dict(cells) for cells in json.loads(capsys.readouterr().out)] == rows


def test_list_names_the_cases(capsys):
    losses.main(["--list", "--device", "cpu", "--only", "linear/", "--only", "50257"])
    assert capsys.readouterr().out.split() == [
        "linear/trained/2048x50257x768x1024/float32",
        "linear/frozen/2048x50257x768x1024/float32",
    ]


def test_the_default_run_is_bounded_and_a_full_one_is_not():
    assert losses.parse_arguments([]).time_limit == 1500
    assert losses.parse_arguments(["--full"]).time_limit is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device must be auto, cpu or cuda, got 'tpu'"),
        (["--seconds", "-1"], "--seconds must be finite and not negative, got -1.0"),
        (["--only", "nothing"], "--only must leave at least one case (--list shows them), got ['nothing']"),
    ],
)
def test_rejects_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        losses.parse_arguments(arguments)
    assert message in capsys.readouterr().err
