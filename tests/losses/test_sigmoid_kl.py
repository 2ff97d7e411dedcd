"""SigmoidKLLoss against the formula of Yang et al. (2023)."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from contract import assert_loss_contract, gradient, make_pair
from distill import LinearLoss, SDDLoss, SigmoidKLLoss, kl_loss, sigmoid_kl_loss
from divergences import assert_keeps_digits

pytestmark = pytest.mark.usefixtures("form")


def reference(student, teacher, temperature, classes="sum", axis=-1):
    """T^2 times the divergence of each class's yes or no, class by class."""
    s, t = np.moveaxis(student, axis, -1) / temperature, np.moveaxis(teacher, axis, -1) / temperature
    values = np.zeros(s.shape)
    for index in np.ndindex(values.shape):
        p, q = 1 / (1 + math.exp(-t[index])), 1 / (1 + math.exp(-s[index]))
        for a, b in ((p, q), (1 - p, 1 - q)):
            values[index] += temperature**2 * (a * math.log(a / b) if a > 0 else 0.0)
    return {"sum": values.sum(-1), "mean": values.sum(-1) / values.shape[-1], "none": values}[classes]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("classes", ["sum", "mean", "none"])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 1), 1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, classes, temperature):
    student, teacher = make_pair(*shape)
    axis = -1 if classes == "none" else dim
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), temperature, classes, axis))
    options = {"temperature": temperature, "classes": classes, "dim": None if classes == "none" else dim}
    values = sigmoid_kl_loss(student, teacher, **options).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = SigmoidKLLoss(**options)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_by_default_the_temperature_is_1_and_the_classes_are_summed():
    student, teacher = make_pair(5, 10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 1.0))
    torch.testing.assert_close(sigmoid_kl_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    values = SigmoidKLLoss(reduction="none")(student, teacher).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("classes", "share"), [("sum", 1), ("none", 1), ("mean", 1 / 5)])
def test_gradient(classes, share):
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: sigmoid_kl_loss(s, teacher, temperature=2.0, classes=classes), student)
    slope = gradient(lambda s: sigmoid_kl_loss(s, teacher, temperature=2.0, classes=classes).sum(), student)
    torch.testing.assert_close(slope, 2 * share * ((student / 2).sigmoid() - (teacher / 2).sigmoid()).detach())


def test_contract():
    assert_loss_contract(SigmoidKLLoss, shape=(6, 10))
    assert_loss_contract(lambda **options: SigmoidKLLoss(2.0, "mean", dim=1, **options), shape=(4, 5, 3, 2))


def test_is_the_divergence_of_two_classes_for_each_class():
    student, teacher = make_pair(6, 1)
    pair = [torch.cat([x, torch.zeros_like(x)], 1) for x in (student, teacher)]
    torch.testing.assert_close(sigmoid_kl_loss(student, teacher, temperature=3.0), kl_loss(*pair, temperature=3.0))


def test_is_the_binary_cross_entropy_less_what_the_teacher_does_not_know():
    student, teacher = make_pair(6, 4)
    entropy = nn.functional.binary_cross_entropy_with_logits(teacher, teacher.sigmoid(), reduction="sum")
    cross = nn.functional.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="sum")
    torch.testing.assert_close(SigmoidKLLoss(reduction="sum")(student, teacher), cross - entropy)


def test_zero_when_equal_and_else_positive():
    student, teacher = make_pair(6, 10)
    assert SigmoidKLLoss()(student, student.detach()) == 0
    assert gradient(SigmoidKLLoss(), student, student.detach()).abs().max() < 1e-15
    assert (sigmoid_kl_loss(student, teacher, classes="none") > 0).all()


def test_keeps_its_digits_near_agreement_and_is_never_negative():
    assert_keeps_digits(SigmoidKLLoss)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_the_gradient_keeps_its_digits_near_agreement(form, scale):
    teacher = scale * make_pair(6, 10, dtype=torch.float32)[1]
    student = teacher + 1e-4 * make_pair(6, 10, seed=1, dtype=torch.float32)[1]
    slope = gradient(SigmoidKLLoss(2.0), student, teacher).double()
    wanted = gradient(SigmoidKLLoss(2.0), student.double(), teacher.double())
    assert (slope - wanted).norm() < {"blocks": 1e-6, "plain": 1e-2}[form] * wanted.norm()


def test_each_class_counts_by_itself_and_shifts_count():
    student, teacher = make_pair(6, 10)
    whole = sigmoid_kl_loss(student, teacher)
    torch.testing.assert_close(
        whole, sum(sigmoid_kl_loss(student[:, c : c + 1], teacher[:, c : c + 1]) for c in range(10))
    )
    assert (sigmoid_kl_loss(student + 5, teacher) > whole).all()
    flipped = sigmoid_kl_loss(-student, -teacher)  # yes and no change places
    torch.testing.assert_close(flipped, whole)


def test_a_mask_of_classes_leaves_out_what_is_not_known():
    student, teacher = make_pair(6, 4)
    known = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) > 0.4
    values = sigmoid_kl_loss(student, teacher, classes="none")
    spoilt = [x.detach().masked_fill(~known, bad) for x, bad in ((student, math.nan), (teacher, math.inf))]
    loss = SigmoidKLLoss(classes="none")
    torch.testing.assert_close(loss(*spoilt, mask=known), values[known].mean())
    assert (gradient(loss, *spoilt, mask=known)[~known] == 0).all()
    weights = known * torch.rand(6, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(loss(student, teacher, mask=weights), (weights * values).sum() / weights.sum())
    torch.testing.assert_close(loss(student, teacher, mask=weights, denominator=7), (weights * values).sum() / 7)
    with pytest.raises(ValueError, match=r"mask must be shaped like the per-sample values, \(6, 4\), got \(6,\)"):
        loss(student, teacher, mask=known[:, 0])


def test_a_probability_of_0_or_1_is_a_probability():
    inf = math.inf
    teacher = torch.tensor([[-inf, inf, -inf, inf, 1.0]], dtype=torch.float64)
    student = torch.tensor([[-inf, inf, 0.5, 0.5, 1.0]], dtype=torch.float64)
    expected = [0.0, 0.0, math.log1p(math.exp(0.5)), math.log1p(math.exp(-0.5)), 0.0]
    values = sigmoid_kl_loss(student, teacher, classes="none")
    torch.testing.assert_close(values[0], torch.tensor(expected, dtype=torch.float64))
    slope = gradient(SigmoidKLLoss(), student, teacher)
    torch.testing.assert_close(slope, student.sigmoid() - teacher.sigmoid())
    assert sigmoid_kl_loss(torch.tensor([[-inf]]), torch.tensor([[0.0]])) == inf
    assert SigmoidKLLoss()(torch.tensor([[math.nan, 0.0]]), torch.tensor([[0.0, -inf]])).isnan()


def test_finite_on_extreme_logits():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = SigmoidKLLoss()(student, -student.detach())
    value.backward()
    torch.testing.assert_close(value.item(), 2e4)  # twice -log sigmoid(-1e4)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        SigmoidKLLoss(temperature=temperature)
    with pytest.raises(ValueError, match=match):
        sigmoid_kl_loss(*make_pair(6, 10), temperature=temperature)


def test_rejects_unknown_ways_to_count_the_classes():
    match = "classes must be 'sum', 'mean' or 'none', got 'avg'"
    with pytest.raises(ValueError, match=match):
        SigmoidKLLoss(classes="avg")
    with pytest.raises(ValueError, match=match):
        sigmoid_kl_loss(*make_pair(6, 10), classes="avg")
    with pytest.raises(ValueError, match=match):
        SigmoidKLLoss().classes = "avg"


def test_rejects_a_dim_without_a_meaning():
    match = "dim must be None with classes='none', got 1"
    with pytest.raises(ValueError, match=match):
        SigmoidKLLoss(classes="none", dim=1)
    with pytest.raises(ValueError, match=match):
        sigmoid_kl_loss(*make_pair(6, 10), classes="none", dim=1)
    loss = SigmoidKLLoss(dim=1)
    loss.classes = "none"
    with pytest.raises(ValueError, match=match):
        loss(*make_pair(6, 10))


def test_one_value_per_class_is_refused_where_a_sample_has_one():
    head, loss = nn.Linear(4, 3), SigmoidKLLoss(classes="none")
    for outer, shape in ((LinearLoss(loss, head, head), (5, 4)), (SDDLoss(loss, head, head), (5, 4, 4, 4))):
        pair = make_pair(*shape, dtype=torch.float32)
        with pytest.raises(ValueError, match="classes must be 'sum' or 'mean' where each sample has one value"):
            outer(*pair, torch.zeros(5, dtype=torch.int64))
    head = nn.Linear(4, 1)
    pair = make_pair(5, 4, dtype=torch.float32)
    assert LinearLoss(loss, head, head)(*pair) == LinearLoss(SigmoidKLLoss(), head, head)(*pair)


def test_repr_shows_options():
    expected = "SigmoidKLLoss(temperature=2.0, classes='sum', reduction='none', dim=None)"
    assert repr(SigmoidKLLoss(2.0, reduction="none")) == expected
