"""One training run from its settings to its result, and how it goes on after a kill."""

from __future__ import annotations

import reprlib
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar.checkpoints import RunFiles, check_teacher, save_state, unusable
from cifar.data import Dataset, normalize
from cifar.engine import Engine, Mode
from cifar.files import remove_leftovers
from cifar.losses import Networks, build_distiller, find_setup, make_target
from cifar.models import ResNet, fold_batch_norms, resnet
from cifar.progress import Overview, Progress
from cifar.records import EpochRecord, RunResult
from cifar.settings import RunConfig, describe_device, find_revision
from cifar.states import check_optimizer, check_random, check_tensors, course, go_on, identity
from cifar.steps import CrossEntropy, epoch_order, evaluate
from distill import Distiller, __version__


def build_student(config: RunConfig, data: Dataset) -> ResNet:
    """Build the network of a run with its initial weights, which depend on the seed only.

    Args:
        config: The run's settings.
        data: The data set.

    Returns:
        The network, channels-last, on the data's device.
    """
    # Even seeds for weights, odd ones for the data: no two of these streams are the same.
    generator = torch.Generator().manual_seed(2 * config.seed)
    return _place(_build(config.student, config, data, generator), data)


def build_teacher(config: RunConfig, data: Dataset, weights: dict[str, Tensor]) -> ResNet:
    """Build the frozen teacher of a run.

    Args:
        config: The run's settings; those of a teacher give the network itself.
        data: The data set.
        weights: State dict of the trained teacher.

    Returns:
        The network, channels-last, on the data's device.

    Raises:
        ValueError: If the weights are not those of such a network.
    """
    depth = config.student if config.teacher is None else config.teacher
    teacher = _build(depth, config, data, torch.Generator())
    check_tensors(weights, teacher.state_dict(), "network")
    teacher.load_state_dict(weights)
    if config.teacher_batch_statistics:
        use_batch_statistics(teacher)
    return _place(teacher, data)


def build_model(
    config: RunConfig, data: Dataset, teacher_weights: dict[str, Tensor] | None
) -> Distiller | CrossEntropy:
    """Build what the run trains.

    Args:
        config: The run's settings.
        data: The data set.
        teacher_weights: State dict of the teacher; None for a run without one.

    Returns:
        A module that maps images and labels to an output with `loss`, `student` and `terms`.
    """
    if teacher_weights is None:
        return CrossEntropy(build_student(config, data))
    return build_distilled(config, data, teacher_weights)


def build_distilled(config: RunConfig, data: Dataset, teacher_weights: dict[str, Tensor]) -> Distiller:
    """Build the student of a run with its teacher and its loss.

    Args:
        config: The run's settings.
        data: The data set.
        teacher_weights: State dict of the teacher.

    Returns:
        The Distiller.
    """
    student, teacher = build_student(config, data), build_teacher(config, data, teacher_weights)
    weight = 1.0 if config.weight is None else config.weight
    task_weight = 1.0 if config.task_weight is None else config.task_weight
    steps = config.epochs * (len(data.train_labels) // config.recipe.batch_size)
    warmup = 0 if config.warmup is None else max(1, round(config.warmup * steps))
    networks = Networks(student, teacher, data)
    distiller = build_distiller(config.method, config.at, weight, networks, warmup=warmup, task_weight=task_weight)
    if _can_fold(teacher, config):
        fold_batch_norms(teacher)
        _place(teacher, data)
    return distiller.to(data.train_images.device)


def check_student(config: RunConfig, data: Dataset) -> None:
    """Take a distilled student through one forward pass with an untrained teacher.

    Args:
        config: The student's settings.
        data: The data set.

    Raises:
        ValueError: If the loss has no such place in the networks, or does not take what stands there.
    """
    with torch.random.fork_rng([]):
        untrained = _build(config.teacher or config.student, config, data, torch.Generator()).state_dict()
        model = build_model(config, data, untrained)
    images, labels = normalize(data.train_images[:2], data.mean, data.std), data.train_labels[:2]
    model(images, make_target(labels, torch.arange(2, device=labels.device), indices=find_setup(config.method).indices))


def use_batch_statistics(model: nn.Module) -> None:
    """Make every batch norm use the statistics of the batch, in eval mode too, as the reference's teacher did.

    Args:
        model: Changed in place: its batch norms lose their running statistics.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.SGD:
    """Build the recipe's SGD.

    Args:
        model: The module whose parameters are trained.
        config: The run's settings.

    Returns:
        The optimizer, in PyTorch's fused form: one pass over the weights.
    """
    recipe = config.recipe
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=True,
    )


class Run:
    """A training run between two epochs: what a checkpoint holds, and what trains the next epoch."""

    def __init__(
        self, config: RunConfig, data: Dataset, teacher_weights: dict[str, Tensor] | None, *, mode: Mode = "eager"
    ) -> None:
        """Start a run before its first epoch.

        Args:
            config: The run's settings.
            data: The data set, on the device to train on.
            teacher_weights: State dict of the teacher; None for a run without one.
            mode: How the steps are run, see `cifar.engine.MODES`.
        """
        if len(data.train_labels) < config.recipe.batch_size:
            raise ValueError(
                f"the training set must fill one batch of {config.recipe.batch_size} images, "
                f"got {len(data.train_labels)} images"
            )
        self.config = config
        self.data = data
        self.device = data.train_images.device
        self.model = build_model(config, data, teacher_weights)
        self.optimizer = build_optimizer(self.model, config)
        self.generator = torch.Generator(self.device).manual_seed(2 * config.seed + 1)
        self.engine = Engine(
            self.model,
            self.optimizer,
            data,
            self.generator,
            batch_size=config.recipe.batch_size,
            precision=config.precision,
            mode=mode,
            indices=config.teacher is not None and find_setup(config.method).indices,
        )
        self.start_time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.taught_by = None if teacher_weights is None else identity(teacher_weights)
        self.history: list[EpochRecord] = []
        self.parts: list[dict[str, Any]] = [
            {
                "from": 1,
                "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
                "engine": mode,
                "device": describe_device(self.device, config.precision),
                "torch": str(torch.__version__),
                "library": __version__,
                "revision": find_revision(),
            }
        ]

    def train_epoch(self, progress: Progress) -> EpochRecord:
        """Train and evaluate the next epoch, and add its record to the history.

        Args:
            progress: Shows how far the epoch is.

        Returns:
            The record.

        Raises:
            NonFiniteLossError: If the loss is no longer finite.
        """
        config, epoch = self.config, len(self.history) + 1
        lr = config.recipe.lr_at(epoch, config.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        start = time.perf_counter()
        engine, batch_size = self.engine, config.recipe.batch_size
        engine.start_epoch()
        steps = len(self.data.train_labels) // batch_size
        with progress.epoch(epoch, steps * batch_size) as bar:
            for index in epoch_order(self.data, batch_size, self.generator):
                engine.step(index)
                if bar.due():
                    bar.show(engine.images, *engine.meter.read(epoch))
            loss, terms, train_acc = engine.meter.read(epoch)
            trained = time.perf_counter() - start
            bar.show(engine.images, loss, terms, train_acc)
            test_acc, test_acc_all = evaluate(self.model.student, self.data, config.precision)
        record = EpochRecord(
            epoch=epoch,
            lr=lr,
            loss=loss,
            terms=terms,
            train_acc=train_acc,
            test_acc=test_acc,
            test_acc_all=test_acc_all,
            images_per_second=engine.images / trained,
            seconds=time.perf_counter() - start,
        )
        self.history.append(record)
        return record

    def state(self) -> dict[str, Any]:
        """Return everything that the next epoch depends on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": {
                "data": self.generator.get_state(),
                # Not drawn from here, but a registered loss may.
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
            "history": [record.to_json() for record in self.history],
            "start_time": self.start_time,
            "parts": self.parts,
            "teacher": self.taught_by,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was called.

        Args:
            state: What `state` returned, of this version or an earlier one.

        Raises:
            ValueError: If it is not that of such a run, or the run was made with what the user must choose again; what
                else is wrong with it may raise other errors. Nothing is changed then.
        """
        try:
            history = [EpochRecord.from_json(record) for record in state["history"]]
        except TypeError as error:
            raise ValueError(f"its history must be a list of records of epochs, got others: {error}") from error
        epochs = [record.epoch for record in history]
        if epochs != list(range(1, len(epochs) + 1)) or not 1 <= len(epochs) <= self.config.epochs:
            got = reprlib.repr(epochs)
            raise ValueError(f"its history must hold the epochs 1, 2, ... of {self.config.epochs}, got {got}")
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        random = {"data": self.generator.get_state(), "cpu": torch.get_rng_state(), "cuda": cuda}
        check_tensors(state["model"], self.model.state_dict(), "network")
        check_optimizer(state["optimizer"], self.optimizer, self.model.student)
        check_random(state["random"], random)
        try:
            datetime.fromisoformat(state["start_time"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"its start must be a time of ISO 8601, got {state['start_time']!r}") from error
        # Earlier versions wrote the revision alone, and the first of them not even that.
        parts = state.get("parts", [{"from": 1, "revision": state.get("revision", "-")}])
        self.parts = go_on(parts, self.parts[0], len(history) + 1)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["random"]["data"])
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        self.history = history
        self.start_time = state["start_time"]

    def result(self) -> RunResult:
        """Return the numbers of the run."""
        config = self.config
        return RunResult(
            method=config.label,
            recipe=config.recipe.name,
            dataset=config.dataset,
            student=f"resnet{config.student}",
            teacher=config.teacher_name,
            seed=config.seed,
            weight=config.weight,
            start_time=self.start_time,
            lr=config.recipe.lr,
            batch_size=config.recipe.batch_size,
            device=course(self.parts, "device"),
            torch=course(self.parts, "torch"),
            revision=course(self.parts, "revision"),
            history=tuple(self.history),
            identity=identity(self.model.student.state_dict()),
            taught_by="-" if self.taught_by is None else self.taught_by,
        )


def train(
    config: RunConfig,
    data: Dataset,
    out: Path,
    *,
    tensorboard: bool = False,
    mode: Mode = "eager",
    overview: Overview | None = None,
) -> RunResult:
    """Train a run to its end, from its checkpoint if it has one; a finished run is only read.

    Args:
        config: The run's settings.
        data: The data set, on the device to train on.
        out: Folder of checkpoints, weights and results; a distilled student finds its teacher's weights there.
        tensorboard: Whether to write TensorBoard events under `out`.
        mode: How the steps are run, see `cifar.engine.MODES`.
        overview: The runs that this one belongs to; by default it stands alone.

    Returns:
        The run's numbers; the network's last weights lie at `RunFiles.of(out, config).weights`.

    Raises:
        CheckpointError: If a file of an earlier run is unreadable, or was made with other settings.
        NonFiniteLossError: If the loss is no longer finite.
    """
    remove_leftovers(out)
    files = RunFiles.of(out, config)
    if (finished := files.load_result(config)) is not None:
        return finished
    teacher_weights = None
    if config.teacher is not None:
        teacher = config.teacher_config()
        theirs = RunFiles.of(out, teacher)
        teacher_weights = theirs.load_weights(teacher)
        with unusable(theirs.weights):
            build_teacher(config, data, teacher_weights)
    device = data.train_images.device
    checkpoint = files.load_checkpoint(config)
    # Losses with learned weights draw these from the global generator: seeded here, and left as it was found.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(2 * config.seed)
        run = Run(config, data, teacher_weights, mode=mode)
        if checkpoint is not None:
            if teacher_weights is not None:
                check_teacher(files.checkpoint, checkpoint.get("teacher"), theirs.weights, teacher_weights)
            with unusable(files.checkpoint):
                run.load_state(checkpoint)
        overview = Overview([config]) if overview is None else overview
        with Progress(config, out, done=len(run.history), tensorboard=tensorboard, overview=overview) as progress:
            while len(run.history) < config.epochs:
                progress.log(run.train_epoch(progress))
                save_state(files.checkpoint, config, run.state())
    if (finished := files.load_result(config)) is not None:  # another process was quicker; students may have its bits
        return finished
    result = run.result()
    files.finish(config, run.model.student.state_dict(), result)
    return result


def _can_fold(teacher: ResNet, config: RunConfig) -> bool:
    """Whether no term compares what is between a convolution and its batch norm, which keeps its statistics."""
    if config.teacher_batch_statistics:
        return False
    places = (config.at or "").replace("+", ",").split(",")
    tapped = [teacher.get_submodule(place.removesuffix(":input")) for place in places]
    return not any(isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) for module in tapped)


def _build(depth: int, config: RunConfig, data: Dataset, generator: torch.Generator) -> ResNet:
    channels = data.train_images.shape[1]
    return resnet(depth, data.num_classes, stem=config.recipe.stem, in_channels=channels, generator=generator)


def _place(model: ResNet, data: Dataset) -> ResNet:
    placed: ResNet = model.to(data.train_images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return placed
