"""SDDLoss against the formula of Wei, Luo and Luo (2024)."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from contract import assert_loss_contract, make_pair
from distill import Distiller, DISTLoss, DKDLoss, KLLoss, SDDLoss, Term, dkd_loss, sdd_loss
from models import ResNet, images


def head(width, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(width, classes).double()
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def labels(n, classes=5):
    return torch.arange(n) % classes


def divergence(s, t, temperature):
    q, p = (np.exp(x / temperature) / np.exp(x / temperature).sum() for x in (s, t))
    return temperature**2 * sum(p[c] * math.log(p[c] / q[c]) for c in range(len(p)))


def reference(student, teacher, target, ours, theirs, scales, temperature=4.0):
    """Region by region: pool, classify, compare; twice where the teacher thinks otherwise than about the whole."""
    values = []
    for s, t, y in zip(student, teacher, target, strict=True):
        total, number, whole = 0.0, 0, None
        for scale in scales:
            for i, j in np.ndindex(scale, scale):
                logits = []
                for x, (weight, bias) in ((s, ours), (t, theirs)):
                    h, w = x.shape[1] // scale, x.shape[2] // scale
                    region = x[:, i * h : (i + 1) * h, j * w : (j + 1) * w]
                    logits.append(weight @ region.reshape(len(x), -1).mean(1) + bias)
                right = int(np.argmax(logits[1])) == y
                whole = right if whole is None else whole
                total += (1.0 if right == whole else 2.0) * divergence(*logits, temperature)
                number += 1
        values.append(total / number)
    return np.array(values)


@pytest.mark.parametrize("scales", [(1, 2, 4), (1, 2), (1,)])
def test_matches_reference(scales):
    student, teacher = make_pair(6, 3, 8, 4, teacher_shape=(6, 4, 4, 8))
    heads = head(3), head(4, seed=1)
    numbers = [[p.detach().numpy() for p in h.parameters()] for h in heads]
    target = labels(6)
    expected = reference(student.detach().numpy(), teacher.numpy(), target.numpy(), *numbers, scales)
    loss = SDDLoss(KLLoss(reduction="none"), *heads, scales)
    torch.testing.assert_close(
        loss(student, teacher, target).detach(), torch.from_numpy(expected), rtol=1e-12, atol=1e-12
    )
    value = SDDLoss(KLLoss(), *heads, scales)(student, teacher, target).item()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_its_reduction_is_that_of_the_loss_inside():
    loss = SDDLoss(KLLoss(), head(3), head(4, seed=1))
    student, teacher = make_pair(6, 3, 8, 4, teacher_shape=(6, 4, 4, 8))
    mean = loss(student, teacher, labels(6))
    loss.reduction = "sum"
    assert loss.loss.reduction == "sum"
    torch.testing.assert_close(loss(student, teacher, labels(6)), 6 * mean)


def test_rejects_classifiers_on_another_device():
    student, teacher = make_pair(6, 3, 8, 4, teacher_shape=(6, 4, 4, 8))
    with pytest.raises(ValueError, match="the classifiers must be on the device of the maps, cpu, got meta"):
        SDDLoss(KLLoss(), head(3).to("meta"), head(4).to("meta"))(student, teacher, labels(6))


def test_scales_are_1_2_4_by_default_and_complementary_regions_count_twice():
    loss = SDDLoss(KLLoss(), head(3), head(4))
    assert loss.scales == (1, 2, 4)
    assert loss.complementary == 2.0


def test_weights_of_all_four_cases():
    # Two classes, label 0. The teacher about the whole: right, wrong; about the region: right, wrong.
    right, wrong = [2.0, 0.0], [0.0, 2.0]
    teacher = torch.tensor([[right, right], [right, wrong], [wrong, right], [wrong, wrong]])
    student = torch.zeros(4, 2, 2)
    values = sdd_loss(student, teacher, torch.zeros(4, dtype=torch.int64), loss=KLLoss(1.0))
    one = KLLoss(1.0)(student[:1, 0], teacher[:1, 0])
    torch.testing.assert_close(values, one * torch.tensor([1.0, 1.5, 1.5, 1.0]))
    values = sdd_loss(student, teacher, torch.zeros(4, dtype=torch.int64), loss=KLLoss(1.0), complementary=5.0)
    torch.testing.assert_close(values, one * torch.tensor([1.0, 3.0, 3.0, 1.0]))


def test_any_loss_of_rows_also_with_labels():
    student, teacher = make_pair(4, 3, 5)
    target = labels(4)
    values = sdd_loss(student, teacher, target, loss=DKDLoss(beta=2.0), complementary=1.0)
    each = dkd_loss(student, teacher, target[:, None].expand(4, 3), beta=2.0)
    torch.testing.assert_close(values, each.mean(1))


def test_with_one_region_it_is_the_loss_of_the_networks():
    student, teacher = ResNet(), ResNet(width=6, seed=1)
    x, target = images()
    term = Term(SDDLoss(DKDLoss(), student.fc, teacher.fc, (1,)), at="layer4")
    plain = Distiller(student, teacher, DKDLoss(), task_loss=None)
    torch.testing.assert_close(Distiller(student, teacher, term, task_loss=None)(x, target).loss, plain(x, target).loss)


def test_trains_the_students_classifier_and_not_the_teachers():
    student, teacher = ResNet(), ResNet(width=6, seed=1)
    teacher.requires_grad_(False)
    x, target = images(side=32)
    loss = SDDLoss(KLLoss(), student.fc, teacher.fc)
    assert not list(loss.parameters())
    distiller = Distiller(student, teacher, Term(loss, at="layer4"), task_loss=None)
    distiller(x, target).loss.backward()
    assert student.fc.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())
    student.fc = nn.Linear(32, 5)
    with pytest.raises(ValueError, match="student_head must be the head that the model has"):
        distiller(x, target)


def test_a_copy_of_a_distiller_has_heads_of_its_own():
    student, teacher = ResNet(), ResNet(width=6, seed=1)
    distiller = Distiller(student, teacher, Term(SDDLoss(KLLoss(), student.fc, teacher.fc), at="layer4"))
    twin = copy.deepcopy(distiller)
    x, target = images(side=32)
    assert torch.equal(twin(x, target).loss, distiller(x, target).loss)
    twin(x, target).loss.backward()
    assert student.fc.weight.grad is None
    assert twin.student.fc.weight.grad.abs().max() > 0


def test_gradient():
    student, teacher = make_pair(3, 2, 4, 4, teacher_shape=(3, 3, 4, 4))
    heads = head(2), head(3, seed=1)
    assert torch.autograd.gradcheck(lambda s: SDDLoss(KLLoss(), *heads)(s, teacher, labels(3)), student)


def test_contract():
    heads = head(3), head(4, seed=1)

    def build(**options):
        return SDDLoss(KLLoss(**options), *heads, (1, 2))

    target = labels(5)
    assert_loss_contract(build, shape=(5, 3, 2, 4), teacher_shape=(5, 4, 4, 2), target=target, maps=True, moves=False)


def test_zero_when_equal():
    student, _ = make_pair(4, 3, 4, 4)
    both = head(3)
    assert SDDLoss(KLLoss(), both, both)(student, student.detach(), labels(4)) == 0


@pytest.mark.parametrize("scales", [(), (2, 1), 4, [2]])
def test_rejects_scales_that_do_not_begin_with_the_whole(scales):
    with pytest.raises(ValueError, match="scales must be a tuple of positive integers that begins with 1, got"):
        SDDLoss(KLLoss(), head(3), head(4), scales)
    with pytest.raises(ValueError, match="each of scales must be a positive integer, got 0"):
        SDDLoss(KLLoss(), head(3), head(4), (1, 0))


def test_rejects_losses_that_are_none_of_rows():
    for call in (
        lambda loss: SDDLoss(loss, head(3), head(4)),
        lambda loss: sdd_loss(*make_pair(4, 3, 5), labels(4), loss=loss),
    ):
        with pytest.raises(TypeError, match=r"loss must be a loss of rows of logits, such as KLLoss\(\), got DISTLoss"):
            call(DISTLoss())
        with pytest.raises(ValueError, match=r"loss must have its classes last \(dim=None or -1\), got dim=1"):
            call(KLLoss(dim=1))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_weights(bad):
    match = f"complementary must be positive and finite, got {bad}"
    with pytest.raises(ValueError, match=match):
        SDDLoss(KLLoss(), head(3), head(4), complementary=bad)
    with pytest.raises(ValueError, match=match):
        sdd_loss(*make_pair(4, 3, 5), labels(4), loss=KLLoss(), complementary=bad)


def test_rejects_what_does_not_fit():
    loss = SDDLoss(KLLoss(), head(3), head(4))
    with pytest.raises(ValueError, match="target must be the class of every sample, got None"):
        loss(*make_pair(4, 3, 4, 4, teacher_shape=(4, 4, 4, 4)))
    with pytest.raises(ValueError, match=r"student must have 3 channels, got shape \(4, 4, 4, 4\)"):
        loss(*make_pair(4, 4, 4, 4), labels(4))
    with pytest.raises(ValueError, match=r"must be logits of regions \(N, R, C\), got shape \(4, 5\)"):
        sdd_loss(*make_pair(4, 5), labels(4), loss=KLLoss())


def test_repr_shows_options():
    text = repr(SDDLoss(KLLoss(), head(3), head(4)))
    assert "scales=(1, 2, 4), complementary=2.0, student_head=(5, 3), teacher_head=(5, 4)" in text
    assert "(loss): KLLoss(temperature=4.0" in text
