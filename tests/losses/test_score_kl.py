"""ScoreKLLoss against the divergence of two softmaxes, each with its own temperature (Lin et al., 2020)."""

import functools
import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import ScoreKLLoss, kl_loss, score_kl_loss
from divergences import assert_hessian_where_equal, assert_knows_zeros, assert_shows_nan

pytestmark = pytest.mark.usefixtures("form")


def reference(student, teacher, student_temperature, teacher_temperature, axis=-1):
    """KL(p, q) with p and q the softmaxes of scores over temperatures, query by query."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for query in np.ndindex(values.shape):
        q = np.exp(s[query] / student_temperature)
        p = np.exp(t[query] / teacher_temperature)
        for pk, qk in zip(p / p.sum(), q / q.sum(), strict=True):
            values[query] += (pk * math.log(pk / qk) if qk else math.inf) if pk else 0
    return values


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.5, 2.0), (3.0, 0.7)])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, temperatures):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), *temperatures, dim))
    names = dict(zip(("student_temperature", "teacher_temperature"), temperatures, strict=True))
    values = score_kl_loss(student, teacher, dim=dim, **names).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = ScoreKLLoss(*temperatures, dim=dim)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_defaults():
    student, teacher = make_pair(5, 10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 1.0, 1.0))
    torch.testing.assert_close(score_kl_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ScoreKLLoss(reduction="none")(student, teacher).detach(), expected, rtol=1e-12, atol=0)


def test_gradient():
    student, teacher = make_pair(4, 5)
    form = functools.partial(score_kl_loss, teacher=teacher, student_temperature=0.5, teacher_temperature=2.0)
    assert torch.autograd.gradcheck(form, student)
    assert torch.autograd.gradgradcheck(form, student)


def test_contract():
    assert_loss_contract(ScoreKLLoss, shape=(6, 10))
    assert_loss_contract(lambda **options: ScoreKLLoss(0.5, 2.0, dim=1, **options), shape=(4, 5, 3, 2))


def test_with_one_temperature_it_is_the_divergence_without_its_factor():
    student, teacher = make_pair(6, 10)
    values = score_kl_loss(student, teacher, student_temperature=3.0, teacher_temperature=3.0)
    torch.testing.assert_close(values * 9, kl_loss(student, teacher, temperature=3.0))


def test_zero_when_equal_and_when_only_the_sizes_differ():
    student, _ = make_pair(6, 10)
    assert ScoreKLLoss()(student, student.detach()) == 0
    assert ScoreKLLoss(0.05)(0.05 * student, student.detach()) < 1e-15
    assert ScoreKLLoss(1.0, 20.0)(student, 20 * student.detach()) < 1e-15
    assert ScoreKLLoss()(student, 20 * student.detach()) > 0.1


def test_does_not_count_shifts():
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(score_kl_loss(student + 5, teacher - 3), score_kl_loss(student, teacher))


def test_finite_on_extreme_scores():
    student, teacher = make_pair(6, 10, dtype=torch.float32)
    assert gradient(ScoreKLLoss(0.01, 0.01), 1e4 * student, -1e4 * teacher).isfinite().all()


def test_a_probability_of_0_is_a_probability():
    for temperatures in ((1.0, 1.0), (0.5, 2.0)):
        assert_knows_zeros(
            functools.partial(ScoreKLLoss, *temperatures),
            lambda s, t: reference(s, t, *temperatures),  # noqa: B023
            infinite=(True, False),
        )
    assert_shows_nan(ScoreKLLoss(0.5))


def test_second_derivative_where_they_are_equal():
    assert_hessian_where_equal(ScoreKLLoss, 1.0)


@pytest.mark.parametrize("name", ["student_temperature", "teacher_temperature"])
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(name, temperature):
    match = f"{name} must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        ScoreKLLoss(**{name: temperature})
    with pytest.raises(ValueError, match=match):
        score_kl_loss(*make_pair(6, 10), **{name: temperature})


def test_rejects_a_single_candidate_and_unclear_dimensions():
    with pytest.raises(ValueError, match=r"at least 2 classes along dim -1, got shape \(6, 1\)"):
        score_kl_loss(*make_pair(6, 1))
    with pytest.raises(ValueError, match=r"dim must be given .*, got shape \(2, 3, 4, 5\)"):
        ScoreKLLoss()(*make_pair(2, 3, 4, 5))


def test_repr_shows_options():
    expected = "ScoreKLLoss(student_temperature=0.5, teacher_temperature=2.0, reduction='mean', dim=None)"
    assert repr(ScoreKLLoss(0.5, 2.0)) == expected
