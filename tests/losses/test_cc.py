"""CCLoss against the formula of Peng et al. (2019)."""

import math

import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import CCLoss, cc_loss


def reference(student, teacher, gamma, order):
    """Mean squared difference of the Taylor series, power by power and pair by pair."""
    n = len(student)
    total = 0.0
    for i in range(n):
        for j in range(n):
            kernels = []
            for features in (student, teacher):
                a, b = features[i].ravel(), features[j].ravel()
                cosine = a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)
                series = sum((2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(order + 1))
                kernels.append(math.exp(-2 * gamma) * series)
            total += (kernels[0] - kernels[1]) ** 2
    return total / n**2


@pytest.mark.parametrize(("gamma", "order"), [(0.4, 2), (0.4, 1), (2.0, 5)])
@pytest.mark.parametrize(
    ("shape", "teacher_shape"), [((5, 8), (5, 8)), ((6, 3), (6, 11)), ((4, 3, 2, 2), (4, 5, 3, 3)), ((1, 3), (1, 3))]
)
def test_matches_reference(shape, teacher_shape, gamma, order):
    student, teacher = make_pair(*shape, teacher_shape=teacher_shape)
    expected = torch.tensor(reference(student.detach().numpy(), teacher.numpy(), gamma, order))
    value = cc_loss(student, teacher, gamma=gamma, order=order)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(CCLoss(gamma, order)(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gamma_is_0_4_and_order_2_by_default():
    student, teacher = make_pair(5, 8)
    expected = torch.tensor(reference(student.detach().numpy(), teacher.numpy(), 0.4, 2))
    torch.testing.assert_close(cc_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(CCLoss()(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 3)
    assert torch.autograd.gradcheck(lambda s: cc_loss(s, teacher), student)
    assert torch.autograd.gradgradcheck(lambda s: cc_loss(s, teacher), student)


def test_contract():
    assert_loss_contract(CCLoss, shape=(6, 10), per_sample=False, batches=True)
    build = lambda: CCLoss(1.0, 3)  # noqa: E731 - as short as it is
    assert_loss_contract(build, shape=(4, 3, 2, 2), teacher_shape=(4, 5), per_sample=False, batches=True)


def test_tends_to_the_gaussian_kernel_as_the_order_grows():
    student, teacher = make_pair(6, 5)
    kernels = []
    for features in (student, teacher):
        unit = features / features.norm(dim=1, keepdim=True)
        kernels.append(torch.exp(-0.7 * torch.cdist(unit, unit) ** 2))
    expected = (kernels[0] - kernels[1]).square().mean()
    torch.testing.assert_close(cc_loss(student, teacher, gamma=0.7, order=25), expected, rtol=1e-10, atol=0)


def test_does_not_count_rotations_and_the_length_of_a_sample():
    student, teacher = make_pair(6, 10)
    orthogonal, _ = torch.linalg.qr(make_pair(10, 10, seed=1)[1])
    lengths = torch.arange(1.0, 7.0, dtype=torch.float64)[:, None]
    torch.testing.assert_close(cc_loss(lengths * student @ orthogonal, teacher / lengths), cc_loss(student, teacher))
    assert cc_loss(student, lengths * student.detach() @ orthogonal) < 1e-28


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_finite_on_equal_samples_and_extreme_features(scale):
    student = torch.full((4, 8), scale, requires_grad=True)
    cc_loss(student, make_pair(4, 5, dtype=torch.float32)[1]).backward()
    assert student.grad.isfinite().all()
    student, teacher = make_pair(4, 5, dtype=torch.float32)
    assert gradient(CCLoss(), student, 0 * teacher).isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_gammas(gamma):
    match = f"gamma must be positive and finite, got {gamma}"
    with pytest.raises(ValueError, match=match):
        CCLoss(gamma)
    with pytest.raises(ValueError, match=match):
        cc_loss(*make_pair(6, 10), gamma=gamma)


@pytest.mark.parametrize("order", [0, -1, 1.5, True])
def test_rejects_bad_orders(order):
    match = f"order must be a positive integer, got {order}"
    with pytest.raises(ValueError, match=match):
        CCLoss(order=order)
    with pytest.raises(ValueError, match=match):
        cc_loss(*make_pair(6, 10), order=order)


def test_repr_shows_options():
    assert repr(CCLoss(1.0, 3)) == "CCLoss(gamma=1.0, order=3)"
