"""Tests of a training run: examples/cifar/training.py and steps.py."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cifar import engine, training
from cifar.checkpoints import CheckpointError, RunFiles
from cifar.data import Dataset, normalize
from cifar.models import resnet
from cifar.progress import Overview, Progress
from cifar.report import EpochRecord, RunResult
from cifar.settings import RECIPES, TEACHER_SEED
from cifar.steps import EpochMeter, NonFiniteLossError, batches, evaluate, train_step
from cifar.training import Run, build_model, build_optimizer, build_student, build_teacher, train
from cifar_runs import make_config, make_data, make_teacher
from distill import DistillerOutput

# --- the models of a run


def test_pooled_loss_is_cross_entropy_plus_mse_of_the_pooled_features():
    data, config = make_data(), make_config(weight=3.0)
    weights = make_teacher(config, data)
    images, labels = normalize(data.train_images[:16], data.mean, data.std), data.train_labels[:16]
    student, teacher = build_student(config, data), build_teacher(config, data, weights).eval()
    seen = {}
    student.fc.register_forward_pre_hook(lambda _module, inputs: seen.update(student=inputs[0]))
    teacher.fc.register_forward_pre_hook(lambda _module, inputs: seen.update(teacher=inputs[0]))
    logits, _ = student(images), teacher(images)
    mse = ((seen["student"] - seen["teacher"]) ** 2).mean()
    output = build_model(config, data, weights)(images, labels)
    assert set(output.terms) == {"task", "logit"}
    torch.testing.assert_close(output.terms["logit"], mse.detach())
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, labels) + 3.0 * mse)


def test_logits_loss_is_cross_entropy_plus_a_tenth_of_the_mse_of_the_logits():
    data = make_data()
    config = make_config(recipe=RECIPES["logits"], at=RECIPES["logits"].at, weight=RECIPES["logits"].weight)
    weights = make_teacher(config, data)
    images, labels = normalize(data.train_images[:16], data.mean, data.std), data.train_labels[:16]
    student, teacher = build_student(config, data)(images), build_teacher(config, data, weights).eval()(images)
    output = build_model(config, data, weights)(images, labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(student, labels) + 0.1 * ((student - teacher) ** 2).mean())


def test_optimizer_holds_every_student_parameter_with_the_recipes_values():
    data = make_data()
    for recipe in RECIPES.values():
        config = make_config(recipe=recipe, at=recipe.at)
        model = build_model(config, data, make_teacher(config, data))
        (group,) = build_optimizer(model, config).param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in model.student.parameters()}
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, recipe.nesterov)


def test_baseline_and_student_of_a_seed_start_equal_and_see_the_same_batches():
    data = make_data()
    config, baseline = make_config(), make_config("baseline")
    runs = [Run(config, data, make_teacher(config, data)), Run(baseline, data, None)]
    first, second = (run.model.student.state_dict() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for _ in range(2):
        streams = [list(batches(data, 128, run.generator)) for run in runs]
        for (images, labels), (others, other_labels) in zip(*streams, strict=True):
            assert torch.equal(images, others)
            assert torch.equal(labels, other_labels)


def test_training_draws_nothing_from_the_generator_of_the_batches(tmp_path):
    data = make_data()
    config, baseline = make_config(epochs=1), make_config("baseline", epochs=1)
    runs = [Run(config, data, make_teacher(config, data)), Run(baseline, data, None)]
    for run in runs:
        overview = Overview([run.config])
        with Progress(run.config, tmp_path, done=0, tensorboard=False, overview=overview) as progress:
            run.train_epoch(progress)
    assert torch.equal(*(run.generator.get_state() for run in runs))


def test_seeds_and_teachers_start_from_different_weights_and_batches():
    data = make_data()
    runs = [Run(make_config("baseline", seed=seed), data, None) for seed in (0, 1)]
    runs.append(Run(make_config().teacher_config(), data, None))
    assert runs[-1].config.seed == TEACHER_SEED
    for get in (lambda r: r.model.student.conv1.weight, lambda r: next(batches(data, 128, r.generator))[0]):
        a, b, c = map(get, runs)
        assert not torch.equal(a, b)
        assert not torch.equal(a, c)


def test_batch_statistics_change_what_the_teacher_returns_and_nothing_else():
    data = make_data()
    plain, study = make_config(), make_config(teacher_batch_statistics=True)
    weights = make_teacher(plain, data)
    before = {name: value.clone() for name, value in weights.items()}
    images, labels = normalize(data.train_images[:32], data.mean, data.std), data.train_labels[:32]
    in_training_mode = build_teacher(plain, data, weights).train()(images)
    in_eval_mode = build_teacher(plain, data, weights).eval()(images)

    distiller = build_model(study, data, weights)
    optimizer = build_optimizer(distiller, study)
    for _ in range(2):
        output = train_step(distiller.train(), optimizer, images, labels, "float32")
        torch.testing.assert_close(output.teacher, in_training_mode)
        assert not torch.allclose(output.teacher, in_eval_mode, atol=1e-2)
    assert not any(module.training for module in distiller.teacher.modules())
    assert all("running" not in name for name, _ in distiller.teacher.named_buffers())
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert study.run_id != plain.run_id


# --- steps


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_steps_are_those_of_a_plain_loop(recipe):
    data = make_data()
    config = make_config(recipe=RECIPES[recipe], at=RECIPES[recipe].at, weight=RECIPES[recipe].weight)
    weights = make_teacher(config, data)
    run = Run(config, data, weights)
    run.model.double()  # so that only a different step can differ, and not the rounding of other kernels

    student, teacher = (resnet(8, 2, stem=config.recipe.stem, in_channels=1).double() for _ in range(2))
    student.load_state_dict(run.model.student.state_dict())
    teacher.load_state_dict(weights)
    teacher.eval()
    seen = {}
    student.fc.register_forward_pre_hook(lambda _module, inputs: seen.update(student=inputs[0]))
    teacher.fc.register_forward_pre_hook(lambda _module, inputs: seen.update(teacher=inputs[0]))
    sgd = torch.optim.SGD(
        student.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=config.recipe.nesterov
    )
    for _ in range(3):
        for images, labels in batches(data, 128, run.generator):
            images = images.double()
            train_step(run.model.train(), run.optimizer, images, labels, "float32")
            with torch.no_grad():
                theirs = teacher(images)
            ours = student(images)
            pair = (ours, theirs) if config.at is None else (seen["student"], seen["teacher"])
            loss = F.cross_entropy(ours, labels) + config.weight * F.mse_loss(*pair)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    for ours, theirs in zip(run.model.student.parameters(), student.parameters(), strict=True):
        # The teacher's batch norms were folded in float32.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_precision_is_that_of_the_activations_and_not_of_the_weights(precision, dtype):
    data, config = make_data(), make_config(precision=precision)
    run = Run(config, data, make_teacher(config, data))
    seen = []
    for model in (run.model.student, run.model.teacher):
        model.layer2.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    images, labels = next(batches(data, 128, run.generator))
    output = train_step(run.model, run.optimizer, images, labels, precision)
    assert seen == [dtype, dtype]
    kept = [output.loss, *output.terms.values(), *run.model.parameters(), *(p.grad for p in run.model.parameters())]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


def test_batches_drop_the_incomplete_one_and_show_no_image_twice():
    # Each image is one grey level, so cropping and flipping leave it recognisable.
    labels = torch.arange(200)
    images = labels.to(torch.uint8)[:, None, None, None].expand(200, 1, 12, 12).contiguous()
    data = Dataset("levels", images, labels, images, labels, 200, (0.0,), (1.0,), True, 1)
    generator = torch.Generator().manual_seed(0)
    epochs = [list(batches(data, 64, generator)) for _ in range(2)]
    for epoch in epochs:
        assert [len(labels) for _, labels in epoch] == [64, 64, 64]
        seen = torch.cat([labels for _, labels in epoch])
        assert len(seen.unique()) == 192
        levels = torch.cat([images[:, 0, 5, 5] for images, _ in epoch])
        torch.testing.assert_close(levels, seen / 255)
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])


class Fixed(nn.Module):
    """Says class 1 for bright images and class 0 for dark ones; anything else only in training mode."""

    def forward(self, images):
        bright = images.mean((1, 2, 3)) > 0
        scores = torch.stack([~bright, bright], dim=1).float()
        return -scores if self.training else scores


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_accuracy_over_whole_batches_and_over_all_images(precision):
    # 300 test images are two batches of 128 and 44 more. Wrong: 64 of the first 256, and 11 of the last 44.
    labels = torch.zeros(300, dtype=torch.int64)
    levels = torch.zeros(300, dtype=torch.uint8)
    levels[:64] = levels[-11:] = 255
    images = levels[:, None, None, None].expand(300, 1, 4, 4).contiguous()
    data = Dataset("levels", images, labels, images, labels, 2, (0.5,), (0.5,), False, 0)
    model = Fixed().train()
    assert evaluate(model, data, precision) == (75.0, 75.0)
    assert not model.training
    levels = torch.full((300,), 255, dtype=torch.uint8)
    levels[:256] = 0
    images = levels[:, None, None, None].expand(300, 1, 4, 4).contiguous()
    data = dataclasses.replace(data, test_images=images)
    assert evaluate(model, data, precision) == (100.0, pytest.approx(100 * 256 / 300))


def test_rejects_sets_that_do_not_fill_a_batch():
    with pytest.raises(ValueError, match="test set must fill one batch of 128 images, got 127 images"):
        evaluate(Fixed(), make_data(test=127), "float32")
    with pytest.raises(ValueError, match="training set must fill one batch of 128 images, got 127 images"):
        Run(make_config("baseline"), make_data(train=127), None)


def make_output(task: float, logit: float, labels: list[int]) -> DistillerOutput:
    student = F.one_hot(torch.tensor(labels), 3).float()
    terms = {"task": torch.tensor(task), "logit": torch.tensor(logit)}
    return DistillerOutput(torch.tensor(task + 2 * logit), student, None, terms)


def test_meter_gives_the_means_of_an_epoch():
    meter = EpochMeter(torch.device("cpu"))
    meter.update(make_output(1.0, 0.5, [0, 1, 2, 0]), torch.tensor([0, 1, 2, 1]))
    meter.update(make_output(3.0, 0.25, [1, 1, 1, 1]), torch.tensor([1, 1, 0, 0]))
    loss, terms, accuracy = meter.read(epoch=1)
    assert loss == pytest.approx(2.75)
    assert terms == pytest.approx({"task": 2.0, "logit": 0.375})
    assert accuracy == pytest.approx(100 * 5 / 8)


def test_meter_names_the_first_step_that_was_not_finite_however_late_it_is_asked():
    meter = EpochMeter(torch.device("cpu"))
    for task, logit in [(1.0, 1.0), (2.0, 1.0), (0.5, float("inf")), (float("nan"), 7.0), (1.0, 1.0)]:
        meter.update(make_output(task, logit, [0]), torch.tensor([0]))
    with pytest.raises(NonFiniteLossError, match=r"got inf in epoch 4, step 3 \(task 0.5, logit inf\)"):
        meter.read(epoch=4)


def test_a_run_whose_loss_is_not_finite_stops_and_keeps_the_last_whole_epoch(tmp_path, monkeypatch):
    data, config = make_data(), make_config("baseline")

    def step(model, optimizer, images, labels, precision):
        epoch_two = optimizer.param_groups[0]["lr"] < 0.1
        return train_step(model, optimizer, images * float("nan") if epoch_two else images, labels, precision)

    monkeypatch.setattr(engine, "train_step", step)
    with pytest.raises(NonFiniteLossError, match=r"got nan in epoch 2, step 1 \(task nan\)"):
        train(config, data, tmp_path)
    files = RunFiles.of(tmp_path, config)
    assert len(files.load_checkpoint(config)["history"]) == 1
    assert not files.result.exists()


# --- whole runs


def test_a_run_leaves_its_numbers_and_its_last_weights(tmp_path):
    data, config = make_data(), make_config("baseline")
    result = train(config, data, tmp_path)
    assert [record.epoch for record in result.history] == [1, 2]
    assert [record.lr for record in result.history] == pytest.approx([0.1, 0.01])
    assert (result.method, result.teacher, result.weight, result.nepoch) == ("baseline", "-", None, 2)
    assert "float32" in result.device
    files = RunFiles.of(tmp_path, config)
    assert RunResult.from_json(json.loads(files.result.read_text())) == result
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted([files.weights.name, files.result.name])
    model = resnet(8, 2, in_channels=1)
    model.load_state_dict(files.load_weights(config))
    assert evaluate(model, data, "float32") == (result.history[-1].test_acc, result.acc_last)


def test_best_and_last_accuracy_are_those_of_the_reference():
    data, config = make_data(), make_config("baseline", epochs=3)
    run = Run(config, data, None)
    run.history = [
        EpochRecord(epoch, 0.1, 1.0, {"task": 1.0}, 50.0, whole, everything, 10.0, 1.0)
        for epoch, whole, everything in [(1, 60.0, 61.0), (2, 80.0, 79.0), (3, 80.0, 81.5)]
    ]
    result = run.result()
    assert (result.acc, result.epoch, result.acc_last) == (80.0, 2, 81.5)


def test_a_finished_run_is_read_and_not_trained_again(tmp_path, monkeypatch):
    data, config = make_data(), make_config("baseline", epochs=1)
    result = train(config, data, tmp_path)
    monkeypatch.setattr(training, "Run", None)
    assert train(config, data, tmp_path) == result


def test_a_student_needs_its_teachers_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"teacher-resnet8-2epochs.pt is missing"):
        train(make_config(), make_data(), tmp_path)


def test_a_run_leaves_the_global_random_state_alone(tmp_path):
    torch.rand(3)  # so that it is not where an earlier run would leave it
    before = torch.get_rng_state()
    train(make_config("baseline", epochs=1), make_data(), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
