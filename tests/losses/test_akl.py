"""AKLLoss against the formula of Wu et al. (2025)."""

import functools
import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import AKLLoss, akl_loss, kl_loss, reverse_kl_loss
from divergences import assert_knows_zeros, assert_light, assert_shows_nan

pytestmark = pytest.mark.usefixtures("form")


def distributions(student, teacher, temperature):
    q, p = np.exp(student / temperature), np.exp(teacher / temperature)
    return q / q.sum(), p / p.sum()


def divergence(a, b):
    return sum((x * math.log(x / y) if y else math.inf) if x else 0 for x, y in zip(a, b, strict=True))


def share_of_head(q, p, mu):
    """h / (h + l): the teacher's likeliest classes while they add up to at most mu, and at least one."""
    order = sorted(range(len(p)), key=lambda c: -p[c])
    head, mass = {order[0]}, p[order[0]]
    for c in order[1:]:
        mass += p[c]
        if mass > mu:
            break
        head.add(c)
    h, low = (sum(abs(p[c] - q[c]) for c in range(len(p)) if (c in head) is inside) for inside in (True, False))
    return h / (h + low) if h + low else 0.5


def reference(student, teacher, mu, temperature, axis=-1, shares=None):
    """T^2 times the two divergences, each times its share, sample by sample; with shares given, these."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        q, p = distributions(s[sample], t[sample], temperature)
        share = share_of_head(q, p, mu) if shares is None else shares[sample]
        parts = ((share, divergence(p, q)), (1 - share, divergence(q, p)))
        values[sample] = temperature**2 * sum(weight * part for weight, part in parts if weight)
    return values


@pytest.mark.parametrize(("mu", "temperature"), [(0.5, 1.0), (0.9, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, mu, temperature):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), mu, temperature, dim))
    values = akl_loss(student, teacher, mu=mu, temperature=temperature, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = AKLLoss(mu, temperature, dim=dim)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_defaults():
    student, teacher = make_pair(5, 10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 0.5, 1.0))
    torch.testing.assert_close(akl_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(AKLLoss(reduction="none")(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gradient_with_the_shares_as_constants():
    student, teacher = make_pair(4, 6)
    s, t, step = student.detach().numpy(), teacher.numpy(), 1e-6
    shares = [share_of_head(*distributions(ours, theirs, 2.0), 0.5) for ours, theirs in zip(s, t, strict=True)]
    expected = np.zeros_like(s)
    for index in np.ndindex(s.shape):
        moved = [s.copy(), s.copy()]
        moved[0][index] += step
        moved[1][index] -= step
        above, below = (reference(x, t, 0.5, 2.0, shares={(n,): v for n, v in enumerate(shares)}) for x in moved)
        expected[index] = (above - below).sum() / (2 * step)
    slope = gradient(AKLLoss(0.5, 2.0, reduction="sum"), student, teacher)
    torch.testing.assert_close(slope, torch.from_numpy(expected), rtol=1e-7, atol=1e-9)
    # Autograd's is that of the two divergences with these shares.
    parts = [torch.tensor(shares) * kl_loss(student, teacher, temperature=2.0)]
    parts.append((1 - torch.tensor(shares)) * reverse_kl_loss(student, teacher, temperature=2.0))
    (sum_slope,) = torch.autograd.grad(sum(parts).sum(), student)
    torch.testing.assert_close(slope, sum_slope, rtol=1e-10, atol=1e-12)


def test_contract():
    assert_loss_contract(AKLLoss, shape=(6, 10))
    assert_loss_contract(lambda **options: AKLLoss(0.3, 2.0, dim=1, **options), shape=(4, 5, 3, 2))


def test_zero_when_equal_and_not_0_over_0():
    student, _ = make_pair(6, 10)
    assert AKLLoss()(student, student.detach()) == 0
    slope = gradient(AKLLoss(), student, student.detach())
    assert slope.isfinite().all()
    assert slope.abs().max() < 1e-15


def test_the_class_that_crosses_mu_is_in_the_tail():
    teacher = torch.tensor([[0.3, 0.3, 0.2, 0.2]], dtype=torch.float64).log()
    student = torch.tensor([[0.3, 0.2, 0.3, 0.2]], dtype=torch.float64).log()  # the second and third differ
    reverse = reverse_kl_loss(student, teacher, temperature=1.0)
    torch.testing.assert_close(akl_loss(student, teacher, mu=0.5), reverse)  # 0.3 + 0.3 is above: both in the tail
    forward = kl_loss(student, teacher, temperature=1.0)
    torch.testing.assert_close(akl_loss(student, teacher, mu=0.7), (forward + reverse) / 2)  # one on each side
    torch.testing.assert_close(akl_loss(student, teacher, mu=0.85), forward)


def test_the_likeliest_class_is_in_the_head_however_likely():
    teacher = torch.tensor([[0.9, 0.06, 0.04]], dtype=torch.float64).log()
    student = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    expected = (kl_loss(student, teacher, temperature=1.0) + reverse_kl_loss(student, teacher, temperature=1.0)) / 2
    torch.testing.assert_close(akl_loss(student, teacher), expected)


def test_lies_between_the_two_divergences():
    student, teacher = make_pair(50, 10)
    forward, reverse = (f(student, teacher, temperature=1.0) for f in (kl_loss, reverse_kl_loss))
    values = akl_loss(student, teacher)
    assert (values > torch.minimum(forward, reverse)).all()
    assert (values < torch.maximum(forward, reverse)).all()


def test_does_not_count_shifts():
    student, teacher = make_pair(6, 10)
    torch.testing.assert_close(akl_loss(student + 5, teacher - 3), akl_loss(student, teacher))


def test_finite_on_extreme_logits():
    student = torch.tensor([[1e4, -1e4, 0.0, -1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0, -1e4]])
    value = AKLLoss()(student, teacher)
    value.backward()
    torch.testing.assert_close(value.item(), 2e4)
    assert student.grad.isfinite().all()


def test_a_probability_of_0_is_a_probability():
    for mu, temperature in ((0.5, 1.0), (0.8, 2.0)):
        assert_knows_zeros(
            functools.partial(AKLLoss, mu, temperature),
            lambda s, t: reference(s, t, mu, temperature),  # noqa: B023
            infinite=(True, True),
        )
    assert_shows_nan(AKLLoss())


def test_a_weight_of_0_takes_away_what_is_infinite():
    teacher = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    student = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()  # the heads agree, and KL(p || q) is infinite
    torch.testing.assert_close(akl_loss(student, teacher), reverse_kl_loss(student, teacher, temperature=1.0))
    assert gradient(AKLLoss(), student, teacher).isfinite().all()


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 says so to everybody
def test_takes_little_memory(form, monkeypatch):
    if form == "blocks":
        assert_light(AKLLoss(), monkeypatch)


@pytest.mark.parametrize("mu", [0.0, 1.0, -0.1, math.nan])
def test_rejects_bad_shares_of_the_head(mu):
    match = f"mu must be above 0 and below 1, got {mu}"
    with pytest.raises(ValueError, match=match):
        AKLLoss(mu)
    with pytest.raises(ValueError, match=match):
        akl_loss(*make_pair(6, 10), mu=mu)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        AKLLoss(temperature=temperature)
    with pytest.raises(ValueError, match=match):
        akl_loss(*make_pair(6, 10), temperature=temperature)


def test_repr_shows_options():
    assert repr(AKLLoss(0.3, 2.0)) == "AKLLoss(mu=0.3, temperature=2.0, reduction='mean', dim=None)"
