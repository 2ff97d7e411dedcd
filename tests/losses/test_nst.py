"""NSTLoss against the discrepancy of Huang and Wang (2017), kernel by kernel."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import NSTLoss, nst_loss


def kernel_mean(a, b):
    return sum(float(x @ y) ** 2 for x in a for y in b) / (len(a) * len(b))


def reference(student, teacher):
    """The squared maximum mean discrepancy of the normalised channels, sample by sample."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        s = [channel.ravel() / math.sqrt(sum(channel.ravel() ** 2)) for channel in s]
        t = [channel.ravel() / math.sqrt(sum(channel.ravel() ** 2)) for channel in t]
        values.append(kernel_mean(s, s) + kernel_mean(t, t) - 2 * kernel_mean(s, t))
    return np.array(values)


# Few positions and many channels, many positions and few channels, and where the one becomes the other.
@pytest.mark.parametrize(("channels", "size"), [((6, 8), (2, 2)), ((3, 2), (3, 4)), ((2, 6), (2, 3)), ((2, 6), (7, 1))])
def test_matches_reference(channels, size):
    student, teacher = make_pair(4, channels[0], *size, teacher_shape=(4, channels[1], *size))
    expected = reference(student.detach().numpy(), teacher.numpy())
    torch.testing.assert_close(nst_loss(student, teacher).detach(), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(NSTLoss()(student, teacher).item(), expected.mean().item(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [2, 9])
def test_the_larger_map_is_average_pooled(channels):
    student, teacher = make_pair(4, 3, 4, 6, teacher_shape=(4, channels, 2, 3))
    blocks = student.detach().numpy().reshape(4, 3, 2, 2, 3, 2).mean((3, 5))
    expected = torch.from_numpy(reference(blocks, teacher.numpy()))
    torch.testing.assert_close(nst_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nst_loss(teacher, student.detach()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 3), (2, 4)])
def test_gradient(size):
    student, teacher = make_pair(2, 3, *size)
    assert torch.autograd.gradcheck(lambda s: nst_loss(s, teacher), student)


def test_contract():
    assert_loss_contract(NSTLoss, shape=(5, 3, 2, 4), maps=True)
    assert_loss_contract(NSTLoss, shape=(5, 6, 4, 4), teacher_shape=(5, 3, 2, 2), maps=True)


@pytest.mark.parametrize("size", [(2, 2), (4, 4)])
def test_counts_neither_scale_nor_sign_nor_order_of_channels_nor_order_of_positions(size):
    student, teacher = make_pair(4, 6, *size)
    expected = nst_loss(student, teacher)
    torch.testing.assert_close(nst_loss(-7 * student, 0.1 * teacher), expected)
    torch.testing.assert_close(nst_loss(student.flip(1), teacher.repeat(1, 2, 1, 1)), expected)
    torch.testing.assert_close(nst_loss(student.flip(2), teacher.flip(2)), expected)


@pytest.mark.parametrize("size", [(2, 2), (4, 4)])
def test_zero_when_equal_and_positive_otherwise(size):
    student, teacher = make_pair(4, 6, *size)
    assert NSTLoss()(student, student.detach()) == 0
    assert (nst_loss(student, teacher) > 0).all()


def test_is_2_for_single_channels_that_do_not_overlap():
    maps = torch.zeros(1, 1, 2, 2)
    maps[..., 0, 0] = 4
    assert nst_loss(maps, maps.flip(2)) == 2


@pytest.mark.parametrize("size", [(2, 2), (4, 4)])
def test_channels_of_zeros_give_finite_values_and_no_gradient(size):
    student, teacher = make_pair(2, 6, *size, dtype=torch.float32)
    student = student.detach().clone()
    student[0, 1] = 0
    student[1] = 0
    slope = gradient(NSTLoss(), student, teacher)
    assert slope.isfinite().all()
    assert slope[0, 1].abs().max() == slope[1].abs().max() == 0
    assert 0 < slope[0].abs().max() < 10
    assert gradient(NSTLoss(), torch.zeros(2, 6, *size), torch.zeros(2, 6, *size)).abs().max() == 0


@pytest.mark.parametrize("size", [(2, 2), (4, 4)])
def test_finite_on_extreme_maps(size):
    student, teacher = make_pair(4, 6, *size, dtype=torch.float32)
    for scale in (1e4, 1e-4):
        slope = gradient(NSTLoss(), scale * student, -scale * teacher)
        torch.testing.assert_close(slope * scale, gradient(NSTLoss(), student, teacher), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("shape", "most"), [((2, 32, 2, 2), 2 * 32 * 4), ((2, 2, 8, 8), 2 * 2 * 64)])
def test_keeps_nothing_larger_than_the_maps_for_the_backward(shape, most):
    sizes = []
    student, teacher = make_pair(*shape)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        nst_loss(student, teacher)
    assert max(sizes) == most


def test_rejects_what_is_no_map():
    with pytest.raises(
        ValueError, match=r"maps \(N, C, L\), .* or \(N, C, D, H, W\) of the same N, got \(4, 3\) and \(4, 3\)"
    ):
        nst_loss(*make_pair(4, 3))


def test_repr_shows_options():
    assert repr(NSTLoss(reduction="none")) == "NSTLoss(reduction='none')"


@pytest.mark.parametrize("size", [(7,), (2, 3, 2), (2,)])
def test_maps_of_one_and_three_dimensions(size):
    student, teacher = make_pair(4, 3, *size, teacher_shape=(4, 5, *size))
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy()))
    torch.testing.assert_close(nst_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    twice = teacher.repeat_interleave(2, dim=-1)  # average-pooled to what it was
    torch.testing.assert_close(NSTLoss()(student, twice).item(), expected.mean().item(), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: nst_loss(s, twice), student)


def test_contract_of_maps_of_one_and_three_dimensions():
    for size in ((8,), (2, 4, 2)):
        shape, teacher_shape = (5, 3, *size), (5, 2, *(n // 2 for n in size))
        assert_loss_contract(NSTLoss, shape=shape, teacher_shape=teacher_shape, maps=True)
