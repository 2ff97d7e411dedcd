"""MFTLoss against the corrected distributions of Belcak et al. (2025)."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import MFTLoss, mft_loss
from divergences import assert_knows_zeros, assert_light, assert_shows_nan

pytestmark = pytest.mark.usefixtures("form")


def correct(p, label, threshold):
    """The teacher's distribution mixed with the label's class, a of it."""
    most = max(p)
    if p[label] == most:
        a = 1.0 if p[label] >= 1 - threshold else threshold / (1 - p[label])
    else:
        a = (most - p[label] + threshold) / (1 + most - p[label])
    return np.array([(1 - a) * p[c] + a * (c == label) for c in range(len(p))])


def reference(student, teacher, target, threshold, temperature, axis=-1):
    """T^2 KL(r, q) with r the corrected distribution, sample by sample."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        q, p = np.exp(s[sample] / temperature), np.exp(t[sample] / temperature)
        r = correct(p / p.sum(), target[sample], threshold)
        for rc, qc in zip(r, q / q.sum(), strict=True):
            values[sample] += (rc * math.log(rc / qc) if qc else math.inf) if rc else 0
    return temperature**2 * values


def make_target(*shape, classes):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("threshold", "temperature"), [(0.2, 1.0), (0.5, 2.0), (0.9, 1.0)])
@pytest.mark.parametrize(("shape", "dim"), [((8, 10), -1), ((8, 2), 1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, threshold, temperature):
    student, teacher = make_pair(*shape)
    target = make_target(*(size for d, size in enumerate(shape) if d != dim % len(shape)), classes=shape[dim])
    teacher = teacher * 3
    args = student.detach().numpy(), teacher.numpy(), target.numpy(), threshold, temperature, dim
    expected = torch.as_tensor(reference(*args))
    values = mft_loss(student, teacher, target, threshold=threshold, temperature=temperature, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = MFTLoss(threshold, temperature, dim=dim)(student, teacher, target).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_defaults():
    (student, teacher), target = make_pair(5, 10), make_target(5, classes=10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), target.numpy(), 0.2, 1.0))
    torch.testing.assert_close(mft_loss(student, teacher, target).detach(), expected, rtol=1e-12, atol=1e-12)
    value = MFTLoss(reduction="none")(student, teacher, target).detach()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    (student, teacher), target = make_pair(4, 5), make_target(4, classes=5)
    assert torch.autograd.gradcheck(lambda s: mft_loss(s, teacher, target, temperature=2.0), student)
    assert torch.autograd.gradgradcheck(lambda s: mft_loss(s, teacher, target, temperature=2.0), student)


def test_contract():
    assert_loss_contract(MFTLoss, shape=(6, 10), target=make_target(6, classes=10))
    assert_loss_contract(
        lambda **options: MFTLoss(0.4, 2.0, dim=1, **options),
        shape=(4, 5, 3, 2),
        target=make_target(4, 3, 2, classes=5),
    )


@pytest.mark.parametrize(
    ("p", "label", "r"),
    [
        ([0.6, 0.3, 0.1], 1, [0.6 * 0.8 / 1.3, (0.3 * 0.8 + 0.5) / 1.3, 0.1 * 0.8 / 1.3]),  # wrong
        ([0.6, 0.3, 0.1], 0, [0.8, 0.15, 0.05]),  # right: 0.2 more
        ([0.85, 0.1, 0.05], 0, [1.0, 0.0, 0.0]),  # right and nearly sure: all
        ([0.4, 0.4, 0.2], 1, [0.8 / 3, 0.6, 0.4 / 3]),  # a tie counts as right
        ([1.0, 0.0, 0.0], 0, [1.0, 0.0, 0.0]),
        ([1.0, 0.0, 0.0], 2, [0.4, 0.0, 0.6]),  # sure and wrong: a = 1.2 / 2
    ],
)
def test_the_corrected_distribution_is_where_the_loss_is_0(p, label, r):
    teacher, corrected = (torch.tensor([x], dtype=torch.float64).log() for x in (p, r))
    target = torch.tensor([label])
    assert mft_loss(corrected, teacher, target) < 1e-15
    slope = gradient(MFTLoss(), torch.tensor([r], dtype=torch.float64).clamp(min=1e-300).log(), teacher, target)
    assert slope.abs().max() < 1e-12


def test_a_wrong_teacher_is_corrected_to_a_margin():
    teacher = make_pair(50, 10)[1]
    target = make_target(50, classes=10)
    p = teacher.softmax(-1).numpy()
    for row, label in zip(p, target.tolist(), strict=True):
        r = correct(row, label, 0.2)
        others = np.delete(r, label)
        assert r.sum() == pytest.approx(1)
        assert r[label] - others.max() >= 0.2 - 1e-12
        assert np.allclose(others / others.sum(), np.delete(row, label) / np.delete(row, label).sum())


def test_is_not_0_where_the_student_is_the_teacher():
    (student, _), target = make_pair(6, 10), make_target(6, classes=10)
    assert (mft_loss(student, student.detach(), target) > 0.01).all()


def test_does_not_count_shifts():
    (student, teacher), target = make_pair(6, 10), make_target(6, classes=10)
    torch.testing.assert_close(mft_loss(student + 5, teacher - 3, target), mft_loss(student, teacher, target))


def test_finite_on_extreme_logits():
    student = torch.tensor([[1e4, -1e4, 0.0, -1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0, -1e4]])
    for label in (0, 1, 3):
        value = MFTLoss()(student, teacher, torch.tensor([label]))
        (slope,) = torch.autograd.grad(value, student)
        assert value.isfinite()
        assert slope.isfinite().all()


def test_a_probability_of_0_is_a_probability():
    target = torch.tensor([3, 5, 0, 1])  # of classes that have a probability on both sides
    for threshold, temperature in ((0.2, 1.0), (0.6, 2.0)):
        assert_knows_zeros(
            lambda **options: WithTarget(MFTLoss(threshold, temperature, **options), target),  # noqa: B023
            lambda s, t: reference(s, t, target.numpy(), threshold, temperature),  # noqa: B023
            infinite=(True, False),
        )
    assert_shows_nan(WithTarget(MFTLoss(), torch.tensor([3, 4])))


class WithTarget(torch.nn.Module):
    """A loss with its labels, for checks that know of none."""

    def __init__(self, loss, target):
        super().__init__()
        self.loss, self.target = loss, target

    def forward(self, student, teacher):
        return self.loss(student, teacher, self.target[: len(student)])


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 says so to everybody
def test_takes_little_memory(form, monkeypatch):
    if form == "blocks":
        assert_light(WithTarget(MFTLoss(), make_target(64, classes=100)), monkeypatch)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, math.nan])
def test_rejects_bad_thresholds(threshold):
    match = f"threshold must be above 0 and below 1, got {threshold}"
    with pytest.raises(ValueError, match=match):
        MFTLoss(threshold)
    with pytest.raises(ValueError, match=match):
        mft_loss(*make_pair(6, 10), make_target(6, classes=10), threshold=threshold)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        MFTLoss(temperature=temperature)
    with pytest.raises(ValueError, match=match):
        mft_loss(*make_pair(6, 10), make_target(6, classes=10), temperature=temperature)


def test_rejects_labels_that_are_missing_or_no_class():
    with pytest.raises(ValueError, match="target must be the class of every sample, got None"):
        MFTLoss()(*make_pair(6, 10))
    with pytest.raises(ValueError, match="target must be classes from 0 to 9, got 10"):
        mft_loss(*make_pair(6, 10), torch.full((6,), 10))


def test_repr_shows_options():
    assert repr(MFTLoss(0.3, 2.0)) == "MFTLoss(threshold=0.3, temperature=2.0, reduction='mean', dim=None)"
