"""SPLoss against the formula of Tung and Mori (2019)."""

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import SPLoss, sp_loss


def reference(student, teacher):
    """Equations 1 to 4: products of the flattened maps, every row over its norm, squared difference over b^2."""
    similarities = []
    for features in (student, teacher):
        b = len(features)
        rows = np.array([[np.sum(features[i] * features[j]) for j in range(b)] for i in range(b)])
        similarities.append(np.array([row / (np.sqrt(np.sum(row**2)) or 1) for row in rows]))
    return np.sum((similarities[0] - similarities[1]) ** 2) / len(student) ** 2


@pytest.mark.parametrize(
    ("shape", "teacher_shape"), [((5, 8), (5, 8)), ((6, 3), (6, 11)), ((4, 3, 2, 2), (4, 5, 3, 3)), ((1, 3), (1, 3))]
)
def test_matches_reference(shape, teacher_shape):
    student, teacher = make_pair(*shape, teacher_shape=teacher_shape)
    expected = torch.tensor(reference(student.detach().numpy(), teacher.numpy()))
    torch.testing.assert_close(sp_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(SPLoss()(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 3)
    assert torch.autograd.gradcheck(lambda s: sp_loss(s, teacher), student)
    assert torch.autograd.gradgradcheck(lambda s: sp_loss(s, teacher), student)


def test_contract():
    assert_loss_contract(SPLoss, shape=(6, 10), per_sample=False, batches=True)
    assert_loss_contract(SPLoss, shape=(4, 3, 2, 2), teacher_shape=(4, 5, 4, 4), per_sample=False, batches=True)


def test_does_not_count_rotations_and_scale():
    student, teacher = make_pair(6, 10)
    orthogonal, _ = torch.linalg.qr(make_pair(10, 10, seed=1)[1])
    torch.testing.assert_close(sp_loss(3 * student @ orthogonal, teacher / 7), sp_loss(student, teacher))
    assert sp_loss(student, 2 * student.detach() @ orthogonal) < 1e-28


def test_counts_a_shift():
    student, _ = make_pair(6, 10)
    assert sp_loss(student, student.detach() + 1) > 1e-3


def test_of_samples_without_and_with_everything_in_common():
    # Rows of the student (1, 0, ...), of the teacher 1 / sqrt(N): N ((1 - 1 / sqrt(N))^2 + (N - 1) / N) / N^2.
    n = 4
    value = sp_loss(torch.eye(n, dtype=torch.float64), torch.ones(n, 1, dtype=torch.float64)).item()
    assert value == pytest.approx(((1 - n**-0.5) ** 2 + (n - 1) / n) / n, rel=1e-14)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_finite_on_equal_samples_and_extreme_maps(scale):
    student = torch.full((4, 2, 3, 3), scale, requires_grad=True)
    sp_loss(student, make_pair(4, 5, dtype=torch.float32)[1]).backward()
    assert student.grad.isfinite().all()
    student, teacher = make_pair(4, 5, dtype=torch.float32)
    assert gradient(SPLoss(), student, 0 * teacher).isfinite().all()


def test_a_sample_of_zeros_has_a_row_of_zeros():
    student, teacher = make_pair(4, 5)
    with torch.no_grad():
        student[1] = 0
    expected = torch.tensor(reference(student.detach().numpy(), teacher.numpy()))
    torch.testing.assert_close(sp_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    assert gradient(SPLoss(), student, teacher).isfinite().all()
