"""ULDLoss against the formula of Boizard et al. (2024)."""

import functools
import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import ULDLoss, uld_loss
from divergences import assert_knows_zeros, assert_light, assert_shows_nan

pytestmark = pytest.mark.usefixtures("form")


def reference(student, teacher, temperature, axis=-1):
    """The sum of the differences of the sorted probabilities, the shorter list filled up with 0, token by token."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for token in np.ndindex(values.shape):
        q, p = (np.exp(x[token] / temperature) for x in (s, t))
        q, p = (sorted((x / x.sum()).tolist(), reverse=True) for x in (q, p))
        longest = max(len(q), len(p))
        q, p = (x + [0.0] * (longest - len(x)) for x in (q, p))
        values[token] = sum(abs(a - b) for a, b in zip(q, p, strict=True))
    return values


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("shape", "teacher_shape", "dim"),
    [
        ((5, 10), None, -1),
        ((5, 10), (5, 7), -1),
        ((5, 2), (5, 9), 1),
        ((3, 4, 7), (3, 4, 12), -1),
        ((2, 5, 3, 4), (2, 8, 3, 4), 1),
    ],
)
def test_matches_reference(shape, teacher_shape, dim, temperature):
    student, teacher = make_pair(*shape, teacher_shape=teacher_shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), temperature, dim))
    values = uld_loss(student, teacher, temperature=temperature, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = ULDLoss(temperature, dim=dim)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_defaults():
    student, teacher = make_pair(5, 10, teacher_shape=(5, 7))
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 1.0))
    torch.testing.assert_close(uld_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ULDLoss(reduction="none")(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("classes", [3, 5, 8])
def test_gradient(classes):
    student, teacher = make_pair(4, 5, teacher_shape=(4, classes))
    assert torch.autograd.gradcheck(lambda s: uld_loss(s, teacher, temperature=2.0), student)
    assert torch.autograd.gradgradcheck(lambda s: uld_loss(s, teacher, temperature=2.0), student)


def test_contract():
    assert_loss_contract(ULDLoss, shape=(6, 10), teacher_shape=(6, 7), widths=True)
    assert_loss_contract(
        lambda **options: ULDLoss(2.0, dim=1, **options), shape=(4, 5, 3, 2), teacher_shape=(4, 8, 3, 2), widths=True
    )


def test_also_keeps_the_contract_with_one_vocabulary():
    assert_loss_contract(ULDLoss, shape=(6, 10), widths=True)


def test_zero_when_equal_and_for_any_other_order_of_the_tokens():
    student, _ = make_pair(6, 10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert ULDLoss()(student, student.detach()) == 0
    assert gradient(ULDLoss(), student, student.detach()).abs().max() == 0
    assert ULDLoss()(student, student.detach()[:, order]) < 1e-15
    more = torch.cat([student.detach(), torch.full((6, 3), -math.inf, dtype=torch.float64)], 1)
    assert ULDLoss()(student, more) == 0


def test_is_at_most_2():
    sure = torch.tensor([[1e4, 0.0, 0.0]])
    spread = torch.zeros(1, 10**4)
    value = uld_loss(sure, spread)
    torch.testing.assert_close(value, torch.tensor([2.0]), rtol=1e-3, atol=0)
    assert (uld_loss(*make_pair(6, 10, teacher_shape=(6, 7))) < 2).all()


def test_does_not_count_shifts():
    student, teacher = make_pair(6, 10, teacher_shape=(6, 7))
    torch.testing.assert_close(uld_loss(student + 5, teacher - 3), uld_loss(student, teacher))


def test_finite_on_extreme_logits():
    student = torch.tensor([[1e4, -1e4, 0.0, -1e4]], requires_grad=True)
    value = ULDLoss()(student, torch.tensor([[-1e4, 1e4, 1e4]]))
    value.backward()
    torch.testing.assert_close(value.item(), 1.0)
    assert student.grad.isfinite().all()


def test_a_probability_of_0_is_a_probability():
    for temperature in (1.0, 2.0):
        assert_knows_zeros(functools.partial(ULDLoss, temperature), lambda s, t: reference(s, t, temperature))  # noqa: B023
    assert_shows_nan(ULDLoss())


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 says so to everybody
def test_takes_little_memory(form, monkeypatch):
    if form == "blocks":
        assert_light(ULDLoss(), monkeypatch)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        ULDLoss(temperature)
    with pytest.raises(ValueError, match=match):
        uld_loss(*make_pair(6, 10), temperature=temperature)


@pytest.mark.parametrize("teacher_shape", [(6, 1), (5, 7), (6, 2, 7), (7,)])
def test_rejects_shapes_that_differ_in_more_than_the_classes(teacher_shape):
    match = r"at least 2 classes each and otherwise the same shape .*, got \(6, 10\) and \("
    with pytest.raises(ValueError, match=match):
        uld_loss(*make_pair(6, 10, teacher_shape=teacher_shape))
    with pytest.raises(ValueError, match="dim must be a dimension of the inputs, got 2"):
        uld_loss(*make_pair(6, 10), dim=2)


def test_repr_shows_options():
    assert repr(ULDLoss(2.0)) == "ULDLoss(temperature=2.0, reduction='mean', dim=None)"
