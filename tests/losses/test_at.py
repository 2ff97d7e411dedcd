"""ATLoss against the attention maps of Zagoruyko and Komodakis (2017), at the scale of RepDistiller."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import ATLoss, at_loss


def attention(maps, p):
    """Mean over the channels of |f|^p, over its norm, one map per row."""
    result = np.zeros((len(maps), maps[0, 0].size))
    for n, sample in enumerate(maps):
        powers = sum(np.abs(channel.ravel()) ** p for channel in sample) / len(sample)
        result[n] = powers / math.sqrt(sum(powers**2))
    return result


def reference(student, teacher, p=2):
    return ((attention(student, p) - attention(teacher, p)) ** 2).mean(1)


@pytest.mark.parametrize("p", [1, 2, 3, 1.5])
@pytest.mark.parametrize(("channels", "size"), [(6, (3, 5)), (2, (3, 5)), (6, (1, 1))])
def test_matches_reference(channels, size, p):
    student, teacher = make_pair(5, 6, *size, teacher_shape=(5, channels, *size))
    expected = reference(student.detach().numpy(), teacher.numpy(), p)
    torch.testing.assert_close(
        at_loss(student, teacher, p=p).detach(), torch.from_numpy(expected), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(ATLoss(p)(student, teacher).item(), expected.mean().item(), rtol=1e-12, atol=1e-12)


def test_p_is_2_by_default():
    student, teacher = make_pair(4, 3, 4, 4)
    expected = reference(student.detach().numpy(), teacher.numpy(), 2).mean().item()
    torch.testing.assert_close(ATLoss()(student, teacher).item(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(at_loss(student, teacher).mean().item(), expected, rtol=1e-12, atol=1e-12)


def test_the_larger_map_is_average_pooled():
    student, teacher = make_pair(4, 3, 4, 6, teacher_shape=(4, 5, 2, 3))
    blocks = student.detach().numpy().reshape(4, 3, 2, 2, 3, 2).mean((3, 5))
    expected = torch.from_numpy(reference(blocks, teacher.numpy()))
    torch.testing.assert_close(at_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(at_loss(teacher, student.detach()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_gradient(p):
    student, teacher = make_pair(2, 3, 2, 2)
    assert torch.autograd.gradcheck(lambda s: at_loss(s, teacher, p=p), student)


def test_contract():
    assert_loss_contract(ATLoss, shape=(5, 3, 2, 3), maps=True)
    assert_loss_contract(
        lambda **options: ATLoss(3, **options), shape=(5, 3, 4, 4), teacher_shape=(5, 7, 2, 3), maps=True
    )


def test_counts_neither_scale_nor_sign_nor_order_of_channels():
    student, teacher = make_pair(4, 3, 4, 4)
    expected = at_loss(student, teacher)
    torch.testing.assert_close(at_loss(-7 * student, 0.1 * teacher), expected)
    torch.testing.assert_close(at_loss(student.flip(1), teacher.repeat(1, 2, 1, 1)), expected)


@pytest.mark.parametrize("p", [1, 1.5, 3, 8])
@pytest.mark.parametrize("scale", [1e-36, 1e-5, 1e6, 1e36])
def test_other_powers_do_not_count_scale_over_the_whole_range_of_float32(p, scale):
    student, teacher = make_pair(4, 3, 4, 4, dtype=torch.float32)
    expected = at_loss(student, teacher, p=p)
    torch.testing.assert_close(at_loss(scale * student, teacher, p=p), expected)
    torch.testing.assert_close(at_loss(student, scale * teacher, p=p), expected)
    zeros = torch.zeros_like(teacher)
    assert gradient(ATLoss(p), zeros, teacher).abs().max() == 0


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_square_does_not_count_scale_over_the_range_that_it_says(scale):
    student, teacher = make_pair(4, 3, 4, 4, dtype=torch.float32)
    torch.testing.assert_close(at_loss(scale * student, teacher), at_loss(student, teacher))


def test_zero_when_attention_is_equal_and_largest_when_disjoint():
    student, _ = make_pair(4, 3, 4, 4)
    assert ATLoss()(student, student.detach()) == 0
    left, right = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    left[..., 0, 0], right[..., 1, 1] = 3, 5
    assert at_loss(left, right) == 2 / 4
    assert at_loss(left, -left) == 0


def test_an_all_zero_map_gives_a_finite_value_and_no_gradient():
    student, teacher = make_pair(2, 3, 4, 4, dtype=torch.float32)
    zero = student.detach().clone()
    zero[0] = 0
    for p in (1, 2, 3):
        values = at_loss(zero, teacher, p=p)
        torch.testing.assert_close(values[0], torch.tensor(1 / 16))
        slope = gradient(ATLoss(p), zero, teacher)
        assert slope.isfinite().all()
        assert slope[0].abs().max() == 0
        assert slope[1].abs().max() > 0
    assert gradient(ATLoss(), torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)).abs().max() == 0


def test_finite_on_extreme_maps():
    student, teacher = make_pair(4, 3, 4, 4, dtype=torch.float32)
    for scale in (1e4, 1e-4):
        slope = gradient(ATLoss(), scale * student, -scale * teacher)
        assert slope.isfinite().all()
        torch.testing.assert_close(slope * scale, gradient(ATLoss(), student, teacher), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("p", [0, 0.5, -2, math.inf, math.nan])
def test_rejects_bad_powers(p):
    for build in (lambda: ATLoss(p), lambda: at_loss(*make_pair(4, 3, 2, 2), p=p)):
        with pytest.raises(ValueError, match=f"p must be finite and at least 1, got {p}"):
            build()


def test_rejects_what_is_no_map():
    with pytest.raises(
        ValueError, match=r"maps \(N, C, L\), .* or \(N, C, D, H, W\) of the same N, got \(4, 3\) and \(4, 3\)"
    ):
        at_loss(*make_pair(4, 3))


def test_repr_shows_options():
    assert repr(ATLoss(4, reduction="none")) == "ATLoss(p=4, reduction='none')"


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("size", [(7,), (2, 3, 2)])
def test_maps_of_one_and_three_dimensions(size, p):
    student, teacher = make_pair(4, 3, *size, teacher_shape=(4, 5, *size))
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), p))
    torch.testing.assert_close(at_loss(student, teacher, p=p).detach(), expected, rtol=1e-12, atol=1e-12)
    twice = teacher.repeat_interleave(2, dim=-1)  # average-pooled to what it was
    torch.testing.assert_close(ATLoss(p)(student, twice).item(), expected.mean().item(), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: at_loss(s, twice, p=p), student)


def test_contract_of_maps_of_one_and_three_dimensions():
    for size in ((8,), (2, 4, 2)):
        shape, teacher_shape = (5, 3, *size), (5, 2, *(n // 2 for n in size))
        assert_loss_contract(
            lambda **options: ATLoss(3, **options), shape=shape, teacher_shape=teacher_shape, maps=True
        )


def test_the_slope_at_the_kink_of_p_1_is_0():
    student, teacher = torch.tensor([[[[0.0, 2.0]], [[3.0, -1.0]]]]), torch.tensor([[[[1.0, 2.0]]]])
    slope = gradient(ATLoss(1), student, teacher)
    assert slope[0, 0, 0, 0] == 0
    assert (slope.flatten()[1:] != 0).all()


def test_rejects_bad_powers_set_later():
    loss = ATLoss()
    with pytest.raises(ValueError, match="p must be finite and at least 1, got 0"):
        loss.p = 0
    assert loss.p == 2
