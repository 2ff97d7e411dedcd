"""AlphaBetaLoss against the formula of Wang et al. (2025), after Cichocki, Cruces and Amari (2011)."""

import functools
import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import AlphaBetaLoss, alpha_beta_loss, kl_loss, reverse_kl_loss
from divergences import (
    assert_hessian_where_equal,
    assert_keeps_digits,
    assert_knows_zeros,
    assert_light,
    assert_shows_nan,
)

pytestmark = pytest.mark.usefixtures("form")


def reference(student, teacher, alpha, beta, temperature=1.0, axis=-1):
    """The formula, or its published limit where an exponent is 0, class by class."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        q = np.exp(s[sample] / temperature)
        p = np.exp(t[sample] / temperature)
        for pc, qc in zip(p / p.sum(), q / q.sum(), strict=True):
            if beta == 0:
                if 0 in (pc, qc):
                    term = math.inf if pc else qc**alpha / alpha**2
                else:
                    term = (pc**alpha * math.log(pc**alpha / qc**alpha) - pc**alpha + qc**alpha) / alpha**2
            elif alpha == 0:
                if 0 in (pc, qc):
                    term = math.inf if qc else pc**beta / beta**2
                else:
                    term = (qc**beta * math.log(qc**beta / pc**beta) - qc**beta + pc**beta) / beta**2
            else:
                both = alpha + beta
                term = pc**alpha * qc**beta - alpha / both * pc**both - beta / both * qc**both
                term = -term / (alpha * beta)
            values[sample] += term
    return values


EXPONENTS = [
    (0.2, 0.7),
    (0.8, 0.3),
    (0.3, 0.7),
    (1.0, 1.0),
    (2.0, 0.5),
    (1.0, 0.0),
    (0.0, 1.0),
    (0.5, 0.0),
    (0.0, 2.0),
    (0.7, 0.04),
]


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS)
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, alpha, beta):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), alpha, beta, 2.0, dim))
    values = alpha_beta_loss(student, teacher, alpha=alpha, beta=beta, temperature=2.0, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = AlphaBetaLoss(alpha, beta, 2.0, dim=dim)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_temperature_is_1_by_default():
    student, teacher = make_pair(5, 10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 0.2, 0.7))
    values = alpha_beta_loss(student, teacher, alpha=0.2, beta=0.7).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    values = AlphaBetaLoss(0.2, 0.7, reduction="none")(student, teacher).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (0.3, 0.7), (1.0, 0.0), (0.0, 1.0), (0.9, 0.01), (0.01, 0.9)])
def test_gradient(alpha, beta):
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: alpha_beta_loss(s, teacher, alpha=alpha, beta=beta), student)
    assert torch.autograd.gradgradcheck(lambda s: alpha_beta_loss(s, teacher, alpha=alpha, beta=beta), student)


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS)
def test_second_derivative_where_they_are_equal(alpha, beta):
    assert_hessian_where_equal(lambda: AlphaBetaLoss(alpha, beta), 1.0, power=alpha + beta)


def test_contract():
    assert_loss_contract(lambda **options: AlphaBetaLoss(0.2, 0.7, **options), shape=(6, 10))
    assert_loss_contract(lambda **options: AlphaBetaLoss(1.0, 0.0, 2.0, dim=1, **options), shape=(4, 5, 3, 2))


def test_limits_are_kl_and_reverse_kl():
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(
        4 * alpha_beta_loss(student, teacher, alpha=1.0, beta=0.0, temperature=2.0),
        kl_loss(student, teacher, temperature=2.0),
    )
    torch.testing.assert_close(
        4 * alpha_beta_loss(student, teacher, alpha=0.0, beta=1.0, temperature=2.0),
        reverse_kl_loss(student, teacher, temperature=2.0),
    )


@pytest.mark.parametrize("small", [1e-3, 1e-6, 1e-12, 1e-200])
@pytest.mark.parametrize("large", [0.5, 1.0, 2.0])
def test_limits_are_reached_continuously(large, small):
    student, teacher = make_pair(6, 10)
    for exponents, limit in (((large, small), (large, 0.0)), ((small, large), (0.0, large))):
        near = AlphaBetaLoss(*exponents)
        at = AlphaBetaLoss(*limit)
        # The value moves by a few times the small exponent, and by nothing else.
        torch.testing.assert_close(near(student, teacher), at(student, teacher), rtol=5 * small + 1e-13, atol=0)
        near, at = gradient(near, student, teacher), gradient(at, student, teacher)
        torch.testing.assert_close(near, at, rtol=0, atol=5 * small + 1e-14)


def test_both_ways_to_compute_it_agree_where_they_meet():
    student, teacher = make_pair(6, 10)
    for exponents in ((0.8, 0.05), (0.05, 0.8)):
        below = AlphaBetaLoss(*(e - 1e-15 if e == 0.05 else e for e in exponents))
        above = AlphaBetaLoss(*exponents)
        torch.testing.assert_close(below(student, teacher), above(student, teacher), rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient(below, student, teacher), gradient(above, student, teacher))


def test_known_members():
    student, teacher = make_pair(6, 10)
    p, q = teacher.softmax(-1), student.softmax(-1)
    half_squared = ((p - q) ** 2).sum(-1) / 2
    torch.testing.assert_close(alpha_beta_loss(student, teacher, alpha=1.0, beta=1.0), half_squared)
    hellinger = ((p.sqrt() - q.sqrt()) ** 2).sum(-1) / 2
    torch.testing.assert_close(alpha_beta_loss(student, teacher, alpha=0.5, beta=0.5), 4 * hellinger)


def test_exchanging_roles_and_exponents_changes_nothing():
    student, teacher = make_pair(6, 10)
    for alpha, beta in EXPONENTS:
        torch.testing.assert_close(
            alpha_beta_loss(student, teacher, alpha=alpha, beta=beta),
            alpha_beta_loss(teacher, student.detach(), alpha=beta, beta=alpha),
        )


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS)
def test_zero_when_equal_and_positive_otherwise(alpha, beta):
    student, teacher = make_pair(6, 10)
    loss = AlphaBetaLoss(alpha, beta, reduction="none")
    torch.testing.assert_close(loss(student, student.detach()), torch.zeros(6, dtype=torch.float64))
    assert gradient(AlphaBetaLoss(alpha, beta), student, student.detach()).abs().max() < 1e-14
    assert (loss(student, teacher) > 0).all()
    torch.testing.assert_close(loss(student + 5, teacher - 3), loss(student, teacher))


@pytest.mark.parametrize(("alpha", "beta"), [*EXPONENTS, (1e-3, 1e-3)])
def test_finite_on_extreme_logits(alpha, beta):
    for scale in (1.0, -1.0):
        student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
        value = AlphaBetaLoss(alpha, beta)(student, scale * student.detach())
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("bad", [-0.5, math.inf, math.nan])
def test_rejects_bad_exponents(bad):
    for name, exponents in (("alpha", (bad, 0.5)), ("beta", (0.5, bad))):
        match = f"{name} must be zero or positive and finite, got {bad}"
        with pytest.raises(ValueError, match=match):
            AlphaBetaLoss(*exponents)
        with pytest.raises(ValueError, match=match):
            alpha_beta_loss(*make_pair(6, 10), alpha=exponents[0], beta=exponents[1])


def test_rejects_exponents_that_are_both_zero():
    with pytest.raises(ValueError, match="alpha and beta must not both be zero, got 0 and 0.0"):
        AlphaBetaLoss(0, 0.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        AlphaBetaLoss(0.2, 0.7, temperature=temperature)
    with pytest.raises(ValueError, match=match):
        alpha_beta_loss(*make_pair(6, 10), alpha=0.2, beta=0.7, temperature=temperature)


def test_repr_shows_options():
    assert (
        repr(AlphaBetaLoss(0.2, 0.7, 2.0, reduction="none"))
        == "AlphaBetaLoss(alpha=0.2, beta=0.7, temperature=2.0, reduction='none', dim=None)"
    )


def test_a_probability_of_0_is_a_probability():
    for alpha, beta in EXPONENTS:
        assert_knows_zeros(
            functools.partial(AlphaBetaLoss, alpha, beta, 2.0),
            lambda s, t: reference(s, t, alpha, beta, 2.0),  # noqa: B023
            infinite=(beta == 0, alpha == 0),
        )
    assert_shows_nan(AlphaBetaLoss(0.2, 0.7))


def test_keeps_its_digits_near_agreement_and_is_never_negative():
    for alpha, beta in EXPONENTS:
        assert_keeps_digits(functools.partial(AlphaBetaLoss, alpha, beta))


def test_exponents_that_come_to_be_both_zero_are_refused(form):
    loss = AlphaBetaLoss(1.0, 0.0)
    loss.alpha = 0.0
    with pytest.raises(ValueError, match="alpha and beta must not both be zero, got 0.0 and 0.0"):
        loss(*make_pair(6, 10))
    loss.beta = 1.0
    assert torch.equal(loss(*make_pair(6, 10)), AlphaBetaLoss(0.0, 1.0)(*make_pair(6, 10)))


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 says so to everybody
def test_takes_little_memory(form, monkeypatch):
    if form == "blocks":
        assert_light(AlphaBetaLoss(0.2, 0.7), monkeypatch)
