"""SRDLoss against the formula of Miles and Mikolajczyk (2024)."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from contract import assert_loss_contract, gradient, make_pair, with_weights
from distill import SRDLoss, srd_loss
from learned import assert_gradients


def reference(student, teacher, power, weight=None):
    """log of 1e-5 and the sum of |BN(W s) - BN(t)|^power, channel by channel."""
    student, teacher = (x.reshape(*x.shape[:2], -1).mean(2) for x in (student, teacher))
    if weight is not None:
        student = np.array([weight @ s for s in student])
    total = 1e-5
    for c in range(teacher.shape[1]):
        s, t = ((x[:, c] - x[:, c].mean()) / math.sqrt(x[:, c].var() + 1e-4) for x in (student, teacher))
        total += sum(abs(a - b) ** power for a, b in zip(s, t, strict=True))
    return math.log(total)


@pytest.mark.parametrize("power", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("shape", [(5, 4), (2, 1), (6, 3, 2, 4), (4, 3, 5)])
def test_matches_reference(shape, power):
    student, teacher = make_pair(*shape)
    expected = reference(student.detach().numpy(), teacher.numpy(), power)
    value = srd_loss(student, teacher, power=power)
    assert value.shape == ()
    torch.testing.assert_close(value.item(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [(3, 5), (5, 2), (4, 4)])
def test_matches_reference_through_the_learned_layer(channels):
    student, teacher = make_pair(6, channels[0], teacher_shape=(6, channels[1]))
    loss = with_weights(SRDLoss(*channels))
    weight = loss.projector.weight.detach().double().numpy()
    expected = reference(student.detach().numpy(), teacher.numpy(), 4.0, weight)
    torch.testing.assert_close(loss(student, teacher).item(), expected, rtol=1e-12, atol=1e-12)


def test_is_that_of_batch_norms_of_torch():
    student, teacher = make_pair(6, 4)
    norms = [nn.BatchNorm1d(4, eps=1e-4, affine=False).double() for _ in range(2)]
    difference = norms[0](student) - norms[1](teacher)
    torch.testing.assert_close(srd_loss(student, teacher), (difference.abs() ** 4).sum().add(1e-5).log())


def test_gradient():
    student, teacher = make_pair(5, 3, teacher_shape=(5, 4))
    assert_gradients(with_weights(SRDLoss(3, 4)), student, teacher)
    assert torch.autograd.gradcheck(lambda s: srd_loss(s, teacher[:, :3]), student)


def test_contract():
    assert_loss_contract(lambda: SRDLoss(3, 5), shape=(6, 3), teacher_shape=(6, 5), per_sample=False, batches=True)


def test_finite_at_agreement():
    student, _ = make_pair(6, 4)
    torch.testing.assert_close(srd_loss(student, student.detach()).item(), math.log(1e-5))
    assert gradient(srd_loss, student, student.detach()).abs().max() == 0
    for power in (1.0, 1.5):
        assert gradient(lambda s, p=power: srd_loss(s, student.detach(), power=p), student).isfinite().all()


def test_scale_and_shift_of_a_channel_do_not_count():
    student, teacher = make_pair(50, 4)
    moved = 3 * student + torch.arange(4)
    torch.testing.assert_close(srd_loss(moved, teacher), srd_loss(student, teacher), rtol=1e-4, atol=0)


def test_gradient_does_not_grow_with_the_batch():
    student, teacher = make_pair(4, 3)
    twice = srd_loss(student.repeat(2, 1), teacher.repeat(2, 1)) - srd_loss(student, teacher)
    torch.testing.assert_close(twice.item(), math.log(2), rtol=1e-5, atol=0)


def test_a_mask_that_leaves_one_sample_gives_0():
    student, teacher = make_pair(4, 3)
    mask = torch.tensor([True, False, False, False])
    assert srd_loss(student, teacher, mask=mask) == 0
    assert gradient(srd_loss, student, teacher, mask=mask).abs().max() == 0


@pytest.mark.parametrize("bad", [0.9, -1.0, math.inf, math.nan])
def test_rejects_bad_powers(bad):
    match = f"power must be at least 1 and finite, got {bad}"
    with pytest.raises(ValueError, match=match):
        SRDLoss(3, 4, bad)
    with pytest.raises(ValueError, match=match):
        srd_loss(*make_pair(4, 3), power=bad)


def test_rejects_channels_that_do_not_fit():
    with pytest.raises(ValueError, match=r"same number of channels \(nothing is broadcast\), got 3 and 4"):
        srd_loss(*make_pair(4, 3, teacher_shape=(4, 4)))
    with pytest.raises(ValueError, match="student must have 3 channels, got 4"):
        SRDLoss(3, 4)(*make_pair(4, 4))
    with pytest.raises(ValueError, match="teacher must have 4 channels, got 3"):
        SRDLoss(3, 4)(*make_pair(4, 3))
    with pytest.raises(ValueError, match="student_channels must be a positive integer, got 0"):
        SRDLoss(0, 4)


def test_rejects_a_single_sample():
    with pytest.raises(ValueError, match=r"there must be at least 2 samples, got shape \(1, 3\) .*drop_last"):
        srd_loss(*make_pair(1, 3))


def test_repr_shows_options():
    assert "student_channels=3, teacher_channels=4, power=2.0" in repr(SRDLoss(3, 4, 2.0))
