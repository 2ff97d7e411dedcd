"""What `ttm` and `wttm` have in common; each one's own test holds it against its formula."""

import math

import pytest
import torch

from contract import gradient, make_pair
from distill import TTMLoss, WTTMLoss, kl_loss, ttm_loss, wttm_loss
from divergences import assert_hessian_where_equal, assert_light

pytestmark = [
    pytest.mark.usefixtures("form"),
    pytest.mark.parametrize(
        ("loss", "function", "gamma"),
        [(TTMLoss, ttm_loss, 0.1), (WTTMLoss, wttm_loss, 0.2)],  # and the exponent that is the default
        ids=["ttm", "wttm"],
    ),
]


def test_with_exponent_1_it_is_the_divergence_at_temperature_1(loss, function, gamma):
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(function(student, teacher, gamma=1.0), kl_loss(student, teacher, temperature=1.0))


def test_zero_where_the_student_gives_the_power_and_not_where_it_gives_the_teacher(loss, function, gamma):
    _, teacher = make_pair(6, 10)
    assert (function(gamma * teacher, teacher) < 1e-15).all()
    assert (function(teacher, teacher) > 0.05).all()


def test_does_not_count_shifts(loss, function, gamma):
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(function(student + 5, teacher - 3), function(student, teacher))


def test_finite_on_extreme_logits(loss, function, gamma):
    student, teacher = make_pair(6, 10, dtype=torch.float32)
    assert gradient(loss(), 1e4 * student, -1e4 * teacher).isfinite().all()


def test_second_derivative_where_they_are_equal(loss, function, gamma):
    assert_hessian_where_equal(lambda: loss(1.0), 1.0)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 says so to everybody
def test_takes_little_memory(loss, function, gamma, form, monkeypatch):
    if form == "blocks":
        assert_light(loss(), monkeypatch)


@pytest.mark.parametrize("exponent", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_exponents(loss, function, gamma, exponent):
    match = f"gamma must be positive and finite, got {exponent}"
    with pytest.raises(ValueError, match=match):
        loss(exponent)
    with pytest.raises(ValueError, match=match):
        function(*make_pair(6, 10), gamma=exponent)


def test_rejects_a_single_class(loss, function, gamma):
    with pytest.raises(ValueError, match=r"at least 2 classes along dim -1, got shape \(6, 1\)"):
        function(*make_pair(6, 1))
