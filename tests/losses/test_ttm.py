"""TTMLoss against the formula of Zheng and Yang (2024)."""

import functools
import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, make_pair
from distill import TTMLoss, ttm_loss
from divergences import assert_knows_zeros, assert_shows_nan

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


def test_a_probability_of_0_is_a_probability():
    for gamma in (0.1, 1.5):
        build = functools.partial(TTMLoss, gamma)
        assert_knows_zeros(build, lambda s, t: reference(s, t, gamma), infinite=(True, False))  # noqa: B023
    assert_shows_nan(TTMLoss())


def test_repr_shows_options():
    assert repr(TTMLoss(0.5, reduction="none")) == "TTMLoss(gamma=0.5, reduction='none', dim=None)"
