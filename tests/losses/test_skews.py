"""What the two skew divergences have in common; each one's own test holds it against its formula."""

import functools
import math

import pytest
import torch

from contract import make_pair
from distill import SkewKLLoss, SkewReverseKLLoss, kl_loss, reverse_kl_loss, skew_kl_loss, skew_reverse_kl_loss
from divergences import assert_hessian_where_equal, assert_keeps_digits, assert_light

pytestmark = [
    pytest.mark.usefixtures("form"),
    pytest.mark.parametrize(
        ("loss", "function", "plain"),
        [(SkewKLLoss, skew_kl_loss, kl_loss), (SkewReverseKLLoss, skew_reverse_kl_loss, reverse_kl_loss)],
        ids=["skew_kl", "skew_reverse_kl"],
    ),
]


def test_without_skew_it_is_the_plain_divergence_and_reached_continuously(loss, function, plain):
    student, teacher = make_pair(6, 10)
    expected = plain(student, teacher, temperature=2.0)
    torch.testing.assert_close(function(student, teacher, alpha=0.0, temperature=2.0), expected)
    near = function(student, teacher, alpha=1e-9, temperature=2.0)
    torch.testing.assert_close(near, expected, rtol=1e-6, atol=0)


def test_zero_when_equal_and_otherwise_positive_and_at_most_log_of_one_over_alpha(loss, function, plain):
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(function(student, student.detach()), torch.zeros(6, dtype=torch.float64))
    for scale in (0.1, 1.0, 100.0):
        values = function(scale * student, scale * teacher)
        assert (values > 0).all()
        assert (values <= math.log(10) + 1e-12).all()


def test_does_not_count_shifts(loss, function, plain):
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(function(student + 5, teacher - 3), function(student, teacher))


@pytest.mark.parametrize(("alpha", "expected"), [(0.1, math.log(10)), (0.0, 2e4)])
def test_finite_on_extreme_logits(loss, function, plain, alpha, expected):
    # Float32 probabilities underflow to 0 here, in both and in the mixture.
    student = torch.tensor([[1e4, -1e4, 0.0, -1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0, -1e4]])
    value = loss(alpha)(student, teacher)
    value.backward()
    torch.testing.assert_close(value.item(), expected, rtol=1e-5, atol=0)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [1.0, -0.1, math.nan])
def test_rejects_bad_shares(loss, function, plain, alpha):
    match = f"alpha must be at least 0 and below 1, got {alpha}"
    with pytest.raises(ValueError, match=match):
        loss(alpha)
    with pytest.raises(ValueError, match=match):
        function(*make_pair(6, 10), alpha=alpha)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(loss, function, plain, temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        loss(temperature=temperature)
    with pytest.raises(ValueError, match=match):
        function(*make_pair(6, 10), temperature=temperature)


def test_keeps_its_digits_near_agreement_and_is_never_negative(loss, function, plain):
    for alpha in (0.0, 0.1, 0.5):
        assert_keeps_digits(functools.partial(loss, alpha))


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_second_derivative_where_they_are_equal(loss, function, plain, alpha):
    assert_hessian_where_equal(lambda: loss(alpha, 3.0), (1 - alpha) ** 2, temperature=3.0)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 says so to everybody
def test_takes_little_memory(loss, function, plain, form, monkeypatch):
    if form == "blocks":
        assert_light(loss(0.3), monkeypatch)
