"""PearsonLoss against the standardised maps of Cao et al. (2022), at the scale of MMRazor."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import PearsonLoss, pearson_loss


def standardize(values):
    mean = sum(values) / len(values)
    std = math.sqrt(sum((values - mean) ** 2) / (len(values) - 1))
    return (values - mean) / (std + 1e-6)


def reference(student, teacher):
    """Half the mean over all elements of the squared difference, standardised channel by channel."""
    total = 0.0
    for c in range(student.shape[1]):
        total += sum((standardize(student[:, c].ravel()) - standardize(teacher[:, c].ravel())) ** 2)
    return total / student.size / 2


@pytest.mark.parametrize("shape", [(5, 6, 3, 4), (1, 2, 1, 3), (4, 3, 1, 1)])
def test_matches_reference(shape):
    student, teacher = make_pair(*shape)
    expected = torch.tensor(reference(student.detach().numpy(), teacher.numpy()), dtype=torch.float64)
    torch.testing.assert_close(pearson_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(PearsonLoss()(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_the_larger_map_is_average_pooled():
    student, teacher = make_pair(4, 3, 4, 6, teacher_shape=(4, 3, 2, 3))
    blocks = student.detach().numpy().reshape(4, 3, 2, 2, 3, 2).mean((3, 5))
    expected = reference(blocks, teacher.numpy())
    torch.testing.assert_close(pearson_loss(student, teacher).item(), expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(3, 2, 2, 2)
    assert torch.autograd.gradcheck(lambda s: pearson_loss(s, teacher), student)


def test_contract():
    assert_loss_contract(PearsonLoss, shape=(5, 3, 2, 3), per_sample=False, maps=True)
    assert_loss_contract(PearsonLoss, shape=(5, 3, 4, 4), teacher_shape=(5, 3, 2, 3), per_sample=False, maps=True)


def test_is_one_minus_the_correlation():
    student, teacher = make_pair(5, 3, 4, 4)
    r = [np.corrcoef(student[:, c].detach().numpy().ravel(), teacher[:, c].numpy().ravel())[0, 1] for c in range(3)]
    expected = (1 - 1 / 80) * (1 - sum(r) / 3)
    torch.testing.assert_close(pearson_loss(student, teacher).item(), expected.item(), rtol=1e-5, atol=0)


def test_does_not_count_scale_and_shift_of_a_channel():
    student, teacher = make_pair(5, 3, 4, 4)
    scale, shift = torch.tensor([0.5, 3.0, 20.0])[:, None, None], torch.tensor([-4.0, 0.0, 9.0])[:, None, None]
    expected = pearson_loss(student, teacher)
    torch.testing.assert_close(pearson_loss(scale * student + shift, teacher), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(pearson_loss(student, scale * teacher + shift), expected, rtol=1e-5, atol=0)
    assert (pearson_loss(-student, teacher) - expected).abs() > 1e-3  # but the sign does count


def test_zero_when_equal_and_near_2_when_opposite():
    student, _ = make_pair(5, 3, 4, 4)
    assert PearsonLoss()(student, student.detach()) == 0
    torch.testing.assert_close(pearson_loss(student, -student.detach()).item(), 2 * 79 / 80, rtol=1e-5, atol=0)


def test_constant_channels_give_finite_gradients():
    student, teacher = make_pair(5, 3, 4, 4, dtype=torch.float32)
    flat = student.detach().clone()
    flat[:, 1] = 0
    flat[:, 2] = 7
    assert pearson_loss(flat, teacher).isfinite()
    assert gradient(PearsonLoss(), flat, teacher).isfinite().all()
    zeros = torch.zeros(5, 3, 4, 4)
    assert pearson_loss(zeros, zeros) == 0
    assert gradient(PearsonLoss(), zeros, zeros).abs().max() == 0


@pytest.mark.parametrize("constant", [0.1, 1.1, 100.3, 1000.1])
def test_a_constant_channel_becomes_0_whatever_its_mean_is_rounded_to(constant):
    _, teacher = make_pair(7, 3, 7, 7, dtype=torch.float32)
    student = torch.full((7, 3, 7, 7), constant)
    torch.testing.assert_close(pearson_loss(student, teacher), pearson_loss(torch.zeros_like(student), teacher))
    assert gradient(PearsonLoss(), student, teacher).abs().max() == 0


def test_a_channel_that_varies_little_is_still_standardised():
    student, teacher = make_pair(7, 3, 7, 7)
    near = (100 + 1e-2 * student.detach()).float()
    torch.testing.assert_close(
        pearson_loss(near, teacher.float()).double(), pearson_loss(near.double(), teacher), rtol=1e-4, atol=0
    )


def test_finite_on_extreme_maps():
    student, teacher = make_pair(5, 3, 4, 4, dtype=torch.float32)
    slope = gradient(PearsonLoss(), 1e4 * student, -1e4 * teacher)
    torch.testing.assert_close(slope * 1e4, gradient(PearsonLoss(), student, -teacher), rtol=1e-3, atol=1e-6)


def test_rejects_a_single_value_per_channel():
    with pytest.raises(ValueError, match=r"at least two values over samples and positions, got shape \(1, 3, 1, 1\)"):
        pearson_loss(*make_pair(1, 3, 4, 4, teacher_shape=(1, 3, 1, 1)))


def test_rejects_unequal_channels():
    student, teacher = make_pair(4, 3, 2, 2, teacher_shape=(4, 1, 2, 2))
    with pytest.raises(ValueError, match=r"of the same N and C, got \(4, 3, 2, 2\) and \(4, 1, 2, 2\)"):
        pearson_loss(student, teacher)


def test_rejects_a_reduction():
    with pytest.raises(TypeError, match="reduction"):
        PearsonLoss(reduction="mean")


@pytest.mark.parametrize("positions", [(6,), (2, 3, 2)])
def test_positions_may_lie_along_a_line_or_in_a_volume(positions):
    student, teacher = make_pair(4, 3, *positions)
    expected = pearson_loss(student.flatten(2)[..., None], teacher.flatten(2)[..., None])
    torch.testing.assert_close(pearson_loss(student, teacher), expected, rtol=1e-12, atol=1e-12)


def test_repr():
    assert repr(PearsonLoss()) == "PearsonLoss()"
