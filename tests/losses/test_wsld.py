"""WSLDLoss against the formula of Zhou et al. (2021)."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import WSLDLoss, kl_loss, wsld_loss

pytestmark = pytest.mark.usefixtures("form")


def make_labels(*shape, classes, seed=1):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def weight(student, teacher, y):
    """1 - exp(-CE_s / CE_t) on the label, at temperature 1; the 1e-7 is that of the authors' code."""
    ce_s = math.log(np.exp(student).sum()) - student[y]
    ce_t = math.log(np.exp(teacher).sum()) - teacher[y]
    return 1 - math.exp(-ce_s / (ce_t + 1e-7))


def reference(student, teacher, target, temperature, axis=-1):
    """T^2 times the weight times the soft cross-entropy, sample by sample."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        y = int(target[sample])
        q = np.exp(s[sample] / temperature)
        p = np.exp(t[sample] / temperature)
        q, p = q / q.sum(), p / p.sum()
        soft = -sum(p[c] * math.log(q[c]) for c in range(len(p)))
        values[sample] = temperature**2 * weight(s[sample], t[sample], y) * soft
    return values


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, temperature):
    student, teacher = make_pair(*shape)
    target = make_labels(*(n for d, n in enumerate(shape) if d != dim % len(shape)), classes=shape[dim])
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), target, temperature, dim))
    values = wsld_loss(student, teacher, target, temperature=temperature, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = WSLDLoss(temperature, dim=dim)(student, teacher, target).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_temperature_is_2_by_default():
    student, teacher = make_pair(5, 10)
    target = make_labels(5, classes=10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), target, 2.0))
    torch.testing.assert_close(wsld_loss(student, teacher, target).detach(), expected, rtol=1e-12, atol=1e-12)
    values = WSLDLoss(reduction="none")(student, teacher, target).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


def test_gradient_is_that_of_kl_times_the_weight():
    # The weight is a constant for autograd, so finite differences of the loss are no check; the weight itself is.
    student, teacher = make_pair(4, 5)
    target = make_labels(4, classes=5)
    rows = zip(student.detach().numpy(), teacher.numpy(), target, strict=True)
    weights = torch.tensor([weight(s, t, int(y)) for s, t, y in rows], dtype=torch.float64)
    expected = gradient(lambda s: (weights * kl_loss(s, teacher, temperature=2.0)).mean(), student)
    torch.testing.assert_close(gradient(WSLDLoss(), student, teacher, target), expected, rtol=1e-12, atol=1e-12)


def test_gradcheck_where_the_weight_is_1():
    # A teacher that is sure and right, and a student that is not: the ratio is so large that the weight is exactly 1.
    student, _ = make_pair(4, 5)
    target = make_labels(4, classes=5)
    teacher = 30.0 * torch.nn.functional.one_hot(target, 5).double()
    assert torch.autograd.gradcheck(lambda s: wsld_loss(s, teacher, target), student)
    assert torch.autograd.gradgradcheck(lambda s: wsld_loss(s, teacher, target), student)


def test_contract():
    assert_loss_contract(WSLDLoss, shape=(6, 10), target=make_labels(6, classes=10))
    assert_loss_contract(
        lambda **options: WSLDLoss(4.0, dim=1, **options), shape=(4, 5, 3, 2), target=make_labels(4, 3, 2, classes=5)
    )


def test_a_sample_on_which_the_student_does_much_better_than_the_teacher_hardly_counts():
    teacher = torch.zeros(1, 4)
    soft = []
    for margin in (-5.0, 0.0, 5.0, 15.0):
        student = torch.tensor([[margin, 0.0, 0.0, 0.0]])
        cross_entropy = -(student / 2).log_softmax(-1).mean() * 4
        soft.append((wsld_loss(student, teacher, torch.tensor([0])) / cross_entropy).item())
    assert soft == sorted(soft, reverse=True)
    torch.testing.assert_close(soft[1], 1 - math.exp(-1), rtol=1e-5, atol=0)  # both do as well
    assert soft[0] > 0.95
    assert soft[-1] < 1e-4


def test_does_not_count_shifts():
    student, teacher = make_pair(6, 10)
    target = make_labels(6, classes=10)
    torch.testing.assert_close(wsld_loss(student + 5, teacher - 3, target), wsld_loss(student, teacher, target))


@pytest.mark.parametrize("target", [0, 1, 2])
def test_finite_on_extreme_logits(target):
    for scale in (1.0, -1.0):
        student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
        value = WSLDLoss()(student, scale * student.detach(), torch.tensor([target]))
        value.backward()
        assert value.isfinite()
        assert value >= 0
        assert student.grad.isfinite().all()


def test_rejects_bad_labels():
    student, teacher = make_pair(6, 10)
    labels = make_labels(6, classes=10)
    with pytest.raises(ValueError, match="target must be the class of every sample, got None"):
        WSLDLoss()(student, teacher)
    for shape in ((5,), (6, 1), (6, 10), ()):
        with pytest.raises(ValueError, match=r"target must be one class per sample, of shape \(6,\), got shape"):
            wsld_loss(student, teacher, torch.zeros(shape, dtype=torch.long))
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"target must be integers, got {dtype}"):
            wsld_loss(student, teacher, labels.to(dtype))
    with pytest.raises(ValueError, match="target must be on the device of the logits, cpu, got meta"):
        wsld_loss(student, teacher, labels.to("meta"))
    for label in (-100, 10):
        with pytest.raises(ValueError, match=f"target must be classes from 0 to 9, got {label}"):
            wsld_loss(student, teacher, torch.full((6,), label))


def test_labels_may_be_of_any_integer_dtype():
    student, teacher = make_pair(6, 10)
    labels = make_labels(6, classes=10)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(wsld_loss(student, teacher, labels.to(dtype)), wsld_loss(student, teacher, labels))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        WSLDLoss(temperature=temperature)
    with pytest.raises(ValueError, match=match):
        wsld_loss(*make_pair(6, 10), torch.zeros(6, dtype=torch.long), temperature=temperature)


def test_repr_shows_options():
    assert repr(WSLDLoss(4.0, reduction="none")) == "WSLDLoss(temperature=4.0, reduction='none', dim=None)"
