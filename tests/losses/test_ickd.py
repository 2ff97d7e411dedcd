"""ICKDLoss against the channel correlations of Liu et al. (2021), at the scale of the authors' ImageNet code."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import ICKDLoss, ickd_loss


def correlation(sample):
    """Inner products of the channels of one map, each row over its norm."""
    rows = np.array([[a.ravel() @ b.ravel() for b in sample] for a in sample])
    return np.array([row / math.sqrt(sum(row**2)) for row in rows])


def reference(student, teacher):
    samples, channels = student.shape[:2]
    values = [((correlation(s) - correlation(t)) ** 2).sum() for s, t in zip(student, teacher, strict=True)]
    return np.array(values) / (channels * samples)


@pytest.mark.parametrize("shape", [(5, 6, 3, 4), (2, 2, 1, 3), (3, 4, 1, 1), (1, 3, 2, 2)])
def test_matches_reference(shape):
    student, teacher = make_pair(*shape)
    expected = reference(student.detach().numpy(), teacher.numpy())
    torch.testing.assert_close(ickd_loss(student, teacher).detach(), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ICKDLoss()(student, teacher).item(), expected.mean().item(), rtol=1e-12, atol=1e-12)


def test_mean_is_the_sum_over_channels_times_squared_samples():
    student, teacher = make_pair(4, 3, 2, 2)
    pairs = zip(student.detach().numpy(), teacher.numpy(), strict=True)
    total = sum(((correlation(s) - correlation(t)) ** 2).sum() for s, t in pairs)
    torch.testing.assert_close(ICKDLoss()(student, teacher).item(), total.item() / (3 * 4**2), rtol=1e-12, atol=0)
    twice = ICKDLoss()(student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1))
    torch.testing.assert_close(twice, ICKDLoss()(student, teacher) / 2, rtol=1e-12, atol=0)


def test_the_larger_map_is_average_pooled():
    student, teacher = make_pair(4, 3, 4, 6, teacher_shape=(4, 3, 2, 3))
    blocks = student.detach().numpy().reshape(4, 3, 2, 2, 3, 2).mean((3, 5))
    expected = torch.from_numpy(reference(blocks, teacher.numpy()))
    torch.testing.assert_close(ickd_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(2, 3, 2, 2)
    assert torch.autograd.gradcheck(lambda s: ickd_loss(s, teacher), student)


def test_contract():
    assert_loss_contract(ICKDLoss, shape=(5, 4, 2, 3), maps=True)
    assert_loss_contract(ICKDLoss, shape=(5, 4, 4, 4), teacher_shape=(5, 4, 2, 3), maps=True)


def test_counts_neither_scale_nor_sign_nor_rotation_of_the_positions():
    student, teacher = make_pair(4, 3, 2, 3)
    rotation = torch.linalg.qr(make_pair(6, 6)[1]).Q
    turned = (student.flatten(2) @ rotation).reshape(student.shape)
    expected = ickd_loss(student, teacher)
    torch.testing.assert_close(ickd_loss(turned, teacher), expected)
    torch.testing.assert_close(ickd_loss(-7 * student, 0.1 * teacher), expected)
    torch.testing.assert_close(ickd_loss(student.flip(1), teacher.flip(1)), expected)
    assert (ickd_loss(student.flip(1), teacher) - expected).abs().max() > 1e-3  # but which channel is which does


def test_zero_when_equal_and_positive_otherwise():
    student, teacher = make_pair(4, 3, 2, 3)
    assert ICKDLoss()(student, student.detach()) == 0
    assert (ickd_loss(student, teacher) > 0).all()


def test_channels_of_zeros_give_bounded_gradients():
    student, teacher = make_pair(2, 3, 4, 4, dtype=torch.float32)
    student = student.detach().clone()
    student[0, 1] = 0
    student[1] = 0
    slope = gradient(ICKDLoss(), student, teacher)
    assert slope.isfinite().all()
    assert slope.abs().max() < 10  # the norm of a row of zeros must not be what the gradient is divided by
    assert slope[1].abs().max() == 0
    assert slope[0].abs().max() > 0
    torch.testing.assert_close(ickd_loss(student, teacher)[1], torch.tensor(0.5))
    assert gradient(ICKDLoss(), torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)).abs().max() == 0


def test_finite_on_extreme_maps():
    student, teacher = make_pair(4, 3, 4, 4, dtype=torch.float32)
    for scale in (1e4, 1e-4):
        slope = gradient(ICKDLoss(), scale * student, scale * teacher)
        torch.testing.assert_close(slope * scale, gradient(ICKDLoss(), student, teacher), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("positions", [(6,), (2, 3, 2)])
def test_positions_may_lie_along_a_line_or_in_a_volume(positions):
    student, teacher = make_pair(4, 3, *positions)
    expected = ickd_loss(student.flatten(2)[..., None], teacher.flatten(2)[..., None])
    torch.testing.assert_close(ickd_loss(student, teacher), expected, rtol=1e-12, atol=1e-12)


def test_rejects_unequal_channels():
    student, teacher = make_pair(4, 3, 2, 2, teacher_shape=(4, 1, 2, 2))
    with pytest.raises(ValueError, match=r"of the same N and C, got \(4, 3, 2, 2\) and \(4, 1, 2, 2\)"):
        ickd_loss(student, teacher)


def test_repr_shows_options():
    assert repr(ICKDLoss(reduction="none")) == "ICKDLoss(reduction='none')"
