"""The Distiller's arithmetic, its calls and what it refuses."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill import CrossEntropyLoss, Distiller, KLLoss, LogitLoss, Term, kl_loss, logit_loss
from models import Hint, Net, WithLogits, batch


class Pairs(nn.Module):
    """A loss of tuples of tensors, for the whole batch: no mask."""

    def forward(self, student, teacher, target=None):
        return sum(F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True))


def pair():
    return Net(), Net(seed=1)


def test_total_is_cross_entropy_plus_logit_loss():
    student, teacher = pair()
    inputs, target = batch()
    out = Distiller(student, teacher, LogitLoss())(inputs, target)
    expected = F.cross_entropy(out.student, target) + F.mse_loss(out.student, teacher(inputs))
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.terms["task"], F.cross_entropy(out.student, target))
    torch.testing.assert_close(out.terms["distillation"], F.mse_loss(out.student, out.teacher))
    assert list(out.terms) == ["task", "distillation"]
    assert out.loss.requires_grad
    assert not any(term.requires_grad for term in out.terms.values())
    assert not out.teacher.requires_grad


def test_gradients_are_those_of_the_hand_written_step():
    student, teacher = pair()
    by_hand = Net()
    inputs, target = batch()
    distiller = Distiller(student, teacher, {"soft": Term(KLLoss(), weight=0.9)}, task_weight=0.1)
    distiller(inputs, target).loss.backward()
    with torch.no_grad():
        soft = teacher(inputs)
    logits = by_hand(inputs)
    (0.1 * F.cross_entropy(logits, target) + 0.9 * kl_loss(logits, soft).mean()).backward()
    for ours, theirs in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_weights_count_and_can_be_changed_between_steps():
    distiller = Distiller(*pair(), {"a": LogitLoss(), "b": Term(KLLoss(), weight=0.5)}, task_weight=2.0)
    assert dict(distiller.weights) == {"a": 1.0, "b": 0.5, "task": 2.0}
    for weights in ({}, {"b": 3.0, "task": 0.0}, {"a": 0.0}):
        distiller.weights.update(weights)
        out = distiller(*batch())
        assert sorted(out.terms) == sorted(name for name, weight in distiller.weights.items() if weight != 0)
        total = sum(distiller.weights[name] * term for name, term in out.terms.items())
        torch.testing.assert_close(out.loss.detach(), total)


def test_taps_feed_their_terms():
    student, teacher = Net(width=8), Net(width=12, seed=1)
    hint = Hint(8, 12)
    losses = {
        "hint": Term(hint, at=("body.0", "body.0")),
        "logits": LogitLoss(),
        "pair": Term(Pairs(), at=(("fc", ""), ("fc", ""))),
    }
    inputs, target = batch()
    distiller = Distiller(student, teacher, losses)
    out = distiller(inputs, target)
    expected = F.mse_loss(hint.regressor(student.body[0](inputs)), teacher.body[0](inputs))
    torch.testing.assert_close(out.terms["hint"], expected.detach())
    torch.testing.assert_close(out.terms["logits"], F.mse_loss(out.student, out.teacher))
    torch.testing.assert_close(out.terms["pair"], 2 * out.terms["logits"])
    out.loss.backward()
    assert hint.regressor.weight.grad.abs().max() > 0
    assert student.body[0].weight.grad.abs().max() > 0


def test_trains_without_labels():
    distiller = Distiller(*pair(), LogitLoss(), task_loss=None)
    out = distiller(batch()[0])
    assert list(out.terms) == ["distillation"]
    assert dict(distiller.weights) == {"distillation": 1.0}
    torch.testing.assert_close(out.loss, out.terms["distillation"])


def test_task_loss_alone_and_of_ones_own():
    inputs, target = batch()
    smooth = Distiller(*pair(), {}, task_loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    out = smooth(inputs, target)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.student, target, label_smoothing=0.1))
    out = Distiller(*pair(), {}, task_loss=F.cross_entropy)(inputs, target)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.student, target))


def test_losses_get_the_target():
    class Keeps(LogitLoss):
        def forward(self, student, teacher, target=None, *, mask=None):
            self.target = target
            return super().forward(student, teacher)

    inputs, target = batch()
    loss = Keeps()
    Distiller(*pair(), loss)(inputs, target)
    assert loss.target is target


def test_mask_reaches_every_term_that_takes_one():
    student, teacher = pair()
    mask = torch.tensor([True, False, True, False])
    distiller = Distiller(
        student, teacher, {"a": LogitLoss(), "b": KLLoss(), "whole": Term(Pairs(), at=(("fc",), ("fc",)))}
    )
    with pytest.raises(ValueError, match=r"\['whole'\] take none; mask=\{'a': mask\} gives it to 'a' alone"):
        distiller(*batch(), mask=mask)
    out = distiller(*batch(), mask={"a": mask, "b": mask, "task": mask})
    torch.testing.assert_close(out.terms["a"], logit_loss(out.student, out.teacher)[mask].mean().detach())
    torch.testing.assert_close(out.terms["b"], kl_loss(out.student, out.teacher)[mask].mean().detach())
    torch.testing.assert_close(out.terms["whole"], F.mse_loss(out.student, out.teacher).detach())
    expected = F.cross_entropy(out.student[mask], batch()[1][mask]).detach()
    torch.testing.assert_close(out.terms["task"], expected)


def test_inputs_may_be_a_tensor_a_tuple_a_mapping_or_anything_else():
    class Sum(Net):
        def forward(self, x, y=0):
            return super().forward(x[0] if isinstance(x, (list, Point)) else x + y)

    Point = namedtuple("Point", "left right")
    (x, target), y = batch(), torch.ones(4, 6)
    distiller = Distiller(Sum(), Sum(seed=1), LogitLoss()).eval()
    plain, shifted = distiller(x, target).student, distiller(x + y, target).student
    assert torch.equal(distiller((x,), target).student, plain)
    assert torch.equal(distiller((x, y), target).student, shifted)
    assert torch.equal(distiller({"y": y, "x": x}, target).student, shifted)
    assert torch.equal(distiller([x, y], target).student, plain)
    assert torch.equal(distiller(Point(x, y), target).student, plain)
    assert torch.equal(distiller(x, target).teacher, distiller({"x": x}, target).teacher)


def test_outputs_with_logits_are_read_and_returned_as_they_are():
    inputs, target = batch()
    out = Distiller(WithLogits(), Net(seed=1), LogitLoss())(inputs, target)
    assert isinstance(out.student, SimpleNamespace)
    torch.testing.assert_close(out.terms["distillation"], F.mse_loss(out.student.logits, out.teacher).detach())


def test_output_finds_the_tensor():
    class Dict(Net):
        def forward(self, x):
            return {"scores": super().forward(x)}

    inputs, target = batch()
    out = Distiller(Dict(), Dict(seed=1), LogitLoss(), output=lambda result: result["scores"])(inputs, target)
    torch.testing.assert_close(out.terms["task"], F.cross_entropy(out.student["scores"], target))
    tapped = Distiller(Dict(), Dict(seed=1), Term(LogitLoss(), at="fc"), task_loss=None)
    assert tapped(inputs).loss > 0  # nobody asks for the outputs


def test_teacher_inputs_and_teacher_output():
    inputs, target = batch()
    others, _ = batch(seed=1)
    student, teacher = pair()
    distiller = Distiller(student, teacher, LogitLoss()).eval()
    seen = distiller(inputs, target, teacher_inputs=others)
    assert torch.equal(seen.teacher, teacher(others))
    assert torch.equal(seen.student, student(inputs))

    def forbidden(x):
        raise AssertionError("the teacher ran")

    teacher.forward = forbidden
    given = distiller(inputs, target, teacher_output=seen.teacher)
    assert torch.equal(given.loss, seen.loss)
    wanted = seen.teacher.clone().requires_grad_()
    distiller(inputs, target, teacher_output=SimpleNamespace(logits=wanted)).loss.backward()
    assert wanted.grad is None


def test_teacher_output_is_a_constant_even_to_losses_that_do_not_detach_it():
    class Squared(nn.Module):
        def forward(self, student, teacher, target=None):
            return (student - teacher).square().mean()

    wanted = torch.ones(4, 5, requires_grad=True)
    Distiller(*pair(), Squared())(*batch(), teacher_output=wanted).loss.backward()
    assert wanted.grad is None


def test_student_as_wrapped_runs_in_place_of_the_bare_one():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, x):
            self.calls += 1
            return self.module(x)

    student, teacher = pair()
    wrapped = Wrapper(student)
    distiller = Distiller(student, teacher, Term(LogitLoss(), at="fc:input")).eval()
    out = distiller(*batch(), student=wrapped)
    assert wrapped.calls == 1
    assert torch.equal(out.loss, distiller(*batch()).loss)


def test_validates_under_no_grad_and_inference_mode():
    distiller = Distiller(*pair(), Term(LogitLoss(), at="fc:input")).eval()
    expected = distiller(*batch()).loss
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(distiller(*batch()).loss, expected)


def test_repr_names_the_teacher_and_the_weights():
    text = repr(Distiller(*pair(), LogitLoss()))
    assert "teacher=Net, weights={'distillation': 1.0, 'task': 1.0}" in text
    assert "(student): Net(" in text
    assert "(distillation): LogitLoss(reduction='mean', dim=-1)" in text
    assert repr(Distiller(*pair(), LogitLoss()).weights) == "{'distillation': 1.0, 'task': 1.0}"


# What it refuses.


def test_rejects_a_missing_target():
    distiller = Distiller(*pair(), LogitLoss())
    for mode in (True, False):  # to leave the task out would be another loss, silently
        with pytest.raises(ValueError, match=r"needs a target, got None; .*weights\['task'\] = 0 switches it off"):
            distiller.train(mode)(batch()[0])
    distiller.weights["task"] = 0.0
    out = distiller(batch()[0])
    assert torch.equal(out.loss, out.terms["distillation"])


def test_rejects_a_mask_that_no_term_takes():
    distiller = Distiller(*pair(), Term(Pairs(), at=(("fc",), ("fc",))), task_loss=None)
    with pytest.raises(ValueError, match=r"\['distillation'\] take none; no term takes one"):
        distiller(*batch(), mask=torch.ones(4))


def test_rejects_teacher_inputs_with_teacher_output():
    distiller = Distiller(*pair(), LogitLoss())
    with pytest.raises(ValueError, match="teacher_inputs or teacher_output must be given, got both"):
        distiller(*batch(), teacher_inputs=batch()[0], teacher_output=torch.zeros(4, 5))


def test_rejects_teacher_output_where_the_teacher_is_tapped():
    distiller = Distiller(*pair(), Term(LogitLoss(), at="fc:input"))
    with pytest.raises(ValueError, match=r"the teacher's taps \['fc:input'\] must see something.*TeacherOutput"):
        distiller(*batch(), teacher_output=torch.zeros(4, 5))


def test_rejects_outputs_without_a_tensor():
    class Tuple(Net):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match=r"output must be a tensor or have .logits, got tuple; output= takes a functi"):
        Distiller(Tuple(), Net(seed=1), LogitLoss())(*batch())
    with pytest.raises(ValueError, match="output= must give a tensor, got tuple"):
        Distiller(Tuple(), Tuple(seed=1), LogitLoss(), output=lambda result: result)(*batch())


def test_rejects_terms_that_are_no_scalars():
    with pytest.raises(ValueError, match=r"term 'a' must be a scalar tensor .* got shape \(4,\)"):
        Distiller(*pair(), {"a": LogitLoss(reduction="none")})(*batch())
    with pytest.raises(ValueError, match=r"term 'task' must be a scalar tensor .* got shape \(4,\)"):
        Distiller(*pair(), {}, task_loss=nn.CrossEntropyLoss(reduction="none"))(*batch())
    with pytest.raises(ValueError, match="term 'task' must be a scalar tensor .* real, got torch.complex64"):
        Distiller(*pair(), {}, task_loss=lambda output, target: torch.fft.fft(output).sum())(*batch())
    with pytest.raises(ValueError, match="term 'task' must be a scalar tensor .* got float"):
        Distiller(*pair(), {}, task_loss=lambda output, target: 1.0)(*batch())


def test_names_the_term_whose_loss_refuses_its_inputs():
    distiller = Distiller(Net(width=8), Net(width=12), {"good": LogitLoss(), "bad": Term(LogitLoss(), at="fc:input")})
    with pytest.raises(ValueError, match=r"term 'bad': student and teacher must have the same shape.*\(4, 8\) and \(4"):
        distiller(*batch())


@pytest.mark.parametrize("name", ["task", "", "a.b", "keys", "type", 3])
def test_rejects_bad_names_of_terms(name):
    with pytest.raises(ValueError, match=f"a term's name must be .* got {name!r}"):
        Distiller(*pair(), {name: LogitLoss()})


@pytest.mark.parametrize("losses", [None, [LogitLoss()], logit_loss])
def test_rejects_what_is_no_loss_term_or_dict(losses):
    with pytest.raises(ValueError, match="losses must be a loss, a Term or a dict of them, got "):
        Distiller(*pair(), losses)


def test_rejects_having_no_loss_at_all():
    with pytest.raises(ValueError, match="needs a loss, got task_loss=None and no terms"):
        Distiller(*pair(), {}, task_loss=None)


def test_rejects_a_task_weight_without_task():
    with pytest.raises(ValueError, match=r"task_weight needs a task_loss, got task_weight=0\.5 and task_loss=None"):
        Distiller(*pair(), LogitLoss(), task_loss=None, task_weight=0.5)


@pytest.mark.parametrize("task_loss", [nn.CrossEntropyLoss, "ce"])
def test_rejects_a_task_loss_that_cannot_be_called(task_loss):
    with pytest.raises(ValueError, match="task_loss must be a module or function called as task_loss"):
        Distiller(*pair(), LogitLoss(), task_loss=task_loss)


def test_a_task_loss_may_be_replaced_by_one_that_is_called_otherwise():
    distiller, mask = Distiller(Net(), Net(seed=1), LogitLoss()), torch.tensor([True, False] * 8)
    inputs, labels = batch()
    mask = mask[: len(labels)]
    distiller.task_loss = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"\['task'\] take none"):
        distiller(inputs, labels, mask=mask)
    distiller.task_loss = CrossEntropyLoss()
    out = distiller(inputs, labels, mask=mask)
    torch.testing.assert_close(out.losses["task"], F.cross_entropy(out.student[mask], labels[mask]))
    with pytest.raises(
        AttributeError, match=r"distiller.weights\['task'\] = 0 switches it off, got None where there is"
    ):
        distiller.task_loss = None
    with pytest.raises(ValueError, match="task_loss must be a module or function called as"):
        distiller.task_loss = nn.BatchNorm1d
    without = Distiller(Net(), Net(seed=1), LogitLoss(), task_loss=None)
    with pytest.raises(AttributeError, match="a task loss or none from the start: .* where task_loss=None was built"):
        without.task_loss = CrossEntropyLoss()


def test_rejects_an_output_that_is_no_function():
    with pytest.raises(ValueError, match="output must be a function of what a model returns, got 'logits'"):
        Distiller(*pair(), LogitLoss(), output="logits")


def test_rejects_losses_called_otherwise():
    with pytest.raises(
        ValueError, match=r"callable as loss\(student, teacher, target\), got MSELoss\(input: .*target: "
    ):
        Distiller(*pair(), nn.MSELoss())
    with pytest.raises(ValueError, match="a loss must be an nn.Module, got <function kl_loss"):
        Term(kl_loss)


@pytest.mark.parametrize("at", [3, ["a", "b"], ("a", "b", "c"), ("a",), ("a", ()), ("a", ("b", 3)), (None, "a")])
def test_rejects_malformed_at(at):
    with pytest.raises(ValueError, match="at must be a path, a function of what a model returned, or a pair .*, got "):
        Term(LogitLoss(), at=at)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_rejects_weights_that_are_not_finite(weight):
    with pytest.raises(ValueError, match=f"weight must be finite, got {weight}"):
        Term(LogitLoss(), weight=weight)
    with pytest.raises(ValueError, match=f"the weight of 'task' must be finite, got {weight}"):
        Distiller(*pair(), LogitLoss(), task_weight=weight)
    distiller = Distiller(*pair(), LogitLoss())
    with pytest.raises(ValueError, match=f"the weight of 'distillation' must be finite, got {weight}"):
        distiller.weights["distillation"] = weight
    assert distiller.weights["distillation"] == 1.0


def test_rejects_weights_of_unknown_terms_and_removal():
    weights = Distiller(*pair(), {"hint": LogitLoss()}).weights
    with pytest.raises(KeyError, match=r"one of the terms \['hint', 'task'\], got 'hnit'"):
        weights["hnit"] = 1.0
    with pytest.raises(KeyError, match="got 'hnit'; a Distiller has those that it was built with"):
        weights["hnit"]
    assert "hnit" not in weights
    assert weights.get("hnit", 2.0) == 2.0
    later = Distiller(*pair(), LogitLoss())
    later.losses["more"] = LogitLoss()
    with pytest.raises(KeyError, match="got 'more'; a Distiller has those that it was built with"):
        later(*batch())
    with pytest.raises(ValueError, match="fixed; set the weight of 'hint' to 0 instead"):
        del weights["hint"]
    assert len(weights) == 2
