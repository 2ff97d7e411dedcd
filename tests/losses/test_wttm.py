"""WTTMLoss against the formula of Zheng and Yang (2024)."""

import functools
import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, make_pair
from distill import WTTMLoss, ttm_loss, wttm_loss
from divergences import assert_knows_zeros, assert_shows_nan

pytestmark = pytest.mark.usefixtures("form")


def reference(student, teacher, gamma, axis=-1):
    """The sum of the powers of the teacher's probabilities times KL(r, q) with r these normalised, sample by sample."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        q, p = np.exp(s[sample]), np.exp(t[sample])
        powers = (p / p.sum()) ** gamma
        for rc, qc in zip(powers / powers.sum(), q / q.sum(), strict=True):
            values[sample] += (rc * math.log(rc / qc) if qc else math.inf) if rc else 0
        values[sample] *= powers.sum()
    return values


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, gamma):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), gamma, dim))
    values = wttm_loss(student, teacher, gamma=gamma, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = WTTMLoss(gamma, dim=dim)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_defaults():
    student, teacher = make_pair(5, 10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 0.2))
    torch.testing.assert_close(wttm_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(WTTMLoss(reduction="none")(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: wttm_loss(s, teacher, gamma=0.3), student)
    assert torch.autograd.gradgradcheck(lambda s: wttm_loss(s, teacher, gamma=0.3), student)


def test_contract():
    assert_loss_contract(WTTMLoss, shape=(6, 10))
    assert_loss_contract(lambda **options: WTTMLoss(0.5, dim=1, **options), shape=(4, 5, 3, 2))


def test_weighs_a_sample_by_how_unsure_the_teacher_is():
    student, teacher = make_pair(3, 8)
    teacher[0] = 0  # all alike: 8^(1 - gamma)
    teacher[1] = 1000 * torch.eye(8, dtype=torch.float64)[3]  # sure of one: 1
    weights = wttm_loss(student, teacher, gamma=0.5) / ttm_loss(student, teacher, gamma=0.5)
    torch.testing.assert_close(weights[:2], torch.tensor([math.sqrt(8), 1.0], dtype=torch.float64))
    assert 1 < weights[2] < math.sqrt(8)


def test_a_probability_of_0_is_a_probability():
    for gamma in (0.1, 1.5):
        build = functools.partial(WTTMLoss, gamma)
        assert_knows_zeros(build, lambda s, t: reference(s, t, gamma), infinite=(True, False))  # noqa: B023
    assert_shows_nan(WTTMLoss())


def test_repr_shows_options():
    assert repr(WTTMLoss(0.5, reduction="none")) == "WTTMLoss(gamma=0.5, reduction='none', dim=None)"
