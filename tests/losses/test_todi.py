"""ToDiLoss against the formula of Jung et al. (2025)."""

import functools
import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import ToDiLoss, kl_loss, reverse_kl_loss, todi_loss
from divergences import assert_knows_zeros, assert_light, assert_shows_nan

pytestmark = pytest.mark.usefixtures("form")


def distributions(student, teacher, temperature):
    q, p = np.exp(student / temperature), np.exp(teacher / temperature)
    return q / q.sum(), p / p.sum()


def reference(student, teacher, temperature, axis=-1, weights=None):
    """The sum over the classes of both divergences' terms, each times its weight; with weights given, these."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        for c, (qc, pc) in enumerate(zip(*distributions(s[sample], t[sample], temperature), strict=True)):
            if pc and qc:
                weight = 1 / (1 + math.exp(-math.log(pc / qc))) if weights is None else weights[sample][c]
                values[sample] += weight * pc * math.log(pc / qc) + (1 - weight) * qc * math.log(qc / pc)
            elif pc or qc:
                values[sample] = math.inf
    return values


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, temperature):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), temperature, dim))
    values = todi_loss(student, teacher, temperature=temperature, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = ToDiLoss(temperature, dim=dim)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_defaults():
    student, teacher = make_pair(5, 10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 2.0))
    torch.testing.assert_close(todi_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ToDiLoss(reduction="none")(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradient_with_the_weights_as_constants():
    student, teacher = make_pair(4, 6)
    s, t, step = student.detach().numpy(), teacher.numpy(), 1e-6
    pairs = [distributions(ours, theirs, 2.0) for ours, theirs in zip(s, t, strict=True)]
    weights = {(n,): p / (p + q) for n, (q, p) in enumerate(pairs)}
    expected = np.zeros_like(s)
    for index in np.ndindex(s.shape):
        moved = [s.copy(), s.copy()]
        moved[0][index] += step
        moved[1][index] -= step
        above, below = (reference(x, t, 2.0, weights=weights) for x in moved)
        expected[index] = (above - below).sum() / (2 * step)
    slope = gradient(ToDiLoss(2.0, reduction="sum"), student, teacher)
    torch.testing.assert_close(slope, torch.from_numpy(expected), rtol=1e-7, atol=1e-9)
    both = kl_loss(student, teacher, temperature=2.0) + reverse_kl_loss(student, teacher, temperature=2.0)
    (of_both,) = torch.autograd.grad(both.sum() / 4, student)
    assert (slope - of_both).abs().max() > 0.01


def test_gradient_in_closed_form():
    student, teacher = make_pair(4, 6)
    q, p = (side.detach().softmax(-1) for side in (student, teacher))
    a = p / (p + q)
    by_class = -a * p + (1 - a) * q * ((q / p).log() + 1)  # for log q
    expected = by_class - q * by_class.sum(-1, keepdim=True)
    slope = gradient(ToDiLoss(1.0, reduction="sum"), student, teacher)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-12)


def test_contract():
    assert_loss_contract(ToDiLoss, shape=(6, 10))
    assert_loss_contract(lambda **options: ToDiLoss(2.0, dim=1, **options), shape=(4, 5, 3, 2))


def test_the_value_is_that_of_both_divergences():
    student, teacher = make_pair(6, 10)
    both = kl_loss(student, teacher, temperature=2.0) + reverse_kl_loss(student, teacher, temperature=2.0)
    torch.testing.assert_close(4 * todi_loss(student, teacher), both, rtol=1e-12, atol=1e-12)


def test_zero_when_equal():
    student, _ = make_pair(6, 10)
    assert ToDiLoss()(student, student.detach()) == 0
    assert gradient(ToDiLoss(), student, student.detach()).abs().max() < 1e-15


def test_is_never_negative_near_agreement():
    teacher = make_pair(200, 10, dtype=torch.float32)[1]
    for apart in (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-3):
        values = todi_loss(teacher * (1 + apart), teacher)
        assert (values >= 0).all()
    exact = todi_loss((teacher * (1 + apart)).double(), teacher.double())
    torch.testing.assert_close(values.double(), exact, rtol=0.2, atol=1e-6)


def test_does_not_count_shifts():
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(todi_loss(student + 5, teacher - 3), todi_loss(student, teacher))


def test_finite_on_extreme_logits():
    student = torch.tensor([[1e4, -1e4, 0.0, -1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0, -1e4]])
    value = ToDiLoss()(student, teacher)
    value.backward()
    torch.testing.assert_close(value.item(), 2e4)
    assert student.grad.isfinite().all()


def test_a_probability_of_0_is_a_probability():
    for temperature in (1.0, 2.0):
        assert_knows_zeros(
            functools.partial(ToDiLoss, temperature),
            lambda s, t: reference(s, t, temperature),  # noqa: B023
            infinite=(True, True),
        )
    assert_shows_nan(ToDiLoss())


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 says so to everybody
def test_takes_little_memory(form, monkeypatch):
    if form == "blocks":
        assert_light(ToDiLoss(), monkeypatch)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        ToDiLoss(temperature)
    with pytest.raises(ValueError, match=match):
        todi_loss(*make_pair(6, 10), temperature=temperature)


def test_repr_shows_options():
    assert repr(ToDiLoss(2.0)) == "ToDiLoss(temperature=2.0, reduction='mean', dim=None)"
