"""Small runs of the CIFAR example, for the tests of its training."""

import dataclasses
import functools
import os
import signal
from pathlib import Path

import torch

from cifar import engine
from cifar.data import Dataset, load_dataset
from cifar.models import resnet
from cifar.settings import RECIPES, RunConfig
from cifar.training import train


def make_data(train: int = 300, test: int = 200) -> Dataset:
    """A data set that the whole machinery runs on in no time: random images, class 0 darker than class 1."""
    generator = torch.Generator().manual_seed(0)

    def split(count):
        labels = torch.arange(count) % 2
        noise = torch.randint(128, (count, 1, 12, 12), generator=generator)
        return (noise + 100 * labels[:, None, None, None]).to(torch.uint8), labels

    images, labels = split(train)
    return Dataset("tiny", images, labels, *split(test), 2, (0.5,), (0.3,), True, 1)


@functools.cache
def few_digits() -> Dataset:
    """The first handwritten digits, two batches of them, for what must look like the command's own data set."""
    data = load_dataset("digits", Path())
    images, labels = data.train_images[:256], data.train_labels[:256]
    tested, their_labels = data.test_images[:128], data.test_labels[:128]
    return dataclasses.replace(
        data, train_images=images, train_labels=labels, test_images=tested, test_labels=their_labels
    )


def make_config(method: str = "logit", **changes: object) -> RunConfig:
    values: dict = {
        "method": method,
        "recipe": RECIPES["pooled"],
        "dataset": "tiny",
        "student": 8,
        "epochs": 2,
        "seed": 0,
        "device": "cpu",
        "precision": "float32",
    }
    if method not in ("teacher", "baseline"):
        values |= {"teacher": 8, "weight": 1.0, "at": "fc:input"}
    return RunConfig(**values | changes)


def make_teacher(config: RunConfig, data: Dataset, seed: int = 7) -> dict[str, torch.Tensor]:
    """Weights of a teacher whose running statistics are not those of its batches."""
    model = resnet(
        config.teacher,
        data.num_classes,
        stem=config.recipe.stem,
        in_channels=1,
        generator=torch.Generator().manual_seed(seed),
    )
    model(torch.rand(64, 1, 12, 12, generator=torch.Generator().manual_seed(seed)))
    return model.state_dict()


def train_all(out: Path, precision: str) -> None:
    """A teacher of 2 epochs and its student of 4, two steps per epoch."""
    data = make_data()
    config = make_config(epochs=4, precision=precision)
    train(config.teacher_config(), data, out)
    train(config, data, out)


def train_and_die(where: str, count: int, precision: str, out: Path) -> None:
    """`train_all` in a process of its own, which gets SIGKILL at the given call."""
    calls = 0

    def dying(function):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    torch.set_num_threads(1)
    if where == "step":
        engine.train_step = dying(engine.train_step)
    else:
        os.fsync = dying(os.fsync)
    train_all(out, precision)
