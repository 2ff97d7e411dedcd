"""Weights for losses from their share of the gradient, to be given to `--weight`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from cifar.checkpoints import RunFiles
from cifar.data import Dataset
from cifar.losses import find_setup, make_target
from cifar.settings import RunConfig, find_usual
from cifar.steps import epoch_order, load_batch
from cifar.training import build_distilled
from distill import calibrate

BATCHES = 10


def describe_weights(students: Sequence[RunConfig], out: Path, datasets: Mapping[str, Dataset], share: float) -> str:
    """Measure the weight of each loss and say how to use them.

    Args:
        students: The settings of one student for each loss.
        out: Folder in which the trained teacher lies.
        datasets: The data sets by name.
        share: Of the gradient, for the loss; the cross-entropy has the rest.

    Returns:
        A few lines: a table, and the options of a command that trains with these weights.

    Raises:
        ValueError: If a gradient is 0 or not finite.
    """
    teacher = students[0].teacher_config()
    teacher_weights = RunFiles.of(out, teacher).load_weights(teacher)
    lines = [
        f"Weights with which a loss has {share:g} of the gradient and the cross-entropy the rest: "
        f"seed {students[0].seed}, untrained student, {BATCHES} batches.",
        f"{'loss':<18}{'default':>12}{'calibrated':>12}",
    ]
    found = []
    for config in students:
        found.append(f"{calibrated_weight(config, datasets[config.dataset], teacher_weights, share):.3g}")
        lines.append(f"{config.method:<18}{config.weight:>12g}{found[-1]:>12}")
    names = ",".join(config.method for config in students)
    return "\n".join([*lines, f"--loss {names} --weight {','.join(found)}{_unusual(students[0])}"])


def _unusual(config: RunConfig) -> str:
    """The options that the weight of a loss goes with, where they are not the usual ones; only one loss has them."""
    usual = find_usual(config.method, config.recipe).at, find_setup(config.method).task_weight or 1.0
    given = {"at": config.at or "logits", "task-weight": f"{config.task_weight or 1.0:g}"}
    defaults = {"at": usual[0] or "logits", "task-weight": f"{usual[1]:g}"}
    return "".join(f" --{option} {value}" for option, value in given.items() if value != defaults[option])


def calibrated_weight(config: RunConfig, data: Dataset, teacher_weights: dict[str, Tensor], share: float) -> float:
    """Return the weight with which a run's loss starts with a share of the gradient.

    Args:
        config: The run's settings, whose loss is one term; of a warm-up the weight after it.
        data: The data set.
        teacher_weights: State dict of the trained teacher.
        share: Of the gradient, for the loss.

    Returns:
        The weight.

    Raises:
        ValueError: If a gradient is 0 or not finite.
    """
    device = data.train_images.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(2 * config.seed)  # as a run draws the weights that a loss learns
        model = build_distilled(dataclasses.replace(config, warmup=None), data, teacher_weights)
    (name,) = model.weights.keys() - {"task"}
    weights = calibrate(model.train(), _batches(config, data), {"task": 1 - share, name: share})
    return weights[name]


def _batches(config: RunConfig, data: Dataset) -> Iterator[tuple[Tensor, Tensor]]:
    """The first batches of the run."""
    generator = torch.Generator(data.train_images.device).manual_seed(2 * config.seed + 1)
    for index in islice(epoch_order(data, config.recipe.batch_size, generator), BATCHES):
        images, labels = load_batch(data, index, generator)
        yield images, make_target(labels, index, indices=find_setup(config.method).indices)
