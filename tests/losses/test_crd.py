"""CRDLoss against the formula of Tian, Krishnan and Isola (2020), at the scale of their code."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from contract import assert_loss_contract, gradient, make_pair
from crd_embeddings import build, embed, unit, with_memory
from distill import CRDLoss, Distiller, Term, crd_loss
from distill.losses import crd


def reference_in_batch(student, teacher, temperature):
    """-1/N of the sum of log h of the pair and log(1 - h) of the others, over the anchors of both sides."""
    scores = np.exp(unit(student) @ unit(teacher).T / temperature)
    n = len(scores)
    h = scores / (scores + (n - 1) * scores.mean())
    total = 0.0
    for i in range(n):
        total += 2 * math.log(h[i, i])
        total += sum(math.log(1 - h[i, j]) + math.log(1 - h[j, i]) for j in range(n) if j != i)
    return -total / n


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3), (4, 3, 2, 2)])
def test_matches_reference_in_batch(shape, temperature):
    student, teacher = make_pair(*shape)
    s, t = (x.detach().flatten(1).numpy() for x in (student, teacher))
    expected = torch.tensor(reference_in_batch(s, t, temperature), dtype=torch.float64)
    value = crd_loss(student, teacher, temperature=temperature).detach()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_module_without_memory_compares_its_embeddings():
    loss = build(12, 7, dim=5, temperature=0.5)
    student, teacher = make_pair(6, 3, 2, 2, teacher_shape=(6, 7))
    ours, theirs = embed(loss.student_embedding, student), embed(loss.teacher_embedding, teacher)
    expected = torch.tensor(reference_in_batch(ours, theirs, 0.5), dtype=torch.float64)
    value = loss(student, teacher)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=1e-12)
    value.backward()
    assert all(p.grad.abs().max() > 0 for p in loss.parameters())


def test_defaults_are_those_of_the_paper():
    loss = build(8, 8, 20000)
    assert (loss.temperature, loss.momentum, loss.num_negatives) == (0.07, 0.5, 16384)
    assert loss.student_memory.shape == loss.teacher_memory.shape == (20000, 128)
    torch.testing.assert_close(loss.student_memory.square().sum(1).mean(), torch.tensor(1.0), rtol=0.01, atol=0)
    assert loss.student_memory.abs().max() <= math.sqrt(3 / 128)
    assert not torch.equal(loss.student_memory, loss.teacher_memory)


def test_gradient():
    student, teacher = make_pair(4, 3)
    # At a constant m, which the gradient takes it for.
    scores = nn.functional.normalize(student.detach()) @ nn.functional.normalize(teacher).T
    constant = crd._log_mean(scores / 0.5)

    def at_constant(s):
        z = nn.functional.normalize(s) @ nn.functional.normalize(teacher).T / 0.5 - constant - math.log(3)
        own = torch.eye(4, dtype=torch.bool)
        return -2 * (nn.functional.logsigmoid(z)[own].sum() + nn.functional.logsigmoid(-z)[~own].sum()) / 4

    of_ours = gradient(crd_loss, student, teacher, temperature=0.5)
    torch.testing.assert_close(of_ours, gradient(at_constant, student), rtol=1e-10, atol=1e-12)

    loss = with_memory(temperature=0.5).double()
    student, teacher = make_pair(4, 10, teacher_shape=(4, 7))
    own = torch.arange(4)
    loss(student, teacher, own)  # sets the constants
    loss.eval()
    assert torch.autograd.gradcheck(lambda s: copy.deepcopy(loss)(s, teacher, own), student)


def test_contract():
    loss = lambda: build(12, 7, dim=5, temperature=0.5)  # noqa: E731 - as short as it is
    assert_loss_contract(loss, shape=(4, 3, 2, 2), teacher_shape=(4, 7), per_sample=False, batches=True)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype):
    loss = with_memory()
    student, teacher = make_pair(4, 10, teacher_shape=(4, 7), dtype=dtype)
    own = torch.arange(4)
    twin, third = copy.deepcopy(loss), copy.deepcopy(loss)
    value = loss(student, teacher, own)
    assert value.dtype == torch.float32
    assert value == twin(student.float(), teacher.float(), own)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert third(student.float(), teacher.float(), own) == value
    assert loss.to(dtype)(student, teacher, own).dtype == torch.float32
    assert loss.student_memory.dtype == dtype


def test_indices_may_stand_beside_labels_in_a_distiller():
    student, teacher = nn.Linear(6, 3), nn.Linear(6, 3)
    loss = build(6, 6, 20, dim=4, num_negatives=5, generator=torch.Generator().manual_seed(0))
    twin = copy.deepcopy(loss)
    task = nn.CrossEntropyLoss()
    distiller = Distiller(
        student,
        teacher,
        {"crd": Term(loss, at=":input", weight=0.8)},
        task_loss=lambda logits, target: task(logits, target[:, 0]),
    )
    inputs = make_pair(4, 6, dtype=torch.float32)[0]
    target = torch.tensor([[0, 17], [2, 3], [1, 0], [0, 5]])
    out = distiller(inputs, target)
    assert out.terms["crd"] == twin(inputs, inputs, target[:, 1])
    out.loss.backward()
    assert all(p.grad is not None for p in distiller.parameters())


def test_finite_on_extreme_features_and_samples_of_zeros():
    for features in (torch.zeros(4, 8), 1e4 * torch.ones(4, 8)):
        student = features.clone().requires_grad_()
        crd_loss(student, make_pair(4, 8, dtype=torch.float32)[1], temperature=1e-3).backward()
        assert student.grad.isfinite().all()


def test_falls_as_pairs_come_together():
    student, teacher = make_pair(8, 5)
    values = [crd_loss(torch.lerp(student, teacher, weight), teacher) for weight in (0.0, 0.5, 1.0)]
    assert values[0] > values[1] > values[2]


def test_rejects_bad_options():
    for name, sizes in {"student_dim": (0, 7), "teacher_dim": (10, 0)}.items():
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, got 0"):
            CRDLoss(*sizes)
    for name in ("dim", "num_negatives"):
        for bad in (0, 2.5, True, math.nan):
            with pytest.raises(ValueError, match=f"{name} must be a positive integer, got {bad}"):
                CRDLoss(10, 7, 30, **{name: bad})
    for momentum in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"momentum must be at least 0 and below 1, got {momentum}"):
            CRDLoss(10, 7, 30, momentum=momentum)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        CRDLoss(10, 7, temperature=0)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        crd_loss(*make_pair(4, 5), temperature=0)
    for bad in (1, 2.5, True):
        with pytest.raises(ValueError, match=f"num_samples must be an integer of at least 2, got {bad}"):
            CRDLoss(10, 7, bad)
    for options in (
        {"num_negatives": 5},
        {"momentum": 0.1},
        {"labels": torch.arange(3)},
        {"generator": torch.Generator()},
    ):
        with pytest.raises(ValueError, match="must be left as they are where there is no memory"):
            CRDLoss(10, 7, **options)


def test_rejects_bad_labels():
    for labels in (torch.arange(29), torch.arange(30.0), torch.arange(30) > 9, torch.arange(60).reshape(30, 2)):
        with pytest.raises(ValueError, match=r"labels must be integers \(30,\), got torch\."):
            CRDLoss(10, 7, 30, labels=labels)
    with pytest.raises(ValueError, match="labels must be of at least 2 classes, got 1"):
        CRDLoss(10, 7, 30, labels=torch.zeros(30, dtype=torch.long))


def test_checks_options_when_they_are_set():
    loss = with_memory()
    for name, bad in (("temperature", 0.0), ("num_negatives", 0), ("momentum", 1.0)):
        with pytest.raises(ValueError, match=f"{name} must be .*, got {bad}"):
            setattr(loss, name, bad)


def test_rejects_other_widths_and_single_samples():
    with pytest.raises(ValueError, match="same number of values per sample, got 5 and 7"):
        crd_loss(*make_pair(4, 5, teacher_shape=(4, 7)))
    loss = build(10, 7)
    with pytest.raises(ValueError, match="student must have student_dim=10 values per sample, got 9"):
        loss(*make_pair(4, 9, teacher_shape=(4, 7)))
    with pytest.raises(ValueError, match="teacher must have teacher_dim=7 values per sample, got 10"):
        loss(*make_pair(4, 10))
    with pytest.raises(ValueError, match="must have at least 2 samples, got 1 .*drop_last"):
        crd_loss(*make_pair(1, 5))


def test_repr_shows_options():
    assert "CRDLoss(\n  num_samples=None, temperature=0.07\n" in repr(build(10, 7))
    assert "num_samples=30, temperature=0.07, num_negatives=4, momentum=0.5" in repr(with_memory())
