"""LogitStdLoss against the formula of Sun, Ren, Li, Wang and Cao (2024)."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, make_pair
from distill import LogitStdLoss, kl_loss, logit_std_loss

pytestmark = pytest.mark.usefixtures("form")


def standardise(logits):
    return (logits - logits.mean()) / (logits.std(ddof=1) + 1e-7)


def reference(student, teacher, temperature, axis=-1):
    """T^2 times the sum of p log(p / q), p and q softmaxes of standardised logits, sample by sample."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        q = np.exp(standardise(s[sample]) / temperature)
        p = np.exp(standardise(t[sample]) / temperature)
        q, p = q / q.sum(), p / p.sum()
        values[sample] = temperature**2 * sum(p[c] * math.log(p[c] / q[c]) for c in range(len(p)))
    return values


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, temperature):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), temperature, dim))
    values = logit_std_loss(student, teacher, temperature=temperature, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = LogitStdLoss(temperature, dim=dim)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_temperature_is_2_by_default():
    student, teacher = make_pair(5, 10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 2.0))
    torch.testing.assert_close(logit_std_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    values = LogitStdLoss(reduction="none")(student, teacher).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: logit_std_loss(s, teacher), student)
    assert torch.autograd.gradgradcheck(lambda s: logit_std_loss(s, teacher), student)


def test_contract():
    assert_loss_contract(LogitStdLoss, shape=(6, 10))
    assert_loss_contract(lambda **options: LogitStdLoss(3.0, dim=1, **options), shape=(4, 5, 3, 2))


def test_is_kl_of_the_standardised_logits():
    pair = make_pair(6, 10)
    standardised = [torch.tensor(np.stack([standardise(row) for row in x.detach().numpy()])) for x in pair]
    torch.testing.assert_close(logit_std_loss(*pair).detach(), kl_loss(*standardised, temperature=2.0))


def test_does_not_count_shifts_and_scales():
    student, teacher = make_pair(6, 10)
    moved = logit_std_loss(3 * student + 5, teacher / 7 - 3)
    torch.testing.assert_close(moved, logit_std_loss(student, teacher), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(logit_std_loss(-student, teacher), logit_std_loss(student, teacher))


def test_zero_when_equal_and_positive_otherwise():
    student, teacher = make_pair(6, 10)
    assert LogitStdLoss()(student, student.detach()) == 0
    assert (logit_std_loss(student, teacher) > 0).all()


@pytest.mark.parametrize("level", [0.0, 0.1, 1e4])
def test_finite_where_all_logits_are_equal(level):
    student = torch.full((2, 3), level, requires_grad=True)
    value = LogitStdLoss()(student, torch.tensor([[1.0, 2.0, 3.0], [level, level, level]]))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_finite_on_extreme_logits():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = LogitStdLoss()(student, -student.detach())
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_rejects_a_single_class():
    with pytest.raises(ValueError, match=r"at least 2 classes along dim -1, got shape \(6, 1\)"):
        logit_std_loss(*make_pair(6, 1))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        LogitStdLoss(temperature=temperature)
    with pytest.raises(ValueError, match=match):
        logit_std_loss(*make_pair(6, 10), temperature=temperature)


def test_repr_shows_options():
    assert repr(LogitStdLoss(3.0, reduction="none")) == "LogitStdLoss(temperature=3.0, reduction='none', dim=None)"
