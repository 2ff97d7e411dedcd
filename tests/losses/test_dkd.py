"""DKDLoss against the formula of Zhao, Cui, Song, Qiu and Liang (2022)."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import DKDLoss, dkd_loss, kl_loss

pytestmark = pytest.mark.usefixtures("form")


def make_labels(*shape, classes, seed=1):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def reference(student, teacher, target, alpha, beta, temperature, axis=-1):
    """T^2 [alpha TCKD + beta NCKD]: a divergence of two binary distributions, and one of the others renormalised."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        y = int(target[sample])
        q = np.exp(s[sample] / temperature)
        p = np.exp(t[sample] / temperature)
        q, p = q / q.sum(), p / p.sum()
        tckd = p[y] * math.log(p[y] / q[y]) + (1 - p[y]) * math.log((1 - p[y]) / (1 - q[y]))
        nckd = 0.0
        for c in range(len(p)):
            if c != y:
                p_hat, q_hat = p[c] / (1 - p[y]), q[c] / (1 - q[y])
                nckd += p_hat * math.log(p_hat / q_hat)
        values[sample] = temperature**2 * (alpha * tckd + beta * nckd)
    return values


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1, 8, 4), (1, 0, 1), (0, 1, 1), (0.5, 2, 0.5)])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, alpha, beta, temperature):
    student, teacher = make_pair(*shape)
    target = make_labels(*(n for d, n in enumerate(shape) if d != dim % len(shape)), classes=shape[dim])
    expected = reference(student.detach().numpy(), teacher.numpy(), target, alpha, beta, temperature, dim)
    expected = torch.as_tensor(expected)
    values = dkd_loss(student, teacher, target, alpha=alpha, beta=beta, temperature=temperature, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = DKDLoss(alpha, beta, temperature, dim=dim)(student, teacher, target).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_defaults():
    student, teacher = make_pair(5, 10)
    target = make_labels(5, classes=10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), target, 1.0, 8.0, 4.0))
    torch.testing.assert_close(dkd_loss(student, teacher, target).detach(), expected, rtol=1e-12, atol=1e-12)
    values = DKDLoss(reduction="none")(student, teacher, target).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 5)
    target = make_labels(4, classes=5)
    assert torch.autograd.gradcheck(lambda s: dkd_loss(s, teacher, target), student)
    assert torch.autograd.gradgradcheck(lambda s: dkd_loss(s, teacher, target), student)


def test_contract():
    assert_loss_contract(DKDLoss, shape=(6, 10), target=make_labels(6, classes=10))
    assert_loss_contract(
        lambda **options: DKDLoss(0.5, 2.0, 2.0, dim=1, **options),
        shape=(4, 5, 3, 2),
        target=make_labels(4, 3, 2, classes=5),
    )


def test_with_beta_one_minus_the_targets_probability_it_is_kl():
    student, teacher = make_pair(6, 10)
    target = make_labels(6, classes=10)
    p_target = (teacher / 3).softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    for n in range(6):
        rows = student[n : n + 1], teacher[n : n + 1]
        value = dkd_loss(*rows, target[n : n + 1], alpha=1.0, beta=1 - p_target[n].item(), temperature=3.0)
        torch.testing.assert_close(value, kl_loss(*rows, temperature=3.0))


def test_the_two_parts_answer_to_the_target_and_to_the_others_only():
    student, teacher = make_pair(6, 10)
    target = make_labels(6, classes=10)
    bump = torch.nn.functional.one_hot(target, 10) * 2.0
    others = dkd_loss(student, teacher, target, alpha=0.0, beta=1.0)
    torch.testing.assert_close(dkd_loss(student + bump, teacher, target, alpha=0.0, beta=1.0), others)
    # Evening out the other classes, while they keep their sum, leaves the target's part as it is.
    q = (student / 4).softmax(-1)
    q_target = q.gather(-1, target[:, None])
    evened = 4 * torch.where(bump > 0, q, (1 - q_target) / 9).log()
    of_target = dkd_loss(student, teacher, target, beta=0.0)
    torch.testing.assert_close(dkd_loss(evened, teacher, target, beta=0.0), of_target)
    assert not torch.allclose(dkd_loss(evened, teacher, target, alpha=0.0, beta=1.0), others)


def test_two_classes_have_no_others_to_compare():
    student, teacher = make_pair(6, 2)
    target = make_labels(6, classes=2)
    assert dkd_loss(student, teacher, target, alpha=0.0).abs().max() < 1e-12
    torch.testing.assert_close(dkd_loss(student, teacher, target), kl_loss(student, teacher))
    assert gradient(DKDLoss(), student, teacher, target).isfinite().all()


def test_zero_when_equal_and_positive_otherwise():
    student, teacher = make_pair(6, 10)
    target = make_labels(6, classes=10)
    assert DKDLoss()(student, student.detach(), target) == 0
    assert (dkd_loss(student, teacher, target) > 0).all()


def test_does_not_count_shifts():
    student, teacher = make_pair(6, 10)
    target = make_labels(6, classes=10)
    torch.testing.assert_close(dkd_loss(student + 5, teacher - 3, target), dkd_loss(student, teacher, target))


def test_large_logits_cost_no_more_digits_than_their_own_rounding():
    generator = torch.Generator().manual_seed(0)
    # Eighths, which the shifts leave exact.
    student, teacher = (torch.randint(-16, 16, (6, 10), generator=generator) / 8 for _ in range(2))
    target = make_labels(6, classes=10)
    expected = dkd_loss(student.double(), teacher.double(), target, temperature=1.0)
    values = dkd_loss(student + 1e4, teacher - 1e4, target, temperature=1.0)
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("offset", [0, 1000, 10000])
def test_an_offset_common_to_all_logits_costs_no_digits(offset):
    student, teacher = make_pair(4, 100)
    target = make_labels(4, classes=100)
    teacher = (3 * teacher).float() + offset
    near = teacher + (0.1 * student.detach()).float()
    exact = dkd_loss(near.double(), teacher.double(), target)
    torch.testing.assert_close(dkd_loss(near, teacher, target).double(), exact, rtol=1e-3, atol=0)
    constant = torch.full((4, 100), 1000.1)
    assert dkd_loss(constant, constant - 999, target).abs().max() < 1e-5


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("target", [0, 1])
def test_finite_on_extreme_logits(classes, target):
    for scale in (1.0, -1.0):
        student = torch.tensor([[1e4, -1e4, 0.0, 5.0]])[:, :classes].requires_grad_()
        value = DKDLoss()(student, scale * student.detach(), torch.tensor([target]))
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_rejects_bad_weights(name, bad):
    match = f"{name} must be zero or positive and finite, got {bad}"
    with pytest.raises(ValueError, match=match):
        DKDLoss(**{name: bad})
    with pytest.raises(ValueError, match=match):
        dkd_loss(*make_pair(6, 10), make_labels(6, classes=10), **{name: bad})


def test_rejects_bad_labels():
    student, teacher = make_pair(6, 10)
    labels = make_labels(6, classes=10)
    with pytest.raises(ValueError, match="target must be the class of every sample, got None"):
        DKDLoss()(student, teacher)
    for shape in ((5,), (6, 1), (6, 10), ()):
        with pytest.raises(ValueError, match=r"target must be one class per sample, of shape \(6,\), got shape"):
            dkd_loss(student, teacher, torch.zeros(shape, dtype=torch.long))
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"target must be integers, got {dtype}"):
            dkd_loss(student, teacher, labels.to(dtype))
    with pytest.raises(ValueError, match="target must be on the device of the logits, cpu, got meta"):
        dkd_loss(student, teacher, labels.to("meta"))
    for label in (-100, 10):
        with pytest.raises(ValueError, match=f"target must be classes from 0 to 9, got {label}"):
            dkd_loss(student, teacher, torch.full((6,), label))


def test_labels_may_be_of_any_integer_dtype():
    student, teacher = make_pair(6, 10)
    labels = make_labels(6, classes=10)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(dkd_loss(student, teacher, labels.to(dtype)), dkd_loss(student, teacher, labels))


def test_rejects_a_single_class():
    with pytest.raises(ValueError, match=r"at least 2 classes along dim -1, got shape \(6, 1\)"):
        dkd_loss(*make_pair(6, 1), make_labels(6, classes=1))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        DKDLoss(temperature=temperature)
    with pytest.raises(ValueError, match=match):
        dkd_loss(*make_pair(6, 10), torch.zeros(6, dtype=torch.long), temperature=temperature)


def test_repr_shows_options():
    assert (
        repr(DKDLoss(1.0, 2.0, 3.0, reduction="none"))
        == "DKDLoss(alpha=1.0, beta=2.0, temperature=3.0, reduction='none', dim=None)"
    )
