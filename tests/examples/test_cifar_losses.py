"""Tests of examples/cifar/losses.py: every registered loss trains the networks, where and how it says."""

import re
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.nn import functional as F

import cifar_resnet
import distill
from cifar.data import normalize
from cifar.losses import SETUPS, Networks, WarmUp, build_distiller, find_setup, make_target
from cifar.models import resnet
from cifar.settings import RECIPES
from cifar.steps import epoch_order
from cifar.training import Run, build_student, build_teacher
from cifar_results import epoch
from cifar_runs import make_config, make_data, make_teacher
from compilers import needs_compiler, one_library
from distill import create_loss, get_loss, list_losses, register_loss


def make_run(name, **changes):
    data, setup = make_data(), find_setup(name)
    usual = {option: getattr(setup, option) for option in ("weight", "at", "warmup", "task_weight")}
    config = make_config(name, teacher=14, **usual | changes)
    return Run(config, data, make_teacher(config, data))


@pytest.mark.parametrize("name", ["logit", *SETUPS])
def test_two_steps_of_every_loss(name):
    run = make_run(name, recipe=replace(RECIPES["pooled"], batch_size=32))  # two small steps
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    run.engine.start_epoch()
    for index in islice(epoch_order(run.data, 32, run.generator), 2):
        run.engine.step(index)
    loss, terms, _ = run.engine.meter.read(1)
    assert torch.tensor([loss, *terms.values()]).isfinite().all()
    assert "task" in terms
    assert all(term == "task" or term == name or term.startswith(f"{name}@") for term in terms)
    assert len(terms) == 1 + len((find_setup(name).at or "").split(","))
    # Student and learned parts of the loss alike.
    after = list(run.model.parameters())
    assert all((new != old).any() for new, old in zip(after, before, strict=True) if new.ndim > 1)


def test_setups_are_of_losses():
    assert set(SETUPS) <= set(list_losses())


@pytest.mark.parametrize("name", sorted(SETUPS))
def test_the_weight_is_one_that_was_published(name):
    text = " ".join((getattr(distill, f"{name}_loss").__doc__ + create_docs(name)).split())
    numbers = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.]*\d)", text)
    published = "published weight" in text.lower() or "published with weight" in text.lower()
    assert published, f"the docstring of {name} must say its published weight"
    if name != "linear_logit":  # that of the logit loss
        assert find_setup(name).weight in {float(number) for number in numbers}


def create_docs(name):
    return get_loss(name).__doc__


def test_losses_of_others_compare_the_class_logits_with_weight_1():
    @register_loss("halved")
    class Halved(torch.nn.Module):
        def forward(self, student, teacher, target=None):
            return ((student - teacher) ** 2).mean() / 2

    assert (find_setup("halved").weight, find_setup("halved").at) == (1.0, None)
    run = make_run("halved")
    images, labels = normalize(run.data.train_images[:16], run.data.mean, run.data.std), run.data.train_labels[:16]
    output = run.model(images, labels)
    torch.testing.assert_close(output.terms["halved"], ((output.student - output.teacher) ** 2).mean().detach() / 2)


def test_terms_of_several_places_are_added_with_their_weights_and_shares():
    data, config = make_data(), make_config("ofd", teacher=14, at=SETUPS["ofd"].at, weight=2.0)
    networks = Networks(build_student(config, data), build_teacher(config, data, make_teacher(config, data)), data)
    distiller = build_distiller("ofd", config.at, 2.0, networks)
    assert dict(distiller.weights) == {
        "ofd@relu1:input": 0.5,
        "ofd@relu2:input": 1.0,
        "ofd@relu3:input": 2.0,
        "task": 1.0,
    }
    images, labels = normalize(data.train_images[:16], data.mean, data.std), data.train_labels[:16]
    output = distiller(images, labels)
    expected = sum(distiller.weights[name] * value for name, value in output.terms.items())
    torch.testing.assert_close(output.loss.detach(), expected)
    with pytest.raises(ValueError, match="ofd needs 3 places, got relu1:input"):
        build_distiller("ofd", "relu1:input", 1.0, networks)


def test_places_inside_the_stages_are_terms_too():
    data, config = make_data(), make_config("at", at="layer1.0,layer2.0")
    networks = Networks(build_student(config, data), build_teacher(config, data, make_teacher(config, data)), data)
    assert list(build_distiller("at", config.at, 2.0, networks).losses) == ["at@layer1/0", "at@layer2/0"]


def test_a_loss_comes_in_over_the_steps_of_its_warm_up():
    loss = WarmUp(create_loss("logit"), 4)
    teacher = torch.zeros(2, 3)
    student = torch.ones(2, 3, requires_grad=True)
    values = [loss(student, teacher).item() for _ in range(6)]
    assert values == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    loss.forwards.zero_()
    loss(student, teacher).backward()
    assert student.grad.flatten().tolist() == pytest.approx([0.25 * 2 / 6] * 6)
    assert loss.eval()(student, teacher).item() == 0.25  # an evaluation is no step
    assert loss.forwards.item() == 1


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.torch.jit")  # inductor's own imports
@needs_compiler
def test_a_compiled_warm_up_has_the_gradient_of_its_step():
    # Whose backward pass may compute the share again, when the count has gone on.
    loss = WarmUp(create_loss("logit"), 4)
    compiled = torch.compile(loss)
    with one_library():
        for step in range(1, 3):
            student = torch.ones(2, 3, requires_grad=True)
            compiled(student, torch.zeros(2, 3)).backward()
            assert student.grad.flatten().tolist() == pytest.approx([step / 4 * 2 / 6] * 6)


def test_a_run_warms_up_over_its_share_and_goes_on_where_it_was():
    run = make_run("dkd", epochs=24)  # of two steps each
    loss = run.model.losses["dkd"]
    assert (loss.steps, loss.loss.beta) == (4, 2.0)  # 20 of 240 epochs
    run.engine.start_epoch()
    for index in epoch_order(run.data, 128, run.generator):
        run.engine.step(index)
    other = make_run("dkd", epochs=24)
    other.load_state({**run.state(), "history": [epoch(1, 50.0).to_json()]})
    assert other.model.losses["dkd"].forwards.item() == 2
    assert run.config.label == "dkd+warm-up"
    assert make_run("dkd", warmup=None).config.label == "dkd"
    assert not isinstance(make_run("dkd", warmup=None).model.losses["dkd"], WarmUp)


def test_kl_stands_beside_the_published_share_of_the_cross_entropy():
    run = make_run("kl")
    assert run.config.label == "kl+task0.1"
    images = normalize(run.data.train_images[:16], run.data.mean, run.data.std)
    output = run.model(images, run.data.train_labels[:16])
    expected = 0.1 * F.cross_entropy(output.student, run.data.train_labels[:16]) + 0.9 * output.terms["kl"]
    torch.testing.assert_close(output.loss, expected)
    assert make_run("kl", task_weight=None).model.weights["task"] == 1


def test_crd_gets_the_places_in_the_training_set_and_the_task_loss_the_labels():
    run = make_run("crd")
    labels, index = run.data.train_labels[100:116], torch.arange(100, 116)
    images = normalize(run.data.train_images[100:116], run.data.mean, run.data.std)
    target = make_target(labels, index, indices=True)
    memory = run.model.losses["crd"].student_memory
    before = memory.clone()
    output = run.model(images, target)
    torch.testing.assert_close(output.terms["task"], F.cross_entropy(output.student, labels).detach())
    assert (memory != before).any(1).nonzero().flatten().tolist() == list(range(100, 116))
    assert make_target(labels, index, indices=False) is labels


def test_the_ends_of_the_stages_have_names_that_do_not_depend_on_the_depth():
    shapes = {}
    for depth in (8, 20):
        model, seen = resnet(depth, 10, stem="3x3"), []
        for name in ("relu1", "relu2", "relu3"):
            model.get_submodule(name).register_forward_hook(
                lambda _m, inputs, output, seen=seen: seen.append((inputs[0], output))
            )
        model(torch.rand(2, 3, 32, 32))
        assert all(torch.equal(output, before.relu()) for before, output in seen)  # the input was not changed
        assert all((before < 0).any() for before, _ in seen)
        shapes[depth] = [tuple(output.shape[1:]) for _, output in seen]
        assert "relu1" not in "".join(model.state_dict())
    assert shapes[8] == shapes[20] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_the_command_takes_the_setup_and_lets_it_be_changed():
    def plan(*options):
        return cifar_resnet.plan(cifar_resnet.parse_arguments(options)[1])[-1]

    assert (plan("--loss", "at").weight, plan("--loss", "at").at) == (1000.0, "relu1,relu2,relu3")
    assert (plan("--loss", "dkd").weight, plan("--loss", "dkd").at) == (1.0, None)
    assert [plan("--loss", name).warmup for name in ("dkd", "review", "kl")] == [20 / 240, 20 / 240, None]
    assert (plan("--loss", "dkd", "--warmup", "0").warmup, plan("--warmup", "0.5").warmup) == (None, 0.5)
    assert [plan("--loss", name).task_weight for name in ("kl", "at", "logit")] == [0.1, None, None]
    assert (plan("--loss", "kl", "--task-weight", "1").task_weight, plan("--task-weight", "2").task_weight) == (None, 2)
    assert (
        plan("--loss", "at", "--weight", "2", "--at", "relu3").weight,
        plan("--loss", "at", "--at", "relu3").at,
    ) == (
        2.0,
        "relu3",
    )
    assert (plan("--loss", "kl", "--recipe", "logits").weight, plan("--recipe", "logits").weight) == (0.9, 0.1)
    assert create_loss("kl").temperature == 4.0
    assert RECIPES["pooled"].weight == 1.0
