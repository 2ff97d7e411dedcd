"""How modules are heard: whatever interrupts, copies, compiles or shares a model, nothing stays on it."""

import copy
import io
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

from distill._distiller import stand_ins, taps
from distill._distiller.taps import Tap, run_with_taps
from models import Checkpointed, Net, batch
from tapping import distiller, see


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


def dicts(model):
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


def interrupt_at(number):
    """A trace function that raises at the step of this number in the taps' own code, and the list of these steps."""
    files, steps = {taps.__file__, stand_ins.__file__}, []

    def trace(frame, event, _):
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            steps.append(frame.f_lineno)
            if len(steps) == number:
                raise KeyboardInterrupt
        return trace

    return trace, steps


def run_interrupted(number, model, x):
    trace, steps = interrupt_at(number)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        see(model, "fc:input", "fc", "body.0", inputs=x)
    finally:
        sys.settrace(before)
    return len(steps)


def test_an_interrupt_at_any_step_leaves_no_trace():
    net, (x, _) = Net().eval(), batch()
    net.fc.forward = lambda h: nn.functional.linear(h, net.fc.weight, net.fc.bias)  # body.0 has that of its class
    before, expected = dicts(net), net(x)
    steps = run_interrupted(0, net, x)
    assert steps > 500
    for number in range(1, steps + 1):
        with pytest.raises(KeyboardInterrupt) as interrupt:
            run_interrupted(number, net, x)
        assert dicts(net) == before, f"step {number} of {steps}, while the traceback lives"
        del interrupt
        assert not stand_ins._PLACES, number
        assert not stand_ins._HERE.listeners, number
    assert torch.equal(net(x), expected)
    assert torch.equal(see(net, "fc")[1]["fc"], expected)


def test_threads_with_one_model_hear_their_own_forward_only():
    class Slow(Net):
        def forward(self, x):
            barrier.wait(timeout=60)
            return self.fc(self.body(x))

    barrier, net, seen = threading.Barrier(4), Slow().eval(), {}
    inputs = [batch(seed=seed)[0] for seed in range(4)]

    def listen(number):
        for _ in range(20):
            seen[number] = see(net, "body.0:input", "fc", inputs=inputs[number])[1]
            assert torch.equal(seen[number]["body.0:input"], inputs[number])

    def pass_by():
        for _ in range(20):
            net(inputs[3])

    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(listen, number) for number in range(3)] + [pool.submit(pass_by)]
        for future in work:
            future.result()
    assert sorted(seen) == [0, 1, 2]
    assert all("forward" not in module.__dict__ for module in net.modules())


@pytest.mark.parametrize("own", [False, True], ids=["class", "instance"])
def test_copies_and_pickles_taken_inside_a_forward_carry_nothing(own):
    twins = []

    class Copied(Net):
        def forward(self, x):
            h = self.body(x)
            twins.extend((copy.copy(self.fc), copy.deepcopy(self.fc), pickle.loads(pickle.dumps(self.fc))))
            buffer = io.BytesIO()
            torch.save(self.fc, buffer)
            twins.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False))
            return self.fc(h)

    net = Copied().eval()
    if own:
        net.fc.forward = partial(nn.functional.relu, inplace=False)
    expected = net.fc(torch.ones(2, 8))
    names = [type(name) for name in net.fc.__dict__]
    see(net, "fc:input", "fc", "")
    assert len(twins) == 4
    for twin in twins:
        assert list(twin.__dict__) == list(net.fc.__dict__)
        assert [type(name) for name in twin.__dict__] == names
        assert twin.training is False
        assert torch.equal(twin(torch.ones(2, 8)), expected)


def test_copies_taken_inside_a_forward_have_the_state_that_the_user_says():
    class Scaled(nn.Linear):
        none = None

        def __getstate__(self):
            return {**self.__dict__, "scale": 3, "none": None}

    class Odd(nn.Linear):
        def __getstate__(self):
            return "no dictionary", self.training

        def __setstate__(self, state):
            self.__dict__["state"] = state

    class Copied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Scaled(6, 5), Scaled(6, 5), Odd(6, 5)])

        def forward(self, x):
            twins.extend(map(copy.copy, self.layers))
            return sum(layer(x) for layer in self.layers)

    twins, net = [], Copied()
    net.layers[1].__getstate__ = own = lambda: {**net.layers[1].__dict__, "scale": 4}
    see(net, "layers.0", "layers.1", "layers.2")
    by_class, by_instance, odd = twins
    assert (by_class.scale, by_class.none, by_instance.scale) == (3, None, 4)
    assert odd.__dict__ == {"state": ("no dictionary", True)}
    assert net.layers[1].__dict__["__getstate__"] is by_instance.__dict__["__getstate__"] is own
    for twin in (by_class, by_instance):
        assert "forward" not in twin.__dict__
        _, seen = see(twin, "")  # a copy is heard as itself
        assert torch.equal(seen[""], twin(batch()[0]))


@pytest.mark.parametrize("forward", [torch.relu, staticmethod(torch.nn.functional.relu)], ids=["builtin", "static"])
def test_hears_a_forward_that_is_no_method(forward):
    model = type("Relu", (nn.Module,), {"forward": forward})()
    result, seen = see(model, "", ":input")
    assert torch.equal(result, batch()[0].relu())
    assert seen[""] is result
    assert torch.equal(seen[":input"], batch()[0])


def test_a_model_compiled_into_one_graph_before_is_heard_without_compiling_anew():
    torch.compiler.reset()
    net, (x, _) = Net(inplace=True).eval(), batch()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    compiled = torch.compile(net, backend=backend, fullgraph=True)
    taps = [Tap("body.1"), Tap("fc:input"), Tap("fc#0")]
    for seed in range(4):
        x = batch(seed=seed)[0]
        result, seen = run_with_taps(net, taps, lambda x=x: compiled(x), side="student")
        torch.testing.assert_close(seen[taps[0]], net.body[1](net.body[0](x)))
        torch.testing.assert_close(seen[taps[1]], net.body(x))
        torch.testing.assert_close(seen[taps[2]], result)
        torch.testing.assert_close(compiled(x), net(x))
    assert len(compilations) == 2  # with taps and without


def test_runs_inside_each_other_hear_what_they_listen_to():
    net, inner = Net().eval(), []

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            result, seen = see(self.net, "fc")
            inner.append(seen["fc"])
            return result

    _, seen = see(Outer(), "net.fc")
    assert seen["net.fc"] is inner[0]
    assert "forward" not in net.fc.__dict__


def test_a_bare_forward_after_the_call_is_not_heard_and_keeps_nothing_alive():
    net, (x, _) = Net().eval(), batch()
    alive = weakref.ref(see(net, "fc")[1]["fc"])
    net(x)
    assert alive() is None


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
