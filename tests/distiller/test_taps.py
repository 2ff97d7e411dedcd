"""Taps: what they see, what they refuse, and that they leave no trace."""

import copy
import pickle

import pytest
import torch
from torch import nn

from distill import Distiller, LogitLoss, Term
from distill._distiller.taps import Tap, run_with_taps
from models import Checkpointed, Net, batch


def see(model, *paths, inputs=None, copy=False):
    x = batch()[0] if inputs is None else inputs
    result, seen = run_with_taps(model, [Tap(path, copy) for path in paths], lambda: model(x), side="student")
    return result, {tap.path: value for tap, value in seen.items()}


def distiller(student=None, at="fc:input", **options):
    return Distiller(student or Net(), Net(seed=1), Term(LogitLoss(), at=at), **options)


class Twice(nn.Module):
    """Runs one module twice and another never."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)

    def forward(self, x):
        return self.shared(self.shared(x))


def test_sees_outputs_and_first_inputs():
    net, (x, _) = Net().eval(), batch()
    result, seen = see(net, "fc:input", "fc", "body.0", "body", ":input", "")
    assert torch.equal(result, net(x))
    assert torch.equal(seen["fc:input"], net.body(x))
    assert torch.equal(seen["body"], net.body(x))
    assert torch.equal(seen["fc"], net(x))
    assert torch.equal(seen[""], net(x))
    assert torch.equal(seen["body.0"], net.body[0](x))
    assert torch.equal(seen[":input"], x)


def test_first_input_may_be_a_keyword():
    class Keyword(Net):
        def forward(self, x):
            return self.fc(input=self.body(x))

    net = Keyword().eval()
    _, seen = see(net, "fc:input")
    assert torch.equal(seen["fc:input"], net.body(batch()[0]))


def test_tables_of_hooks_say_the_same_as_stand_ins(monkeypatch):
    # Only traced code takes this way, where coverage sees nothing: here it runs in the open.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    net, (x, _), calls = Net().eval(), batch(), []
    kept = net.fc.register_forward_hook(lambda module, args, output: calls.append(1))
    _, seen = see(net, "fc:input", "fc", "body.0:input", "body.2")
    assert torch.equal(seen["fc:input"], seen["body.2"])
    assert torch.equal(seen["fc"], net(x))
    assert torch.equal(seen["body.0:input"], x)
    kept.remove()
    net.fc.register_forward_hook(lambda module, args, output: calls.append(2)).remove()
    net(x)
    assert calls == [1, 1]
    assert not any(module._forward_hooks or module._forward_hooks_with_kwargs for module in net.modules())


def test_an_instance_forward_of_the_users_is_kept():
    net, (x, _) = Net().eval(), batch()
    net.fc.forward = lambda h: 2 * nn.functional.linear(h, net.fc.weight, net.fc.bias)
    patched = net.fc.forward
    result, seen = see(net, "fc")
    assert torch.equal(result, net(x))
    assert torch.equal(seen["fc"], result)
    assert net.fc.forward is patched


def test_leaves_no_trace_even_when_the_forward_fails():
    net = Net()
    before = {name: dict(module.__dict__) for name, module in net.named_modules()}
    see(net, "fc:input", "fc", "body.0")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        see(net, "fc:input", "body.0", inputs=torch.ones(4, 7))
    assert {name: dict(module.__dict__) for name, module in net.named_modules()} == before


def test_student_copies_pickles_and_exports_as_if_never_wrapped():
    student, (x, y) = Net(), batch()
    expected = copy.deepcopy(student)
    distiller(student, at=("body.2", "body.2"))(x, y).loss.backward()
    expected(x)  # moves the running statistics alike
    student.eval(), expected.eval()
    for twin in (student, copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert torch.equal(twin(x), expected(x))
    program = torch.export.export(student, (x,))
    torch.testing.assert_close(program.module()(x), expected(x))
    assert list(student.state_dict()) == list(expected.state_dict())


def test_recomputation_by_activation_checkpointing_is_not_heard():
    student, (x, y) = Checkpointed(use_reentrant=False), batch()
    plain = Net()
    tapped = distiller(student, at="body.0")(x, y)
    tapped.loss.backward()
    distiller(plain, at="body.0")(x, y).loss.backward()
    for ours, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_rejects_a_tap_without_gradient_in_training_only():
    wrapped, (x, y) = distiller(Checkpointed(use_reentrant=True), at="body.0"), batch()
    x.requires_grad_()  # reentrant checkpointing wants an input with a gradient
    with pytest.raises(ValueError, match=r"student's tap 'body.0' must carry a gradient in training.*use_reentrant=Fa"):
        wrapped(x, y)
    with torch.no_grad():
        wrapped(x, y)
    wrapped.eval()(x, y)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("fcc:input", r"module of the student, got 'fcc'; the nearest are 'fc'"),
        ("body.9", r"module of the student, got 'body.9'; the nearest are 'body.\d'"),
        (("fc", "fcc"), r"module of the teacher, got 'fcc'; the nearest are 'fc'"),
        ("zzzzzz", r"module of the student, got 'zzzzzz'; the nearest are 'body', 'fc'"),
        ("fc:output", r"module of the student, got 'fc:output'"),
    ],
)
def test_rejects_unknown_paths_at_construction(at, message):
    with pytest.raises(ValueError, match=message):
        distiller(at=at)


def test_rejects_unknown_paths_of_a_model_without_submodules():
    with pytest.raises(ValueError, match="got 'fc'; the nearest are none: it has no submodules"):
        Distiller(nn.Linear(6, 5), Net(), Term(LogitLoss(), at="fc"))


def test_rejects_taps_not_reached_or_reached_twice():
    with pytest.raises(
        ValueError, match="student's tap 'unused' must be reached once in a forward, but it was not rea"
    ):
        see(Twice(), "unused")
    with pytest.raises(
        ValueError, match=r"tap 'shared:input' must be reached once .* but it was reached 2 times; 'shared:input#0' is"
    ):
        see(Twice(), "shared:input")


def test_sees_whatever_a_module_is_given_and_gives():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 5)
            self.scale = type("Scale", (nn.Module,), {"forward": lambda self: 1.0})()

        def forward(self, x):
            return self.lstm(x)[0] * self.scale()

    _, seen = see(Outer(), "lstm", "scale:input", "scale")
    assert isinstance(seen["lstm"], tuple)
    assert seen["scale:input"] is None
    assert seen["scale"] == 1.0


def test_rejects_a_tensor_changed_in_place_after_the_tap():
    with pytest.raises(ValueError, match=r"student's tap 'body.1' must not change after the tap.*inplace=True"):
        see(Net(inplace=True), "body.1")
    see(Net(inplace=True), "body.2")
    with torch.inference_mode():  # inference tensors count no versions
        see(Net(inplace=True), "body.2")
