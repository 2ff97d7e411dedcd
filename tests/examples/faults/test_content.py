"""Checkpoints, networks and numbers that are damaged, of another version, or of another run."""

import errno
import json
import shutil

import pytest
import torch

import cifar_resnet
import distill
from campaign.damage import WRONG, damaged, rewritten
from cifar import checkpoints
from cifar.agreement import measure_agreement
from cifar.checkpoints import CheckpointError, RunFiles
from cifar.settings import describe_device
from cifar.states import check_tensors, go_on, identity
from cifar.training import Run, train
from cifar_runs import make_config, make_data, make_teacher

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
        ({"weight": 3.0}, "belongs to another run: weight is 3.0, must be 1.0"),
        (
            {"teacher": "resnet8 of 9 epochs"},
            "belongs to another run: teacher is 'resnet8 of 9 epochs', must be 'resnet8'",
        ),
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


def test_a_run_made_new_has_its_identity():
    data = make_data(128, 128)
    run = Run(make_config(), data, make_teacher(make_config(), data))
    assert run.taught_by == identity(make_teacher(make_config(), data))
