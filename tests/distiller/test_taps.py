"""Taps: what they see, and what they refuse."""

import dataclasses
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distill import Distiller, HintLoss, LogitLoss, Term
from distill._distiller.taps import parse_path
from models import Checkpointed, Net, batch
from tapping import distiller, see


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


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_rejects_paths_into_what_torch_jit_runs():
    net = Net(seed=1).eval()
    traced = torch.jit.trace(net, batch()[0])
    out = Distiller(Net(), torch.jit.script(net.body), Term(LogitLoss(), at=("body", lambda out: out)), task_loss=None)
    assert out(batch()[0]).loss > 0  # as a teacher alone it serves
    for teacher, path in ((traced, "body"), (nn.Sequential(traced), "0.body.0"), (nn.Sequential(traced), "0")):
        with pytest.raises(
            ValueError, match=f"that Python runs, but '{path}' of the teacher is in a torch.jit.ScriptMod"
        ):
            Distiller(Net(), teacher, Term(LogitLoss(), at=("body", path)))


def test_rejects_unknown_paths_of_a_model_without_submodules():
    with pytest.raises(ValueError, match="got 'fc'; the nearest are none: it has no submodules"):
        Distiller(nn.Linear(6, 5), Net(), Term(LogitLoss(), at="fc"))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rejects_a_tap_whose_module_is_gone(side):
    models = {"student": Net(), "teacher": Net(seed=1)}
    built = Distiller(*models.values(), Term(LogitLoss(), at="body.1"))
    models[side].body = models[side].body[:1]  # pruned, or wrapped by something
    with pytest.raises(ValueError, match=f"must name a module of the {side}, got 'body.1'; the nearest are 'body"):
        built(*batch())


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


class Head(nn.Module):
    """One head for five levels, called as detectors call it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return [self.head(input=x * level) for level in range(5)]


def test_numbered_calls_of_a_shared_head():
    model, (x, _) = Head(), batch()
    paths = [f"head#{level}" for level in range(5)] + ["head:input#3"]
    levels, seen = see(model, *paths)
    for level in range(5):
        assert seen[f"head#{level}"] is levels[level]
    assert torch.equal(seen["head:input#3"], x * 3)
    with pytest.raises(
        ValueError, match=r"tap 'head' must be reached once .* was reached 5 times; 'head#0' is the first"
    ):
        see(model, "head")
    with pytest.raises(
        ValueError, match=r"tap 'head#5' must be reached at least 6 times .*, but it was reached 5 times"
    ):
        see(model, "head#5")
    with pytest.raises(ValueError, match=r"tap 'unused#0' must be reached at least 1 times .*, but it was not reached"):
        see(Twice(), "unused#0")


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("a.b", ("a.b", False, None)),
        ("a:input", ("a", True, None)),
        ("a#2", ("a", False, 2)),
        ("a:input#10", ("a", True, 10)),
        (":input#0", ("", True, 0)),
        ("", ("", False, None)),
    ],
)
def test_parses_paths(path, parts):
    assert parse_path(path) == parts


@pytest.mark.parametrize("path", ["a#", "a#-1", "a#x", "a#1:input", "a#1#2", "#"])
def test_rejects_malformed_paths(path):
    with pytest.raises(ValueError, match=f"a path must be 'module', .* or 'module:input#k', got '{path}'"):
        parse_path(path)


def test_a_copy_is_what_the_module_gave_and_carries_the_gradient():
    net, (x, _) = Net(inplace=True), batch()
    plain = Net()
    _, seen = see(net, "body.1", "body.2:input", copy=True)
    expected = plain.body[1](plain.body[0](x))
    assert torch.equal(seen["body.1"], expected)
    assert torch.equal(seen["body.2:input"], expected)
    assert (expected < 0).any()
    seen["body.1"].square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(net.body[0].weight.grad, plain.body[0].weight.grad)


def test_a_change_in_place_is_found_inside_of_what_a_module_gives():
    class Pair(nn.Module):
        def forward(self, x):
            return {"first": x + 1, "rest": [x + 2]}

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            pair = self.pair(x)
            pair["rest"][0].zero_()
            return pair["first"]

    with pytest.raises(ValueError, match=r"student's tap 'pair' must not change after the tap.*copy=True keeps what"):
        see(Outer(), "pair")
    _, seen = see(Outer(), "pair", copy=True)
    assert torch.equal(seen["pair"]["rest"][0], batch()[0] + 2)


def test_inference_tensors_are_copied_since_they_count_no_changes():
    net, (x, _) = Net(inplace=True).eval(), batch()
    with torch.inference_mode():
        _, seen = see(net, "body.1")
        assert torch.equal(seen["body.1"], net.body[1](net.body[0](x)))


@dataclasses.dataclass(frozen=True)
class Frozen:
    h: torch.Tensor


@dataclasses.dataclass
class Slotted:
    __slots__ = ("h",)
    h: torch.Tensor


class Entries(dict):
    pass


class Several(list):
    pass


class Sizes(tuple):
    __slots__ = ()


OBJECTS = {
    "dataclass": (lambda h: Frozen(h), lambda out: out.h),
    "slots": (lambda h: Slotted(h), lambda out: out.h),
    "namespace": (lambda h: SimpleNamespace(deep=SimpleNamespace(h=[h])), lambda out: out.deep.h[0]),
    "dict": (lambda h: Entries(h=h), lambda out: out["h"]),
    "list": (lambda h: Several([h]), lambda out: out[0]),
    "tuple": (lambda h: Sizes([h]), lambda out: out[0]),
}


@pytest.mark.parametrize("kind", list(OBJECTS))
def test_what_an_object_holds_is_seen_like_what_a_container_holds(kind):
    build, take = OBJECTS[kind]

    class Layer(nn.Linear):
        def forward(self, x):
            return build(super().forward(x))

    class Model(nn.Module):
        def __init__(self, seed, change):
            super().__init__()
            torch.manual_seed(seed)
            self.layer, self.fc, self.change = Layer(6, 4), nn.Linear(4, 5), change

        def forward(self, x):
            out = self.layer(x)
            h = take(out)
            if self.change == "in place":
                h.relu_()
            if self.change == "later" and kind == "dict":
                out["h"] = h * 0
            if self.change == "later" and kind == "namespace":
                out.deep = None
            return self.fc(h)

    def step(change, **options):
        student, teacher = Model(0, change), Model(1, change)
        term = Term(HintLoss(), at="layer", student=take, teacher=take, **options)
        return Distiller(student, teacher, term, task_loss=None), student, teacher

    x = batch()[0]
    for change, options in (("nothing", {}), ("later", {}), ("in place", {"copy": True})):
        distiller, student, teacher = step(change, **options)
        loss = distiller(x).loss
        ours, theirs = (nn.functional.linear(x, m.layer.weight, m.layer.bias) for m in (student, teacher))
        torch.testing.assert_close(loss, nn.functional.mse_loss(ours, theirs))
        loss.backward()
        assert student.layer.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="the teacher's tap 'layer' must not change after the tap"):
        step("in place")[0](x)


def test_an_object_that_refers_to_itself_is_seen_once():
    class Node(nn.Linear):
        def forward(self, x):
            out = SimpleNamespace(h=super().forward(x))
            out.parent = out
            return out

    term = Term(HintLoss(), at="0", student=lambda out: out.parent.h, teacher=lambda out: out.h, copy=True)
    models = [nn.Sequential(Node(6, 4), nn.Identity()) for _ in range(2)]
    out = Distiller(*models, term, task_loss=None)(batch()[0])
    torch.testing.assert_close(out.loss, nn.functional.mse_loss(out.student.h, out.teacher.h))


def test_an_object_that_many_refer_to_is_looked_at_once():
    class Chain(nn.Linear):
        def forward(self, x):
            out = SimpleNamespace(h=super().forward(x))
            for _ in range(40):  # 2^40 ways to the first one
                out = SimpleNamespace(left=out, right=out, h=out.h)
            return out

    term = Term(HintLoss(), at="0", student=lambda out: out.left.right.h, teacher=lambda out: out.h, copy=True)
    models = [nn.Sequential(Chain(6, 4), nn.Identity()) for _ in range(2)]
    out = Distiller(*models, term, task_loss=None)(batch()[0])
    torch.testing.assert_close(out.loss, nn.functional.mse_loss(out.student.h, out.teacher.h))


def encoder(seed):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def test_parts_of_an_encoder_that_eval_mode_would_fuse_are_heard():
    student, teacher = encoder(0), encoder(1)
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    padded = torch.tensor([[False] * 4, [False, False, True, True]])
    terms = {"layer": Term(HintLoss(), at="layers.0"), "part": Term(HintLoss(), at="layers.1.linear2")}
    distiller = Distiller(student, teacher, terms, task_loss=None)
    out = distiller({"src": x, "src_key_padding_mask": padded}, mask=~padded)
    ours, theirs = (m.layers[0](x, src_key_padding_mask=padded) for m in (student, teacher.train()))
    torch.testing.assert_close(out.terms["layer"], nn.functional.mse_loss(ours[~padded], theirs[~padded]).detach())
    assert torch.backends.mha.get_fastpath_enabled()

    inside, go_on = threading.Event(), threading.Event()

    def wait(_module, _inputs):  # runs that overlap leave the switch as it was
        inside.set()
        go_on.wait(30)

    handle = teacher.register_forward_pre_hook(wait)
    thread = threading.Thread(target=distiller, args=({"src": x},))
    thread.start()
    inside.wait(30)
    Distiller(encoder(2), encoder(3), terms["layer"], task_loss=None)(x)
    assert not torch.backends.mha.get_fastpath_enabled()
    go_on.set()
    thread.join()
    handle.remove()
    assert torch.backends.mha.get_fastpath_enabled()
