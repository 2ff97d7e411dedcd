"""Tests of examples/cifar/models.py: the networks of the reference, checked against sizes and values derived here."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cifar.models import resnet


def count_parameters(depth: int, num_classes: int, kernel: int, in_channels: int) -> int:
    """Parameters by hand: stem, three stages of n blocks (two 3x3 convolutions each), shortcuts, batch norms, fc."""
    n = (depth - 2) // 6
    total = kernel * kernel * in_channels * 16 + 2 * 16
    width = 16
    for stage in (16, 32, 64):
        total += 9 * width * stage + 9 * stage * stage + 4 * stage + (n - 1) * (2 * 9 * stage * stage + 4 * stage)
        total += 0 if width == stage else width * stage + 2 * stage
        width = stage
    return total + 64 * num_classes + num_classes


@pytest.mark.parametrize(
    ("depth", "num_classes", "stem", "in_channels"),
    [(20, 10, "3x3", 3), (20, 10, "7x7", 3), (20, 100, "7x7", 3), (110, 10, "7x7", 3), (8, 10, "3x3", 1)],
)
def test_number_of_parameters(depth, num_classes, stem, in_channels):
    model = resnet(depth, num_classes, stem=stem, in_channels=in_channels)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(depth, num_classes, int(stem[0]), in_channels)


def test_resnet20_has_the_published_size():
    # 0.27 million (He et al., table 6): 269,722 with parameter-free shortcuts, and 2,752 for the two 1x1 shortcuts.
    assert sum(p.numel() for p in resnet(20, 10, stem="3x3").parameters()) == 269_722 + 2_752


@pytest.mark.parametrize(("stem", "sizes"), [("7x7", (28, 14, 7)), ("3x3", (32, 16, 8))])
def test_stages_have_the_sizes_of_the_recipe(stem, sizes):
    model = resnet(8, 10, stem=stem)
    seen = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda _module, _inputs, output: seen.append(tuple(output.shape)))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert seen == [(2, width, size, size) for width, size in zip((16, 32, 64), sizes, strict=True)]


def test_only_blocks_that_change_the_shape_have_a_convolution_in_the_shortcut():
    model = resnet(20, 10)
    blocks = {name: module for name, module in model.named_modules() if hasattr(module, "shortcut")}
    assert len(blocks) == 9
    for name, block in blocks.items():
        if name in ("layer2.0", "layer3.0"):
            conv, norm = block.shortcut
            assert (conv.kernel_size, conv.stride, conv.bias) == ((1, 1), (2, 2), None)
            assert isinstance(norm, torch.nn.BatchNorm2d)
        else:
            assert len(block.shortcut) == 0


def reference_forward(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """The network in functional form on its state dict, batch norms in eval mode, written from the paper's figure."""

    def norm(x: Tensor, name: str) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, shift = (state[f"{name}.{key}"][:, None, None] for key in keys)
        return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift

    x = torch.relu(norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = torch.relu(norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
            y = norm(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                x = norm(F.conv2d(x, state[f"{name}.shortcut.0.weight"], stride=2), f"{name}.shortcut.1")
            x = torch.relu(x + y)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("stem", ["7x7", "3x3"])
def test_forward_is_the_network_of_the_paper(stem):
    generator = torch.Generator().manual_seed(0)
    model = resnet(14, 10, stem=stem, generator=generator).double().eval()
    state = model.state_dict()
    for value in state.values():  # batch norms that do something
        if value.dtype == torch.float64 and value.dim() == 1:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(model(images), reference_forward(state, images, blocks=2), rtol=1e-10, atol=1e-10)


def test_the_classifier_sees_the_pooled_features():
    model = resnet(8, 10).eval()
    seen = {}
    model.layer3.register_forward_hook(lambda _module, _inputs, output: seen.update(last=output))
    model.fc.register_forward_pre_hook(lambda _module, inputs: seen.update(pooled=inputs[0]))
    model(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(seen["pooled"], seen["last"].mean((2, 3)))


def test_under_autocast_features_and_logits_stay_float32():
    model = resnet(8, 10).eval()
    seen = {}
    model.layer3.register_forward_hook(lambda _module, _inputs, output: seen.update(last=output))
    model.fc.register_forward_pre_hook(lambda _module, inputs: seen.update(pooled=inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.zeros(2, 3, 32, 32))
    assert (seen["last"].dtype, seen["pooled"].dtype, logits.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_initial_weights_are_kaiming_normal_by_fan_out_and_xavier_uniform():
    model = resnet(56, 100, generator=torch.Generator().manual_seed(0))
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == 1 + 54 + 2
    for conv in convolutions:
        count = conv.weight.numel()
        expected = math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] ** 2))
        assert conv.bias is None
        assert conv.weight.std().item() == pytest.approx(expected, rel=5 / math.sqrt(count))
        assert abs(conv.weight.mean().item()) < 5 * expected / math.sqrt(count)
    bound = math.sqrt(6 / (64 + 100))
    assert 0.98 * bound < model.fc.weight.abs().max() <= bound
    assert model.fc.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert torch.equal(model.fc.bias, torch.zeros(100))


def test_initial_weights_come_from_the_generator_alone():
    first, same, other = (resnet(8, 10, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)


@pytest.mark.parametrize("depth", [-4, 0, 2, 7, 18, 21, 111])
def test_rejects_a_depth_that_is_not_6n_plus_2(depth):
    with pytest.raises(ValueError, match=rf"6n\+2 with n >= 1 .* got {depth}"):
        resnet(depth, 10)


def test_rejects_an_unknown_stem():
    with pytest.raises(ValueError, match="stem must be one of '7x7', '3x3', got '5x5'"):
        resnet(20, 10, stem="5x5")
