"""Small models for the tests."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill import logit_loss


class Net(nn.Module):
    """Linear, batch norm, ReLU, linear: (N, 6) -> (N, 5), with 8 features inside."""

    def __init__(self, *, width: int = 8, seed: int = 0, inplace: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(inplace=inplace))
        self.fc = nn.Linear(width, 5)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


class Checkpointed(Net):
    """The same, with activation checkpointing around the body."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(checkpoint(self.body, x, use_reentrant=self.use_reentrant))


class WithLogits(Net):
    """Returns what Hugging Face models return: an object with `.logits`."""

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=super().forward(x), hidden=x)


class Hint(nn.Module):
    """A loss with a weight of its own."""

    def __init__(self, student_width, teacher_width):
        super().__init__()
        self.regressor = nn.Linear(student_width, teacher_width)

    def forward(self, student, teacher, target=None, *, mask=None):
        return logit_loss(self.regressor(student), teacher).mean()


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut; one ReLU, in place, is called twice, and the sum is in place too."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """As torchvision's, small: images (N, 3, H, W), four stages of one or two blocks, `fc`."""

    def __init__(self, *, width: int = 4, blocks: int = 1, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.relu = nn.ReLU(inplace=True)
            for stage in range(4):
                channels = width * 2 ** max(stage - 1, 0)
                out = width * 2**stage
                first = BasicBlock(channels, out, 1 if stage == 0 else 2)
                rest = (BasicBlock(out, out, 1) for _ in range(blocks - 1))
                setattr(self, f"layer{stage + 1}", nn.Sequential(first, *rest))
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(width * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def images(size: int = 4, *, side: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (N, 3, side, side) and labels (N,) of 5 classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, side, side, generator=generator), torch.randint(5, (size,), generator=generator)


def batch(size: int = 4, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (N, 6) and labels (N,) of 5 classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator), torch.randint(5, (size,), generator=generator)
