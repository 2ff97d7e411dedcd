"""OFDLoss against the formulas of Heo et al. (2019)."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from contract import assert_loss_contract, make_pair, with_weights
from distill import OFDLoss, ofd_loss, ofd_margin
from learned import (
    assert_gradients,
    average_pool,
    batch_norm,
    convolve,
    make_maps,
    weights,
)

MARGIN = torch.tensor([-0.3, -1.0, -2.0, 0.0], dtype=torch.float64)


def reference(student, teacher, margin):
    """Section 3: margin ReLU of the teacher, then the partial distance, summed; element by element."""
    values = np.zeros(len(student))
    for n, c, *position in np.ndindex(student.shape):
        s, t = student[(n, c, *position)], max(teacher[(n, c, *position)], margin[c])
        values[n] += 0 if s <= t <= 0 else (t - s) ** 2
    return values


def reference_margin(weight, bias):
    """The mean of the negative part of a normal density, by Gauss-Legendre quadrature."""
    s, low = abs(weight), min(bias, 0) - 40 * abs(weight)
    nodes, factors = np.polynomial.legendre.leggauss(400)
    x = (nodes + 1) / 2 * -low + low
    density = np.exp(-((x - bias) ** 2) / (2 * s**2)) * factors
    return (x * density).sum() / density.sum()


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 2, 5)])
def test_function_matches_reference(shape):
    student, teacher = make_pair(*shape)
    expected = reference(student.detach().numpy(), teacher.numpy(), MARGIN.numpy())
    value = ofd_loss(student, teacher, margin=MARGIN).detach()
    torch.testing.assert_close(value, torch.as_tensor(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [((4, 4), (4, 4)), ((6, 6), (3, 3)), ((4, 5), (7, 8)), ((2, 7), (4, 3))])
def test_module_matches_reference(sizes):
    student, teacher = make_maps((3, 2, *sizes[0]), (3, 4, *sizes[1]))
    loss = with_weights(OFDLoss(2, 4, MARGIN, reduction="none"))
    height, width = (min(a, b) for a, b in zip(*sizes, strict=True))
    convolution, norm = loss.connector
    s = convolve(average_pool(student.detach().numpy(), height, width), *weights(convolution))
    t = average_pool(teacher.numpy(), height, width)
    expected = reference(batch_norm(s, *weights(norm)), t, MARGIN.numpy())
    torch.testing.assert_close(loss(student, teacher).detach(), torch.as_tensor(expected), rtol=1e-12, atol=1e-12)
    loss.reduction = "mean"
    torch.testing.assert_close(loss(student, teacher).item(), expected.mean().item(), rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(3, 4, 5)
    assert torch.autograd.gradcheck(lambda s: ofd_loss(s, teacher, margin=MARGIN), student)
    assert torch.autograd.gradgradcheck(lambda s: ofd_loss(s, teacher, margin=MARGIN), student)
    assert_gradients(with_weights(OFDLoss(2, 4, MARGIN)), *make_maps((2, 2, 3, 3), (2, 4, 2, 4)))


def test_contract():
    margin = -torch.arange(5.0)
    assert_loss_contract(
        lambda **options: OFDLoss(3, 5, margin, **options),
        shape=(6, 3, 6, 6),
        teacher_shape=(6, 5, 4, 4),
        maps=True,
        meet=True,
    )


def test_asks_nothing_of_a_student_below_a_silent_teacher():
    margin = torch.tensor([-1.0])
    student = torch.tensor([[[-1.0, -5.0, -0.5, -0.5, 2.0, -2.0]]], requires_grad=True)
    teacher = torch.tensor([[[-9.0, -0.2, -9.0, -0.7, 2.0, 0.1]]])
    # Silent enough: at the margin, below the teacher. Not silent enough by 0.5 and 0.2. Equal. Not active, by 2.1.
    value = ofd_loss(student, teacher, margin=margin)
    torch.testing.assert_close(value, torch.tensor([0.5**2 + 0.2**2 + 2.1**2]))
    value.backward()
    torch.testing.assert_close(student.grad, torch.tensor([[[0.0, 0.0, 1.0, 0.4, 0.0, -4.2]]]))


def test_is_the_squared_error_where_the_teacher_is_active():
    student, teacher = make_pair(3, 4, 5)
    teacher = teacher.abs()
    torch.testing.assert_close(
        ofd_loss(student, teacher, margin=MARGIN), (student - teacher).square().flatten(1).sum(1)
    )


def test_margin_matches_the_expectation_of_the_negative_part():
    weight = torch.tensor([1.0, 0.3, 2.0, -1.5, 1.0, 1.0], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.2, -1.0, 0.4, -6.0, 3.0], dtype=torch.float64)
    expected = [reference_margin(w, b) for w, b in zip(weight.tolist(), bias.tolist(), strict=True)]
    torch.testing.assert_close(
        ofd_margin(weight, bias), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(ofd_margin(torch.ones(1), torch.zeros(1)).item(), -math.sqrt(2 / math.pi))


def test_margin_is_minus_three_spreads_for_a_channel_that_is_hardly_ever_negative():
    # Phi(-3.09) is 0.001001, Phi(-3.1) is 0.00097.
    weight, bias = torch.tensor([2.0, 2.0, -0.5, 1.0]), torch.tensor([6.18, 6.2, 5.0, 1e4])
    margin = ofd_margin(weight, bias)
    torch.testing.assert_close(margin[1:], torch.tensor([-6.0, -1.5, -3.0]))
    assert -1 < margin[0] < 0


def test_margin_of_a_constant_channel():
    margin = ofd_margin(torch.zeros(3), torch.tensor([-2.0, 0.0, 2.0]))
    assert margin.tolist() == [-2.0, 0.0, 0.0]


def test_margin_is_a_constant_of_the_batch_norm():
    norm = nn.BatchNorm2d(3)
    margin = ofd_margin(norm.weight, norm.bias)
    assert not margin.requires_grad
    assert margin.dtype == torch.float32
    assert ofd_margin(norm.weight.half(), norm.bias.half()).dtype == torch.float32
    assert ofd_margin(norm.weight, norm.bias.double()).dtype == torch.float64


def test_margin_is_kept_in_the_state_and_on_its_own():
    margin = torch.tensor([-1.0, -2.0])
    loss = OFDLoss(3, 2, margin)
    margin.fill_(-7.0)
    assert loss.state_dict()["margin"].tolist() == [-1.0, -2.0]
    assert "margin" not in dict(loss.named_parameters())


def test_batch_norm_has_no_running_state():
    names = ["connector.0.weight", "connector.1.bias", "connector.1.weight", "margin"]
    assert sorted(OFDLoss(2, 4, MARGIN).state_dict()) == names


def test_connector_starts_as_published():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolution, norm = OFDLoss(64, 128, torch.zeros(128)).connector
    torch.testing.assert_close(convolution.weight.std().item(), math.sqrt(2 / 128), rtol=0.02, atol=0)
    assert convolution.bias is None
    assert (norm.weight == 1).all()
    assert (norm.bias == 0).all()


def test_rejects_bad_margins():
    for shape in ((4,), (1,), (), (3, 1)):
        with pytest.raises(ValueError, match=r"margin must have shape \(3,\), got \("):
            OFDLoss(2, 3, torch.zeros(shape))
        with pytest.raises(ValueError, match=r"margin must have shape \(3,\), got \("):
            ofd_loss(*make_pair(2, 3, 4), margin=torch.zeros(shape))
    for bad in (0.5, math.nan):
        with pytest.raises(ValueError, match=f"margin must not be positive, got {bad}"):
            OFDLoss(2, 3, torch.tensor([-1.0, bad, -1.0]))
    with pytest.raises(ValueError, match=r"weight and bias must be of one shape \(C,\), got \(3,\) and \(2,\)"):
        ofd_margin(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"weight and bias must be of one shape \(C,\), got \(3, 1\) and \(3, 1\)"):
        ofd_margin(torch.ones(3, 1), torch.ones(3, 1))


def test_rejects_bad_channels_and_pairs():
    with pytest.raises(ValueError, match="student_channels must be a positive integer, got 0"):
        OFDLoss(0, 3, torch.zeros(3))
    with pytest.raises(ValueError, match="teacher_channels must be a positive integer, got -1"):
        OFDLoss(3, -1, torch.zeros(3))
    student, teacher = make_pair(2, 4, 3)
    with pytest.raises(ValueError, match=r"same shape \(nothing is broadcast\), got \("):
        ofd_loss(student, teacher[:1], margin=MARGIN)


def test_rejects_a_batch_without_statistics():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        OFDLoss(2, 4, MARGIN)(*make_maps((1, 2, 1, 1), (1, 4, 1, 1)))


def test_repr_shows_options():
    expected = "OFDLoss(\n  student_channels=2, teacher_channels=4, reduction='sum'\n"
    assert repr(OFDLoss(2, 4, MARGIN, reduction="sum")).startswith(expected)


def test_a_margin_may_be_an_inference_tensor():
    with torch.inference_mode():
        norm = nn.BatchNorm2d(4)
        margin = ofd_margin(norm.weight, norm.bias)
    loss = OFDLoss(2, 4, margin)
    student, teacher = make_maps((3, 2, 4, 4), (3, 4, 4, 4))
    loss(student, teacher).backward()
    assert student.grad.isfinite().all()
    assert not loss.margin.is_inference()
    student, teacher = make_pair(3, 4, 5)
    ofd_loss(student, teacher, margin=margin).sum().backward()
    torch.testing.assert_close(ofd_margin(norm.weight, norm.bias), torch.full((4,), -math.sqrt(2 / math.pi)))


def test_no_gradient_hangs_on_a_tie():
    student = torch.tensor([[[-1.0, -1.0, 0.0, 2.0]]], requires_grad=True)
    teacher = torch.tensor([[[-9.0, -1.0, 0.0, 2.0]]])  # student, teacher and margin meet
    ofd_loss(student, teacher, margin=torch.tensor([-1.0])).backward()
    assert student.grad.abs().max() == 0


def test_rejects_what_is_no_tensor():
    for name, build in {
        "margin": lambda: OFDLoss(2, 3, [0.0, 0.0, 0.0]),
        "weight": lambda: ofd_margin(None, None),  # a batch norm with affine=False
        "bias": lambda: ofd_margin(torch.ones(3), None),
    }.items():
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got (list|NoneType)"):
            build()
    with pytest.raises(TypeError, match="margin must be a tensor, got float"):
        ofd_loss(*make_pair(2, 3, 4), margin=-1.0)


def test_a_mask_leaves_the_value_of_the_kept_samples_alone():
    student, teacher = make_maps((5, 2, 4, 4), (5, 4, 4, 4))
    loss = with_weights(OFDLoss(2, 4, MARGIN))
    for mask in (torch.tensor([True, False, True, True, False]), torch.tensor([2.0, 0.0, 2.0, 2.0, 0.0])):
        alone = loss(student[mask != 0], teacher[mask != 0])
        torch.testing.assert_close(loss(student, teacher, mask=mask), alone, rtol=1e-12, atol=1e-12)
    student = student.detach().clone()
    student[1], student[4] = torch.nan, torch.inf
    torch.testing.assert_close(loss(student, teacher, mask=mask), alone, rtol=1e-12, atol=1e-12)
