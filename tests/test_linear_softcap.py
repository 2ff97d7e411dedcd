"""Soft caps on the logits of LinearLoss and LinearCrossEntropyLoss, against formed logits."""

import pytest
import torch
from torch import nn

from distill import CrossEntropyLoss, JSLoss, KLLoss, LinearCrossEntropyLoss, LinearLoss, NKDLoss, ReverseKLLoss

V, N, CAP = 23, 7, 1.5


def capped(logits, cap):
    return logits if cap is None else cap * torch.tanh(logits / cap)


def make(seed=0):
    generator = torch.Generator().manual_seed(seed)
    heads = [nn.Linear(width, V, dtype=torch.float64) for width in (4, 6)]
    with torch.no_grad():
        for parameter in (parameter for head in heads for parameter in head.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    states = [torch.randn(N, width, generator=generator, dtype=torch.float64) for width in (4, 6)]
    return heads, states[0].requires_grad_(), states[1], torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("share", [0.0, 0.6])
@pytest.mark.parametrize(("ours", "theirs"), [(CAP, None), (None, CAP), (CAP, 3.0)])
@pytest.mark.parametrize("loss", [KLLoss(2.0), ReverseKLLoss(), JSLoss(), NKDLoss()])
def test_equals_capped_formed_logits(loss, ours, theirs, share, reduction):
    loss = type(loss)(**loss.given(), reduction=reduction)
    (head, their_head), student, teacher, labels = make()
    linear = LinearLoss(
        loss,
        head,
        their_head,
        cross_entropy=share,
        student_scale=0.5,
        student_softcap=ours,
        teacher_softcap=theirs,
        rows=3,
    )
    value = linear(student, teacher, labels)
    logits = capped(0.5 * head(student), ours)
    formed = loss(logits, capped(their_head(teacher), theirs), labels)
    formed = formed + share * CrossEntropyLoss(reduction=reduction)(logits, labels)
    torch.testing.assert_close(value, formed, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(0.1, 1, value.numel(), dtype=torch.float64).reshape(value.shape)
    wanted = student, head.weight, head.bias
    found = torch.autograd.grad((weights * value).sum(), wanted)
    for got, expected in zip(found, torch.autograd.grad((weights * formed).sum(), wanted), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_capped_logits():
    (head, their_head), student, teacher, labels = make()
    linear = LinearLoss(KLLoss(), head, their_head, cross_entropy=0.5, student_softcap=CAP, teacher_softcap=CAP, rows=3)
    assert torch.autograd.gradcheck(lambda s: linear(s, teacher, labels), student)
    assert torch.autograd.gradgradcheck(lambda s: linear(s, teacher, labels), student)
    alone = LinearCrossEntropyLoss(head, softcap=CAP, rows=3)
    formed = CrossEntropyLoss()(capped(head(student), CAP), labels)
    torch.testing.assert_close(alone(student, labels), formed, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: alone(s, labels), student)


def test_large_logits_get_no_gradient_but_no_nan():
    (head, their_head), student, teacher, _ = make()
    states = 1e6 * student.detach().requires_grad_()
    value = LinearLoss(KLLoss(), head, their_head, student_softcap=30.0)(states, teacher)
    (gradient,) = torch.autograd.grad(value, states)
    assert value.isfinite()
    assert gradient.abs().max() < 1e-6


class Capped(nn.Linear):
    """A head that caps its own logits."""

    def forward(self, hidden):
        return capped(super().forward(hidden), 30.0)


def test_a_head_that_caps_by_itself_fits_the_option():
    head, other = Capped(4, V), nn.Linear(6, V)
    with pytest.raises(ValueError, match="student_head must compute W h .* student_softcap= for a soft cap"):
        LinearLoss(KLLoss(), head, other)
    loss = LinearLoss(KLLoss(), head, other, student_softcap=30.0)
    states = torch.randn(5, 4), torch.randn(5, 6)
    torch.testing.assert_close(loss(*states), KLLoss()(head(states[0]), other(states[1])))
    assert "student_softcap=30.0, teacher_softcap=None" in repr(loss)
    loss.student_softcap = None
    with pytest.raises(ValueError, match="student_head must compute W h"):
        loss(*states)
    for name in ("student_softcap", "teacher_softcap"):
        with pytest.raises(ValueError, match=f"{name} must be a positive and finite number, got 0"):
            setattr(loss, name, 0)
    with pytest.raises(ValueError, match="softcap must be a positive and finite number, got 'no'"):
        LinearCrossEntropyLoss(other, softcap="no")
