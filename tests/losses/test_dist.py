"""DISTLoss against the formula of Huang et al. (2022)."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, make_pair
from distill import DISTLoss, dist_loss


def correlation(a, b):
    """Pearson's, with the 1e-8 of the authors' code in the denominator."""
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (math.sqrt((a * a).sum()) * math.sqrt((b * b).sum()) + 1e-8)


def reference(student, teacher, beta, gamma, temperature, axis=-1):
    """T^2 [beta inter + gamma intra]: 1 minus the mean correlation along the rows, and along the columns."""
    classes = student.shape[axis]
    q = np.exp(np.moveaxis(student, axis, -1).reshape(-1, classes) / temperature)
    p = np.exp(np.moveaxis(teacher, axis, -1).reshape(-1, classes) / temperature)
    q, p = q / q.sum(1, keepdims=True), p / p.sum(1, keepdims=True)
    inter = 1 - sum(correlation(q[n], p[n]) for n in range(len(p))) / len(p)
    intra = 1 - sum(correlation(q[:, c], p[:, c]) for c in range(classes)) / classes
    return temperature**2 * (beta * inter + gamma * intra)


@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(1, 1, 1), (2, 2, 4), (1, 0, 1), (0, 1, 0.5)])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, beta, gamma, temperature):
    student, teacher = make_pair(*shape)
    expected = reference(student.detach().numpy(), teacher.numpy(), beta, gamma, temperature, dim)
    value = dist_loss(student, teacher, beta=beta, gamma=gamma, temperature=temperature, dim=dim)
    assert value.shape == ()
    torch.testing.assert_close(value.item(), expected.item(), rtol=1e-12, atol=1e-12)
    value = DISTLoss(beta, gamma, temperature, dim=dim)(student, teacher)
    torch.testing.assert_close(value.item(), expected.item(), rtol=1e-12, atol=1e-12)


def test_defaults():
    student, teacher = make_pair(5, 10)
    expected = reference(student.detach().numpy(), teacher.numpy(), 1.0, 1.0, 1.0).item()
    torch.testing.assert_close(dist_loss(student, teacher).item(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(DISTLoss()(student, teacher).item(), expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: dist_loss(s, teacher, temperature=2.0), student)
    assert torch.autograd.gradgradcheck(lambda s: dist_loss(s, teacher, temperature=2.0), student)


def test_contract():
    assert_loss_contract(DISTLoss, shape=(6, 10), per_sample=False)
    assert_loss_contract(lambda: DISTLoss(2.0, 2.0, 4.0, dim=1), shape=(4, 5, 3, 2), per_sample=False)


def test_is_the_correlation_of_numpy_when_no_class_is_rare():
    student, teacher = make_pair(6, 5)
    q, p = student.detach().softmax(-1).numpy(), teacher.softmax(-1).numpy()
    inter = 1 - np.mean([np.corrcoef(q[n], p[n])[0, 1] for n in range(6)])
    intra = 1 - np.mean([np.corrcoef(q[:, c], p[:, c])[0, 1] for c in range(5)])
    torch.testing.assert_close(dist_loss(student, teacher).item(), inter + intra, rtol=1e-6, atol=0)


def test_only_proportions_count():
    # Mixing the teacher with the uniform distribution keeps all correlations at 1.
    _, teacher = make_pair(6, 5)
    mixed = (0.4 * teacher.softmax(-1) + 0.6 / 5).log()
    torch.testing.assert_close(dist_loss(mixed, teacher).item(), 0.0, rtol=0, atol=1e-5)
    torch.testing.assert_close(dist_loss(teacher, teacher).item(), 0.0, rtol=0, atol=1e-5)


def test_the_other_way_round_it_is_two_for_each_part():
    teacher = torch.tensor([[0.2, 0.8], [0.4, 0.6]]).log()
    for options in ({"gamma": 0.0}, {"beta": 0.0}):
        torch.testing.assert_close(dist_loss(-teacher, teacher, **options).item(), 2.0, rtol=0, atol=1e-4)


def test_a_class_that_no_sample_is_likely_to_be_counts_as_uncorrelated():
    _, teacher = make_pair(6, 5)
    teacher = teacher - torch.tensor([0.0, 0.0, 0.0, 0.0, 40.0])
    torch.testing.assert_close(dist_loss(teacher, teacher, beta=0.0).item(), 1 / 5, rtol=0, atol=1e-5)


def test_does_not_count_shifts_and_the_order_of_samples_and_classes():
    student, teacher = make_pair(6, 10)
    expected = dist_loss(student, teacher)
    torch.testing.assert_close(dist_loss(student + 5, teacher - 3), expected)
    torch.testing.assert_close(dist_loss(student.flip(0), teacher.flip(0)), expected)
    torch.testing.assert_close(dist_loss(student.flip(1), teacher.flip(1)), expected)
    torch.testing.assert_close(dist_loss(student.T, teacher.T, dim=0), expected)


@pytest.mark.parametrize("samples", [1, 3])
def test_finite_where_nothing_varies(samples):
    # Identical samples leave the columns constant, equal logits the rows, and a single sample has no variance at all.
    for row in ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]):
        student = torch.tensor([row] * samples, requires_grad=True)
        value = DISTLoss()(student, torch.tensor([row] * samples))
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


def test_finite_on_extreme_logits():
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 5.0]], requires_grad=True)
    for teacher in (student.detach(), -student.detach()):
        value = DISTLoss()(student, teacher)
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["beta", "gamma"])
def test_rejects_bad_weights(name, bad):
    match = f"{name} must be zero or positive and finite, got {bad}"
    with pytest.raises(ValueError, match=match):
        DISTLoss(**{name: bad})
    with pytest.raises(ValueError, match=match):
        dist_loss(*make_pair(6, 10), **{name: bad})


def test_rejects_a_single_class_and_maps_whose_classes_are_not_said():
    with pytest.raises(ValueError, match=r"at least 2 classes along dim -1, got shape \(6, 1\)"):
        dist_loss(*make_pair(6, 1))
    with pytest.raises(ValueError, match=r"dim must be given for logits of four dimensions or more"):
        DISTLoss()(*make_pair(2, 5, 3, 4))


def test_rejects_a_single_dimension():
    with pytest.raises(ValueError, match=r"must have samples and classes, got shape \(10,\)"):
        dist_loss(*make_pair(10))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        DISTLoss(temperature=temperature)
    with pytest.raises(ValueError, match=match):
        dist_loss(*make_pair(6, 10), temperature=temperature)


def test_repr_shows_options():
    assert repr(DISTLoss(2.0, 1.0, 4.0)) == "DISTLoss(beta=2.0, gamma=1.0, temperature=4.0, dim=None)"
