"""CosineLoss against the cosine embedding loss of Sanh et al. (2019)."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from contract import assert_loss_contract, gradient, make_pair
from distill import CosineLoss, LinearLoss, cosine_loss

pytestmark = pytest.mark.usefixtures("form")


def reference(student, teacher, axis=-1):
    """One minus the product of two vectors over that of their lengths, vector by vector."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        product = sum(float(a) * float(b) for a, b in zip(s[sample], t[sample], strict=True))
        lengths = [math.sqrt(sum(float(x) ** 2 for x in side[sample])) for side in (s, t)]
        values[sample] = 1 - product / (lengths[0] * lengths[1])
    return values


@pytest.mark.parametrize(
    ("shape", "dim"), [((5, 10), -1), ((5, 1), 1), ((10,), 0), ((3, 4, 7), -1), ((3, 4, 7), 1), ((2, 5, 3, 4), 1)]
)
def test_matches_reference(shape, dim):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), dim))
    values = cosine_loss(student, teacher, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(CosineLoss(dim=dim)(student, teacher).detach(), expected.mean(), rtol=1e-12, atol=1e-12)


def test_equals_the_loss_of_the_published_code():
    student, teacher = make_pair(12, 10)
    of_torch = nn.CosineEmbeddingLoss()(student, teacher, torch.ones(12))
    torch.testing.assert_close(CosineLoss()(student, teacher), of_torch, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: cosine_loss(s, teacher), student)
    assert torch.autograd.gradgradcheck(lambda s: cosine_loss(s, teacher), student)


def test_contract():
    assert_loss_contract(CosineLoss, shape=(6, 10))
    assert_loss_contract(CosineLoss, shape=(4, 3, 7))
    assert_loss_contract(lambda **options: CosineLoss(dim=1, **options), shape=(4, 5, 3, 2))


def test_zero_when_equal_and_two_when_opposite():
    student, _ = make_pair(6, 10)
    assert CosineLoss()(student, student.detach()) == 0
    torch.testing.assert_close(cosine_loss(student, -student.detach()), torch.full((6,), 2.0, dtype=torch.float64))


def test_one_at_a_right_angle():
    vectors = torch.eye(4)
    assert torch.equal(cosine_loss(vectors.clone().requires_grad_(), 3 * vectors.flip(1)), torch.ones(4))


def test_does_not_count_the_length_of_a_vector():
    student, teacher = make_pair(6, 10)
    scale = torch.tensor([1e-30, 1e-3, 0.5, 2.0, 1e3, 1e30])[:, None]
    torch.testing.assert_close(cosine_loss(scale * student, teacher / scale), cosine_loss(student, teacher))
    slope = gradient(CosineLoss(), student, teacher)
    torch.testing.assert_close((slope * student.detach()).sum(-1), torch.zeros(6, dtype=torch.float64))


def test_keeps_its_digits_near_agreement_and_is_never_negative():
    _, teacher = make_pair(200, 100, dtype=torch.float32)
    for apart in (1e-1, 1e-3, 1e-5):
        student = teacher + apart * make_pair(200, 100, seed=1, dtype=torch.float32)[1]
        values = cosine_loss(student, teacher)
        assert (values >= 0).all()
        torch.testing.assert_close(
            values.double(), cosine_loss(student.double(), teacher.double()), rtol=0.1 if apart < 1e-4 else 1e-3, atol=0
        )
    assert (cosine_loss(teacher * 3, teacher) < 1e-12).all()


def test_a_vector_of_0_has_no_direction():
    student, teacher = make_pair(4, 5)
    student = student.detach()
    student[1:3] = 0
    teacher[2:] = 0
    values = cosine_loss(student, teacher)
    assert values[1:].tolist() == [1, 1, 1]
    slope = gradient(CosineLoss(), student, teacher)
    assert slope[0].abs().max() > 0
    assert slope[1:].abs().max() == 0


def test_finite_on_extreme_vectors():
    student, teacher = make_pair(6, 10, dtype=torch.float32)
    for scale in (1e-30, 1e4, 1e36):
        torch.testing.assert_close(cosine_loss(scale * student, scale * teacher), cosine_loss(student, teacher))
    assert gradient(CosineLoss(), 1e30 * student, teacher).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_shows_what_is_not_finite(bad):
    student, teacher = make_pair(4, 5)
    teacher[2, 1] = bad
    assert cosine_loss(student, teacher).isnan().tolist() == [False, False, True, False]


def test_through_two_heads():
    student, teacher = make_pair(6, 4, teacher_shape=(6, 3))
    heads = nn.Linear(4, 9).double(), nn.Linear(3, 9).double()
    loss = LinearLoss(CosineLoss(), *heads, rows=4)
    torch.testing.assert_close(loss(student, teacher), CosineLoss()(heads[0](student), heads[1](teacher)))


def test_rejects_a_dimension_that_is_none():
    with pytest.raises(ValueError, match=r"dim must be a dimension of the inputs, got 2 for shape \(6, 10\)"):
        cosine_loss(*make_pair(6, 10), dim=2)


def test_repr_shows_options():
    assert repr(CosineLoss(reduction="none", dim=1)) == "CosineLoss(reduction='none', dim=1)"
