"""JSLoss against the formula of Agarwal et al. (2024), equation 1."""

import functools
import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, make_pair
from distill import JSLoss, js_loss, kl_loss, reverse_kl_loss
from divergences import (
    assert_hessian_where_equal,
    assert_keeps_digits,
    assert_knows_zeros,
    assert_light,
    assert_shows_nan,
)

pytestmark = pytest.mark.usefixtures("form")


def reference(student, teacher, beta, temperature, axis=-1):
    """T^2 times beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q, sample by sample."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        q = np.exp(s[sample] / temperature)
        p = np.exp(t[sample] / temperature)
        q, p = q / q.sum(), p / p.sum()
        for pc, qc in zip(p, q, strict=True):
            m = beta * pc + (1 - beta) * qc
            values[sample] += beta * pc * math.log(pc / m) if pc else 0
            values[sample] += (1 - beta) * qc * math.log(qc / m) if qc else 0
    return temperature**2 * values


@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 1.0), (0.1, 1.0), (0.9, 4.0), (0.3, 0.5)])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, beta, temperature):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), beta, temperature, dim))
    values = js_loss(student, teacher, beta=beta, temperature=temperature, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = JSLoss(beta, temperature, dim=dim)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_defaults():
    student, teacher = make_pair(5, 10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 0.5, 1.0))
    torch.testing.assert_close(js_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(JSLoss(reduction="none")(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: js_loss(s, teacher, beta=0.2, temperature=2.0), student)
    assert torch.autograd.gradgradcheck(lambda s: js_loss(s, teacher, beta=0.2, temperature=2.0), student)


def test_contract():
    assert_loss_contract(JSLoss, shape=(6, 10))
    assert_loss_contract(lambda **options: JSLoss(0.1, 2.0, dim=1, **options), shape=(4, 5, 3, 2))


def test_symmetric_at_one_half():
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(js_loss(student, teacher), js_loss(teacher, student.detach()))
    assert not torch.allclose(js_loss(student, teacher, beta=0.1), js_loss(teacher, student.detach(), beta=0.1))


def test_tends_to_kl_at_one_end_and_to_reverse_kl_at_the_other():
    student, teacher = make_pair(6, 10)
    small = 1e-6
    towards_kl = js_loss(student, teacher, beta=small, temperature=2.0) / small
    torch.testing.assert_close(towards_kl, kl_loss(student, teacher, temperature=2.0), rtol=1e-4, atol=0)
    towards_reverse = js_loss(student, teacher, beta=1 - small, temperature=2.0) / small
    torch.testing.assert_close(towards_reverse, reverse_kl_loss(student, teacher, temperature=2.0), rtol=1e-4, atol=0)


def test_zero_when_equal_and_otherwise_positive_and_at_most_log_2():
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(js_loss(student, student.detach()), torch.zeros(6, dtype=torch.float64))
    for scale in (0.1, 1.0, 100.0):
        values = js_loss(scale * student, scale * teacher)
        assert (values > 0).all()
        assert (values <= math.log(2) + 1e-12).all()


def test_does_not_count_shifts():
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(js_loss(student + 5, teacher - 3), js_loss(student, teacher))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_finite_on_extreme_logits(beta):
    # Float32 probabilities underflow to 0 here, in both and in the mixture.
    student = torch.tensor([[1e4, -1e4, 0.0, -1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0, -1e4]])
    value = JSLoss(beta)(student, teacher)
    value.backward()
    entropy = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
    torch.testing.assert_close(value.item(), entropy, rtol=1e-5, atol=0)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, math.nan])
def test_rejects_bad_shares(beta):
    match = f"beta must be above 0 and below 1, got {beta}"
    with pytest.raises(ValueError, match=match):
        JSLoss(beta)
    with pytest.raises(ValueError, match=match):
        js_loss(*make_pair(6, 10), beta=beta)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        JSLoss(temperature=temperature)
    with pytest.raises(ValueError, match=match):
        js_loss(*make_pair(6, 10), temperature=temperature)


def test_repr_shows_options():
    assert repr(JSLoss(0.1, 2.0, reduction="none")) == "JSLoss(beta=0.1, temperature=2.0, reduction='none', dim=None)"


def test_a_probability_of_0_is_a_probability():
    for beta, temperature in ((0.1, 1.0), (0.5, 4.0)):
        assert_knows_zeros(
            functools.partial(JSLoss, beta, temperature),
            lambda s, t: reference(s, t, beta, temperature),  # noqa: B023
        )
    assert_shows_nan(JSLoss(0.3))


def test_keeps_its_digits_near_agreement_and_is_never_negative():
    for beta in (0.1, 0.5):
        assert_keeps_digits(functools.partial(JSLoss, beta))


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_second_derivative_where_they_are_equal(beta):
    assert_hessian_where_equal(lambda: JSLoss(beta, 3.0), beta * (1 - beta), temperature=3.0)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 says so to everybody
def test_takes_little_memory(form, monkeypatch):
    if form == "blocks":
        assert_light(JSLoss(0.3), monkeypatch)
