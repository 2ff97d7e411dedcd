"""SKDLoss against the formula of Jeong, Lee and Choi (2026)."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import SKDLoss, kl_loss, skd_loss


def directions(student, teacher, ridge):
    """The mean Mahalanobis distance of the rows of the difference of the Gram matrices of unit logits."""
    n, classes = student.shape
    s, t = (np.array([row / math.sqrt(row @ row) for row in x]) for x in (student, teacher))
    d = np.array([[(s[i] @ s[j] - t[i] @ t[j]) / classes for j in range(n)] for i in range(n)])
    mean = d.mean(0)
    covariance = sum(np.outer(row - mean, row - mean) for row in d) / (n - 1) + ridge * np.eye(n)
    return sum(math.sqrt(row @ np.linalg.solve(covariance, row)) for row in d) / n


def reference(student, teacher, alpha=1.0, beta=1.0, temperature=4.0, ridge=0.1):
    q, p = (np.exp(x / temperature) for x in (student, teacher))
    q, p = q / q.sum(1, keepdims=True), p / p.sum(1, keepdims=True)
    instances = temperature**2 * (p * np.log(p / q)).sum() / len(p)
    return alpha * instances + beta * directions(student, teacher, ridge)


OPTIONS = [{}, {"alpha": 0.0}, {"beta": 0.5, "temperature": 2.0}, {"alpha": 0.3, "ridge": 1e-3}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(5, 10), (6, 2), (2, 7)])
def test_matches_reference(shape, options):
    student, teacher = make_pair(*shape)
    expected = reference(student.detach().numpy(), teacher.numpy(), **options)
    for value in (skd_loss(student, teacher, **options), SKDLoss(**options)(student, teacher)):
        assert value.shape == ()
        torch.testing.assert_close(value.item(), expected.item(), rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: skd_loss(s, teacher, temperature=2.0), student)


def test_contract():
    assert_loss_contract(SKDLoss, shape=(6, 10), per_sample=False)


def test_the_first_part_is_the_divergence():
    student, teacher = make_pair(5, 10)
    torch.testing.assert_close(skd_loss(student, teacher, beta=0.0), kl_loss(student, teacher).mean())


def test_the_second_part_is_the_distance_in_the_whitened_space():
    student, teacher = make_pair(5, 10)
    s, t = (torch.nn.functional.normalize(x.detach(), dim=1) for x in (student, teacher))
    d = (s @ s.T - t @ t.T) / 10
    values, vectors = torch.linalg.eigh(torch.cov(d.T) + 0.1 * torch.eye(5))
    whitened = d @ vectors / values.sqrt()
    torch.testing.assert_close(skd_loss(student, teacher, alpha=0.0).detach(), whitened.norm(dim=1).mean())


def test_zero_at_agreement_with_a_gradient_of_0():
    student, teacher = make_pair(5, 10)
    assert skd_loss(student, student.detach()) == 0
    assert gradient(SKDLoss(), student, student.detach()).abs().max() < 1e-15
    # Lengths do not count in the second part.
    assert gradient(SKDLoss(alpha=0.0), 2 * student, student.detach()).isfinite().all()
    assert skd_loss(student, teacher, alpha=0.0) > 0


def test_order_of_the_samples_does_not_count():
    student, teacher = make_pair(5, 10)
    torch.testing.assert_close(skd_loss(student.flip(0), teacher.flip(0)), skd_loss(student, teacher))


def test_a_single_sample_has_no_direction():
    student, teacher = make_pair(1, 10)
    assert skd_loss(student, teacher, alpha=0.0) < 1e-15
    assert gradient(SKDLoss(), student, teacher).isfinite().all()


def test_what_is_no_number_shows_also_in_the_second_part_alone():
    student, teacher = make_pair(4, 5)
    student.data[0, 0] = math.nan
    assert skd_loss(student, teacher, alpha=0.0).isnan()
    assert skd_loss(student, teacher, beta=0.0).isnan()


def test_covariances_that_have_no_factor_show(monkeypatch):
    # With a ridge below what rounding leaves; the factor is then finite and wrong.
    factor = torch.eye(4, dtype=torch.float64), torch.tensor(3)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda covariance: factor)
    assert skd_loss(*make_pair(4, 5), alpha=0.0).isnan()


@pytest.mark.parametrize("name", ["temperature", "ridge"])
@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures_and_ridges(name, bad):
    match = f"{name} must be positive and finite, got {bad}"
    with pytest.raises(ValueError, match=match):
        SKDLoss(**{name: bad})
    with pytest.raises(ValueError, match=match):
        skd_loss(*make_pair(4, 5), **{name: bad})


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_rejects_bad_weights(name, bad):
    match = f"{name} must be zero or positive and finite, got {bad}"
    with pytest.raises(ValueError, match=match):
        SKDLoss(**{name: bad})
    with pytest.raises(ValueError, match=match):
        skd_loss(*make_pair(4, 5), **{name: bad})


def test_rejects_what_are_no_logits_of_samples():
    with pytest.raises(ValueError, match=r"must be logits \(N, C\), got shape \(4, 5, 2\)"):
        skd_loss(*make_pair(4, 5, 2))
    with pytest.raises(ValueError, match=r"at least 2 classes along dim -1, got shape \(4, 1\)"):
        skd_loss(*make_pair(4, 1))


def test_repr_shows_options():
    assert repr(SKDLoss(ridge=0.2)) == "SKDLoss(alpha=1.0, beta=1.0, temperature=4.0, ridge=0.2)"
