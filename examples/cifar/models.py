"""The ResNets of the CIFAR experiments: depth 6n+2, stages of 16, 32 and 64 channels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

Stem = Literal["7x7", "3x3"]

WIDTHS = (16, 32, 64)
STEMS: dict[str, int] = {"7x7": 7, "3x3": 3}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution with batch norm where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, last: bool = False) -> None:
        """Build the block.

        Args:
            in_channels: Channels of the input.
            channels: Channels of the output.
            stride: Stride of the first convolution, and of the shortcut.
            last: Whether the block ends a stage: its last ReLU then leaves its input as it is, for losses that look
                there.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu = nn.ReLU(inplace=not last)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, channels, ceil(H / stride), ceil(W / stride))`."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        activated: Tensor = self.relu(out)
        return activated


class ResNet(nn.Module):
    """ResNet for small images (He et al., 2016, section 4.2) with 1x1-convolution shortcuts.

    The input of `fc` is the average-pooled feature, `(N, 64)`: a `Term(..., at="fc:input")` regresses it. The stages
    end with `relu1`, `relu2` and `relu3`, whatever the depth: their outputs are the stages' maps, their inputs the same
    before the ReLU.
    """

    def __init__(self, depth: int, num_classes: int, *, stem: Stem = "7x7", in_channels: int = 3) -> None:
        """Build the network; see `resnet`."""
        super().__init__()
        kernel = STEMS[stem]
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, WIDTHS[0], kernel, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks, stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks, stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks, stride=2)
        self.relu1, self.relu2, self.relu3 = (stage[-1].relu for stage in (self.layer1, self.layer2, self.layer3))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDTHS[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(N, in_channels, H, W)` to class logits `(N, num_classes)`."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.layer3(self.layer2(self.layer1(out)))
        # Features and logits are what losses compare: under autocast the head stays in the precision of its weights.
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.fc(self.avgpool(out.to(self.fc.weight.dtype)).flatten(1))
        return logits


def resnet(
    depth: int,
    num_classes: int,
    *,
    stem: Stem = "7x7",
    in_channels: int = 3,
    generator: torch.Generator | None = None,
) -> ResNet:
    """Build a CIFAR ResNet with the initial weights of the reference.

    Convolutions are Kaiming-normal (fan-out, ReLU), the classifier is Xavier-uniform with zero bias.

    Args:
        depth: 20, 32, 44, 56, 110 or any other 6n+2.
        num_classes: Width of the logits.
        stem: `"7x7"` (stride 1, padding 1: a 32-pixel image gives stages of 28, 14 and 7 pixels) or `"3x3"`
            (padding 1: 32, 16 and 8 pixels).
        in_channels: Channels of the images.
        generator: Source of the initial weights; by default PyTorch's global one.

    Returns:
        The network, in training mode, on the CPU. Modules: `conv1`, `bn1`, `layer1` to `layer3`, `avgpool`, `fc`.

    Raises:
        ValueError: If the depth is not 6n+2 with n >= 1, or the stem is unknown.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth must be 6n+2 with n >= 1 (8, 14, 20, ..., 110), got {depth}")
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(map(repr, STEMS))}, got {stem!r}")
    model = ResNet(depth, num_classes, stem=stem, in_channels=in_channels)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    nn.init.xavier_uniform_(model.fc.weight, generator=generator)
    nn.init.zeros_(model.fc.bias)
    return model


def fold_batch_norms(model: ResNet) -> None:
    """Fold each batch norm into the convolution before it, as its running statistics allow in eval mode.

    The network computes the same in fewer passes over its activations. A folded batch norm stays in its place as an
    identity, so the modules keep their paths; what a convolution returns is now what its batch norm returned.

    Args:
        model: A network that is trained no more; put in eval mode and changed in place.
    """
    model.eval()
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock)]
    pairs: list[tuple[nn.Module, str, str]] = [(model, "conv1", "bn1")]
    for block in blocks:
        pairs += [(block, "conv1", "bn1"), (block, "conv2", "bn2")]
        pairs += [(block.shortcut, "0", "1")] if len(block.shortcut) else []
    for parent, convolution, batch_norm in pairs:
        fused = fuse_conv_bn_eval(getattr(parent, convolution), getattr(parent, batch_norm))
        setattr(parent, convolution, fused)
        setattr(parent, batch_norm, nn.Identity().eval())


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Chain basic blocks; the first one changes channels and size."""
    widths = [in_channels, *[channels] * (blocks - 1)]
    return nn.Sequential(
        *(
            BasicBlock(width, channels, 1 if number else stride, last=number == blocks - 1)
            for number, width in enumerate(widths)
        )
    )
