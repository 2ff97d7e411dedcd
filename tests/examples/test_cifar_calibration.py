"""Tests of the weights that `--calibrate` prints: examples/cifar/calibration.py."""

import itertools

import pytest
import torch
from torch.nn import functional as F

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


def test_a_loss_that_wants_to_know_the_images_gets_them():
    data, config = make_data(), make_config("crd")
    weights = make_teacher(config, data)
    before = torch.get_rng_state()
    first, again = (calibrated_weight(config, data, weights, SHARE) for _ in range(2))
    assert first == again > 0
    assert torch.equal(torch.get_rng_state(), before)
