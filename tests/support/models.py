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


def batch(size: int = 4, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (N, 6) and labels (N,) of 5 classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator), torch.randint(5, (size,), generator=generator)
