"""Tests of examples/cifar/settings.py: recipes, the settings of a run, and the choice of device and precision."""

import dataclasses

import pytest
import torch

from cifar import settings
from cifar.settings import RECIPES, RunConfig, find_device, find_precision
from cifar_runs import make_config


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (200, {1: 0.1, 100: 0.1, 101: 0.01, 150: 0.01, 151: 0.001, 200: 0.001}),
        (10, {1: 0.1, 5: 0.1, 6: 0.01, 8: 0.01, 9: 0.001, 10: 0.001}),
        (1, {1: 0.1}),
    ],
)
def test_learning_rate_falls_at_one_half_and_three_quarters(epochs, expected):
    assert {e: RECIPES["pooled"].lr_at(e, epochs) for e in expected} == pytest.approx(expected)


def test_recipes_are_those_of_the_reference():
    pooled, logits = RECIPES["pooled"], RECIPES["logits"]
    assert (pooled.stem, pooled.at, pooled.weight, pooled.nesterov) == ("7x7", "fc:input", 1.0, False)
    assert (logits.stem, logits.at, logits.weight, logits.nesterov) == ("3x3", None, 0.1, True)
    for recipe in (pooled, logits):
        assert (recipe.lr, recipe.momentum, recipe.weight_decay, recipe.batch_size) == (0.1, 0.9, 1e-4, 128)


def test_every_setting_that_makes_another_run_makes_another_file_or_is_in_the_file():
    config = make_config()
    other = {
        "method": "kl",
        "recipe": RECIPES["logits"],
        "dataset": "cifar10",
        "student": 14,
        "epochs": 3,
        "seed": 1,
        "device": "cuda",
        "precision": "bfloat16",
        "teacher": 14,
        "weight": 2.0,
        "at": "layer3",
        "teacher_batch_statistics": True,
        "warmup": 0.25,
        "task_weight": 0.5,
        "teacher_epochs": 3,
    }
    assert set(other) == {field.name for field in dataclasses.fields(RunConfig)}
    for name, value in other.items():
        changed = dataclasses.replace(config, **{name: value})
        assert changed.to_dict() != config.to_dict()
        assert (changed.run_id != config.run_id) == (name not in ("device", "precision"))
    warmups = [dataclasses.replace(config, warmup=share).run_id for share in (0.25, 0.5)]
    assert len({config.run_id, *warmups}) == 3
    losses = [dataclasses.replace(config, weight=weight).run_id for weight in (371.847293, 371.847294, 371.847)]
    assert len({*losses}) == 3
    assert losses[2].endswith("-weight371.847-2epochs-seed0")
    weights = [dataclasses.replace(config, task_weight=weight).run_id for weight in (0.25, 0.5)]
    assert len({config.run_id, *weights}) == 3


def test_the_tables_tell_runs_apart_by_what_is_not_usual():
    def label(method="logit", **changes):
        return make_config(method, **changes).label

    assert label() == "logit"
    assert label(at=None) == "logit at logits"
    assert label(at=None, recipe=RECIPES["logits"]) == "logit"
    assert label("at", at="relu1,relu2,relu3") == "at"
    assert label("at", at="relu3") == "at at relu3"
    assert label("dkd", at=None, warmup=20 / 240) == "dkd+warm-up"
    assert label("dkd", at=None, warmup=0.5) == "dkd+warm-up over 0.5"
    assert label("kl", at=None, task_weight=0.1, teacher_batch_statistics=True) == "kl+batch-statistics+task0.1"
    assert label("baseline") == "baseline"


def test_a_teacher_is_shared_by_seeds_losses_and_weights_and_by_nothing_else():
    teacher = make_config().teacher_config()
    assert teacher == make_config("kl", seed=3, weight=5.0, at=None, student=14).teacher_config()
    for change in ({"teacher": 14}, {"epochs": 3}, {"recipe": RECIPES["logits"]}, {"dataset": "digits"}):
        assert make_config(**change).teacher_config().run_id != teacher.run_id
    longer = make_config(teacher_epochs=3)
    assert longer.teacher_config() == make_config(epochs=3).teacher_config()
    assert (longer.teacher_name, make_config(teacher_epochs=1).teacher_name) == (
        "resnet8 of 3 epochs",
        "resnet8 of 1 epoch",
    )
    baseline = make_config("baseline")
    assert (baseline.teacher, baseline.teacher_name, make_config().teacher_name) == (None, "-", "resnet8")
    assert baseline.teacher_config().student == baseline.student  # what it is compared with: a teacher of its own depth


@pytest.mark.parametrize(("capabilities", "expected"), [({"avx512_bf16": True}, "bfloat16"), ({}, "float32")])
def test_automatic_precision_follows_the_processor(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert find_precision("auto", torch.device("cpu")) == expected
    assert find_precision("float32", torch.device("cpu")) == "float32"
    assert find_precision("bfloat16", torch.device("cpu")) == "bfloat16"


@pytest.mark.parametrize(("flags", "expected"), [("fpu avx512_bf16 sse", "bfloat16"), ("fpu avx2", "float32")])
def test_automatic_precision_reads_cpuinfo_where_pytorch_cannot_tell(monkeypatch, flags, expected):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(settings, "_cpuinfo", lambda key: flags if key == "flags" else None)
    assert find_precision("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize("name", ["cuda:99", "no_such_device"])
def test_rejects_a_device_that_is_not_there(name):
    with pytest.raises(ValueError, match=f"device must be one that PyTorch can use here, got '{name}'"):
        find_device(name)
