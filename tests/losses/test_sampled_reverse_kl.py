"""SampledReverseKLLoss against the estimate of Oh et al. (2026)."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import SampledReverseKLLoss, reverse_kl_loss, sampled_reverse_kl_loss
from divergences import assert_light, assert_shows_nan

pytestmark = pytest.mark.usefixtures("form")


def distributions(student, teacher, temperature):
    q, p = np.exp(student / temperature), np.exp(teacher / temperature)
    return q / q.sum(), p / p.sum()


def reference(student, teacher, target, temperature, axis=-1):
    """T^2 times the logarithm of q over p at the token, position by position."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for position in np.ndindex(values.shape):
        q, p = distributions(s[position], t[position], temperature)
        y = target[position]
        values[position] = temperature**2 * math.log(q[y] / p[y])
    return values


def reference_gradient(student, teacher, target, temperature, baseline):
    """T^2 (log q_y / p_y - KL(q, p)) times the gradient of log q_y, which is (one-hot of y - q) / T."""
    slopes = np.zeros_like(student)
    for n, y in enumerate(target):
        q, p = distributions(student[n], teacher[n], temperature)
        advantage = math.log(q[y] / p[y])
        if baseline:
            advantage -= sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        slopes[n] = temperature**2 * advantage * (np.eye(len(q))[y] - q) / temperature
    return slopes


def make_target(*shape, classes):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, temperature, baseline):
    student, teacher = make_pair(*shape)
    target = make_target(*(size for d, size in enumerate(shape) if d != dim % len(shape)), classes=shape[dim])
    args = student.detach().numpy(), teacher.numpy(), target.numpy(), temperature, dim
    expected = torch.as_tensor(reference(*args))
    options = {"temperature": temperature, "baseline": baseline}
    values = sampled_reverse_kl_loss(student, teacher, target, dim=dim, **options).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = SampledReverseKLLoss(dim=dim, **options)(student, teacher, target).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_matches_reference(temperature, baseline):
    (student, teacher), target = make_pair(5, 10), make_target(5, classes=10)
    expected = reference_gradient(student.detach().numpy(), teacher.numpy(), target.numpy(), temperature, baseline)
    loss = SampledReverseKLLoss(baseline, temperature, reduction="sum")
    slope = gradient(loss, student, teacher, target)
    torch.testing.assert_close(slope, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_defaults():
    (student, teacher), target = make_pair(5, 10), make_target(5, classes=10)
    expected = reference_gradient(student.detach().numpy(), teacher.numpy(), target.numpy(), 1.0, True)
    for form in (sampled_reverse_kl_loss, SampledReverseKLLoss(reduction="none")):
        slope = gradient(lambda *x, form=form: form(*x).sum(), student, teacher, target)
        torch.testing.assert_close(slope, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_contract():
    assert_loss_contract(SampledReverseKLLoss, shape=(6, 10), target=make_target(6, classes=10))
    assert_loss_contract(
        lambda **options: SampledReverseKLLoss(False, 2.0, dim=1, **options),
        shape=(4, 5, 3, 2),
        target=make_target(4, 3, 2, classes=5),
    )


def over_all_tokens(student, teacher, **options):
    """Value and gradient for each token that the student may sample, and how likely each is."""
    classes = student.shape[-1]
    student, teacher = student.expand(classes, -1).clone(), teacher.expand(classes, -1)
    loss = SampledReverseKLLoss(reduction="none", **options)
    leaf = student.detach().requires_grad_()
    values = loss(leaf, teacher, torch.arange(classes))
    (slopes,) = torch.autograd.grad(values.sum(), leaf)
    weights = (student / options.get("temperature", 1.0)).softmax(-1)[0].detach()[:, None]
    return values.detach()[:, None], slopes, weights


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("baseline", [True, False])
def test_value_and_gradient_are_on_average_those_of_the_reverse_divergence(temperature, baseline):
    student, teacher = make_pair(1, 10)
    values, slopes, weights = over_all_tokens(student, teacher, temperature=temperature, baseline=baseline)
    expected = reverse_kl_loss(student, teacher, temperature=temperature)
    torch.testing.assert_close((weights * values).sum(), expected.sum().detach(), rtol=1e-10, atol=1e-12)
    (slope,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close((weights * slopes).sum(0), slope[0], rtol=1e-10, atol=1e-12)


def test_the_baseline_takes_away_spread_where_the_two_are_far_apart():
    student, _ = make_pair(1, 10)
    teacher = -5 * student.detach()  # the student's tokens are all much worse than the teacher's
    spreads = []
    for baseline in (True, False):
        _, slopes, weights = over_all_tokens(student, teacher, baseline=baseline)
        spreads.append((weights * (slopes - (weights * slopes).sum(0)).square()).sum())
    assert spreads[0] < 0.9 * spreads[1]


def test_zero_when_equal_for_every_token():
    (student, _), target = make_pair(6, 10), make_target(6, classes=10)
    for baseline in (True, False):
        loss = SampledReverseKLLoss(baseline)
        assert loss(student, student.detach(), target) == 0
        assert gradient(loss, student, student.detach(), target).abs().max() == 0


def test_does_not_count_shifts():
    (student, teacher), target = make_pair(6, 10), make_target(6, classes=10)
    shifted = sampled_reverse_kl_loss(student + 5, teacher - 3, target)
    torch.testing.assert_close(shifted, sampled_reverse_kl_loss(student, teacher, target))


def test_finite_on_extreme_logits():
    student = torch.tensor([[1e4, -1e4, 0.0, -1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0, -1e4]])
    value = SampledReverseKLLoss()(student, teacher, torch.tensor([0]))
    value.backward()
    assert value.item() == 2e4
    assert student.grad.isfinite().all()


def test_a_probability_of_0_is_a_probability():
    student = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64).log()
    values = sampled_reverse_kl_loss(student, teacher, torch.tensor([0]))
    torch.testing.assert_close(values, torch.tensor([math.log(2)], dtype=torch.float64))
    slope = gradient(SampledReverseKLLoss(), student, teacher, torch.tensor([0]))
    assert slope.isfinite().all()
    assert slope[0, 2] == 0
    cut = torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64).log()  # the divergence is infinite: nothing is taken off
    for baseline in (True, False):
        values = [sampled_reverse_kl_loss(student, cut, torch.tensor([y]), baseline=baseline).item() for y in (0, 1)]
        assert values == [math.inf, 0.0]
        assert gradient(SampledReverseKLLoss(baseline), student, cut, torch.tensor([0])).abs().max() == 0
        assert gradient(SampledReverseKLLoss(baseline), student, cut, torch.tensor([1])).isfinite().all()
    assert_shows_nan(WithTarget(SampledReverseKLLoss(), torch.tensor([3, 4])))


class WithTarget(torch.nn.Module):
    """A loss with its labels, for checks that know of none."""

    def __init__(self, loss, target):
        super().__init__()
        self.loss, self.target = loss, target

    def forward(self, student, teacher):
        return self.loss(student, teacher, self.target)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 says so to everybody
def test_takes_little_memory(form, monkeypatch):
    if form == "blocks":
        assert_light(WithTarget(SampledReverseKLLoss(), make_target(64, classes=100)), monkeypatch)


@pytest.mark.parametrize("baseline", [None, 1, "kl"])
def test_rejects_what_is_no_flag(baseline):
    match = f"baseline must be True or False, got {baseline!r}"
    with pytest.raises(ValueError, match=match):
        SampledReverseKLLoss(baseline)
    with pytest.raises(ValueError, match=match):
        sampled_reverse_kl_loss(*make_pair(6, 10), make_target(6, classes=10), baseline=baseline)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        SampledReverseKLLoss(temperature=temperature)
    with pytest.raises(ValueError, match=match):
        sampled_reverse_kl_loss(*make_pair(6, 10), make_target(6, classes=10), temperature=temperature)


def test_rejects_a_missing_token():
    with pytest.raises(ValueError, match="target must be the class of every sample, got None"):
        SampledReverseKLLoss()(*make_pair(6, 10))


def test_repr_shows_options():
    expected = "SampledReverseKLLoss(baseline=False, temperature=2.0, reduction='mean', dim=None)"
    assert repr(SampledReverseKLLoss(False, 2.0)) == expected
