"""Tests of the weights that `--calibrate` prints: examples/cifar/calibration.py."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional as F

from cifar import calibration
from cifar.calibration import calibrated_weight
from cifar.steps import batches
from cifar.training import build_student, build_teacher
from cifar_runs import make_config, make_data, make_teacher
from distill import kl_loss

SHARE = 0.25


def norm(value, parameters):
    return torch.cat([slope.flatten() for slope in torch.autograd.grad(value, parameters, retain_graph=True)]).norm()


def test_the_weight_is_the_ratio_of_the_gradients_over_the_first_batches_of_the_run():
    data, config = make_data(), make_config("kl", at=None, weight=7.0, task_weight=0.5, warmup=0.5)
    weights = make_teacher(config, data)
    student, teacher = build_student(config, data).train(), build_teacher(config, data, weights).eval()
    ours, theirs = [], []
    for images, labels in itertools.islice(batches(data, 128, torch.Generator().manual_seed(1)), 10):
        logits = student(images)
        ours.append(norm(kl_loss(logits, teacher(images).detach(), temperature=4.0).mean(), [*student.parameters()]))
        theirs.append(norm(0.5 * F.cross_entropy(logits, labels), [*student.parameters()]))
    wanted = sum(theirs) / (1 - SHARE) * SHARE / sum(ours)
    assert calibrated_weight(config, data, weights, SHARE) == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("method", "at", "task_weight", "more"),
    [
        ("kl", None, 0.1, ""),
        ("kl", None, None, " --task-weight 1"),
        ("srd", "fc:input", None, ""),
        ("hint", "relu1", 0.5, " --at relu1 --task-weight 0.5"),
    ],
)
def test_the_command_has_the_options_that_the_weight_was_measured_with(monkeypatch, method, at, task_weight, more):
    monkeypatch.setattr(calibration, "calibrated_weight", lambda *given: 0.25)
    monkeypatch.setattr(calibration, "RunFiles", SimpleNamespace(of=lambda *given: Mock()))
    students = [make_config(method, at=at, task_weight=task_weight)]
    told = calibration.describe_weights(students, Path(), {"tiny": None}, SHARE)
    assert told.splitlines()[-1] == f"--loss {method} --weight 0.25{more}"


def test_a_loss_that_wants_to_know_the_images_gets_them():
    data, config = make_data(), make_config("crd")
    weights = make_teacher(config, data)
    before = torch.get_rng_state()
    first, again = (calibrated_weight(config, data, weights, SHARE) for _ in range(2))
    assert first == again > 0
    assert torch.equal(torch.get_rng_state(), before)
