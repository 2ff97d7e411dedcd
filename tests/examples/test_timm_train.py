"""The example for timm's training script, where timm is installed."""

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

import timm
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask
from timm.utils import ModelEmaV3

import timm_train
from distill import HintLoss, KLLoss, Term
from timm_train import DistillTask, ForTimm

OPTIONS = {"img_size": 32, "patch_size": 8, "num_heads": 2, "num_classes": 5}


def vit(width, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", embed_dim=width, depth=2, **OPTIONS)
        return model.requires_grad_()


def images(size=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.randint(5, (size,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_agrees_with_the_task_of_timm(temperature):
    teacher = vit(32, 1)
    x, target = images()
    ours, theirs = vit(16, 0), vit(16, 0)
    task = DistillTask(ForTimm(ours, teacher, {"kl": Term(KLLoss(temperature), weight=0.7)}, task_weight=0.3))
    with torch.random.fork_rng():
        reference = LogitDistillationTask(
            theirs, vit(32, 1), nn.CrossEntropyLoss(), task_loss_weight=0.3, temperature=temperature, verbose=False
        )
    result, expected = task(x, target), reference(x, target)
    torch.testing.assert_close(result["loss"], expected["loss"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result["kl_loss"], expected["kd_loss"].detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result["output"], expected["output"], rtol=1e-6, atol=1e-6)
    result["loss"].backward()
    expected["loss"].backward()
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-5, atol=1e-6)


def groups(optimizer, names):
    """By name, the weight decay and the scale of the learning rate."""
    known = {id(parameter): name for name, parameter in names}
    return {
        known[id(parameter)]: (group["weight_decay"], group.get("lr_scale"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_weight_decay_and_layer_decay_are_those_of_the_student_alone():
    student = vit(16, 0)
    options = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05}
    for more in ({}, {"layer_decay": 0.5}):
        alone = groups(create_optimizer_v2(student, **options, **more), student.named_parameters())
        distiller = ForTimm(student, vit(32, 1), {"hint": Term(HintLoss(16, 32), at="norm")})
        found = groups(create_optimizer_v2(distiller, **options, **more), distiller.named_parameters())
        assert found.pop("losses.hint.regressor.weight") == (0.05, 1.0 if more else None)
        assert found.pop("losses.hint.regressor.bias")[0] == 0
        assert found == {f"student.{name}": value for name, value in alone.items()}
    assert alone["cls_token"][0] == 0
    assert alone["patch_embed.proj.weight"][1] < alone["head.weight"][1] == 1


def test_the_average_and_what_is_saved_are_of_the_student_alone():
    with torch.random.fork_rng():
        task = timm_train.main(steps=4)
    student = task.trainable_module.student
    assert isinstance(task.get_trainable_module(ema=True), ModelEmaV3)
    averaged = task.get_trainable_module(ema=True).module.state_dict()
    assert averaged.keys() == student.state_dict().keys()
    assert not torch.equal(averaged["head.weight"], student.state_dict()["head.weight"])
    assert task.get_checkpoint_state()["state_dict"].keys() == student.state_dict().keys()
    clipped = list(task.get_clip_parameters())
    assert any(parameter is task.trainable_module.losses["hint"].regressor.weight for parameter in clipped)
