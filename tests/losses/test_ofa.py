"""OFALoss against the formula of Hao et al. (2023)."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from contract import assert_loss_contract, gradient, make_pair
from distill import OFALoss, ofa_loss

pytestmark = pytest.mark.usefixtures("form")


def labels(*shape, classes=10, seed=3):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def reference(student, teacher, target, eps, temperature, axis=-1):
    """-sum [(p_c + m_c)^eps - m_c] log q_c, sample by sample."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        q, p = np.exp(s[sample] / temperature), np.exp(t[sample] / temperature)
        q, p = q / q.sum(), p / p.sum()
        for c in range(len(p)):
            m = float(c == target[sample])
            values[sample] -= ((p[c] + m) ** eps - m) * math.log(q[c])
    return values


@pytest.mark.parametrize(("eps", "temperature"), [(1.0, 1.0), (1.5, 1.0), (0.5, 4.0), (3.0, 0.5)])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, eps, temperature):
    student, teacher = make_pair(*shape)
    target = labels(*[n for d, n in enumerate(shape) if d != dim % len(shape)], classes=shape[dim])
    expected = reference(student.detach().numpy(), teacher.numpy(), target.numpy(), eps, temperature, dim)
    options = {"eps": eps, "temperature": temperature, "dim": dim}
    values = ofa_loss(student, teacher, target, **options).detach()
    torch.testing.assert_close(values, torch.as_tensor(expected), rtol=1e-12, atol=1e-12)
    value = OFALoss(**options)(student, teacher, target).detach()
    torch.testing.assert_close(value, torch.as_tensor(expected.mean()), rtol=1e-12, atol=1e-12)


def test_eps_and_temperature_are_1_by_default():
    student, teacher = make_pair(5, 10)
    target = labels(5)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), target.numpy(), 1.0, 1.0))
    torch.testing.assert_close(ofa_loss(student, teacher, target).detach(), expected, rtol=1e-12, atol=1e-12)
    values = OFALoss(reduction="none")(student, teacher, target).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 5)
    target = labels(4, classes=5)
    assert torch.autograd.gradcheck(lambda s: ofa_loss(s, teacher, target, eps=1.5, temperature=2.0), student)


def test_contract():
    assert_loss_contract(OFALoss, shape=(6, 10), target=labels(6))
    target = labels(4, 3, 2, classes=5)
    assert_loss_contract(lambda **options: OFALoss(1.5, 2.0, dim=1, **options), shape=(4, 5, 3, 2), target=target)


def test_with_eps_1_it_is_the_cross_entropy_with_the_teachers_probabilities():
    student, teacher = make_pair(6, 10)
    expected = nn.functional.cross_entropy(student, teacher.softmax(-1), reduction="none")
    torch.testing.assert_close(ofa_loss(student, teacher, labels(6)), expected)
    assert gradient(OFALoss(), teacher, teacher, labels(6)).abs().max() < 1e-15


def test_a_larger_eps_counts_the_label_more_and_the_others_less():
    student = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    log_q = student.log_softmax(-1)[0]
    for eps in (1.5, 2.0):
        expected = -((1.5**eps - 1) * log_q[0] + 0.3**eps * log_q[1] + 0.2**eps * log_q[2])
        torch.testing.assert_close(ofa_loss(student, teacher, torch.tensor([0]), eps=eps)[0], expected)


def test_does_not_count_shifts():
    student, teacher = make_pair(6, 10)
    expected = ofa_loss(student, teacher, labels(6), eps=1.5)
    torch.testing.assert_close(ofa_loss(student + 5, teacher - 3, labels(6), eps=1.5), expected)


def test_finite_where_the_student_is_sure_and_wrong():
    student = torch.tensor([[0.0, -200.0]])
    value = ofa_loss(student, torch.zeros(1, 2), torch.tensor([1]), eps=1.5)
    torch.testing.assert_close(value, torch.tensor([200 * (1.5**1.5 - 1)]))
    for scale in (200.0, 1e4):
        far = scale * torch.tensor([[1.0, -1.0, 0.0]])
        assert OFALoss(1.5)(far, -far, torch.tensor([1])).isfinite()
        assert gradient(OFALoss(1.5), far, -far, torch.tensor([1])).isfinite().all()


def test_a_probability_of_0_is_a_probability():
    inf = math.inf
    teacher = torch.tensor([[0.0, 1.0, -inf]], dtype=torch.float64)
    for eps in (0.5, 1.0, 1.5):
        expected = ofa_loss(teacher[:, :2], teacher[:, :2], torch.tensor([0]), eps=eps)
        torch.testing.assert_close(ofa_loss(teacher, teacher, torch.tensor([0]), eps=eps), expected)
        assert gradient(OFALoss(eps), teacher, teacher, torch.tensor([0])).isfinite().all()
    assert ofa_loss(teacher, torch.zeros(1, 3), torch.tensor([0])) == inf
    assert ofa_loss(teacher, teacher, torch.tensor([2]), eps=1.5).isfinite()  # p_y = 0: (0 + 1)^eps - 1 = 0
    assert OFALoss()(torch.tensor([[math.nan, 0.0]]), torch.zeros(1, 2), torch.tensor([0])).isnan()


def test_a_branch_is_a_term_with_its_layers_as_adapter():
    from distill import Distiller, Term
    from models import ResNet, images

    student, teacher = ResNet(), ResNet(width=6, seed=1)
    branch = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    losses = {
        "logits": Term(OFALoss(1.5)),
        "branch": Term(OFALoss(), at=("layer2", "fc"), student=branch, weight=0.5),
    }
    x, target = images()
    distiller = Distiller(student, teacher, losses, task_loss=None)
    out = distiller(x, target)
    with torch.no_grad():
        logits = teacher(x)
    torch.testing.assert_close(out.terms["logits"], ofa_loss(out.student, logits, target, eps=1.5).mean().detach())
    out.loss.backward()
    assert branch[2].weight.grad.abs().max() > 0
    assert branch[2].weight in set(distiller.parameters())


@pytest.mark.parametrize("name", ["eps", "temperature"])
@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_options(name, bad):
    match = f"{name} must be positive and finite, got {bad}"
    with pytest.raises(ValueError, match=match):
        OFALoss(**{name: bad})
    with pytest.raises(ValueError, match=match):
        ofa_loss(*make_pair(6, 10), labels(6), **{name: bad})


def test_rejects_missing_labels():
    with pytest.raises(ValueError, match="target must be the class of every sample, got None"):
        OFALoss()(*make_pair(6, 10))


def test_repr_shows_options():
    assert repr(OFALoss(1.5)) == "OFALoss(eps=1.5, temperature=1.0, reduction='mean', dim=None)"
