"""SkewKLLoss against the formula of Ko, Kim, Chen and Yun (2024)."""

import functools
import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, make_pair
from distill import SkewKLLoss, skew_kl_loss
from divergences import assert_knows_zeros, assert_shows_nan

pytestmark = pytest.mark.usefixtures("form")


def reference(student, teacher, alpha, temperature, axis=-1):
    """T^2 times KL(p, alpha p + (1 - alpha) q), sample by sample."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        q = np.exp(s[sample] / temperature)
        p = np.exp(t[sample] / temperature)
        q, p = q / q.sum(), p / p.sum()
        for pc, qc in zip(p, q, strict=True):
            m = alpha * pc + (1 - alpha) * qc
            values[sample] += (pc * math.log(pc / m) if m else math.inf) if pc else 0
    return temperature**2 * values


@pytest.mark.parametrize(("alpha", "temperature"), [(0.1, 1.0), (0.0, 2.0), (0.9, 4.0), (0.3, 0.5)])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, alpha, temperature):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), alpha, temperature, dim))
    values = skew_kl_loss(student, teacher, alpha=alpha, temperature=temperature, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = SkewKLLoss(alpha, temperature, dim=dim)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_defaults():
    student, teacher = make_pair(5, 10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 0.1, 1.0))
    torch.testing.assert_close(skew_kl_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        SkewKLLoss(reduction="none")(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_gradient(alpha):
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: skew_kl_loss(s, teacher, alpha=alpha, temperature=2.0), student)
    assert torch.autograd.gradgradcheck(lambda s: skew_kl_loss(s, teacher, alpha=alpha, temperature=2.0), student)


def test_contract():
    assert_loss_contract(SkewKLLoss, shape=(6, 10))
    assert_loss_contract(lambda **options: SkewKLLoss(0.0, 2.0, dim=1, **options), shape=(4, 5, 3, 2))


def test_repr_shows_options():
    assert (
        repr(SkewKLLoss(0.2, 2.0, reduction="none"))
        == "SkewKLLoss(alpha=0.2, temperature=2.0, reduction='none', dim=None)"
    )


def test_a_probability_of_0_is_a_probability():
    for alpha, temperature in ((0.1, 1.0), (0.4, 2.0), (0.0, 2.0)):
        assert_knows_zeros(
            functools.partial(SkewKLLoss, alpha, temperature),
            lambda s, t: reference(s, t, alpha, temperature),  # noqa: B023
            infinite=(alpha == 0, False),
        )
    assert_shows_nan(SkewKLLoss(0.3))
