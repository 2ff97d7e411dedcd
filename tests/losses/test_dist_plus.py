"""DISTPlusLoss against correlations by NumPy: along the channels, and along the samples of the sums over channels."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import DISTPlusLoss, dist_plus_loss


def reference(student, teacher, iota=1.0, kappa=1.0):
    samples, _, *positions = student.shape
    places = list(np.ndindex(*positions))
    channel = [
        1 - np.corrcoef(student[(n, slice(None), *p)], teacher[(n, slice(None), *p)])[0, 1]
        for n in range(samples)
        for p in places
    ]
    ours, theirs = student.sum(1), teacher.sum(1)
    spatial = [1 - np.corrcoef(ours[(slice(None), *p)], theirs[(slice(None), *p)])[0, 1] for p in places]
    return iota * sum(channel) / len(channel) + kappa * sum(spatial) / len(spatial)


@pytest.mark.parametrize("shape", [(5, 6, 3, 4), (2, 2, 1, 3), (4, 3, 1, 1), (3, 4, 5), (3, 4, 2, 1, 2)])
@pytest.mark.parametrize(("iota", "kappa"), [(1.0, 1.0), (2.0, 0.0), (0.0, 3.0)])
def test_matches_reference(shape, iota, kappa):
    student, teacher = make_pair(*shape)
    expected = reference(student.detach().numpy(), teacher.numpy(), iota, kappa).item()
    value = dist_plus_loss(student, teacher, iota=iota, kappa=kappa)
    torch.testing.assert_close(value.item(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(DISTPlusLoss(iota, kappa)(student, teacher).item(), expected, rtol=1e-12, atol=1e-12)


def test_defaults():
    student, teacher = make_pair(4, 3, 2, 2)
    expected = reference(student.detach().numpy(), teacher.numpy()).item()
    torch.testing.assert_close(dist_plus_loss(student, teacher).item(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(DISTPlusLoss()(student, teacher).item(), expected, rtol=1e-12, atol=1e-12)


def test_the_larger_map_is_average_pooled():
    student, teacher = make_pair(4, 3, 4, 6, teacher_shape=(4, 3, 2, 3))
    blocks = student.detach().numpy().reshape(4, 3, 2, 2, 3, 2).mean((3, 5))
    expected = reference(blocks, teacher.numpy()).item()
    torch.testing.assert_close(dist_plus_loss(student, teacher).item(), expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(3, 3, 2, 2)
    assert torch.autograd.gradcheck(lambda s: dist_plus_loss(s, teacher, kappa=2.0), student)
    assert torch.autograd.gradgradcheck(lambda s: dist_plus_loss(s, teacher, kappa=2.0), student)


def test_contract():
    assert_loss_contract(DISTPlusLoss, shape=(5, 3, 2, 3), per_sample=False, maps=True)
    assert_loss_contract(
        lambda: DISTPlusLoss(0.5, 2.0), shape=(5, 3, 4, 4), teacher_shape=(5, 3, 2, 3), per_sample=False, maps=True
    )


def test_zero_where_they_agree_and_twice_the_weights_where_they_are_opposite():
    student, _ = make_pair(5, 3, 4, 4, dtype=torch.float32)
    assert dist_plus_loss(student, student.detach()) == 0
    assert gradient(DISTPlusLoss(), student, student).abs().max() == 0
    torch.testing.assert_close(dist_plus_loss(student, -student, iota=0.5, kappa=3.0).item(), 7.0)
    dead = student.detach().relu()
    dead[:, :, 1] = 0  # positions where nothing is active on either side
    assert dist_plus_loss(dead, dead) == 0


def test_each_part_does_not_count_what_it_does_not_see():
    student, teacher = make_pair(5, 3, 2, 2)
    factor, shift = torch.tensor([[0.5, 3.0], [20.0, 1.0]]), torch.tensor([[-4.0, 0.0], [9.0, 1.0]])
    expected = dist_plus_loss(student, teacher)
    torch.testing.assert_close(dist_plus_loss(factor * student + shift, teacher), expected)
    torch.testing.assert_close(dist_plus_loss(student, factor * teacher + shift), expected)
    turned = teacher.flip(1)  # the channels in another order have the same sums
    assert (dist_plus_loss(student, turned) - expected).abs() > 1e-3
    torch.testing.assert_close(dist_plus_loss(student, turned, iota=0.0), dist_plus_loss(student, teacher, iota=0.0))


def test_keeps_digits_near_agreement():
    student, noise = make_pair(6, 8, 3, 3)
    near = student.detach() + 1e-4 * noise
    value = dist_plus_loss(near.float(), student.detach().float()).double()
    torch.testing.assert_close(
        value, dist_plus_loss(near.float().double(), student.detach().float().double()), rtol=5e-3, atol=0
    )


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (4, 1, 2, 2)])
def test_what_does_not_vary_has_no_correlation(shape):
    student, teacher = make_pair(*shape, dtype=torch.float32)
    weights = {"iota": 0.0} if shape[0] == 1 else {"kappa": 0.0}
    assert dist_plus_loss(student, teacher, **weights) == 0
    assert gradient(DISTPlusLoss(**weights), student, teacher).abs().max() == 0


@pytest.mark.parametrize("constant", [0.0, 0.1, 1000.1])
def test_a_constant_student_counts_half_whatever_its_mean_is_rounded_to(constant):
    _, teacher = make_pair(7, 5, 3, 3, dtype=torch.float32)
    student = torch.full((7, 5, 3, 3), constant)
    torch.testing.assert_close(dist_plus_loss(student, teacher).item(), 1.0)
    assert gradient(DISTPlusLoss(), student, teacher).abs().max() == 0


@pytest.mark.parametrize("scale", [1e-15, 1e10, 1e25])
def test_maps_of_any_size(scale):
    student, teacher = make_pair(5, 3, 4, 4, dtype=torch.float32)
    torch.testing.assert_close(dist_plus_loss(scale * student, teacher), dist_plus_loss(student, teacher))
    slope = gradient(DISTPlusLoss(), scale * student, scale * teacher)
    torch.testing.assert_close(slope * scale, gradient(DISTPlusLoss(), student, teacher), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["iota", "kappa"])
def test_rejects_bad_weights(name, bad):
    match = f"{name} must be zero or positive and finite, got {bad}"
    with pytest.raises(ValueError, match=match):
        DISTPlusLoss(**{name: bad})
    with pytest.raises(ValueError, match=match):
        dist_plus_loss(*make_pair(6, 3, 2, 2), **{name: bad})


def test_rejects_unequal_channels():
    student, teacher = make_pair(4, 3, 2, 2, teacher_shape=(4, 1, 2, 2))
    with pytest.raises(ValueError, match=r"of the same N and C, got \(4, 3, 2, 2\) and \(4, 1, 2, 2\)"):
        dist_plus_loss(student, teacher)


def test_repr_shows_options():
    assert repr(DISTPlusLoss(2.0)) == "DISTPlusLoss(iota=2.0, kappa=1.0)"
