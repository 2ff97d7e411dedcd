"""TVDLoss against the formula of Wen, Li, Du and Mou (2023)."""

import functools
import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import TVDLoss, kl_loss, tvd_loss
from divergences import NoTies, assert_keeps_digits, assert_knows_zeros, assert_light, assert_shows_nan

pytestmark = pytest.mark.usefixtures("form")


def reference(student, teacher, temperature, axis=-1):
    """Half the sum of |p - q|, sample by sample."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        q = np.exp(s[sample] / temperature)
        p = np.exp(t[sample] / temperature)
        q, p = q / q.sum(), p / p.sum()
        values[sample] = 0.5 * sum(abs(p[c] - q[c]) for c in range(len(p)))
    return values


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, temperature):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), temperature, dim))
    values = tvd_loss(student, teacher, temperature=temperature, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = TVDLoss(temperature, dim=dim)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_temperature_is_1_by_default():
    student, teacher = make_pair(5, 10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 1.0))
    torch.testing.assert_close(tvd_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(TVDLoss(reduction="none")(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: tvd_loss(s, teacher, temperature=2.0), student)


def test_contract():
    assert_loss_contract(TVDLoss, shape=(6, 10))
    assert_loss_contract(lambda **options: TVDLoss(2.0, dim=1, **options), shape=(4, 5, 3, 2))


def test_is_the_largest_difference_in_the_probability_of_any_event():
    student, teacher = make_pair(3, 4)
    difference = (student.detach().softmax(-1) - teacher.softmax(-1)).numpy()
    events = np.array(np.meshgrid(*[[0, 1]] * 4)).reshape(4, -1)
    largest = np.abs(difference @ events).max(1)
    torch.testing.assert_close(tvd_loss(student, teacher).detach(), torch.from_numpy(largest))


def test_zero_when_equal_symmetric_and_between_0_and_1():
    student, teacher = make_pair(6, 10)
    assert TVDLoss()(student, student.detach()) == 0
    assert gradient(TVDLoss(), student, student.detach()).isfinite().all()
    torch.testing.assert_close(tvd_loss(student, teacher), tvd_loss(teacher, student.detach()))
    for scale in (0.1, 1.0, 100.0):
        values = tvd_loss(scale * student, scale * teacher)
        assert (values > 0).all()
        assert (values <= 1 + 1e-12).all()


def test_pinsker_bounds_it_by_the_divergence():
    student, teacher = make_pair(50, 10)
    assert (2 * tvd_loss(student, teacher) ** 2 <= kl_loss(student, teacher, temperature=1.0)).all()


def test_does_not_count_shifts():
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(tvd_loss(student + 5, teacher - 3), tvd_loss(student, teacher))


def test_finite_on_extreme_logits():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = TVDLoss()(student, -student.detach())
    value.backward()
    assert value == 1
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        TVDLoss(temperature=temperature)
    with pytest.raises(ValueError, match=match):
        tvd_loss(*make_pair(6, 10), temperature=temperature)


def test_repr_shows_options():
    assert repr(TVDLoss(2.0, reduction="none")) == "TVDLoss(temperature=2.0, reduction='none', dim=None)"


def test_a_probability_of_0_is_a_probability():
    for temperature in (1.0, 4.0):
        assert_knows_zeros(functools.partial(TVDLoss, temperature), lambda s, t: reference(s, t, temperature))  # noqa: B023
    assert_shows_nan(TVDLoss())


def test_keeps_its_digits_near_agreement_and_is_never_negative():
    assert_keeps_digits(TVDLoss)


def test_gradient_where_some_probabilities_are_equal_is_that_of_the_middle():
    # From below the slope of |p - q| / 2 is -1/2, from above 1/2: between them lies 0, and it is not left to PyTorch.
    logits = torch.tensor([[0.0, 1.0, 2.0, 2.0]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 0.0, 2.0, 2.0]], dtype=torch.float64)
    q = logits.softmax(-1)[0]
    side = torch.tensor([-0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    with NoTies():
        slope = gradient(TVDLoss(), logits, teacher)
        assert gradient(TVDLoss(), logits, logits).abs().max() == 0
    torch.testing.assert_close(slope[0], q * (side - (q * side).sum()))


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 says so to everybody
def test_takes_little_memory(form, monkeypatch):
    if form == "blocks":
        assert_light(TVDLoss(), monkeypatch)
