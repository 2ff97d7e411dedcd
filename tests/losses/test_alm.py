"""ALMLoss against the binary cross-entropy of Minixhofer et al. (2025)."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import ALMLoss, alm_loss


def reference(student, teacher, temperature):
    """-P log Q - (1 - P) log(1 - Q) of the likelihoods to the power of 1 / T, chunk by chunk, 1e-6 taken off."""
    values = np.zeros(student.shape)
    for chunk in np.ndindex(values.shape):
        log_q, log_p = (min(float(x[chunk]), 0.0) / temperature - 1e-6 for x in (student, teacher))
        not_p, not_q = -math.expm1(log_p), -math.expm1(log_q)  # 1 - P, with the digits that 1 - exp would lose
        values[chunk] = -math.exp(log_p) * log_q - not_p * math.log(not_q)
    return values


def make_likelihoods(*shape, dtype=torch.float64):
    student, teacher = make_pair(*shape)
    return (-5 * student.detach().abs()).to(dtype).requires_grad_(), (-5 * teacher.abs()).to(dtype)


@pytest.mark.parametrize("temperature", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("shape", [(7,), (5, 9)])
def test_matches_reference(shape, temperature):
    student, teacher = make_likelihoods(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), temperature))
    values = alm_loss(student, teacher, temperature=temperature).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = ALMLoss(temperature)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_keeps_its_digits_where_a_chunk_is_likely():
    student, teacher = make_likelihoods(200)
    exact = alm_loss(1e-3 * student, 1e-3 * teacher)
    low = alm_loss((1e-3 * student).float(), (1e-3 * teacher).float())
    torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=0)


def test_defaults():
    student, teacher = make_likelihoods(5, 4)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 100.0))
    torch.testing.assert_close(alm_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ALMLoss(reduction="none")(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_likelihoods(4, 5)
    assert torch.autograd.gradcheck(lambda s: alm_loss(s, teacher, temperature=3.0), student)
    assert torch.autograd.gradgradcheck(lambda s: alm_loss(s, teacher, temperature=3.0), student)


def test_contract():
    assert_loss_contract(ALMLoss, shape=(6, 10), elementwise=True)
    assert_loss_contract(lambda **options: ALMLoss(3.0, **options), shape=(4, 3, 2), elementwise=True)


def test_smallest_where_the_likelihoods_are_equal():
    student, _ = make_likelihoods(6, 10)
    assert gradient(ALMLoss(3.0), student, student.detach()).abs().max() < 1e-12
    least = alm_loss(student, student.detach(), temperature=3.0)
    for factor in (0.5, 0.9, 1.1, 3.0):
        assert (alm_loss(factor * student, student.detach(), temperature=3.0) > least).all()


def test_pulls_towards_the_teacher():
    student = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    slope = gradient(ALMLoss(), student, torch.tensor([-2.0, -2.0], dtype=torch.float64))
    assert slope[0] > 0  # too likely: down
    assert slope[1] < 0


def test_finite_where_the_student_is_sure_and_infinite_where_it_excludes_a_chunk():
    teacher = torch.tensor([-1.0, 0.0, -1e6, -math.inf, -1.0])
    student = torch.tensor([0.0, 0.0, 0.0, -math.inf, -math.inf])
    values = alm_loss(student, teacher)
    assert values[:4].isfinite().all()
    assert values[4] == math.inf
    assert values[3] == 0
    assert gradient(ALMLoss(), student[:3], teacher[:3]).isfinite().all()
    above = torch.tensor([0.0, 1e-7, 0.5])  # by rounding, in bfloat16 by much
    assert torch.equal(alm_loss(above, teacher[:1].expand(3)), values[:1].expand(3))
    assert torch.equal(alm_loss(student[:1].expand(3) - 1, above), alm_loss(student[:3] - 1, torch.zeros(3)))
    assert gradient(ALMLoss(), above, teacher[:1].expand(3)).isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        ALMLoss(temperature)
    with pytest.raises(ValueError, match=match):
        alm_loss(*make_likelihoods(6), temperature=temperature)


def test_repr_shows_options():
    assert repr(ALMLoss(10.0)) == "ALMLoss(temperature=10.0, reduction='mean')"
