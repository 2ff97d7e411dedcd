"""The short form of benchmarks/faults.py: the study under faults, as docs/reliability.md says."""

import errno
import functools
import json
import os
import re
import shutil
import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch

import cifar_resnet
import distill
from cifar import archives, checkpoints, files
from cifar.agreement import measure_agreement
from cifar.archives import unpickle_arrays
from cifar.checkpoints import CheckpointError, RunFiles
from cifar.files import remove_leftovers, temporary_name, write_atomically
from cifar.settings import describe_device
from cifar.states import check_tensors, go_on, identity
from cifar.training import Run, train
from cifar_runs import make_config, make_data, make_teacher
from distill import _registry
from faults import WRONG, bad_lines, damaged, rewritten


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a finished teacher and its student, stopped after the first of two epochs."""
    out, data, config = tmp_path_factory.mktemp("stopped"), make_data(128, 128), make_config()
    train(config.teacher_config(), data, out)
    with pytest.MonkeyPatch.context() as patch:
        save = checkpoints.save_state

        def stop(path, *rest):
            save(path, *rest)
            raise KeyboardInterrupt

        patch.setattr("cifar.training.save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, data, out)
    return out


@pytest.fixture
def resumed(stopped, tmp_path):
    """A copy of it, and what goes on with it."""
    shutil.copytree(stopped, tmp_path / "runs")
    config = make_config()
    return RunFiles.of(tmp_path / "runs", config), lambda: train(config, make_data(128, 128), tmp_path / "runs")


REASONS = {
    "no network": "it must hold model",
    "a tensor is missing": "network must hold student.conv1.weight, which is missing",
    "a tensor too many": "network must hold the network's tensors only, got 'extra'",
    "another shape": r"student.conv1.weight of the network must be .* of shape \(16, .*, got .* of shape \(2, 3\)",
    "another type": r"student.conv1.weight of the network must be torch.float32 of .*, got torch.float64 of shape",
    "no tensor": "student.conv1.weight of the network must be a tensor, got int",
    "the network is a list": "network must map names to tensors, got list",
    "an unknown field": "it must hold nothing unknown, got 'surprise'",
    "no history": r"its history must hold the epochs 1, 2, ... of 2, got \[\]",
    "history with a gap": r"its history must hold the epochs 1, 2, ... of 2, got \[2\]",
    "history too long": r"its history must hold the epochs 1, 2, ... of 2, got \[1, 2, 3, 4, 5, 6, ...\]",
    "history of text": "its history must be a list of records of epochs, got others",
    "a record without a field": "its history must be a list of records of epochs, got others: .*'loss'",
    "a record with nan": "loss must be a finite float, got nan",
    "no optimizer": "it must hold optimizer",
    "no momentum": "optimizer's state of parameter 0 must hold momentum_buffer, which is missing",
    "momentum of another shape": "momentum_buffer of the optimizer's state of parameter 0 must be .*, got",
    "another momentum": "the optimizer's options must be the recipe's, got others",
    "no groups": "the optimizer's options must be the recipe's, got others",
    "an optimizer without groups": "the optimizer's state must hold state and param_groups",
    "a parameter too many": "the optimizer must know 29 parameters, got one numbered 99",
    "groups are a number": "the optimizer's param_groups must be a list of options",
    "no random state": "it must hold random",
    "random states are a list": "the random states must be those of data, cpu, cuda",
    "a short random state": "data of the random states must be torch.uint8 of .*, got torch.uint8 of shape",
    "no random state of the data": "the random states must be those of data, cpu, cuda",
    "a start that is no time": "its start must be a time of ISO 8601, got 'yesterday'",
    "a start that is a number": "its start must be a time of ISO 8601, got 7",
    "of a later format": "its format must be one of 1 to 2, got 99",
    "a format that is text": "its format must be one of 1 to 2, got '2'",
    "parts that are none": "what the run was made with must be a list of parts, each with its first epoch",
    "parts without an epoch": "what the run was made with must be a list of parts, each with its first epoch",
    "other threads": "threads must be 99, as before, .*, got .*: give --threads 99",
    "another engine": "engine must be graph, as before, .*, got eager: give --engine graph",
}


@pytest.mark.parametrize("how", list(WRONG))
def test_a_sound_checkpoint_with_wrong_content_is_refused_by_name(resumed, how):
    files, resume = resumed
    content = rewritten(files.checkpoint.read_bytes(), WRONG[how])
    files.checkpoint.write_bytes(content)
    refused = rf"{files.checkpoint.name} is not a readable checkpoint \({REASONS[how]}.*\); delete"
    with pytest.raises(CheckpointError, match=refused):
        resume()
    assert files.checkpoint.read_bytes() == content
    assert not files.result.exists()


def test_damaged_bytes_are_refused_or_were_without_effect(resumed, stopped):
    files, _resume = resumed
    content = files.checkpoint.read_bytes()
    refused = 0
    for seed in range(24):
        files.checkpoint.write_bytes(damaged(content, seed))
        try:
            state = files.load_checkpoint(make_config())
        except CheckpointError:
            refused += 1
        else:  # bytes that no reader looks at, such as those between two members of the archive
            assert identity(state["model"]) == identity(RunFiles.of(stopped, make_config()).load_checkpoint(
                make_config())["model"])  # fmt: skip
    assert refused >= 20


def test_a_checkpoint_says_what_it_was_made_with(resumed):
    state = resumed[0].load_checkpoint(make_config())
    assert (state["format"], state["library"]) == (checkpoints.FORMAT, distill.__version__)
    (part,) = state["parts"]
    made_with = {"from": 1, "threads": torch.get_num_threads(), "engine": "eager", "torch": str(torch.__version__)}
    assert part | made_with == part
    assert part["library"] == distill.__version__
    assert part["device"] == describe_device(torch.device("cpu"), "float32")
    assert go_on([part], {**part, "from": 1}, 2) == [part]  # nothing has changed


def test_an_identity_is_of_names_types_and_shapes_too():
    weights = {"a": torch.zeros(4), "b": torch.ones(2, 2)}
    assert identity(weights) == identity(dict(reversed(weights.items())))
    others = [
        {"aa": weights["a"], "b": weights["b"]},
        {**weights, "a": torch.zeros(4, dtype=torch.int32)},
        {**weights, "b": torch.ones(4)},
        {**weights, "b": torch.tensor([[1.0, 1.0], [1.0, 2.0]])},
        {"a": weights["a"]},
    ]
    assert len({identity(other) for other in [weights, *others]}) == 6


def test_other_threads_say_what_to_give(resumed):
    files, resume = resumed
    change = lambda state: state["parts"][-1].update(threads=3)  # noqa: E731
    files.checkpoint.write_bytes(rewritten(files.checkpoint.read_bytes(), change))
    with pytest.raises(CheckpointError, match=r"threads must be 3, as before, .* got \d+: give --threads 3"):
        resume()


def test_a_run_that_goes_on_with_another_version_says_so_in_the_table(resumed):
    files, resume = resumed
    change = lambda state: state["parts"][-1].update(torch="1.9.0", library="0.0.1")  # noqa: E731
    files.checkpoint.write_bytes(rewritten(files.checkpoint.read_bytes(), change))
    result = resume()
    assert result.torch == f"1.9.0, {torch.__version__} from epoch 2"
    assert " from epoch" not in result.device + result.revision
    assert "1.9.0, " in cifar_resnet.write_report.__globals__["_made_with"](result)


def test_a_checkpoint_of_the_first_format_goes_on(resumed):
    files, resume = resumed

    def old(state):
        for name in ("format", "library", "parts", "teacher"):
            del state[name]
        state["revision"] = "abc1234"
        del state["config"]["warmup"], state["config"]["task_weight"]  # came later

    files.checkpoint.write_bytes(rewritten(files.checkpoint.read_bytes(), old))
    result = resume()
    assert result.torch == f"not recorded, {torch.__version__} from epoch 2"
    assert result.revision.startswith("abc1234")


def test_a_student_goes_on_under_its_own_teacher_only(resumed, tmp_path):
    _files, resume = resumed
    config = make_config()
    theirs = RunFiles.of(tmp_path / "runs", config.teacher_config())
    change = lambda state: next(iter(state["model"].values())).add_(1)  # noqa: E731
    before = theirs.weights.read_bytes()
    theirs.weights.write_bytes(rewritten(before, change))
    with pytest.raises(CheckpointError, match="belongs to a student of another teacher than"):
        resume()
    theirs.weights.write_bytes(before)
    taught_by = resume().taught_by
    assert taught_by == identity(theirs.load_weights(config.teacher_config()))
    theirs.weights.write_bytes(rewritten(before, change))
    with pytest.raises(CheckpointError, match="belongs to a student of another teacher than"):  # the finished one too
        resume()


def test_numbers_and_network_of_two_runs_are_told_apart(resumed):
    files, resume = resumed
    resume()
    whole = files.result.read_text()
    for change, message in [
        ({"identity": "sha256:0"}, "is not the network whose numbers"),
        ({"seed": 3}, "belongs to another run: seed is 3, must be 0"),
        ({"method": "kl"}, "belongs to another run: method is 'kl', must be 'logit'"),
        ({"surprise": 3}, "no readable result"),
        ({"history": []}, "no readable result"),
    ]:
        files.result.write_text(json.dumps({**json.loads(whole), **change}))
        with pytest.raises(CheckpointError, match=message):
            resume()


def test_the_agreement_names_weights_of_another_network(resumed, tmp_path):
    files, resume = resumed
    resume()
    saved = rewritten(files.weights.read_bytes(), WRONG["another shape"])
    files.weights.write_bytes(saved)
    state = torch.load(files.weights, weights_only=True)["model"]
    numbers = json.loads(files.result.read_text())
    files.result.write_text(json.dumps({**numbers, "identity": identity(state)}))
    with pytest.raises(
        CheckpointError, match=rf"{files.weights.name} is not a readable .*\(conv1.weight of the network"
    ):
        measure_agreement([make_config()], tmp_path / "runs", {"tiny": make_data(128, 128)})


def test_what_damaged_lengths_raise_is_the_files_fault(resumed, monkeypatch):
    def seek(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(checkpoints.zipfile, "ZipFile", seek)
    with pytest.raises(CheckpointError, match=r"is not a readable checkpoint \(.*Invalid argument\)"):
        resumed[0].load_checkpoint(make_config())


def test_weights_of_another_network_are_named(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "runs")
    config, data = make_config(), make_data(128, 128)
    theirs = RunFiles.of(tmp_path / "runs", config.teacher_config())
    theirs.weights.write_bytes(rewritten(theirs.weights.read_bytes(), WRONG["another shape"]))
    with pytest.raises(CheckpointError, match=rf"{theirs.weights.name} is not a readable checkpoint .*got"):
        train(config, data, tmp_path / "runs")
    theirs.weights.write_bytes(rewritten(theirs.weights.read_bytes(), WRONG["the network is a list"]))
    with pytest.raises(CheckpointError, match="its network must be a dict of tensors"):
        train(config, data, tmp_path / "runs")
    with pytest.raises(ValueError, match=r"x of the network must be torch.float32 of shape \(2,\)"):
        check_tensors({"x": torch.zeros(3)}, {"x": torch.zeros(2)}, "network")


# --- the disk


class Full:
    """A file on a disk that is full."""

    def __init__(self, file):
        self.file, self.free = file, 1000

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        self.free -= len(content)
        if self.free < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(content)


def test_a_full_disk_is_named_and_costs_the_epoch_only(resumed, monkeypatch):
    sound, resume = resumed
    before = sound.checkpoint.read_bytes()
    open_file = type(sound.checkpoint).open
    with monkeypatch.context() as patch:
        patch.setattr(
            type(sound.checkpoint),
            "open",
            lambda path, mode="r", *rest, **more: (
                Full(open_file(path, mode)) if mode == "xb" else open_file(path, mode, *rest, **more)
            ),
        )
        with pytest.raises(OSError, match=r"No space left on device: .*\.pt"):
            resume()
    assert sound.checkpoint.read_bytes() == before
    assert not [*sound.checkpoint.parent.glob(".*"), *sound.checkpoint.parent.glob("*.tmp")]
    resume()


def test_temporary_names_never_meet_and_do_not_stay(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    assert len({temporary_name("x") for _ in range(100)}) == 100
    mine, theirs = tmp_path / temporary_name("mine"), tmp_path / "runs" / temporary_name("mine")
    dead = tmp_path / mine.name.replace(f".{os.getpid()}.", ".999999999.")
    monkeypatch.setattr(files.socket, "gethostname", lambda: "elsewhere.example")
    far = tmp_path / temporary_name("far")
    monkeypatch.undo()
    first_format, not_ours = tmp_path / "run.pt.123.tmp", tmp_path / "notes.tmp"
    for path in (mine, theirs, dead, far, first_format, not_ours):
        path.write_bytes(b"half")
    remove_leftovers(tmp_path)
    left = {mine, theirs, far, first_format, not_ours}  # all of these may still be written
    assert set(tmp_path.rglob("*.tmp")) == left
    for path in left:
        os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert set(tmp_path.rglob("*.tmp")) == {not_ours}


def test_stray_files_beside_the_numbers_are_passed_over(resumed, tmp_path):
    sound, resume = resumed
    resume()
    folder = sound.result.parent
    (folder / "._x.json").write_bytes(b"\x00\x05\x16\x07")
    (folder / "notes.json").write_text("[1]")
    shutil.copy(sound.result, folder / "copy of it.json")
    results, left_out = cifar_resnet.read_finished(tmp_path / "runs")
    assert sorted(result.method for result in results) == ["logit", "teacher"]
    assert len(left_out) == 1
    assert "notes.json is no readable result" in left_out[0]


# --- the terminal


def test_output_that_nobody_reads_ends_the_command_quietly(monkeypatch, capsys):
    def broken(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    closed = []
    monkeypatch.setattr(cifar_resnet, "_run", broken)
    monkeypatch.setattr(cifar_resnet.os, "dup2", lambda *pair: closed.append(pair[1]))
    assert cifar_resnet.main([]) == 141
    assert closed == [1]
    assert capsys.readouterr().err == "Stopped: nobody reads the output any more. The same command goes on.\n"


def test_a_terminal_that_lacks_a_sign_gets_another(monkeypatch, tmp_path):
    screen = (tmp_path / "screen").open("w", encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(cifar_resnet, "_run", lambda *_: screen.write("91.60 \u00b1 1.35\n") and 0)
    assert cifar_resnet.main([]) == 0
    screen.close()
    assert (tmp_path / "screen").read_text() == "91.60 ? 1.35\n"


# --- data from elsewhere


def reduce_of(function, *arguments):
    import pickle

    class Call:
        def __reduce__(self):
            return function, arguments

    return pickle.dumps({"data": Call()}, 2)


def array_of(shape, dtype, content):
    import pickle

    class Array:
        def __reduce__(self):
            made_by = np.zeros(0).__reduce__()[0]
            return made_by, (np.ndarray, (0,), b"b"), (1, shape, np.dtype(dtype), False, content)

    return pickle.dumps(Array(), 2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (reduce_of(np.ndarray, (1 << 40,), np.dtype("u1")), "a call of numpy.ndarray"),  # would allocate
        (reduce_of(np.ndarray, (3,), np.dtype("O")), "a call of numpy.ndarray"),  # would hold what is no object
        (b"cnumpy\nndarray\n(K\x03tR.", "a call of numpy.ndarray"),
        (b"cnumpy\nndarray\n)\x81.", "the instruction NEWOBJ"),
        (b"cnumpy\ndtype\n}b.", "a state of dtype"),
        (b"cnumpy\ndtype\n.", "_Marker"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR.", "an array must be a call of"),
        (b"Nr\xff\xff\xff\xff.", "the instruction LONG_BINPUT"),  # a place in the memo far beyond the file
        (b"]q\x00h\x00a.", "containers may be nested 8 deep"),  # a list that holds itself
        (b"(" * 1000, ""),
        (b"\x80\x02cposix\nsystem\n.", "posix.system"),
        (array_of((1 << 40,), "u1", b"abc"), "an array must have a shape of sizes"),
        (array_of((-1,), "u1", b"abc"), "an array must have a shape of sizes"),
        (array_of(3, "u1", b"abc"), "an array must have a shape of sizes"),
        (array_of((4,), "u1", b"abc"), r"an array of shape \(4,\) must have as many bytes"),
        (array_of((3,), "O", [1, 2, 3]), "an array must be of numbers"),
    ],
)
def test_a_crafted_pickle_is_refused(content, reason):
    with pytest.raises(ValueError, match=f"batch must be a pickle of arrays and plain containers: {reason}"):
        unpickle_arrays("batch", content)


def test_arrays_of_objects_are_refused_and_of_numbers_read(monkeypatch):
    import pickle

    with pytest.raises(ValueError, match="must be of numbers, got the dtype 'O8'"):
        unpickle_arrays("batch", pickle.dumps(np.array([{}], object), 2))
    for array in (np.arange(6, dtype=">i4").reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3))):
        np.testing.assert_array_equal(unpickle_arrays("batch", pickle.dumps(array, 2)), array)


@pytest.mark.parametrize(
    ("limit", "value", "message"), [("_LARGEST", 10, "at most 10 bytes"), ("_LONGEST", -1.0, "must come within")]
)
def test_a_download_is_bounded_in_size_and_time(monkeypatch, tmp_path, limit, value, message):
    class Response(dict):
        headers = {"Content-Length": None}  # noqa: RUF012
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731
        chunks = iter([b"x" * 11, b"x" * 11, b""])
        read1 = lambda self, size: next(self.chunks)  # noqa: E731

    def urlopen(_url, *, timeout):
        assert timeout == archives._TIMEOUT  # else a connection that is dead is waited for for ever
        return Response()

    monkeypatch.setattr(archives.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(archives, limit, value)
    archive = archives.Archive("http://127.0.0.1/set.tar.gz", "0")
    with pytest.raises(OSError, match=f"could not be downloaded: .*{message}"):
        archives.fetch(archive, tmp_path / "set", download=True, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_file_far_too_large_is_not_read(monkeypatch, tmp_path):
    (tmp_path / "set.tar.gz").write_bytes(b"x" * 11)
    monkeypatch.setattr(archives, "_LARGEST", 10)
    with pytest.raises(ValueError, match=r"set.tar.gz must have at most 10 bytes, got 11: it is another file"):
        archives.fetch(
            archives.Archive("http://127.0.0.1/set.tar.gz", "0"), tmp_path / "set", download=False, progress=False
        )


def test_what_a_killed_download_leaves_goes_after_a_day(tmp_path):
    archive, old, new = (
        archives.Archive("http://127.0.0.1/set.tar.gz", "0"),
        *(tmp_path / f"set.tar.gz.{name}.part" for name in ("old", "new")),
    )
    for part in (old, new):
        part.mkdir()
        (part / "set.tar.gz").write_bytes(b"half")
    os.utime(old, (0, 0))
    (tmp_path / "set.tar.gz").write_bytes(b"another file")
    with pytest.raises(ValueError, match="must have the md5"):
        archives.fetch(archive, tmp_path / "set", download=False, progress=False)
    assert (old.exists(), new.exists()) == (False, True)


# --- losses of others


class Broken(torch.nn.Module):
    """A loss that raises what nobody expects."""

    def __init__(self, where="build"):
        super().__init__()
        if where == "build":
            raise RuntimeError("no such thing")

    def forward(self, student, teacher, target=None):
        raise ZeroDivisionError("no such thing")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Broken, r"--loss: 'broken' cannot be built without arguments: no such thing"),
        (
            functools.partial(Broken, "forward"),
            r"--loss broken at logits does not work here: term 'broken': no such thing",
        ),
        (None, r"--loss: the loss 'broken' of broken_package:Loss \(package .*\) cannot be imported: .*no such thing"),
    ],
)
def test_a_loss_of_others_that_raises_anything_is_named(monkeypatch, capsys, tmp_path, loss, message):
    if loss is not None:
        monkeypatch.setitem(_registry._registered, "broken", loss)
    else:
        (tmp_path / "broken_package.py").write_text("raise RuntimeError('no such thing')")
        monkeypatch.syspath_prepend(tmp_path)
        point = EntryPoint("broken", "broken_package:Loss", "distill.losses")
        monkeypatch.setattr(_registry, "entry_points", lambda **_: [point])
    with pytest.raises(SystemExit) as stopped:
        cifar_resnet.main(["--student", "8", "--teacher", "8", "--out", str(tmp_path / "runs"), "--loss", "broken"])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "runs" / "weights").exists()
    with pytest.raises(SystemExit) as stopped:
        cifar_resnet.main(["--help"])
    assert stopped.value.code == 0
    assert "broken" in capsys.readouterr().out


def test_a_run_made_new_has_its_identity():
    data = make_data(128, 128)
    run = Run(make_config(), data, make_teacher(make_config(), data))
    assert run.taught_by == identity(make_teacher(make_config(), data))
    assert write_atomically is files.write_atomically


def test_command_lines_that_cannot_be_run_are_refused_by_name(tmp_path):
    assert list(bad_lines(12, tmp_path)) == [{"refused by name": 1}] * 12
