"""MatryoshkaLoss against the sum over leading dimensions of Kusupati et al. (2022)."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from contract import assert_loss_contract, gradient, make_pair
from distill import (
    CosineLoss,
    Distiller,
    KLLoss,
    LogitLoss,
    MatryoshkaLoss,
    MGDLoss,
    SigmoidKLLoss,
    SPLoss,
    cosine_loss,
    matryoshka_loss,
)

DIMS = (10, 5, 2)


def reference(student, teacher, dims, weights):
    """The weighted sum over the widths of one minus the cosine, vector by vector."""
    values = np.zeros(student.shape[:-1])
    for index in np.ndindex(values.shape):
        for d, weight in zip(dims, weights, strict=True):
            s, t = student[index][:d], teacher[index][:d]
            product = sum(float(a) * float(b) for a, b in zip(s, t, strict=True))
            values[index] += weight * (1 - product / math.sqrt(sum(s**2) * sum(t**2)))
    return values


@pytest.mark.parametrize("weights", [None, (1.0, 0.5, 2.0), (1.0, 0.0, 0.3)])
@pytest.mark.parametrize("shape", [(6, 10), (3, 4, 10)])
def test_matches_reference(shape, weights):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), DIMS, weights or (1, 1, 1)))
    plain = lambda s, t, _: cosine_loss(s, t)  # noqa: E731
    values = matryoshka_loss(student, teacher, loss=plain, dims=DIMS, weights=weights).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    loss = MatryoshkaLoss(CosineLoss(), DIMS, weights)
    torch.testing.assert_close(loss(student, teacher).detach(), expected.mean(), rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 10)
    loss = MatryoshkaLoss(CosineLoss(), DIMS, (1.0, 0.5, 2.0))
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)
    assert torch.autograd.gradgradcheck(lambda s: loss(s, teacher), student)


def build(inner, *args, dims=DIMS, weights=None, of_teacher=True, **options):
    return MatryoshkaLoss(inner(*args, **options), dims, weights, of_teacher=of_teacher)


def test_contract():
    assert_loss_contract(functools.partial(build, CosineLoss, weights=(1.0, 0.5, 2.0)), shape=(6, 10))


def test_other_losses_keep_the_contract_too():
    assert_loss_contract(functools.partial(build, LogitLoss), shape=(4, 3, 10))
    build_one = functools.partial(build, SPLoss, of_teacher=False)
    assert_loss_contract(build_one, shape=(6, 10), teacher_shape=(6, 7), per_sample=False, batches=True)


def test_one_width_is_the_loss_of_a_part_and_the_rest_gets_no_gradient():
    student, teacher = make_pair(6, 10)
    loss = MatryoshkaLoss(KLLoss(2.0), (4,))
    assert torch.equal(loss(student, teacher), KLLoss(2.0)(student[:, :4], teacher[:, :4]))
    slope = gradient(loss, student, teacher)
    assert slope[:, :4].abs().min() > 0
    assert slope[:, 4:].abs().max() == 0


def test_zero_when_equal_and_when_only_what_is_cut_off_differs():
    student, teacher = make_pair(6, 10)
    assert MatryoshkaLoss(CosineLoss(), DIMS)(student, student.detach()) == 0
    tail = torch.cat([student.detach()[:, :5], teacher[:, 5:]], 1)
    assert MatryoshkaLoss(CosineLoss(), (5, 2))(student, tail) == 0
    assert MatryoshkaLoss(CosineLoss(), DIMS)(student, tail) > 0.01


def test_the_whole_teacher_for_relations_of_another_width():
    student, teacher = make_pair(6, 10, teacher_shape=(6, 7))
    expected = sum(SPLoss()(student[:, :d], teacher) for d in DIMS)
    torch.testing.assert_close(MatryoshkaLoss(SPLoss(), DIMS, of_teacher=False)(student, teacher), expected)


def test_a_width_of_weight_0_is_not_computed():
    student, teacher = make_pair(6, 10)
    widths = []

    def loss(student, teacher, target):
        widths.append(student.shape[-1])
        return (student - teacher).sum()

    matryoshka_loss(student, teacher, loss=loss, dims=DIMS, weights=(1.0, 0.0, 2.0))
    assert widths == [10, 2]


def test_in_a_distiller_with_a_mask_and_a_denominator():
    student, teacher = nn.Linear(4, 10), nn.Linear(4, 10)
    inputs, mask = torch.randn(6, 4), torch.tensor([True, True, False, True, True, True])
    loss = MatryoshkaLoss(CosineLoss(), DIMS)
    out = Distiller(student, teacher, loss, task_loss=None)(inputs, mask=mask, denominator=3)
    expected = 5 / 3 * loss(student(inputs), teacher(inputs), mask=mask)
    torch.testing.assert_close(out.loss, expected)
    relations = MatryoshkaLoss(SPLoss(), DIMS)
    assert not hasattr(relations, "reduction")
    Distiller(student, teacher, relations, task_loss=None)(inputs, mask=mask).loss.backward()


def test_the_reduction_is_that_of_the_loss_inside():
    loss = MatryoshkaLoss(CosineLoss(), DIMS)
    loss.reduction = "sum"
    assert loss.loss.reduction == loss.reduction == "sum"


def test_what_the_loss_inside_learns_is_learned_here():
    inner = MGDLoss(4, 4)
    assert list(MatryoshkaLoss(inner, (4,)).parameters()) == list(inner.parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dims": ()}, r"dims must be at least one width, got \(\)"),
        ({"dims": 4}, "dims must be at least one width, got 4"),
        ({"dims": (4, 0)}, "a width of dims must be a positive integer, got 0"),
        ({"dims": (4, 2.0)}, "a width of dims must be a positive integer, got 2.0"),
        ({"dims": (4, 4)}, r"dims must be different from each other, got \(4, 4\)"),
        ({"dims": (4, 2), "weights": (1.0,)}, "weights must be one for each of dims, got 1 for 2"),
        ({"dims": (4,), "weights": (-1.0,)}, "a weight of weights must be zero or positive and finite, got -1.0"),
        ({"dims": (4,), "weights": (0.0,)}, r"weights must have one above 0, got \(0.0,\)"),
        ({"dims": (4, 11)}, r"student must be at least 11 wide for dims=\(4, 11\), got \(6, 10\)"),
    ],
)
def test_rejects_bad_widths_and_weights(options, match):
    with pytest.raises(ValueError, match=match):
        MatryoshkaLoss(CosineLoss(), **options)(*make_pair(6, 10))
    with pytest.raises(ValueError, match=match):
        matryoshka_loss(*make_pair(6, 10), loss=CosineLoss(), **options)


def test_rejects_a_narrow_teacher_a_function_as_a_module_and_what_is_no_flag():
    with pytest.raises(ValueError, match=r"teacher must be at least 10 wide for dims=\(10, 5, 2\), .*, got \(6, 7\)"):
        MatryoshkaLoss(CosineLoss(), DIMS)(*make_pair(6, 10, teacher_shape=(6, 7)))
    with pytest.raises(TypeError, match="loss must be a module, got function"):
        MatryoshkaLoss(cosine_loss, DIMS)
    with pytest.raises(ValueError, match="of_teacher must be True or False, got 1"):
        MatryoshkaLoss(CosineLoss(), DIMS, of_teacher=1)
    with pytest.raises(ValueError, match="weights must be one for each of dims, got 2 for 3"):
        MatryoshkaLoss(CosineLoss(), DIMS, (1.0, 0.5))
    loss = MatryoshkaLoss(CosineLoss(), DIMS)
    loss.weights = (1.0,)
    with pytest.raises(ValueError, match="weights must be one for each of dims, got 1 for 3"):
        loss(*make_pair(6, 10))


def test_rejects_a_loss_with_a_value_for_each_dimension():
    loss = MatryoshkaLoss(SigmoidKLLoss(classes="none", reduction="none"), dims=(6, 2))
    with pytest.raises(ValueError, match=r"values of one shape for all widths, .*, got \(4, 6\), \(4, 2\)"):
        loss(*make_pair(4, 6))


def test_repr_shows_options():
    text = repr(MatryoshkaLoss(CosineLoss(), (4, 2)))
    assert "dims=(4, 2), weights=None, of_teacher=True, reduction='mean'" in text
    assert "(loss): CosineLoss(reduction='mean', dim=-1)" in text
