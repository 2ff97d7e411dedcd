"""RKDLoss against the formula of Park, Kim, Lu and Cho (2019)."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import RKDLoss, rkd_loss
from distill.losses import rkd


def reference(student, teacher, distance_weight=25.0, angle_weight=50.0):
    """Equations 5 to 10 from the differences of the samples; means over all pairs and triples."""
    distances, angles = [], []
    for features in (student, teacher):
        x = features.reshape(len(features), -1)
        sides = x[None, :, :] - x[:, None, :]  # [i, j] leads from i to j
        lengths = np.sqrt((sides**2).sum(-1))
        distances.append(lengths / lengths[lengths > 0].mean() if lengths.any() else lengths)
        unit = sides / np.where(lengths > 0, lengths, 1)[:, :, None]
        angles.append(np.stack([u @ u.T for u in unit]))
    return distance_weight * _huber(*distances).mean() + angle_weight * _huber(*angles).mean()


def _huber(a, b):
    x = np.abs(a - b)
    return np.where(x <= 1, x**2 / 2, x - 0.5)


@pytest.mark.parametrize("weights", [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0), (0.0, 0.0)])
@pytest.mark.parametrize(
    ("shape", "teacher_shape"),
    [((5, 8), (5, 8)), ((6, 3), (6, 11)), ((4, 3, 2, 2), (4, 5, 3, 3)), ((2, 3), (2, 3)), ((1, 3), (1, 3))],
)
def test_matches_reference(shape, teacher_shape, weights):
    student, teacher = make_pair(*shape, teacher_shape=teacher_shape)
    expected = torch.tensor(reference(student.detach().numpy(), teacher.numpy(), *weights))
    value = rkd_loss(student, teacher, distance_weight=weights[0], angle_weight=weights[1])
    torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(RKDLoss(*weights)(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_weights_are_25_and_50_by_default():
    student, teacher = make_pair(5, 8)
    expected = torch.tensor(reference(student.detach().numpy(), teacher.numpy(), 25, 50))
    torch.testing.assert_close(rkd_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(RKDLoss()(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_matches_reference_where_the_angles_need_several_blocks():
    student, teacher = make_pair(70, 4)
    expected = torch.tensor(reference(student.detach().numpy(), teacher.numpy()))
    torch.testing.assert_close(rkd_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)

    cosines = []
    for x in (student, teacher):  # the angles as in the reference, by autograd
        sides = torch.nn.functional.normalize(x[None] - x[:, None], dim=2)
        cosines.append(sides @ sides.mT)
    (plain,) = torch.autograd.grad(torch.nn.functional.smooth_l1_loss(*cosines), student)
    of_ours = gradient(RKDLoss(0.0, 1.0), student, teacher)
    torch.testing.assert_close(of_ours, plain, rtol=1e-10, atol=1e-14)


def test_gradient():
    student, teacher = make_pair(4, 3)
    for weights in ((1.0, 0.0), (0.0, 1.0), (25.0, 50.0)):
        loss = RKDLoss(*weights)
        assert torch.autograd.gradcheck(lambda s, loss=loss: loss(s, teacher), student)
        assert torch.autograd.gradgradcheck(lambda s, loss=loss: loss(s, teacher), student)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch.compile traces
def test_contract():
    assert_loss_contract(RKDLoss, shape=(6, 10), per_sample=False, batches=True)
    assert_loss_contract(RKDLoss, shape=(4, 3, 2, 2), teacher_shape=(4, 5), per_sample=False, batches=True)


def test_does_not_count_rotations_shifts_and_scale():
    student, teacher = make_pair(6, 10)
    orthogonal, _ = torch.linalg.qr(make_pair(10, 10, seed=1)[1])
    torch.testing.assert_close(rkd_loss(3 * student @ orthogonal + 5, teacher / 7 - 2), rkd_loss(student, teacher))
    assert rkd_loss(student, 3 * student.detach() @ orthogonal + 5) < 1e-25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_samples_that_are_the_same(dtype):
    # Far from the origin, where products of matrices round most: their distance is 0 all the same.
    generator = torch.Generator().manual_seed(0)
    student = torch.randint(-8, 8, (6, 5), generator=generator).to(dtype) + 1024
    teacher = torch.randint(-8, 8, (6, 7), generator=generator).to(dtype)
    student[1] = student[4]
    teacher[0] = teacher[2]
    student.requires_grad_()
    value = rkd_loss(student, teacher)
    expected = reference(student.detach().double().numpy(), teacher.double().numpy())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert value.item() == pytest.approx(expected, rel=tolerance)
    value.backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 10


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_finite_on_batches_of_one_sample_alone(scale):
    student = torch.full((4, 8), scale, requires_grad=True)
    teacher = make_pair(4, 5, dtype=torch.float32)[1]
    value = rkd_loss(student, teacher)
    assert value.item() == pytest.approx(reference(student.detach().numpy(), teacher.numpy()), rel=1e-5)
    value.backward()
    assert torch.equal(student.grad, torch.zeros_like(student))
    assert gradient(RKDLoss(), make_pair(4, 5)[0], torch.zeros(4, 5, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-20, 1e18])
def test_does_not_count_scale_over_the_range_of_float32(scale):
    student, teacher = make_pair(5, 36, dtype=torch.float32)
    tiny = student.detach() * scale
    torch.testing.assert_close(rkd_loss(tiny, teacher), rkd_loss(student, teacher), rtol=1e-5, atol=0)
    slope = gradient(RKDLoss(), tiny, teacher) * scale
    torch.testing.assert_close(slope, gradient(RKDLoss(), student, teacher), rtol=1e-4, atol=1e-6)


def test_finite_where_some_samples_are_far_nearer_to_each_other_than_others():
    _, teacher = make_pair(5, 3, dtype=torch.float32)
    student = torch.tensor([[0, 0, 0], [1e-20, 0, 0], [0, 1e-20, 0], [1, 1, 1], [-1, -1, -1]])
    assert rkd_loss(student, teacher).isfinite()
    assert gradient(RKDLoss(), student, teacher).isfinite().all()


def test_weights_of_0_give_a_gradient_of_0():
    student, teacher = make_pair(4, 5)
    assert torch.equal(gradient(RKDLoss(0.0, 0.0), student, teacher), torch.zeros_like(student))


def test_precise_in_float32_far_from_the_origin():
    student, teacher = make_pair(8, 16)
    far = student.detach().float() + 100
    exact = rkd_loss(far.double(), teacher)
    torch.testing.assert_close(rkd_loss(far, teacher.float()).double(), exact, rtol=1e-5, atol=0)


def test_precise_in_float32_where_samples_are_near_each_other():
    # Two pairs, far apart: their own distances are 1e-4 of the largest, whose square float32 knows to 1e-7.
    student, teacher = make_pair(4, 16)
    near = student.detach().clone()
    near[2:] = near[:2] + 1e-4 * near[2:]
    near = near.float()
    exact = rkd_loss(near.double(), teacher, distance_weight=0.0)
    torch.testing.assert_close(rkd_loss(near, teacher.float(), distance_weight=0.0).double(), exact, rtol=1e-3, atol=0)
    distances = rkd._relative_distances(rkd._squared_distances(near))
    exact = rkd._relative_distances(rkd._squared_distances(near.double()))
    torch.testing.assert_close(distances.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_infinity_in_the_teacher_shows(weights):
    for spoilt in (0, 1):
        sides = [x.detach().clone() for x in make_pair(6, 10, dtype=torch.float32)]
        sides[spoilt][2, 1] = math.inf
        assert RKDLoss(*weights)(*sides).isnan()
        assert not gradient(RKDLoss(*weights), *sides).isfinite().all()


@pytest.mark.parametrize("scale", [1e-21, 1e-20, 1e-19])
def test_finite_gradients_near_the_smallest_numbers(scale):
    student, teacher = make_pair(32, 36, dtype=torch.float32)
    tiny = student.detach() * scale
    tiny[1] = tiny[0] * (1 + 1e-6)
    slope = gradient(RKDLoss(), tiny, teacher)
    assert slope.isfinite().all()
    assert slope.abs().max() > 1e-3 / scale


def test_no_derivative_rests_on_a_tie():
    # Distances over their mean: (1, 1) on both sides, so a difference of 0; angles differ by exactly 1, where Huber's
    # function has its kink in the second derivative: the quadratic side counts.
    difference = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(rkd._huber(difference).sum(), difference, create_graph=True)
    assert slope.tolist() == [-1, -1, 0, 1, 1]
    assert rkd._slope(difference).tolist() == [-1, -1, 0, 1, 1]
    for first in (slope, rkd._slope(difference)):
        (second,) = torch.autograd.grad(first.sum(), difference, retain_graph=True)
        assert second.tolist() == [0, 1, 1, 1, 0]


def test_angle_is_at_the_first_sample():
    # The student sees a right angle at sample 0 and two of 45 degrees; the teacher a line, 0, 180 and 0 degrees.
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    half = math.sqrt(0.5)
    expected = 2 * (0.5 * 1 + (1 + half - 0.5) + 0.5 * (1 - half) ** 2) / 27
    assert rkd_loss(student, teacher, distance_weight=0, angle_weight=1).item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["distance_weight", "angle_weight"])
def test_rejects_bad_weights(name, weight):
    match = f"{name} must be zero or positive and finite, got {weight}"
    with pytest.raises(ValueError, match=match):
        RKDLoss(**{name: weight})
    with pytest.raises(ValueError, match=match):
        rkd_loss(*make_pair(6, 10), **{name: weight})
    with pytest.raises(ValueError, match=match):
        setattr(RKDLoss(), name, weight)


def test_repr_shows_options():
    assert repr(RKDLoss(1.0, 2.0)) == "RKDLoss(distance_weight=1.0, angle_weight=2.0)"


def test_as_many_anchors_at_a_time_as_fit(monkeypatch):
    squares = torch.ones(6, 6)
    for angles, steps in ((2 * 36, [2, 2, 2]), (36, [1] * 6), (5, [1] * 6), (5 * 36 + 35, [5, 1])):
        monkeypatch.setattr(rkd, "_ANGLES_CPU", angles)
        assert [len(ours) for _, ours, _, _ in rkd._blocks(squares, squares)] == steps
