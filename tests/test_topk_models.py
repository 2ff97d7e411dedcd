"""TopK as the teacher of a Distiller, and in LinearLoss in place of hidden states."""

import pickle

import pytest
import torch
from torch import nn

import distill
from contract import make_pair
from distill import Distiller, KLLoss, LinearLoss, TeacherOutput, Term, TopK
from distill._engine import linear as engine_linear
from topk_cases import T, build, each

V = 13


# --- through the Distiller ---


def test_a_distiller_takes_it_as_the_teachers_output():
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 9), nn.Linear(4, 9)
    inputs, target = torch.randn(3, 5, 4), torch.randint(9, (3, 5))
    mask = torch.rand(3, 5) > 0.3
    topk = TopK.of(teacher(inputs), 3, temperature=4.0)
    expected = KLLoss()(student(inputs), topk, mask=mask, denominator=20)

    def plain(out):
        return out * 1.0

    for distiller, output in [
        (Distiller(student, None, KLLoss()), topk),
        (Distiller(student, teacher, KLLoss()), topk),
        (Distiller(student, None, KLLoss(), output=plain), topk),  # it finds the tensor in what a model returns
        (Distiller(student, None, KLLoss()), {"logits": topk}),
        (Distiller(student, None, KLLoss()), TeacherOutput(topk)),
        (Distiller(student, None, Term(KLLoss(), at=("", "stored"))), TeacherOutput(features={"stored": topk})),
        (Distiller(student, None, Term(KLLoss(), at=(lambda out: out, lambda out: out["kept"]))), {"kept": topk}),
        (Distiller(student, lambda x: TopK.of(teacher(x), 3, temperature=4.0), KLLoss()), None),
    ]:
        out = distiller(inputs, target, mask=mask, denominator=20, teacher_output=output)
        torch.testing.assert_close(out.terms["distillation"], expected.detach())
        student.zero_grad()
        out.loss.backward()
        assert student.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="term 'distillation': the temperature of a TopK must be the loss's"):
        Distiller(student, None, KLLoss(2.0))(inputs, target, teacher_output=topk)
    with pytest.raises(TypeError, match="term 'distillation': DKDLoss takes no TopK"):
        Distiller(student, None, distill.DKDLoss())(inputs, target, teacher_output=topk)


def test_losses_whose_forward_is_their_own_refuse_it_too():
    student, teacher = make_pair(4, 6)
    topk = TopK.of(teacher, 3)
    for loss in (
        distill.SigmoidKLLoss(),
        distill.SigmoidKLLoss(classes="none"),
        distill.MatryoshkaLoss(distill.CosineLoss(), [2, 6]),
        distill.HintLoss(),
        distill.RKDLoss(),
    ):
        with pytest.raises(TypeError, match="TopK"):
            loss(student, topk)


# --- through LinearLoss ---


def heads(vocabularies=(V, V)):
    generator = torch.Generator().manual_seed(2)
    made = [nn.Linear(width, size, dtype=torch.float64) for width, size in zip((6, 9), vocabularies, strict=True)]
    with torch.no_grad():
        for parameter in (*made[0].parameters(), *made[1].parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def linear_case():
    student, teacher = make_pair(10, 6)[0], make_pair(10, 9)[1]
    return student, teacher, torch.randint(V, (10,), generator=torch.Generator().manual_seed(3))


def gradients(value, *tensors):
    return torch.autograd.grad(value.sum(), tensors, retain_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@each
def test_linear_loss_takes_it_for_the_teachers_hidden_states(name, reduction):
    (ours, theirs), (student, teacher, labels) = heads(), linear_case()
    topk = TopK.of(theirs(teacher), 4, temperature=T)
    loss, wanted = build(name, reduction=reduction), (student, ours.weight, ours.bias)
    mask = torch.arange(10) % 3 * 0.5
    linear = LinearLoss(loss, ours, theirs, rows=4)
    alone = LinearLoss(loss, ours, rows=4)
    both = LinearLoss(loss, ours, cross_entropy=0.5, rows=4)
    assert "teacher_head=None" in repr(alone)
    formed = loss(ours(student), topk, mask=mask)
    for value in (linear(student, topk, mask=mask), alone(student, topk, mask=mask)):
        torch.testing.assert_close(value, formed, rtol=1e-10, atol=1e-12)
        for found, expected in zip(gradients(value, *wanted), gradients(formed, *wanted), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    entropy = nn.functional.cross_entropy(ours(student), labels, reduction="none")
    entropy = mask * entropy if reduction == "none" else (mask * entropy).sum() / mask.sum()
    value, formed = both(student, topk, labels, mask=mask), formed + 0.5 * entropy
    torch.testing.assert_close(value, formed, rtol=1e-10, atol=1e-12)
    for found, expected in zip(gradients(value, *wanted), gradients(formed, *wanted), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_linear_loss_second_derivatives_samples_and_vocabularies():
    (ours, theirs), (student, teacher, labels) = heads((V, V - 3)), linear_case()
    topk = TopK.of(theirs(teacher), 4, temperature=T, samples=3, generator=torch.Generator().manual_seed(0))
    exact = topk.indices[:, :4], topk.log_probs[:, :4], topk.log_tail
    for known in (TopK(*exact, T), topk):
        linear = LinearLoss(KLLoss(T), ours, cross_entropy=0.5, vocab_size=V - 3)
        value = linear(student, known, labels, denominator=7)
        logits = ours(student)
        formed = KLLoss(T)(logits[:, : V - 3], known, denominator=7)
        formed = formed + 0.5 * nn.functional.cross_entropy(logits, labels, reduction="sum") / 7
        torch.testing.assert_close(value, formed, rtol=1e-10, atol=1e-12)
        slopes = [torch.autograd.grad(x, student, create_graph=True)[0] for x in (value, formed)]
        torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            *(torch.autograd.grad(slope.square().sum(), student)[0] for slope in slopes), rtol=1e-9, atol=1e-11
        )
    assert linear(student.detach().view(2, 5, 6), topk.reshape(2, 5), labels.view(2, 5)).isfinite()


def test_linear_loss_multiplies_the_students_head_alone(monkeypatch):
    (ours, theirs), (student, teacher, _) = heads(), linear_case()
    topk, shapes = TopK.of(theirs(teacher), 4, temperature=T), []
    real = engine_linear.multiply

    def multiply(side, piece, buffer):
        shapes.append(tuple(side[1].shape))
        return real(side, piece, buffer)

    monkeypatch.setattr(engine_linear, "multiply", multiply)
    linear = LinearLoss(build("kl"), ours, theirs)
    linear(student, topk)
    assert shapes == [(V, 6)]
    linear(student, teacher)
    assert shapes == [(V, 6), (V, 6), (V, 9)]


def test_linear_loss_through_a_distiller_without_a_teacher():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, V))
    teacher = nn.Linear(4, V)
    inputs, labels = torch.randn(3, 5, 4), torch.randint(V, (3, 5))
    topk = TopK.of(teacher(inputs), 4, temperature=T)
    soft = LinearLoss(build("kl"), student[1], cross_entropy=1.0)
    for copied in (soft, pickle.loads(pickle.dumps(soft))):
        assert copied(torch.randn(3, 5, 6), topk, labels).isfinite()
    term = Term(soft, at=("1:input", lambda out: out))
    out = Distiller(student, None, term, task_loss=None)(inputs, labels, teacher_output=topk)
    expected = build("kl")(student(inputs), topk) + nn.functional.cross_entropy(
        student(inputs).flatten(0, 1), labels.flatten()
    )
    torch.testing.assert_close(out.loss, expected)


def test_linear_loss_rejects_what_does_not_fit():
    (ours, theirs), (student, teacher, _) = heads(), linear_case()
    topk = TopK.of(theirs(teacher), 4, temperature=T)
    with pytest.raises(ValueError, match="teacher must be a TopK where there is no teacher_head, got a tensor"):
        LinearLoss(build("kl"), ours)(student, teacher)
    with pytest.raises(ValueError, match="temperature of a TopK must be the loss's, 4.0, got 2.0"):
        LinearLoss(KLLoss(), ours)(student, topk)
    with pytest.raises(ValueError, match=r"a row for each of the student's .*\(9,\), got \(10,\)"):
        LinearLoss(build("kl"), ours)(student[:9], topk)
    with pytest.raises(TypeError, match="DKDLoss takes no TopK"):
        LinearLoss(distill.DKDLoss(), ours)(student, topk, torch.zeros(10, dtype=torch.int64))
    with pytest.raises(ValueError, match="vocab_size"):
        LinearLoss(build("kl"), ours, vocab_size=V + 1)


def test_linear_loss_caps_and_scales_the_students_logits():
    (ours, theirs), (student, teacher, _) = heads(), linear_case()
    topk = TopK.of(theirs(teacher), 4, temperature=T)
    linear = LinearLoss(build("kl"), ours, student_scale=0.5, student_softcap=2.0)
    formed = build("kl")(2.0 * torch.tanh(0.5 * ours(student) / 2.0), topk)
    value = linear(student, topk)
    torch.testing.assert_close(value, formed, rtol=1e-10, atol=1e-12)
    for found, expected in zip(gradients(value, student), gradients(formed, student), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
