"""PKTLoss against the formula of Passalis and Tefas (2018), at the scale of their code."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import PKTLoss, pkt_loss
from distill.losses import pkt


def reference(student, teacher):
    """KL of the conditional probabilities of the cosine kernel, mean over all pairs, 1e-7 beside both probabilities."""
    n = len(student)
    probabilities = []
    for features in (student, teacher):
        kernel = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                a, b = features[i].ravel(), features[j].ravel()
                kernel[i, j] = (a @ b / math.sqrt(a @ a) / math.sqrt(b @ b) + 1) / 2
        probabilities.append(kernel / kernel.sum(1, keepdims=True))
    q, p = probabilities
    return np.mean(p * np.log((p + 1e-7) / (q + 1e-7)))


@pytest.mark.parametrize(
    ("shape", "teacher_shape"), [((5, 8), (5, 8)), ((6, 3), (6, 11)), ((4, 3, 2, 2), (4, 5, 3, 3)), ((1, 3), (1, 3))]
)
def test_matches_reference(shape, teacher_shape):
    student, teacher = make_pair(*shape, teacher_shape=teacher_shape)
    expected = torch.tensor(reference(student.detach().numpy(), teacher.numpy()))
    torch.testing.assert_close(pkt_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(PKTLoss()(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 3)
    assert torch.autograd.gradcheck(lambda s: pkt_loss(s, teacher), student)
    assert torch.autograd.gradgradcheck(lambda s: pkt_loss(s, teacher), student)


def test_contract():
    assert_loss_contract(PKTLoss, shape=(6, 10), per_sample=False, batches=True)
    assert_loss_contract(PKTLoss, shape=(4, 3, 2, 2), teacher_shape=(4, 5), per_sample=False, batches=True)


def test_is_the_divergence_from_the_teacher():
    # p = (1/2, 1/2) twice, q = (2/3, 1/3) and (1/3, 2/3): a row gives log(9/8) / 2, the other way log(32/27) / 3.
    teacher, student = torch.ones(2, 1, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    assert pkt_loss(student, teacher).item() == pytest.approx(math.log(9 / 8) / 4, rel=1e-6)
    assert pkt_loss(teacher, student).item() == pytest.approx(math.log(32 / 27) / 6, rel=1e-6)


def test_does_not_count_rotations_and_the_length_of_a_sample():
    student, teacher = make_pair(6, 10)
    orthogonal, _ = torch.linalg.qr(make_pair(10, 10, seed=1)[1])
    lengths = torch.arange(1.0, 7.0, dtype=torch.float64)[:, None]
    torch.testing.assert_close(pkt_loss(lengths * student @ orthogonal, teacher / lengths), pkt_loss(student, teacher))
    assert abs(pkt_loss(student, lengths * student.detach() @ orthogonal)) < 1e-16


def test_precise_in_float32_near_the_teacher():
    # The published weight is 30000: what rounding adds to a small value would be seen.
    teacher = make_pair(64, 32)[1]
    student = teacher + 0.05 * make_pair(64, 32, seed=1)[1]
    exact = pkt_loss(student, teacher)
    torch.testing.assert_close(pkt_loss(student.float(), teacher.float()).double(), exact, rtol=1e-3, atol=0)


def test_finite_on_opposite_samples():
    student = torch.tensor([[1.0, 1.0, 1.0], [-3.0, -3.0, -3.0]], requires_grad=True)
    value = pkt_loss(student, torch.ones(2, 1))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    half = make_pair(200, 5, dtype=torch.float32)[1]
    assert (pkt._neighbours(torch.cat([half, -half])) >= 0).all()  # rounding takes some of these cosines below -1


def test_no_derivative_rests_on_opposite_samples():
    # Where the kernel is exactly 0 it is no kink of the formula: the derivatives are those of 1 + cosine.
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    assert pkt._neighbours(student)[0, 1] == 0
    weights = torch.arange(9.0, dtype=torch.float64).reshape(3, 3)

    def plain(s):
        unit = s / s.norm(dim=1, keepdim=True)
        kernel = 1 + unit @ unit.T
        return (weights * kernel / kernel.sum(1, keepdim=True)).sum()

    ours = torch.autograd.functional.hessian(lambda s: (weights * pkt._neighbours(s)).sum(), student)
    torch.testing.assert_close(ours, torch.autograd.functional.hessian(plain, student), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_finite_on_equal_samples_and_extreme_features(scale):
    student = torch.full((4, 8), scale, requires_grad=True)
    pkt_loss(student, make_pair(4, 5, dtype=torch.float32)[1]).backward()
    assert student.grad.isfinite().all()
    student, teacher = make_pair(4, 5, dtype=torch.float32)
    assert gradient(PKTLoss(), student, 0 * teacher).isfinite().all()
