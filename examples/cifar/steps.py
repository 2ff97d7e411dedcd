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
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, target: Tensor, precision: str
) -> DistillerOutput:
    """Take one step; nothing in it waits for the device.

    Args:
        model: A `Distiller` or a `CrossEntropy`.
        optimizer: Holds the parameters to train.
        images: Normalized images `(N, C, H, W)`.
        target: What the model takes as its target: classes `(N,)`, or more.
        precision: `"float32"`, or `"bfloat16"` for autocast.

    Returns:
        What the model returned.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        output: DistillerOutput = model(images, target)
    optimizer.zero_grad()
    output.loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    optimizer.step()
    return output


class EpochMeter:
    """Sums of an epoch, kept on the device, with the first loss that was not finite.

    Every sum is changed in place and nothing is read before `read`, so a CUDA graph can hold `update`.
    """

    def __init__(self, device: torch.device) -> None:
        """Start the first epoch.

        Args:
            device: The device to train on.
        """
        self._names: tuple[str, ...] = ()
        self._sums = self._bad = torch.zeros(2, device=device)
        self._steps, self._bad_step = torch.zeros(2, dtype=torch.int64, device=device).unbind()

    def tensors(self) -> list[Tensor]:
        """Return everything that `update` changes."""
        return [self._sums, self._bad, self._steps, self._bad_step]

    def reset(self) -> None:
        """Start a new epoch."""
        for tensor in self.tensors():
            tensor.zero_()

    def update(self, output: DistillerOutput, labels: Tensor) -> None:
        """Add a step.

        Args:
            output: What the step's model returned.
            labels: Classes of the step's images, `(N,)`.
        """
        correct = (output.student.argmax(1) == labels).sum()
        images = torch.full_like(correct, len(labels))
        values = torch.stack([output.loss.detach(), *output.terms.values(), correct, images]).float()
        if self._names != tuple(output.terms):
            self._names = tuple(output.terms)
            self._sums, self._bad = torch.zeros_like(values), torch.zeros_like(values)
        self._steps += 1
        self._sums += values
        first = (self._bad_step == 0) & ~values[0].isfinite()
        self._bad_step.copy_(torch.where(first, self._steps, self._bad_step))
        self._bad.copy_(torch.where(first, values, self._bad))

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
            loss, *terms, _, _ = self._bad.tolist()
            listed = ", ".join(f"{name} {value:g}" for name, value in zip(self._names, terms, strict=True))
            raise NonFiniteLossError(
                f"the loss must stay finite, got {loss:g} in epoch {epoch}, step {step} ({listed})"
            )
        steps = int(self._steps)
        loss, *terms, correct, images = self._sums.tolist()
        means = {name: value / steps for name, value in zip(self._names, terms, strict=True)}
        return loss / steps, means, 100 * correct / images


@torch.no_grad()
def predict(model: nn.Module, data: Dataset, precision: str) -> Tensor:
    """Predict the class of every test image.

    Args:
        model: Maps images to class logits; it is left in eval mode.
        data: The data set.
        precision: `"float32"`, or `"bfloat16"` for autocast.

    Returns:
        The classes, `(M,)`, on the data's device.
    """
    model.eval()
    device = data.test_images.device.type
    # Small batches stay in a processor's cache; a GPU would idle between them.
    size = EVAL_BATCH_SIZE if device == "cpu" else 16 * EVAL_BATCH_SIZE
    classes = []
    for first in range(0, len(data.test_images), size):
        images = data.test_images[first : first + size]
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            classes.append(model(normalize(images, data.mean, data.std)).argmax(1))
    return torch.cat(classes)


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
    whole = total - total % EVAL_BATCH_SIZE
    if whole == 0:
        raise ValueError(f"the test set must fill one batch of {EVAL_BATCH_SIZE} images, got {total} images")
    right = predict(model, data, precision) == data.test_labels
    hits, all_hits = torch.stack([right[:whole].sum(), right.sum()]).tolist()
    return 100 * hits / whole, 100 * all_hits / total


def epoch_order(data: Dataset, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Draw the order of an epoch and yield its batches as indices, without the last incomplete one.

    Args:
        data: The data set.
        batch_size: Images per batch.
        generator: Source of the order, on the data's device.

    Yields:
        Indices of training images, `(batch_size,)`.
    """
    total = len(data.train_labels)
    order = torch.randperm(total, generator=generator, device=data.train_labels.device)
    for first in range(0, total - batch_size + 1, batch_size):
        yield order[first : first + batch_size]


def load_batch(data: Dataset, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Augment and normalize a batch; nothing in it waits for the device.

    Args:
        data: The data set.
        index: Indices of training images, `(N,)`.
        generator: Source of the augmentation, on the data's device.

    Returns:
        Normalized images `(N, C, H, W)` and their classes `(N,)`.
    """
    images = augment(data.train_images[index], pad=data.pad, flip=data.flip, generator=generator)
    return normalize(images, data.mean, data.std), data.train_labels[index]


def batches(data: Dataset, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of augmented training images in a new random order, without the last incomplete batch.

    Args:
        data: The data set.
        batch_size: Images per batch.
        generator: Source of order and augmentation, on the data's device.

    Yields:
        Normalized images `(batch_size, C, H, W)` and their classes `(batch_size,)`.
    """
    for index in epoch_order(data, batch_size, generator):
        yield load_batch(data, index, generator)
