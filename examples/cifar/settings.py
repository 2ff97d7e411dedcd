"""What a run is: the two recipes, the settings of one run, and the precision that a device is good at."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cifar.losses import Setup, find_setup
from cifar.models import Stem

TEACHER_SEED = 1000  # not a student's: a teacher of the same depth would be the baseline of that seed, weight by weight


@dataclass(frozen=True)
class Recipe:
    """A training protocol, shared by teacher, baseline and student.

    In both recipes the initial weights, the order of the images and their augmentation depend on nothing but the
    run's seed, so the baseline and the student of one seed start equal and see the same batches.

    Attributes:
        name: `"pooled"` or `"logits"`.
        stem: First convolution of the networks.
        at: What the logit loss compares: a module path as `distill.Term` takes it, or None for the class logits.
        weight: Weight of the logit loss.
        nesterov: Whether SGD uses Nesterov momentum.
        lr: Learning rate of the first half of the epochs; a tenth of it in the third quarter, a hundredth in the last.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD, on every parameter.
        batch_size: Images per step; the last incomplete batch of an epoch is dropped.
    """

    name: str
    stem: Stem
    at: str | None
    weight: float
    nesterov: bool
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 128

    def lr_at(self, epoch: int, epochs: int) -> float:
        """Return the learning rate of an epoch.

        Args:
            epoch: Number of the epoch, from 1.
            epochs: Number of epochs of the run.

        Returns:
            `lr`, times 0.1 once half of the epochs are done, and once more at three quarters.
        """
        done = epoch - 1
        return self.lr * 0.1 ** ((2 * done >= epochs) + (4 * done >= 3 * epochs))


RECIPES = {
    "pooled": Recipe("pooled", stem="7x7", at="fc:input", weight=1.0, nesterov=False),
    "logits": Recipe("logits", stem="3x3", at=None, weight=0.1, nesterov=True),
}


def find_usual(loss: str, recipe: Recipe) -> Recipe | Setup:
    """Return what says the weight and the place of a loss.

    Args:
        loss: The loss's registry name.
        recipe: The protocol.

    Returns:
        The recipe for the logit loss, which its weight and place were chosen for; the loss's setup for others.
    """
    return recipe if loss == "logit" else find_setup(loss)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the numbers of one run.

    Attributes:
        method: `"teacher"`, `"baseline"` (cross-entropy only) or the registry name of the loss.
        recipe: The protocol.
        dataset: Name of the data set.
        student: Depth of the network that is trained.
        epochs: Number of epochs.
        seed: Seed of the initial weights, the order of the images and their augmentation.
        device: Type of the device, such as `"cpu"`.
        precision: `"float32"`, or `"bfloat16"` for autocast; weights and optimizer are float32 in both.
        teacher: Depth of the teacher; None for teacher and baseline, as are the fields below.
        weight: Weight of the loss beside the cross-entropy.
        at: What the loss compares; None for the class logits.
        teacher_batch_statistics: Whether the teacher's batch norms use the statistics of the batch.
        warmup: Share of the run over which the weight rises from 0; None where it is whole from the start.
        task_weight: Weight of the cross-entropy beside the loss; None for 1.
        teacher_epochs: Epochs of the teacher; None for as many as the student's.
    """

    method: str
    recipe: Recipe
    dataset: str
    student: int
    epochs: int
    seed: int
    device: str
    precision: str
    teacher: int | None = None
    weight: float | None = None
    at: str | None = None
    teacher_batch_statistics: bool = False
    warmup: float | None = None
    task_weight: float | None = None
    teacher_epochs: int | None = None

    @property
    def label(self) -> str:
        """Name of the method as the tables show it: what is not usual is named, and keeps runs apart."""
        name = self._variant
        if self.warmup not in (None, find_setup(self.method).warmup):
            name += f" over {self.warmup:g}"
        usual = find_usual(self.method, self.recipe).at
        return name if self.teacher is None or self.at == usual else f"{name} at {self.at or 'logits'}"

    @property
    def _variant(self) -> str:
        name = self.method + "+batch-statistics" * self.teacher_batch_statistics
        name += "+warm-up" * (self.warmup is not None)
        return name if self.task_weight is None else f"{name}+task{self.task_weight:g}"

    @property
    def run_id(self) -> str:
        """Name of the run's files."""
        name = f"{self.dataset}-{self.recipe.name}-{self._variant}-resnet{self.student}"
        if self.teacher is not None:
            place = (self.at or "logits").replace(":", "-")
            length = "" if self.teacher_epochs is None else f"-of-{self.teacher_epochs}epochs"
            name += f"-from-resnet{self.teacher}{length}-{place}-weight{exactly(self.weight)}"
        if self.warmup is not None:
            name += f"-over{self.warmup:g}"
        name += f"-{self.epochs}epochs"
        return name if self.method == "teacher" else f"{name}-seed{self.seed}"

    @property
    def teacher_name(self) -> str:
        """Name of the teacher as the tables show it: its epochs where they are not the student's; "-" for none."""
        if self.teacher is None:
            return "-"
        if self.teacher_epochs is None:
            return f"resnet{self.teacher}"
        return f"resnet{self.teacher} of {self.teacher_epochs} epoch{'s' * (self.teacher_epochs != 1)}"

    def teacher_config(self) -> RunConfig:
        """Return the settings of the run that trains this run's teacher; a baseline's is of its own depth."""
        depth = self.student if self.teacher is None else self.teacher
        epochs = self.epochs if self.teacher_epochs is None else self.teacher_epochs
        return RunConfig("teacher", self.recipe, self.dataset, depth, epochs, TEACHER_SEED, self.device, self.precision)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a flat dict of plain values, the recipe's among them."""
        values = dataclasses.asdict(self)
        recipe = values.pop("recipe")
        return values | {"recipe": recipe.pop("name")} | {f"recipe.{name}": value for name, value in recipe.items()}


def exactly(number: float | None) -> str:
    """Return a number as short as it can be without becoming another one.

    Args:
        number: The number; None where there is none.

    Returns:
        Such as `"0.9"`, `"1e+06"` or `"371.84729"`.
    """
    if number is None:
        return "none"
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def find_device(name: str) -> torch.device:
    """Return the device of that name.

    Args:
        name: `"auto"` (a CUDA GPU if there is one, else the CPU) or a name that `torch.device` takes.

    Returns:
        The device.

    Raises:
        ValueError: If PyTorch knows no such device or cannot use it here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cpu" and device.index:
            raise ValueError(f"device must be cpu without a number, got {name!r}: all processors are one device")
        torch.ones(1, device=device).item()  # meta has no values
    except (RuntimeError, AssertionError, ImportError) as error:  # AssertionError: a PyTorch built without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that PyTorch can use here, got {name!r}: {reason}") from error
    return torch.device("cpu") if device.type == "cpu" else device


def find_precision(name: str, device: torch.device) -> str:
    """Return the precision to train in.

    Args:
        name: `"float32"`, `"bfloat16"` or `"auto"`: bfloat16 where the device computes in it natively.
        device: The device to train on.

    Returns:
        `"float32"` or `"bfloat16"`.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device.type == "cpu" and _cpu_has_bfloat16()
    return "bfloat16" if native else "float32"


def describe_device(device: torch.device, precision: str) -> str:
    """Name the hardware and the precision, as the tables show them.

    Args:
        device: The device to train on.
        precision: `"float32"` or `"bfloat16"`.

    Returns:
        Such as `"cpu (AMD EPYC, 2 threads, bfloat16)"`.
    """
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({precision})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({_cpu_name()}, {threads} thread{'s' * (threads != 1)}, {precision})"
    return f"{device.type} ({precision})"


def find_revision() -> str:
    """Name the git revision of this code, as the tables show it.

    Returns:
        Such as `"9a25a33"`, with `-dirty` if files differ from it; `"-"` if there is no git or no checkout.
    """
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "-"
    return found.stdout.strip() or "-"


def _cpu_has_bfloat16() -> bool:
    """Say whether the processor multiplies bfloat16 natively; no if nobody can tell."""
    if hasattr(torch.cpu, "get_capabilities"):  # newer versions of PyTorch
        known = torch.cpu.get_capabilities()
        return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    flags = _cpuinfo("flags") or _cpuinfo("Features") or ""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str | None:
    """Return the first value of a key in Linux's description of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), None)
