"""CTKDLoss against the formula of Li et al. (2023), and its temperature against a gradient that is turned round."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import CTKDLoss, Distiller, Term, ctkd_loss, ctkd_strength, kl_loss
from models import Net, batch


def reference(student, teacher, temperature, axis=-1):
    """T^2 KL(p || q), sample by sample."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        q, p = np.exp(s[sample] / temperature), np.exp(t[sample] / temperature)
        q, p = q / q.sum(), p / p.sum()
        values[sample] = temperature**2 * sum(p[c] * math.log(p[c] / q[c]) for c in range(len(p)))
    return values


@pytest.mark.parametrize(("low", "span", "raw"), [(1.0, 20.0, 1.0), (0.5, 2.0, -0.3)])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, low, span, raw):
    student, teacher = make_pair(*shape)
    temperature = low + span / (1 + math.exp(-raw))
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), temperature, dim))
    values = ctkd_loss(student, teacher, temperature=torch.tensor(temperature, dtype=torch.float64), dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    loss = CTKDLoss(low, span, dim=dim).double()
    loss.raw.data.fill_(raw)
    torch.testing.assert_close(loss(student, teacher).detach(), expected.mean(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss.temperature.item(), temperature, rtol=1e-12, atol=0)


def test_gradient_for_logits_and_temperature():
    student, teacher = make_pair(4, 5)
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, t: ctkd_loss(s, teacher, temperature=t), (student, temperature))


@pytest.mark.parametrize("bad", [0.0, -2.0])
def test_rejects_a_temperature_that_is_not_positive(bad):
    with pytest.raises(ValueError, match=f"temperature must be positive, got {bad}"):
        ctkd_loss(*make_pair(4, 5), temperature=torch.tensor(bad))


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_the_gradient_of_the_temperature_is_turned_round(strength):
    student, teacher = make_pair(4, 5)
    loss = CTKDLoss(strength=strength).double()
    loss(student, teacher).backward()
    raw = loss.raw.detach().requires_grad_()
    straight = ctkd_loss(student, teacher, temperature=1 + 20 * torch.sigmoid(raw)).mean()
    expected, ours = torch.autograd.grad(straight, [raw, student])
    torch.testing.assert_close(loss.raw.grad, -strength * expected)
    torch.testing.assert_close(student.grad, ours)
    assert expected != 0


def test_contract():
    assert_loss_contract(CTKDLoss, shape=(6, 10), adversary=True)
    assert_loss_contract(lambda **options: CTKDLoss(0.5, 3.0, **options), shape=(4, 3, 5), adversary=True)


def test_is_kl_at_its_temperature():
    student, teacher = make_pair(6, 10)
    loss = CTKDLoss().double()
    expected = kl_loss(student, teacher, temperature=loss.temperature.item()).mean()
    torch.testing.assert_close(loss(student, teacher), expected)
    assert CTKDLoss()(student, student.detach()) == 0


def test_one_step_lessens_it_for_the_student_and_increases_it_for_the_temperature():
    student, teacher = Net(), Net(seed=1)
    x, _ = batch()
    loss = CTKDLoss().double()
    distiller = Distiller(student.double(), teacher.double(), Term(loss), task_loss=None)
    before = distiller(x.double()).loss.item()
    old = loss.temperature.item()
    distiller(x.double()).loss.backward()
    torch.optim.SGD([loss.raw], lr=0.1).step()
    assert loss.temperature != old
    assert distiller(x.double()).loss > before
    torch.optim.SGD(student.parameters(), lr=1e-4).step()
    loss.raw.data.fill_(1.0)
    assert distiller(x.double()).loss < before


def test_the_strength_rises_as_half_a_cosine():
    assert ctkd_strength(0) == 0
    for epoch in range(1, 12):  # the schedule of the authors' code, from 0 to -1
        theirs = (math.cos(min(epoch, 10) * math.pi / 10) + 1) * 0.5 * (0 - -1) + -1
        assert ctkd_strength(epoch) == pytest.approx(-theirs, abs=1e-15)
    assert ctkd_strength(2.5, 5) == pytest.approx(0.5)


def test_a_probability_of_0_is_a_probability():
    student, teacher = make_pair(3, 5)
    dead = torch.full((3, 2), -math.inf, dtype=torch.float64)
    more = [torch.cat([x.detach(), dead], 1) for x in (student, teacher)]
    loss = CTKDLoss().double()
    torch.testing.assert_close(loss(*more), loss(student, teacher))
    torch.testing.assert_close(gradient(loss, *more)[:, :5], gradient(loss, student, teacher))


@pytest.mark.parametrize(("name", "bad"), [("low", 0.0), ("span", -1.0), ("low", math.nan), ("span", math.inf)])
def test_rejects_bad_ranges(name, bad):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {bad}"):
        CTKDLoss(**{name: bad})


def test_rejects_bad_strengths_and_epochs():
    with pytest.raises(ValueError, match=r"strength must be zero or positive and finite, got -1\.0"):
        CTKDLoss(strength=-1.0)
    with pytest.raises(ValueError, match="epoch must be zero or positive and finite, got -1"):
        ctkd_strength(-1)
    with pytest.raises(ValueError, match="epochs must be positive and finite, got 0"):
        ctkd_strength(1, 0)


def test_rejects_temperatures_that_are_not_one_number():
    with pytest.raises(TypeError, match="temperature must be a tensor, got float"):
        ctkd_loss(*make_pair(3, 5), temperature=4.0)
    with pytest.raises(ValueError, match=r"temperature must be one number, got shape \(2,\)"):
        ctkd_loss(*make_pair(3, 5), temperature=torch.ones(2))
    with pytest.raises(ValueError, match="the loss must be on the device of what it compares, cpu, got meta"):
        ctkd_loss(*make_pair(3, 5), temperature=torch.ones((), device="meta"))
    with pytest.raises(ValueError, match=r"at least 2 classes along dim -1, got shape \(3, 1\)"):
        ctkd_loss(*make_pair(3, 1), temperature=torch.ones(()))
    with pytest.raises(ValueError, match="dim must be given for logits of four dimensions"):
        CTKDLoss()(*make_pair(2, 3, 4, 5))


def test_repr_shows_options():
    assert repr(CTKDLoss()) == "CTKDLoss(low=1.0, span=20.0, strength=1.0, reduction='mean', dim=None)"
