"""Records and CSV files of the CIFAR example against texts written by hand."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cifar.records import EpochRecord, RunResult, read_results, to_csv
from cifar_results import epoch, run


def write_csv(out: Path, runs: list[RunResult]) -> None:
    out.mkdir(exist_ok=True)
    for name, text in zip(("results.csv", "curves.csv"), to_csv(runs), strict=True):
        (out / name).write_bytes(text.encode())


def test_properties_of_a_run():
    result = run(accs=(70.0, 88.5, 88.5, 80.0), last=81.25)
    assert (result.acc, result.epoch, result.nepoch, result.acc_last, result.seconds) == (88.5, 2, 4, 81.25, 10.0)


def test_json_gives_the_run_back():
    result = run("logit", accs=(0.1 + 0.2, 100 / 3), weight=0.1, device="gpu, «ü» | x")
    assert RunResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert RunResult.from_json(json.loads(json.dumps(run().to_json()))).weight is None
    assert EpochRecord.from_json(json.loads(json.dumps(result.history[0].to_json()))) == result.history[0]
    measured = replace(result, revision="9a25a33-dirty", agreement=100 / 3)
    assert RunResult.from_json(json.loads(json.dumps(measured.to_json()))) == measured


def test_json_of_earlier_versions_has_neither_revision_nor_agreement():
    data = run("logit", revision="9a25a33", agreement=88.5).to_json()
    old = RunResult.from_json({name: value for name, value in data.items() if name not in ("revision", "agreement")})
    assert (old.revision, old.agreement) == ("-", None)
    assert replace(old, revision="9a25a33", agreement=88.5) == RunResult.from_json(data)


@pytest.mark.parametrize("agreement", [0, 100, 87.5, "87.5", None])
def test_agreement_may_be_any_percentage_or_none(agreement):
    expected = None if agreement is None else float(agreement)
    assert run("logit", agreement=agreement).agreement == expected


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
        (run(), {"agreement": -0.25}, r"agreement must be in 0\.\.100 \(%\), got -0.25"),
        (run(), {"agreement": 100.5}, r"agreement must be in 0\.\.100 \(%\), got 100.5"),
        (run(), {"agreement": float("nan")}, "agreement must be a finite float, got nan"),
        (run(), {"revision": ""}, "revision must be one line of text that is not empty, got ''"),
        (run(), {"revision": None}, "revision must be one line of text that is not empty, got None"),
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
    student = run(
        "logit", history=two, weight=0.1, seed=7, device="cpu (A, 2 threads)", revision="9a25a33", agreement=87.5
    )
    write_csv(tmp_path, [run("teacher", history=(one,)), student])
    assert (tmp_path / "results.csv").read_bytes().decode() == (
        "no,method,dataset,student,teacher,start_time,acc,epoch,nepoch,lr,batch_size,"
        "acc_last,recipe,weight,seed,seconds,device,torch,revision,agreement\n"
        "1,teacher,cifar10,resnet20,-,2025-03-01T12:00:00+00:00,0.300,1,1,0.1,128,0.300,pooled,,0,2.5,cpu,2.9.0,-,\n"
        "2,logit,cifar10,resnet20,resnet20,2025-03-01T12:00:00+00:00,91.000,2,2,0.1,128,"
        '90.988,pooled,0.1,7,5.0,"cpu (A, 2 threads)",2.9.0,9a25a33,87.5\n'
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
    runs += [
        odd,
        replace(odd, seed=10**12, weight=0.0, revision="9a25a33-dirty", agreement=0.0),
        run("logit", accs=(0.0, 100.0), lr=1e-3, agreement=1 / 3),
    ]
    write_csv(tmp_path / "one", runs)
    back = read_results(tmp_path / "one")
    assert back == runs
    write_csv(tmp_path / "two", back)
    for name in ("results.csv", "curves.csv"):
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "two" / name).read_bytes()
        (tmp_path / "two" / name).write_bytes(content.replace(b"\n", b"\r\n"))
    assert read_results(tmp_path / "two") == runs  # as a checkout on Windows leaves them


@pytest.mark.parametrize("name", ["results.csv", "curves.csv"])
def test_an_empty_and_a_missing_file_are_named(tmp_path, name):
    write_csv(tmp_path, [run()])
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
        ("results.csv", ",agreement\n", "\n", "results.csv, line 1: column 20 must be 'agreement', got None"),
        (
            "results.csv",
            "agreement\n",
            "agreement,term:x\n",
            "results.csv, line 1: column 21 must be None, got 'term:x'",
        ),
        ("results.csv", ",-,\n", ",-\n", "results.csv, line 2: 19 cells, 20 expected; see column 'agreement'"),
        ("results.csv", ",-,\n", ",-,,5\n", "results.csv, line 2: 21 cells, 20 expected; see column 'agreement'"),
        ("results.csv", "2,logit", "5,logit", "results.csv, line 3: no must be 2, as curves.csv has it, got '5'"),
        ("results.csv", ",91.500,", ",99,", "results.csv, line 3: acc must be 91.500, as curves.csv .* got '99'"),
        ("results.csv", "pooled,1.0", "pooled,x", "results.csv, line 3: weight must be a finite float, got 'x'"),
        ("results.csv", ",-,\n", ",-,x\n", "results.csv, line 2: agreement must be a finite float, got 'x'"),
        ("results.csv", ",-,\n", ",-,101\n", r"results.csv, line 2: agreement must be in 0..100 \(%\), got 101.0"),
        ("results.csv", ",-,\n", ",,\n", "results.csv, line 2: revision must be one line of text that is not empty"),
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
    write_csv(tmp_path, [run(), run("logit", accs=(80.0, 91.5))])
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / name).write_bytes(text.replace(old, new, 1).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path) + "/") + message):
        read_results(tmp_path)
