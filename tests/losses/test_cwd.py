"""CWDLoss against the formula of Shu et al. (2021), channel by channel."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import CWDLoss, KLLoss, cwd_loss


def reference(student, teacher, temperature):
    """T^2 times the mean over channels of the sum over positions of p log(p / q)."""
    values = np.zeros(len(student))
    for n in range(len(student)):
        for s, t in zip(student[n], teacher[n], strict=True):
            q = np.exp(s.ravel() / temperature)
            p = np.exp(t.ravel() / temperature)
            q, p = q / q.sum(), p / p.sum()
            values[n] += sum(p[i] * math.log(p[i] / q[i]) for i in range(len(p)))
    return temperature**2 * values / student.shape[1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("shape", [(5, 6, 3, 4), (2, 1, 1, 3), (3, 2, 2, 1)])
def test_matches_reference(shape, temperature):
    student, teacher = make_pair(*shape)
    expected = reference(student.detach().numpy(), teacher.numpy(), temperature)
    torch.testing.assert_close(
        cwd_loss(student, teacher, temperature=temperature).detach(),
        torch.from_numpy(expected),
        rtol=1e-12,
        atol=1e-12,
    )
    torch.testing.assert_close(
        CWDLoss(temperature)(student, teacher).item(), expected.mean().item(), rtol=1e-12, atol=1e-12
    )


def test_temperature_is_4_by_default():
    student, teacher = make_pair(5, 3, 4, 4)
    expected = reference(student.detach().numpy(), teacher.numpy(), 4.0).mean().item()
    torch.testing.assert_close(CWDLoss()(student, teacher).item(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cwd_loss(student, teacher).mean().item(), expected, rtol=1e-12, atol=1e-12)


def test_the_larger_map_is_average_pooled():
    student, teacher = make_pair(4, 3, 4, 6, teacher_shape=(4, 3, 2, 3))
    blocks = student.detach().numpy().reshape(4, 3, 2, 2, 3, 2).mean((3, 5))
    expected = torch.from_numpy(reference(blocks, teacher.numpy(), 2.0))
    torch.testing.assert_close(cwd_loss(student, teacher, temperature=2.0).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(2, 3, 2, 3)
    assert torch.autograd.gradcheck(lambda s: cwd_loss(s, teacher), student)


def test_contract():
    assert_loss_contract(CWDLoss, shape=(5, 3, 2, 3), maps=True)
    assert_loss_contract(
        lambda **options: CWDLoss(1.0, **options), shape=(5, 3, 4, 4), teacher_shape=(5, 3, 2, 3), maps=True
    )


def test_is_kl_over_the_positions_of_each_channel():
    student, teacher = make_pair(4, 3, 2, 5)
    expected = KLLoss(2.0)(student.flatten(2), teacher.flatten(2))
    torch.testing.assert_close(CWDLoss(2.0)(student, teacher), expected, rtol=1e-12, atol=0)


def test_does_not_count_shifts_of_a_channel():
    student, teacher = make_pair(4, 3, 2, 5)
    shifts = torch.arange(3.0)[:, None, None]
    torch.testing.assert_close(cwd_loss(student + 5 * shifts, teacher - shifts), cwd_loss(student, teacher))


def test_is_the_divergence_from_the_teacher():
    # KL(p || q) with p = (1/2, 1/2), q = (1/4, 3/4) is half of log(4 / 3), 0.1438; the other way it is 0.1308.
    student, teacher = torch.tensor([[[[0.25, 0.75]]]]).log(), torch.tensor([[[[0.5, 0.5]]]]).log()
    torch.testing.assert_close(CWDLoss(1.0)(student, teacher).item(), 0.5 * math.log(4 / 3), atol=1e-6, rtol=0)


def test_zero_when_equal_and_positive_otherwise():
    student, teacher = make_pair(4, 3, 2, 5)
    assert CWDLoss()(student, student.detach()) == 0
    assert (cwd_loss(student, teacher) > 0).all()


def test_finite_on_extreme_maps_and_on_zeros():
    student = torch.tensor([[[[1e4, -1e4, 0.0]]]])
    for temperature in (1.0, 4.0):
        torch.testing.assert_close(CWDLoss(temperature)(student, -student).item(), temperature * 2e4)
        assert gradient(CWDLoss(temperature), student, -student).isfinite().all()
    assert gradient(CWDLoss(), torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)).abs().max() == 0


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        CWDLoss(temperature)
    with pytest.raises(ValueError, match=match):
        cwd_loss(*make_pair(4, 3, 2, 2), temperature=temperature)


def test_rejects_unequal_channels():
    student, teacher = make_pair(4, 3, 2, 2, teacher_shape=(4, 1, 2, 2))
    with pytest.raises(ValueError, match=r"of the same N and C, got \(4, 3, 2, 2\) and \(4, 1, 2, 2\)"):
        cwd_loss(student, teacher)


def test_repr_shows_options():
    assert repr(CWDLoss(2.0, reduction="none")) == "CWDLoss(temperature=2.0, reduction='none')"


@pytest.mark.parametrize("size", [(7,), (2, 3, 2)])
def test_maps_of_one_and_three_dimensions(size):
    student, teacher = make_pair(4, 3, *size)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 2.0))
    torch.testing.assert_close(cwd_loss(student, teacher, temperature=2.0).detach(), expected, rtol=1e-12, atol=1e-12)
    twice = teacher.repeat_interleave(2, dim=-1)  # average-pooled to what it was
    torch.testing.assert_close(CWDLoss(2.0)(student, twice).item(), expected.mean().item(), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: cwd_loss(s, twice), student)


def test_contract_of_maps_of_one_and_three_dimensions():
    for size in ((8,), (2, 4, 2)):
        shape, teacher_shape = (5, 3, *size), (5, 3, *(n // 2 for n in size))
        assert_loss_contract(CWDLoss, shape=shape, teacher_shape=teacher_shape, maps=True)


def test_a_position_of_minus_infinity_has_no_probability():
    student, teacher = make_pair(2, 3, 2, 3)
    teacher[0, 1, 1, 2] = -torch.inf
    limit = teacher.clone()
    limit[0, 1, 1, 2] = -1e4
    torch.testing.assert_close(cwd_loss(student, teacher), cwd_loss(student, limit), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(CWDLoss(), student, teacher), gradient(CWDLoss(), student, limit))
    assert cwd_loss(teacher, student.detach())[0] == torch.inf
    both = student.detach().clone()
    both[0, 1, 1, 2] = -torch.inf
    slope = gradient(CWDLoss(), both, teacher)
    assert slope.isfinite().all()
    assert slope[0, 1, 1, 2] == 0


def test_keeps_its_digits_near_agreement():
    student, teacher = make_pair(4, 3, 16, 16)
    near = (teacher + 1e-3 * student).detach()
    exact = cwd_loss(near, teacher)
    torch.testing.assert_close(cwd_loss(near.float(), teacher.float()).double(), exact, rtol=1e-3, atol=0)


def test_rejects_one_position_and_bad_temperatures_set_later():
    loss = CWDLoss()
    with pytest.raises(ValueError, match="at least 2 positions to compare, got 1 of each channel"):
        loss(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 1, 1))
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        loss.temperature = 0


@pytest.mark.parametrize("size", [(7,), (3, 4)])
def test_with_a_mask_of_positions_the_distributions_are_over_those_that_count(size):
    student, teacher = make_pair(4, 3, *size)
    known = torch.rand(4, *size, generator=torch.Generator().manual_seed(1)) > 0.4
    known[2] = False
    expected = []
    for n in (0, 1, 3):
        s, t = (maps[n : n + 1, :, known[n]].detach().numpy() for maps in (student, teacher))
        expected.append(reference(s, t, 2.0).item())
    student.data.masked_fill_(~known.unsqueeze(1), torch.nan)
    loss = CWDLoss(2.0)(student, teacher, mask=known)
    torch.testing.assert_close(loss.item(), sum(expected) / 3, rtol=1e-12, atol=1e-12)
    loss.backward()
    assert (student.grad.movedim(1, -1)[~known] == 0).all()
    assert (student.grad[known.unsqueeze(1).expand_as(student)] != 0).all()
    values = CWDLoss(2.0, reduction="none")(student, teacher, mask=known)
    torch.testing.assert_close(values, torch.tensor([*expected[:2], 0, expected[2]], dtype=torch.float64))
    divided = CWDLoss(2.0)(student, teacher, mask=known, denominator=8)
    torch.testing.assert_close(divided.item(), sum(expected) / 8, rtol=1e-12, atol=1e-12)


def test_a_mask_of_positions_is_of_the_smaller_map_and_may_hide_all():
    student, teacher = make_pair(4, 3, 4, 4, teacher_shape=(4, 3, 2, 2))
    known = torch.ones(4, 2, 2, dtype=torch.bool)
    torch.testing.assert_close(CWDLoss()(student, teacher, mask=known), CWDLoss()(student, teacher))
    assert (gradient(CWDLoss(), student, teacher, mask=~known) == 0).all()
    with pytest.raises(ValueError, match=r"shaped like the per-sample values, \(4, 2, 2\), got \(4, 4, 4\)"):
        CWDLoss()(student, teacher, mask=torch.ones(4, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="a mask of positions must be bool .*, got torch.float32"):
        CWDLoss()(student, teacher, mask=known.float())
