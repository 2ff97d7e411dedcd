"""SkewReverseKLLoss against the formula of Ko, Kim, Chen and Yun (2024)."""

import functools
import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, make_pair
from distill import SkewReverseKLLoss, reverse_kl_loss, skew_reverse_kl_loss
from divergences import (
    assert_hessian_where_equal,
    assert_keeps_digits,
    assert_knows_zeros,
    assert_light,
    assert_shows_nan,
)

pytestmark = pytest.mark.usefixtures("form")


def reference(student, teacher, alpha, temperature, axis=-1):
    """T^2 times KL(q, (1 - alpha) p + alpha q), sample by sample."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        q = np.exp(s[sample] / temperature)
        p = np.exp(t[sample] / temperature)
        q, p = q / q.sum(), p / p.sum()
        for pc, qc in zip(p, q, strict=True):
            m = (1 - alpha) * pc + alpha * qc
            values[sample] += (qc * math.log(qc / m) if m else math.inf) if qc else 0
    return temperature**2 * values


@pytest.mark.parametrize(("alpha", "temperature"), [(0.1, 1.0), (0.0, 2.0), (0.9, 4.0), (0.3, 0.5)])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, alpha, temperature):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), alpha, temperature, dim))
    values = skew_reverse_kl_loss(student, teacher, alpha=alpha, temperature=temperature, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = SkewReverseKLLoss(alpha, temperature, dim=dim)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_defaults():
    student, teacher = make_pair(5, 10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 0.1, 1.0))
    torch.testing.assert_close(skew_reverse_kl_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        SkewReverseKLLoss(reduction="none")(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_gradient(alpha):
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: skew_reverse_kl_loss(s, teacher, alpha=alpha, temperature=2.0), student)
    assert torch.autograd.gradgradcheck(
        lambda s: skew_reverse_kl_loss(s, teacher, alpha=alpha, temperature=2.0), student
    )


def test_contract():
    assert_loss_contract(SkewReverseKLLoss, shape=(6, 10))
    assert_loss_contract(lambda **options: SkewReverseKLLoss(0.0, 2.0, dim=1, **options), shape=(4, 5, 3, 2))


def test_without_skew_it_is_the_plain_divergence_and_reached_continuously():
    student, teacher = make_pair(6, 10)
    plain = reverse_kl_loss(student, teacher, temperature=2.0)
    torch.testing.assert_close(skew_reverse_kl_loss(student, teacher, alpha=0.0, temperature=2.0), plain)
    near = skew_reverse_kl_loss(student, teacher, alpha=1e-9, temperature=2.0)
    torch.testing.assert_close(near, plain, rtol=1e-6, atol=0)


def test_zero_when_equal_and_otherwise_positive_and_at_most_log_of_one_over_alpha():
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(skew_reverse_kl_loss(student, student.detach()), torch.zeros(6, dtype=torch.float64))
    for scale in (0.1, 1.0, 100.0):
        values = skew_reverse_kl_loss(scale * student, scale * teacher)
        assert (values > 0).all()
        assert (values <= math.log(10) + 1e-12).all()


def test_does_not_count_shifts():
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(skew_reverse_kl_loss(student + 5, teacher - 3), skew_reverse_kl_loss(student, teacher))


@pytest.mark.parametrize(("alpha", "expected"), [(0.1, math.log(10)), (0.0, 2e4)])
def test_finite_on_extreme_logits(alpha, expected):
    # Float32 probabilities underflow to 0 here, in both and in the mixture.
    student = torch.tensor([[1e4, -1e4, 0.0, -1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0, -1e4]])
    value = SkewReverseKLLoss(alpha)(student, teacher)
    value.backward()
    torch.testing.assert_close(value.item(), expected, rtol=1e-5, atol=0)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [1.0, -0.1, math.nan])
def test_rejects_bad_shares(alpha):
    match = f"alpha must be at least 0 and below 1, got {alpha}"
    with pytest.raises(ValueError, match=match):
        SkewReverseKLLoss(alpha)
    with pytest.raises(ValueError, match=match):
        skew_reverse_kl_loss(*make_pair(6, 10), alpha=alpha)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        SkewReverseKLLoss(temperature=temperature)
    with pytest.raises(ValueError, match=match):
        skew_reverse_kl_loss(*make_pair(6, 10), temperature=temperature)


def test_repr_shows_options():
    assert (
        repr(SkewReverseKLLoss(0.2, 2.0, reduction="none"))
        == "SkewReverseKLLoss(alpha=0.2, temperature=2.0, reduction='none', dim=None)"
    )


def test_a_probability_of_0_is_a_probability():
    for alpha, temperature in ((0.1, 1.0), (0.4, 2.0), (0.0, 2.0)):
        assert_knows_zeros(
            functools.partial(SkewReverseKLLoss, alpha, temperature),
            lambda s, t: reference(s, t, alpha, temperature),  # noqa: B023
            infinite=(False, alpha == 0),
        )
    assert_shows_nan(SkewReverseKLLoss(0.3))


def test_keeps_its_digits_near_agreement_and_is_never_negative():
    for alpha in (0.0, 0.1, 0.5):
        assert_keeps_digits(functools.partial(SkewReverseKLLoss, alpha))


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_second_derivative_where_they_are_equal(alpha):
    assert_hessian_where_equal(lambda: SkewReverseKLLoss(alpha, 3.0), (1 - alpha) ** 2, temperature=3.0)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 says so to everybody
def test_takes_little_memory(form, monkeypatch):
    if form == "blocks":
        assert_light(SkewReverseKLLoss(0.3), monkeypatch)
