"""NKDLoss against the formula of Yang et al. (2023)."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import NKDLoss, nkd_loss

pytestmark = pytest.mark.usefixtures("form")


def make_labels(*shape, classes, seed=1):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def reference(student, teacher, target, gamma, temperature, axis=-1):
    """-p_y log q_y at temperature 1, and gamma T^2 times the cross-entropy of the other classes, renormalised."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        y = int(target[sample])
        q, p = np.exp(s[sample]), np.exp(t[sample])
        value = -p[y] / p.sum() * math.log(q[y] / q.sum())
        q_hat = np.exp(np.delete(s[sample], y) / temperature)
        p_hat = np.exp(np.delete(t[sample], y) / temperature)
        q_hat, p_hat = q_hat / q_hat.sum(), p_hat / p_hat.sum()
        for c in range(len(p_hat)):
            value -= gamma * temperature**2 * p_hat[c] * math.log(q_hat[c])
        values[sample] = value
    return values


@pytest.mark.parametrize(("gamma", "temperature"), [(1.5, 1.0), (3.5, 3.0), (0.0, 1.0), (1.0, 0.5)])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, gamma, temperature):
    student, teacher = make_pair(*shape)
    target = make_labels(*(n for d, n in enumerate(shape) if d != dim % len(shape)), classes=shape[dim])
    expected = reference(student.detach().numpy(), teacher.numpy(), target, gamma, temperature, dim)
    expected = torch.as_tensor(expected)
    values = nkd_loss(student, teacher, target, gamma=gamma, temperature=temperature, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = NKDLoss(gamma, temperature, dim=dim)(student, teacher, target).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_defaults():
    student, teacher = make_pair(5, 10)
    target = make_labels(5, classes=10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), target, 1.5, 1.0))
    torch.testing.assert_close(nkd_loss(student, teacher, target).detach(), expected, rtol=1e-12, atol=1e-12)
    values = NKDLoss(reduction="none")(student, teacher, target).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 5)
    target = make_labels(4, classes=5)
    assert torch.autograd.gradcheck(lambda s: nkd_loss(s, teacher, target, temperature=2.0), student)
    assert torch.autograd.gradgradcheck(lambda s: nkd_loss(s, teacher, target, temperature=2.0), student)


def test_contract():
    assert_loss_contract(NKDLoss, shape=(6, 10), target=make_labels(6, classes=10))
    assert_loss_contract(
        lambda **options: NKDLoss(3.5, 3.0, dim=1, **options),
        shape=(4, 5, 3, 2),
        target=make_labels(4, 3, 2, classes=5),
    )


def test_the_targets_part_does_not_know_the_temperature():
    student, teacher = make_pair(6, 10)
    target = make_labels(6, classes=10)
    hot = nkd_loss(student, teacher, target, gamma=0.0, temperature=5.0)
    torch.testing.assert_close(hot, nkd_loss(student, teacher, target, gamma=0.0), rtol=1e-12, atol=0)


def test_the_others_part_is_smallest_where_the_student_has_the_teachers_proportions():
    _, teacher = make_pair(6, 10)
    target = make_labels(6, classes=10)

    def others(student):
        return nkd_loss(student, teacher, target) - nkd_loss(student, teacher, target, gamma=0.0)

    # Whatever the target's logit: it is left out of the normalisation.
    same = teacher.scatter(-1, target[:, None], 7.0)
    torch.testing.assert_close(others(same), others(teacher))
    for seed in range(5):
        assert (others(make_pair(6, 10, seed=seed)[0]) > others(teacher)).all()


def test_two_classes_leave_the_targets_part_only():
    student, teacher = make_pair(6, 2)
    target = make_labels(6, classes=2)
    torch.testing.assert_close(nkd_loss(student, teacher, target), nkd_loss(student, teacher, target, gamma=0.0))
    assert gradient(NKDLoss(), student, teacher, target).isfinite().all()


def test_does_not_count_shifts():
    student, teacher = make_pair(6, 10)
    target = make_labels(6, classes=10)
    torch.testing.assert_close(nkd_loss(student + 5, teacher - 3, target), nkd_loss(student, teacher, target))


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("target", [0, 1])
def test_finite_on_extreme_logits(classes, target):
    for scale in (1.0, -1.0):
        student = torch.tensor([[1e4, -1e4, 0.0, 5.0]])[:, :classes].requires_grad_()
        value = NKDLoss()(student, scale * student.detach(), torch.tensor([target]))
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [-1.0, math.inf, math.nan])
def test_rejects_bad_weights(gamma):
    match = f"gamma must be zero or positive and finite, got {gamma}"
    with pytest.raises(ValueError, match=match):
        NKDLoss(gamma)
    with pytest.raises(ValueError, match=match):
        nkd_loss(*make_pair(6, 10), make_labels(6, classes=10), gamma=gamma)


def test_rejects_bad_labels():
    student, teacher = make_pair(6, 10)
    labels = make_labels(6, classes=10)
    with pytest.raises(ValueError, match="target must be the class of every sample, got None"):
        NKDLoss()(student, teacher)
    for shape in ((5,), (6, 1), (6, 10), ()):
        with pytest.raises(ValueError, match=r"target must be one class per sample, of shape \(6,\), got shape"):
            nkd_loss(student, teacher, torch.zeros(shape, dtype=torch.long))
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"target must be integers, got {dtype}"):
            nkd_loss(student, teacher, labels.to(dtype))
    with pytest.raises(ValueError, match="target must be on the device of the logits, cpu, got meta"):
        nkd_loss(student, teacher, labels.to("meta"))
    for label in (-100, 10):
        with pytest.raises(ValueError, match=f"target must be classes from 0 to 9, got {label}"):
            nkd_loss(student, teacher, torch.full((6,), label))


def test_labels_may_be_of_any_integer_dtype():
    student, teacher = make_pair(6, 10)
    labels = make_labels(6, classes=10)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(nkd_loss(student, teacher, labels.to(dtype)), nkd_loss(student, teacher, labels))


def test_rejects_a_single_class():
    with pytest.raises(ValueError, match=r"at least 2 classes along dim -1, got shape \(6, 1\)"):
        nkd_loss(*make_pair(6, 1), make_labels(6, classes=1))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        NKDLoss(temperature=temperature)
    with pytest.raises(ValueError, match=match):
        nkd_loss(*make_pair(6, 10), torch.zeros(6, dtype=torch.long), temperature=temperature)


def test_repr_shows_options():
    shown = "NKDLoss(gamma=3.5, temperature=3.0, reduction='none', dim=None)"
    assert repr(NKDLoss(3.5, 3.0, reduction="none")) == shown
