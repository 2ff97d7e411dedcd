"""One step, one epoch's batches and sums, and the evaluation: what every run does, with a teacher or without."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifar.data import Dataset, augment, normalize
from distill import DistillerOutput

EVAL_BATCH_SIZE = 128  # the reference's `acc` counts only the test images that fill batches of this size


class NonFiniteLossError(Exception):
    """The training loss became infinite or NaN."""


class CrossEntropy(nn.Module):
    """A network trained without a teacher, called like a `Distiller`, so that there is one training loop."""

    def __init__(self, student: nn.Module) -> None:
        """Hold the network.

        Args:
            student: Maps images to class logits.
        """
        super().__init__()
        self.student = student

    def forward(self, images: Tensor, labels: Tensor) -> DistillerOutput:
        """Run the network and compare its logits with the labels."""
        logits = self.student(images)
        loss = F.cross_entropy(logits, labels)
        return DistillerOutput(loss=loss, student=logits, teacher=None, terms={"task": loss.detach()})


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, precision: str
) -> DistillerOutput:
    """Take one step; nothing in it waits for the device.

    Args:
        model: A `Distiller` or a `CrossEntropy`.
        optimizer: Holds the parameters to train.
        images: Normalized images `(N, C, H, W)`.
        labels: Classes `(N,)`.
        precision: `"float32"`, or `"bfloat16"` for autocast.

    Returns:
        What the model returned.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        output: DistillerOutput = model(images, labels)
    optimizer.zero_grad()
    output.loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    optimizer.step()
    return output


class EpochMeter:
    """Sums of an epoch, kept on the device, with the first loss that was not finite."""

    def __init__(self, device: torch.device) -> None:
        """Start an epoch.

        Args:
            device: The device to train on.
        """
        self.steps = 0
        self.images = 0
        self._names: tuple[str, ...] = ()
        self._sums = self._bad = torch.zeros(0, device=device)
        self._bad_step = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, output: DistillerOutput, labels: Tensor) -> None:
        """Add a step.

        Args:
            output: What the step's model returned.
            labels: Classes of the step's images, `(N,)`.
        """
        correct = (output.student.argmax(1) == labels).sum()
        values = torch.stack([output.loss.detach(), *output.terms.values(), correct]).float()
        if self.steps == 0:
            self._names = tuple(output.terms)
            self._sums = self._bad = torch.zeros_like(values)
        self.steps += 1
        self.images += len(labels)
        self._sums = self._sums + values
        first = (self._bad_step == 0) & ~values[0].isfinite()
        self._bad_step = torch.where(first, self.steps, self._bad_step)
        self._bad = torch.where(first, values, self._bad)

    def read(self, epoch: int) -> tuple[float, dict[str, float], float]:
        """Wait for the device and return the means so far.

        Args:
            epoch: Number of the epoch, for the error.

        Returns:
            Loss, unweighted terms by name, and training accuracy in %.

        Raises:
            NonFiniteLossError: If the loss of a step was infinite or NaN; names the first such step and its terms.
        """
        if step := int(self._bad_step):
            loss, *terms, _ = self._bad.tolist()
            listed = ", ".join(f"{name} {value:g}" for name, value in zip(self._names, terms, strict=True))
            raise NonFiniteLossError(
                f"the loss must stay finite, got {loss:g} in epoch {epoch}, step {step} ({listed})"
            )
        loss, *terms, correct = self._sums.tolist()
        means = {name: value / self.steps for name, value in zip(self._names, terms, strict=True)}
        return loss / self.steps, means, 100 * correct / self.images


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, precision: str) -> tuple[float, float]:
    """Measure the test accuracy.

    Args:
        model: Maps images to class logits; it is left in eval mode.
        data: The data set.
        precision: `"float32"`, or `"bfloat16"` for autocast.

    Returns:
        Accuracy in % over the images that fill whole batches of 128 (the reference's `acc`), and over all images.

    Raises:
        ValueError: If the test images do not fill one batch.
    """
    total = len(data.test_labels)
    whole = total // EVAL_BATCH_SIZE
    if whole == 0:
        raise ValueError(f"the test set must fill one batch of {EVAL_BATCH_SIZE} images, got {total} images")
    model.eval()
    hits = []
    for first in range(0, total, EVAL_BATCH_SIZE):
        images = data.test_images[first : first + EVAL_BATCH_SIZE]
        labels = data.test_labels[first : first + EVAL_BATCH_SIZE]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(normalize(images, data.mean, data.std))
        hits.append((logits.argmax(1) == labels).sum())
    correct = torch.stack(hits).tolist()
    return 100 * sum(correct[:whole]) / (whole * EVAL_BATCH_SIZE), 100 * sum(correct) / total


def batches(data: Dataset, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of augmented training images in a new random order, without the last incomplete batch.

    Args:
        data: The data set.
        batch_size: Images per batch.
        generator: Source of order and augmentation, on the data's device.

    Yields:
        Normalized images `(batch_size, C, H, W)` and their classes `(batch_size,)`.
    """
    total = len(data.train_labels)
    order = torch.randperm(total, generator=generator, device=data.train_labels.device)
    for first in range(0, total - batch_size + 1, batch_size):
        index = order[first : first + batch_size]
        images = augment(data.train_images[index], pad=data.pad, flip=data.flip, generator=generator)
        yield normalize(images, data.mean, data.std), data.train_labels[index]
