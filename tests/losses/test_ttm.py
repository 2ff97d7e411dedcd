"""TTMLoss against the formula of Zheng and Yang (2024)."""

import functools
import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import TTMLoss, kl_loss, ttm_loss
from divergences import assert_hessian_where_equal, assert_knows_zeros, assert_light, assert_shows_nan

pytestmark = pytest.mark.usefixtures("form")


def reference(student, teacher, gamma, axis=-1):
    """KL(r, q) with r the normalised powers of the teacher's probabilities, sample by sample."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        q, p = np.exp(s[sample]), np.exp(t[sample])
        powers = (p / p.sum()) ** gamma
        for rc, qc in zip(powers / powers.sum(), q / q.sum(), strict=True):
            values[sample] += (rc * math.log(rc / qc) if qc else math.inf) if rc else 0
    return values


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, gamma):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), gamma, dim))
    values = ttm_loss(student, teacher, gamma=gamma, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = TTMLoss(gamma, dim=dim)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_defaults():
    student, teacher = make_pair(5, 10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 0.1))
    torch.testing.assert_close(ttm_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(TTMLoss(reduction="none")(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: ttm_loss(s, teacher, gamma=0.3), student)
    assert torch.autograd.gradgradcheck(lambda s: ttm_loss(s, teacher, gamma=0.3), student)


def test_contract():
    assert_loss_contract(TTMLoss, shape=(6, 10))
    assert_loss_contract(lambda **options: TTMLoss(0.5, dim=1, **options), shape=(4, 5, 3, 2))


def test_with_exponent_1_it_is_the_divergence_at_temperature_1():
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(ttm_loss(student, teacher, gamma=1.0), kl_loss(student, teacher, temperature=1.0))


def test_zero_where_the_student_gives_the_power_and_not_where_it_gives_the_teacher():
    _, teacher = make_pair(6, 10)
    assert (ttm_loss(0.1 * teacher, teacher) < 1e-15).all()
    assert (ttm_loss(teacher, teacher) > 0.05).all()


def test_does_not_count_shifts():
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(ttm_loss(student + 5, teacher - 3), ttm_loss(student, teacher))


def test_finite_on_extreme_logits():
    student, teacher = make_pair(6, 10, dtype=torch.float32)
    assert gradient(TTMLoss(), 1e4 * student, -1e4 * teacher).isfinite().all()


def test_a_probability_of_0_is_a_probability():
    for gamma in (0.1, 1.5):
        build = functools.partial(TTMLoss, gamma)
        assert_knows_zeros(build, lambda s, t: reference(s, t, gamma), infinite=(True, False))  # noqa: B023
    assert_shows_nan(TTMLoss())


def test_second_derivative_where_they_are_equal():
    assert_hessian_where_equal(lambda: TTMLoss(1.0), 1.0)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 says so to everybody
def test_takes_little_memory(form, monkeypatch):
    if form == "blocks":
        assert_light(TTMLoss(), monkeypatch)


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_exponents(gamma):
    match = f"gamma must be positive and finite, got {gamma}"
    with pytest.raises(ValueError, match=match):
        TTMLoss(gamma)
    with pytest.raises(ValueError, match=match):
        ttm_loss(*make_pair(6, 10), gamma=gamma)


def test_rejects_a_single_class():
    with pytest.raises(ValueError, match=r"at least 2 classes along dim -1, got shape \(6, 1\)"):
        ttm_loss(*make_pair(6, 1))


def test_repr_shows_options():
    assert repr(TTMLoss(0.5, reduction="none")) == "TTMLoss(gamma=0.5, reduction='none', dim=None)"
