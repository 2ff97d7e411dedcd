"""Tests of the engine: it takes the steps of a plain loop, and a capture takes none."""

import copy
import dataclasses
import functools
import types
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F

from cifar import engine as module
from cifar.engine import Engine, find_mode
from cifar.models import fold_batch_norms
from cifar.settings import RECIPES
from cifar.steps import batches, epoch_order, load_batch
from cifar.training import Run, build_teacher
from cifar_results import epoch
from cifar_runs import make_config, make_data, make_teacher

CPU = torch.device("cpu")
BATCH = 16  # images per step, where the recipes have 128


def make_run(method="logit", mode="eager", recipe="pooled", **changes):
    data = make_data(2 * BATCH + 5, 128).to(torch.device(changes.get("device", "cpu")))
    recipe = dataclasses.replace(RECIPES[recipe], batch_size=BATCH)
    places = {} if method == "baseline" else {"at": recipe.at, "weight": recipe.weight}
    config = make_config(method, recipe=recipe, **places, **changes)
    weights = None if config.teacher is None else make_teacher(config, data)
    return Run(config, data, weights, mode=mode)


def in_float64(data, index, generator):
    images, labels = load_batch(data, index, generator)
    return images.double(), labels


def take_steps(run, steps, lr=None):
    """Trains for a number of steps, two of which make an epoch; gives the mean loss of each epoch."""
    losses = []
    while steps > 0:
        run.engine.start_epoch()
        for index in epoch_order(run.data, run.config.recipe.batch_size, run.generator):
            if lr is not None:
                run.optimizer.param_groups[0]["lr"] = lr(steps)
            run.engine.step(index)
            steps -= 1
        losses.append(run.engine.meter.read(1)[0])
    return losses


def plain_loop(run, epochs, *, memory_format=torch.contiguous_format, **options):
    """The loop as people write it: hooks, no autocast, one loss; on the run's batches and with its (folded) teacher."""
    config, dtype = run.config, run.model.student.fc.weight.dtype
    student = copy.deepcopy(run.model.student).to(memory_format=memory_format)
    teacher = copy.deepcopy(run.model.teacher).to(memory_format=memory_format)
    seen = {}
    student.fc.register_forward_pre_hook(lambda _module, inputs: seen.update(student=inputs[0]))
    teacher.fc.register_forward_pre_hook(lambda _module, inputs: seen.update(teacher=inputs[0]))
    nesterov = config.recipe.nesterov
    sgd = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=nesterov, **options)
    generator, losses = torch.Generator().manual_seed(2 * config.seed + 1), []
    for _ in range(epochs):
        total = []
        for images, labels in batches(run.data, BATCH, generator):
            images = images.to(dtype, memory_format=memory_format)
            with torch.no_grad():
                theirs = teacher(images)
            ours = student(images)
            pair = (ours, theirs) if config.at is None else (seen["student"], seen["teacher"])
            loss = F.cross_entropy(ours, labels) + config.weight * F.mse_loss(*pair)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            total.append(loss.detach().item())
        losses.append(sum(total) / len(total))
    return student, losses


def relative(ours, theirs):
    """Difference of two networks over all their parameters, as a share of their length."""
    ours, theirs = (torch.cat([p.detach().double().flatten() for p in side.parameters()]) for side in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm())


# A network with batch norms and ReLUs multiplies a rounding error by about 1e4 in 20 steps at the recipe's learning
# rate: two plain float32 loops that differ in memory format alone end 1e-3 apart. So the steps are compared in float64,
# whatever the kernels, and in float32 against a loop that uses the same kernels.


@pytest.mark.parametrize(("recipe", "mode"), [("pooled", "eager"), ("logits", "eager"), ("pooled", "compile")])
def test_after_20_steps_in_float64_the_parameters_are_those_of_a_plain_loop(recipe, mode, monkeypatch):
    # Only traced: what PyTorch's own backend makes of a Distiller is shown in tests/distiller, on smaller networks.
    from torch._dynamo.testing import CompileCounter  # which takes long to import

    graphs = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    run = make_run(recipe=recipe, mode=mode)
    run.model.double()
    monkeypatch.setattr(module, "load_batch", in_float64)
    student, expected = plain_loop(run, epochs=10)
    assert take_steps(run, 20) == pytest.approx(expected, rel=1e-6)
    assert graphs.frame_count == (mode == "compile")
    assert relative(run.model.student, student) < 1e-8
    for name, buffer in student.named_buffers():
        torch.testing.assert_close(run.model.student.get_buffer(name), buffer, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_after_4_steps_in_float32_the_parameters_are_those_of_a_plain_loop(recipe):
    run = make_run(recipe=recipe)
    student, expected = plain_loop(run, epochs=2, memory_format=torch.channels_last, fused=True)
    assert take_steps(run, 4) == pytest.approx(expected, rel=1e-5)
    assert relative(run.model.student, student) < 1e-5


def test_in_bfloat16_the_losses_stay_within_a_tenth_of_the_plain_loops():
    run = make_run(precision="bfloat16")
    _, expected = plain_loop(run, epochs=2)
    losses = take_steps(run, 4)
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.1)


class FakeGraph:
    """Stands in for a CUDA graph where there is none: it runs the engine's step at each replay."""

    made: ClassVar[list] = []

    def __init__(self):
        self.generators, self.replays = [], 0
        FakeGraph.made.append(self)

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def replay(self):
        self.replays += 1
        self.engine._take()


@pytest.fixture
def graphs(monkeypatch):
    """Lets the CPU play a CUDA device: a capture records that the step was called, and changes nothing."""
    FakeGraph.made = []

    class Stream:
        def __init__(self, _device=None):
            pass

        def wait_stream(self, _other):
            pass

    @contextmanager
    def inside(*_):
        yield

    @contextmanager
    def capture(graph):
        taken = []
        original = Engine._take
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_take", lambda engine: taken.append(engine))
            yield
        (graph.engine,) = taken
        assert Engine._take is original

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return FakeGraph.made


@pytest.mark.parametrize("method", ["baseline", "logit"])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_capture_warms_up_and_leaves_no_trace(graphs, method, recipe):
    plain, captured = make_run(method, recipe=recipe), make_run(method, recipe=recipe)
    captured.engine._captures = True
    assert take_steps(captured, 4) == take_steps(plain, 4)
    assert [graph.replays for graph in graphs] == [4]
    assert graphs[0].generators == [captured.generator]
    ours, theirs = captured.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(captured.generator.get_state(), plain.generator.get_state())
    buffers = [[s["momentum_buffer"] for s in run.optimizer.state.values()] for run in (captured, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))


def test_a_new_learning_rate_is_captured_anew_in_mid_course(graphs):
    def lr(steps_left):
        return 0.1 if steps_left > 2 else 0.01

    plain, captured = make_run(), make_run()
    captured.engine._captures = True
    assert take_steps(captured, 4, lr) == take_steps(plain, 4, lr)
    assert [graph.replays for graph in graphs] == [2, 2]
    assert all(torch.equal(*pair) for pair in zip(captured.model.parameters(), plain.model.parameters(), strict=True))


def test_a_captured_run_goes_on_from_a_state(graphs):
    plain, captured = make_run(), make_run()
    captured.engine._captures = True
    losses = take_steps(plain, 4)
    take_steps(captured, 2)
    resumed = make_run()
    resumed.engine._captures = True
    resumed.load_state({**captured.state(), "history": [epoch(1, 50.0).to_json()]})
    assert take_steps(resumed, 2) == losses[1:]
    assert all(torch.equal(*pair) for pair in zip(resumed.model.parameters(), plain.model.parameters(), strict=True))


def test_a_step_that_no_graph_can_hold_is_refused_with_the_reason(graphs, monkeypatch):
    run = make_run()
    run.engine._captures = True

    @contextmanager
    def refuse(_graph):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.raises(
        ValueError, match=r"fit for a CUDA graph, .* got: operation not permitted .* capturing; --engine"
    ):
        take_steps(run, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_on_a_gpu_the_graph_takes_the_steps_of_the_eager_engine(recipe):
    runs = [make_run(mode=mode, recipe=recipe, device="cuda") for mode in ("eager", "graph")]
    losses = [take_steps(run, 20) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # TF32, and sums in another order
    assert relative(*(run.model.student for run in runs)) < 1e-2


def test_a_folded_teacher_says_the_same_and_keeps_its_paths():
    data, config = make_data(), make_config(teacher=14)
    weights = make_teacher(config, data)
    plain, folded = (build_teacher(config, data, weights).eval() for _ in range(2))
    fold_batch_norms(folded)
    images = torch.rand(16, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(folded(images), plain(images), rtol=1e-5, atol=1e-5)
    assert [name for name, _ in folded.named_modules()] == [name for name, _ in plain.named_modules()]
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d) or m.training]


@pytest.mark.parametrize(
    ("at", "changes", "folded"),
    [
        ("fc:input", {}, True),
        (None, {}, True),
        ("layer2.0.bn2:input", {}, False),
        ("layer2.0.conv1", {}, False),
        ("bn1:input", {}, False),
        ("layer3", {}, True),
        ("fc:input", {"teacher_batch_statistics": True}, False),
    ],
)
def test_a_teacher_is_folded_only_where_nobody_can_tell(at, changes, folded):
    data, config = make_data(), make_config(at=at, **changes)
    run = Run(config, data, make_teacher(config, data))
    kept = [m for m in run.model.teacher.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert (not kept) == folded
    assert not any(p.requires_grad for p in run.model.teacher.parameters())
    images = torch.rand(32, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    if not changes:
        # What is compared is what an unfolded teacher has there.
        unfolded = build_teacher(dataclasses.replace(config), data, make_teacher(config, data)).eval()
        torch.testing.assert_close(run.model.eval()(images, torch.zeros(32).long()).teacher, unfolded(images))


def test_modes():
    assert find_mode("auto", CPU) == "eager"
    assert find_mode("auto", torch.device("cuda")) == "graph"
    assert find_mode("compile", CPU) == "compile"
    with pytest.raises(ValueError, match="a graph needs a CUDA device, got cpu"):
        find_mode("graph", CPU)
    with pytest.raises(ValueError, match="must be one of eager, graph, compile, got 'fast'"):
        find_mode("fast", CPU)
    assert make_run().engine._captures is False
    assert module.WARM_UP >= 1


def test_a_process_keeps_what_it_frees_where_the_c_library_can(monkeypatch):
    calls = []
    mallopt = types.SimpleNamespace(mallopt=lambda name, value: calls.append((name, value)))
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: mallopt)
    monkeypatch.setattr(module.sys, "platform", "linux")
    module.keep_freed_memory()
    # In this order: either call ends the growth of the first threshold, which starts at 128 KiB.
    assert calls == [(-3, 32 << 20), (-1, -1)]
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: object())  # another C library
    module.keep_freed_memory()
    monkeypatch.setattr(module.sys, "platform", "darwin")
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: pytest.fail("must not be asked"))
    module.keep_freed_memory()
    assert len(calls) == 2
