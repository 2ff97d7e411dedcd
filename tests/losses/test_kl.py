"""KLLoss against the formula of Hinton, Vinyals and Dean (2015)."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from contract import assert_loss_contract, gradient, make_pair
from distill import KLLoss, LogitLoss, kl_loss

pytestmark = pytest.mark.usefixtures("form")


def reference(student, teacher, temperature, axis=-1):
    """T^2 times the sum of p log(p / q), p and q written out as softmaxes, sample by sample."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        q = np.exp(s[sample] / temperature)
        p = np.exp(t[sample] / temperature)
        q, p = q / q.sum(), p / p.sum()
        values[sample] = temperature**2 * sum(p[c] * math.log(p[c] / q[c]) for c in range(len(p)))
    return values


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, temperature):
    student, teacher = make_pair(*shape)
    expected = reference(student.detach().numpy(), teacher.numpy(), temperature, dim)
    torch.testing.assert_close(
        kl_loss(student, teacher, temperature=temperature, dim=dim).detach(),
        torch.as_tensor(expected),
        rtol=1e-12,
        atol=1e-12,
    )
    torch.testing.assert_close(
        KLLoss(temperature, dim=dim)(student, teacher).item(), expected.mean().item(), rtol=1e-12, atol=1e-12
    )


def test_temperature_is_4_by_default():
    student, teacher = make_pair(5, 10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 4.0))
    torch.testing.assert_close(kl_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(KLLoss(reduction="none")(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: kl_loss(s, teacher), student)
    assert torch.autograd.gradgradcheck(lambda s: kl_loss(s, teacher), student)
    # Section 2: the gradient of the soft cross-entropy is (q - p) / T, times T^2 here.
    p, q = (teacher / 4).softmax(-1), (student.detach() / 4).softmax(-1)
    torch.testing.assert_close(gradient(KLLoss(), student, teacher), 4 * (q - p) / 4)


def test_contract():
    assert_loss_contract(KLLoss, shape=(6, 10))
    assert_loss_contract(KLLoss, shape=(4, 3, 7))
    assert_loss_contract(lambda **options: KLLoss(2.0, dim=1, **options), shape=(4, 5, 3, 2))


def test_is_the_divergence_from_the_teacher():
    # KL(p || q) with p = (1/2, 1/2), q = (1/4, 3/4) is half of log(4 / 3), 0.1438; the other way it is 0.1308.
    student, teacher = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    torch.testing.assert_close(KLLoss(1.0)(student, teacher).item(), 0.5 * math.log(4 / 3), atol=1e-6, rtol=0)


def test_zero_when_equal_and_positive_otherwise():
    student, teacher = make_pair(6, 10)
    assert KLLoss()(student, student.detach()) == 0
    assert (kl_loss(student, teacher) > 0).all()


def test_does_not_count_shifts():
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(kl_loss(student + 5, teacher - 3), kl_loss(student, teacher))


def test_tends_to_half_the_centred_squared_difference_at_high_temperature():
    student, teacher = make_pair(6, 10)
    centred = [x - x.mean(-1, keepdim=True) for x in (student, teacher)]
    torch.testing.assert_close(KLLoss(1e4)(student, teacher), LogitLoss()(*centred) / 2, rtol=1e-3, atol=0)


def test_finite_on_extreme_logits():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    for temperature in (1.0, 4.0):
        value = KLLoss(temperature)(student, -student.detach())
        value.backward()
        torch.testing.assert_close(value.item(), temperature * 2e4)
        assert student.grad.isfinite().all()


def test_agrees_with_kl_div_loss_of_torch():
    student, teacher = make_pair(6, 10)
    of_torch = nn.KLDivLoss(reduction="batchmean")((student / 2).log_softmax(-1), (teacher / 2).softmax(-1)) * 4
    torch.testing.assert_close(KLLoss(2.0)(student, teacher), of_torch, rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        KLLoss(temperature)
    with pytest.raises(ValueError, match=match):
        kl_loss(*make_pair(6, 10), temperature=temperature)


def test_repr_shows_options():
    assert repr(KLLoss(2.0, reduction="none")) == "KLLoss(temperature=2.0, reduction='none', dim=None)"
