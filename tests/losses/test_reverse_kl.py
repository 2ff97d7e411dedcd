"""ReverseKLLoss against the formula of Gu, Dong, Wei and Huang (2024)."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, make_pair
from distill import KLLoss, ReverseKLLoss, kl_loss, reverse_kl_loss

pytestmark = pytest.mark.usefixtures("form")


def reference(student, teacher, temperature, axis=-1):
    """T^2 times the sum of q log(q / p), both written out as softmaxes, sample by sample."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        q = np.exp(s[sample] / temperature)
        p = np.exp(t[sample] / temperature)
        q, p = q / q.sum(), p / p.sum()
        values[sample] = temperature**2 * sum(q[c] * math.log(q[c] / p[c]) for c in range(len(q)))
    return values


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, temperature):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), temperature, dim))
    values = reverse_kl_loss(student, teacher, temperature=temperature, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = ReverseKLLoss(temperature, dim=dim)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_temperature_is_1_by_default():
    student, teacher = make_pair(5, 10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 1.0))
    torch.testing.assert_close(reverse_kl_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        ReverseKLLoss(reduction="none")(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12
    )


def test_gradient():
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: reverse_kl_loss(s, teacher, temperature=2.0), student)
    assert torch.autograd.gradgradcheck(lambda s: reverse_kl_loss(s, teacher, temperature=2.0), student)


def test_contract():
    assert_loss_contract(ReverseKLLoss, shape=(6, 10))
    assert_loss_contract(lambda **options: ReverseKLLoss(2.0, dim=1, **options), shape=(4, 5, 3, 2))


def test_is_the_divergence_from_the_student():
    # KL(q || p) with p = (1/4, 3/4), q = (1/2, 1/2) is half of log(4 / 3), 0.1438; the other way it is 0.1308.
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    torch.testing.assert_close(ReverseKLLoss()(student, teacher).item(), 0.5 * math.log(4 / 3), atol=1e-6, rtol=0)


def test_is_kl_with_the_roles_exchanged():
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(
        reverse_kl_loss(student, teacher, temperature=3.0), kl_loss(teacher, student.detach(), temperature=3.0)
    )


def test_zero_when_equal_and_positive_otherwise():
    student, teacher = make_pair(6, 10)
    assert ReverseKLLoss()(student, student.detach()) == 0
    assert (reverse_kl_loss(student, teacher) > 0).all()


def test_does_not_count_shifts():
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(reverse_kl_loss(student + 5, teacher - 3), reverse_kl_loss(student, teacher))


def test_a_class_that_the_student_leaves_out_costs_nothing():
    teacher = torch.tensor([[0.5, 0.5]]).log()
    student = torch.tensor([[1e3, 0.0]])
    torch.testing.assert_close(ReverseKLLoss()(student, teacher).item(), math.log(2), atol=1e-6, rtol=0)
    assert KLLoss(1.0)(student, teacher) > 400


def test_tends_to_half_the_centred_squared_difference_at_high_temperature():
    student, teacher = make_pair(6, 10)
    difference = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    torch.testing.assert_close(ReverseKLLoss(1e4)(student, teacher), (difference**2).mean() / 2, rtol=1e-3, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_finite_on_extreme_logits(temperature):
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = ReverseKLLoss(temperature)(student, -student.detach())
    value.backward()
    torch.testing.assert_close(value.item(), temperature * 2e4)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        ReverseKLLoss(temperature=temperature)
    with pytest.raises(ValueError, match=match):
        reverse_kl_loss(*make_pair(6, 10), temperature=temperature)


def test_repr_shows_options():
    assert repr(ReverseKLLoss(2.0, reduction="none")) == "ReverseKLLoss(temperature=2.0, reduction='none', dim=None)"
