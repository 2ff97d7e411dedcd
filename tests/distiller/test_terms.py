"""What a term compares: sides that are functions or nothing, adapters, and what is refused."""

import copy
import io
import pickle
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from distill import Distiller, HintLoss, LogitLoss, Term, adapt
from models import Net, batch


def last(out):
    return out["states"][-1]


class Heads(nn.Module):
    """Returns a mapping: logits of two heads, and the states of two layers."""

    def __init__(self, width=8, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(6, width), nn.Linear(width, width)
        self.main, self.aux = nn.Linear(width, 5), nn.Linear(width, 3)

    def forward(self, x):
        a = self.first(x).tanh()
        b = self.second(a).tanh()
        return {"logits": self.main(b), "aux": self.aux(a), "states": (a, b)}


def test_a_side_may_be_a_function_of_what_the_model_returned():
    student, teacher = Heads(), Heads(seed=1)
    terms = {"same": Term(LogitLoss(), at=last), "pair": Term(LogitLoss(), at=(last, lambda out: out["states"][0]))}
    out = Distiller(student, teacher, terms, task_loss=None)(batch()[0])
    ours, theirs = out.student["states"], out.teacher["states"]
    torch.testing.assert_close(out.terms["same"], (ours[1] - theirs[1]).square().mean().detach())
    torch.testing.assert_close(out.terms["pair"], (ours[1] - theirs[0]).square().mean().detach())


def test_logits_in_a_mapping_are_read_like_an_attribute():
    out = Distiller(Heads(), Heads(seed=1), LogitLoss())(*batch())
    expected = (out.student["logits"] - out.teacher["logits"]).square().mean()
    torch.testing.assert_close(out.terms["distillation"], expected.detach())


class Sparsity(nn.Module):
    def forward(self, student, teacher, target=None):
        assert teacher is None
        return student.abs().mean()


def test_a_loss_of_the_student_alone_needs_no_teacher():
    out = Distiller(Net(), None, Term(Sparsity(), at=("body", None)))(*batch())
    torch.testing.assert_close(out.terms["distillation"], Net().body(batch()[0]).abs().mean().detach())
    assert out.teacher is None

    class NeverRun(Net):
        def forward(self, x):
            raise RuntimeError("run")

    Distiller(Net(), NeverRun(), Term(Sparsity(), at=("body", None)))(*batch())


def test_students_adapter_learns_trains_and_is_saved():
    student, teacher = Net(), Net(width=12, seed=1)
    adapter = nn.Linear(8, 12)
    distiller = Distiller(student, teacher, {"wide": Term(LogitLoss(), at="body", student=adapter)})
    names = {name for name, _ in distiller.named_parameters()}
    assert {"adapters.wide.0.weight", "adapters.wide.0.bias"} <= names
    assert names == set(distiller.state_dict()) - {name for name, _ in distiller.named_buffers()}
    out = distiller(*batch())
    expected = (adapter(student.body(batch()[0])) - teacher.body(batch()[0])).square().mean()
    torch.testing.assert_close(out.terms["wide"], expected.detach())
    before = copy.deepcopy(distiller.state_dict())
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    out.loss.backward()
    optimizer.step()
    assert not torch.equal(adapter.weight, before["adapters.wide.0.weight"])
    distiller.load_state_dict(before)
    assert torch.equal(adapter.weight, before["adapters.wide.0.weight"])
    assert distiller.double().adapters["wide"][0].weight.dtype == torch.float64


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_have_adapters_of_their_own(clone):
    terms = {"wide": Term(LogitLoss(), at="body", student=nn.Linear(8, 12), teacher=nn.BatchNorm1d(12, affine=False))}
    distiller = Distiller(Net(), Net(width=12, seed=1), terms).eval()
    twin = clone(distiller)
    assert twin(*batch()).loss == distiller(*batch()).loss
    with torch.no_grad():
        twin.adapters["wide"][0].weight.zero_()
    assert twin(*batch()).terms["wide"] != distiller(*batch()).terms["wide"]


def test_teachers_adapter_is_a_constant_that_follows_the_teacher():
    norm = nn.BatchNorm1d(8, affine=False)
    distiller = Distiller(Net(), Net(seed=1), Term(LogitLoss(), at="body", teacher=norm))
    assert not any("norm" in name or "adapters" in name for name in distiller.state_dict())
    distiller.train()
    before = norm.running_mean.clone()
    out = distiller(*batch())
    assert torch.equal(norm.running_mean, before)  # in eval mode
    teacher = Net(seed=1).eval()
    expected = (Net().body(batch()[0]) - norm(teacher.body(batch()[0]))).square().mean()
    torch.testing.assert_close(out.terms["distillation"], expected.detach())
    norm.train()  # behind its back
    distiller(batch()[0], batch()[1])
    assert torch.equal(norm.running_mean, before)
    distiller.double()
    assert norm.running_mean.dtype == torch.float64


def test_an_adapter_on_both_sides_has_the_mode_of_each():
    drop = nn.Dropout(0.5)
    distiller = Distiller(Net(), Net(seed=1), Term(LogitLoss(), at="body", student=drop, teacher=drop))
    assert drop.training
    seen = []
    distiller.losses["distillation"].register_forward_pre_hook(lambda _, given: seen.append(given))
    distiller.train()(*batch())
    ours, theirs = seen[0][:2]
    assert torch.equal(theirs, Net(seed=1).eval().body(batch()[0]))
    assert not torch.equal(ours, Net().body(batch()[0]))
    norm, fixed = nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3).requires_grad_(False)
    with pytest.raises(ValueError, match=r"adapter must have no buffers in common with what trains.*Sequential"):
        Distiller(Net(), Net(), Term(LogitLoss(), at="body", student=norm, teacher=nn.Sequential(norm)))
    both = Distiller(Net(), Net(seed=1), Term(LogitLoss(), at="body", student=fixed, teacher=fixed))
    nn.init.zeros_(fixed.weight)  # what is loaded into one is that of both
    assert both(*batch()).terms["distillation"] == 0


def test_rejects_a_term_without_a_gradient_in_training():
    class Detached(nn.Module):
        def forward(self, student, teacher, target=None):
            return (student.detach() - teacher).square().mean()

    for task_loss in (None, nn.CrossEntropyLoss()):
        distiller = Distiller(Net(), Net(seed=1), {"a": Detached()}, task_loss=task_loss)
        with pytest.raises(ValueError, match="term 'a' must carry a gradient in training, but it has none"):
            distiller(*batch())
        distiller.eval()(*batch())


def test_teachers_adapter_builds_no_graph():
    seen = []

    def adapter(features):
        seen.append(torch.is_grad_enabled())
        return features

    Distiller(Net(), Net(seed=1), Term(LogitLoss(), at="body", teacher=adapter))(*batch())
    assert seen == [False]


def test_adapters_take_what_no_loss_takes_apart():
    class Pair(Net):
        def forward(self, x):
            return super().forward(x), x

    terms = {
        "select": Term(LogitLoss(), at="", student=adapt.Select(0), teacher=adapt.Select(0)),
        "each": Term(Two(), at=(("body", "fc"), ("body", "fc")), student=(torch.abs, torch.neg)),
    }
    distiller = Distiller(Pair(), Pair(seed=1), terms, task_loss=None)
    out = distiller(batch()[0])
    torch.testing.assert_close(out.terms["select"], (out.student[0] - out.teacher[0]).square().mean().detach())
    ours = (out.student[0] + out.teacher[0]).square().mean()
    torch.testing.assert_close(out.terms["each"], ours.detach())


class Two(nn.Module):
    def forward(self, student, teacher, target=None):
        assert (student[0] >= 0).all()
        return (-student[1] + teacher[1]).square().mean()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"weight": torch.tensor(1.0)}, TypeError, "weight must be a number, got Tensor"),
        ({"weight": nn.Parameter(torch.ones(()))}, TypeError, "weight must be a number, got Parameter"),
        ({"weight": True}, TypeError, "weight must be a number, got bool"),
        ({"teacher": nn.Linear(2, 2)}, ValueError, r"teacher's adapter must have nothing to learn, got Linear"),
        ({"student": 3}, TypeError, "student= must be a module or function of what was tapped, got 3"),
        ({"at": "body", "student": (abs,)}, ValueError, "one for each of a tuple of paths, got 1 for 'body'"),
        ({"at": ("body", None), "teacher": abs}, ValueError, "teacher= must have something to adapt"),
        ({"copy": True}, ValueError, "copy=True must have a path to copy from, got at=None"),
        ({"at": nn.Linear(2, 2)}, ValueError, r"a side of at must have no parameters .* Linear with \['weight', 'bi"),
        ({"at": ("body", nn.BatchNorm1d(2, affine=False))}, ValueError, "a side of at must have no parameters or buff"),
        ({"at": (None, "body")}, ValueError, "at must be a path, a function .* got \\(None, 'body'\\)"),
    ],
)
def test_rejects(arguments, error, match):
    with pytest.raises(error, match=match):
        Term(LogitLoss(), **arguments)


def test_weights_may_be_numbers_that_no_tensor_takes():
    out = Distiller(Net(), Net(seed=1), Term(LogitLoss(), weight=Fraction(1, 4)), task_loss=None)(batch()[0])
    torch.testing.assert_close(out.loss, out.terms["distillation"] / 4)


def test_weights_are_plain_numbers_that_any_checkpoint_takes():
    distiller = Distiller(Net(), Net(seed=1), Term(LogitLoss(), weight=np.float64(0.5)))
    distiller.weights["task"] = np.linspace(0, 1, 3)[1]  # as a schedule gives it
    file = io.BytesIO()
    torch.save(dict(distiller.weights), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == {"distillation": 0.5, "task": 0.5}


def test_rejects_a_tensor_as_a_weight_set_later():
    distiller = Distiller(Net(), Net(seed=1), {"a": LogitLoss()})
    with pytest.raises(TypeError, match="the weight of 'a' must be a number, got Parameter"):
        distiller.weights["a"] = nn.Parameter(torch.ones(()))


def test_rejects_what_is_no_tensor_with_the_way_out():
    distiller = Distiller(Heads(), Heads(seed=1), {"a": Term(LogitLoss(), at="")}, task_loss=None)
    with pytest.raises(
        ValueError, match=r"term 'a', student side: what is compared must be a tensor.*got dict.*Select"
    ):
        distiller(batch()[0])


def test_a_hint_learns_between_widths_without_an_adapter():
    distiller = Distiller(Net(), Net(width=12, seed=1), Term(HintLoss(8, 12), at="body"))
    assert any(name.startswith("losses.distillation.regressor") for name in distiller.state_dict())


class OddError(Exception):
    """An error that is not made of a message."""

    def __init__(self, code, where):
        super().__init__(code, where)


def raising(error):
    def fails(value):
        raise error

    return fails


ERRORS = [
    IndexError("tuple index out of range"),
    KeyError("aux"),
    RuntimeError("sizes"),
    AttributeError("none"),
    OddError(3, 4),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_of_a_term_names_it_and_the_side_and_keeps_type_and_cause(error):
    class Loss(nn.Module):
        def forward(self, student, teacher, target=None):
            raise error

    fails, whole = raising(error), (lambda out: out)
    cases = {
        "term 'a', student side": (Term(LogitLoss(), at=(fails, whole)), {}),
        "term 'a', teacher side": (Term(LogitLoss(), at=(whole, fails)), {}),
        "term 'a', student side ": (Term(LogitLoss(), student=fails), {}),
        "term 'a', teacher side ": (Term(LogitLoss(), teacher=fails), {}),
        "term 'a'": (Term(Loss()), {}),
        "term 'a', teacher side  ": (Term(LogitLoss()), {"output": fails}),
        "term 'task', student side": (Term(LogitLoss()), {"task_output": fails, "task_loss": nn.CrossEntropyLoss()}),
        "term 'task'": (Term(LogitLoss()), {"task_loss": lambda output, target: fails(output)}),
    }
    for where, (term, options) in cases.items():
        distiller = Distiller(Net(), Net(seed=1), {"a": term}, **{"task_loss": None, **options})
        with pytest.raises(type(error)) as raised:
            distiller(batch()[0], batch()[1] if distiller.task_loss else None)
        if isinstance(error, OddError):
            assert raised.value is error
            assert sys.version_info < (3, 11) or where.strip() in error.__notes__
        else:
            assert str(raised.value).strip("\"'").startswith(where.strip() + ": ")
            assert raised.value.__cause__ is error
