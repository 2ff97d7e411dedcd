"""A ResNet teaches a small one that sees fewer pictures: the student taught against the same student alone.

python examples/image_classifier.py   # handwritten digits; or yours: --pictures FOLDER, a subfolder for each class
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # scikit-learn ships no types
from torch import Tensor, nn

from distill import Distiller, KLLoss


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        first = nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        self.body = nn.Sequential(*first, nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.shortcut = nn.Conv2d(channels, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, width, H / stride, W / stride)."""
        return torch.relu(self.body(x) + self.shortcut(x))


def load(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Pictures (N, C, H, W) and labels (N,), in a random order that is always the same."""
    if folder is None:
        digits = load_digits()
        pictures, labels = torch.from_numpy(digits.images).float().unsqueeze(1), torch.from_numpy(digits.target)
    else:
        files = sorted(file for file in folder.glob("[!.]*/[!.]*") if file.is_file())
        if len({file.parent for file in files}) < 2:
            raise SystemExit(f"{folder} must have a subfolder of pictures for each class, two or more")
        opened = [np.array(Image.open(file).convert("RGB").resize((32, 32)), np.float32) for file in files]
        pictures = torch.from_numpy(np.stack(opened)).movedim(-1, 1).contiguous()
        labels = torch.tensor(np.unique([file.parent.name for file in files], return_inverse=True)[1])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return ((pictures - pictures.mean()) / pictures.std())[order], labels[order]


def fit(width: int, classes: int, x: Tensor, y: Tensor, seed: int, epochs: int, teacher: nn.Module | None) -> nn.Module:
    """Train a ResNet of three blocks: alone, or with a teacher."""
    torch.manual_seed(seed)
    blocks = Block(x.shape[1], width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))
    distiller = Distiller(model, teacher, {} if teacher is None else KLLoss(temperature=4.0))  # + cross-entropy
    steps = [part for _ in range(epochs) for part in torch.split(torch.randperm(len(y)), 64)]
    optimizer = torch.optim.AdamW(distiller.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=len(steps))
    for part in steps:
        optimizer.zero_grad()
        distiller(x[part], y[part]).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()


def main(arguments: list[str] | None = None) -> None:
    """Train a teacher, and of each seed a student alone and one with the teacher; say how many each gets right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="a folder with a subfolder for each class; default: the digits")
    x, y = load(parser.parse_args(arguments).pictures)
    classes, held, few = int(y.max()) + 1, len(y) // 4, slice(len(y) // 4, len(y) // 4 + 200)  # a quarter: to measure
    teacher = fit(16, classes, x[held:], y[held:], seed=99, epochs=10, teacher=None)
    alone = [fit(4, classes, x[few], y[few], seed, epochs=30, teacher=None) for seed in range(5)]
    taught = [fit(4, classes, x[few], y[few], seed, epochs=30, teacher=teacher) for seed in range(5)]
    for name, models in {"teacher": [teacher], "students alone": alone, "students taught": taught}.items():
        right = [100 * float((model(x[:held]).argmax(1) == y[:held]).float().mean()) for model in models]
        print(f"{name}: {mean(right):.1f}% right", f"(+- {stdev(right):.1f}, {len(right)} seeds)" if right[1:] else "")


if __name__ == "__main__":
    main()
