"""Times the example's engine against a plain float32 loop, and the Distiller against the step written by hand.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --depth 110 --repeats 12
    python benchmarks/train_step.py --device cuda --repeats 10

Steps of recipe `pooled`, teacher and student of the same depth, random images:

    plain    float32, contiguous, PyTorch's default SGD, a teacher with batch norms, written by hand as people do
    hand     the example's precision, memory format, folded teacher and optimizer, written by hand
    example  the same through `cifar.steps.train_step` and the Distiller
    engine   what examples/cifar_resnet.py runs: example with augmentation and sums, in the mode of --engine; on CUDA
             every mode is timed
    jobs     on a CPU: several engines side by side, a process and a thread each, as --jobs runs them

Each repetition times all of them, in an order that turns from one to the next, so that a busy machine disturbs them
alike; printed are medians over the repetitions, of the ratios within a repetition, with their quartiles. Without
--repeats there are as many as fit into a minute, 5 at least and 60 at most.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from cifar.data import Dataset
from cifar.engine import MODES, Mode, find_mode, keep_freed_memory
from cifar.models import ResNet, fold_batch_norms, resnet
from cifar.settings import RECIPES, RunConfig, describe_device, find_device, find_precision
from cifar.steps import train_step
from cifar.training import Run, build_model, build_optimizer, build_student, build_teacher
from measure import quartiles, time_steps, wall_clock

Step = Callable[[], Tensor]
HandStep = Callable[[Tensor, Tensor], Tensor]
RECIPE = RECIPES["pooled"]
SECONDS = 60  # for the repetitions, where nobody says how many


def hand_step(student: ResNet, teacher: ResNet, optimizer: torch.optim.Optimizer, precision: str) -> HandStep:
    """Write the distillation step without the library: hooks on both classifiers' inputs and one loss.

    Args:
        student: The network to train.
        teacher: The network to imitate; frozen here.
        optimizer: Holds the student's parameters.
        precision: `"float32"`, or `"bfloat16"` for autocast.

    Returns:
        A function that takes images and labels, takes one step and returns the loss.
    """
    seen: dict[str, Tensor] = {}
    student.fc.register_forward_pre_hook(lambda _, inputs: seen.update(student=inputs[0]))
    teacher.fc.register_forward_pre_hook(lambda _, inputs: seen.update(teacher=inputs[0]))
    student.train()
    teacher.eval().requires_grad_(False)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            with torch.no_grad():
                teacher(images)
            logits = student(images)
            loss = F.cross_entropy(logits, labels) + RECIPE.weight * F.mse_loss(seen["student"], seen["teacher"])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        return loss.detach()

    return step


def make_data(batch_size: int, device: torch.device) -> Dataset:
    """Make a batch of random images, which is the whole data set."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (batch_size,), generator=generator)
    channel = (0.5, 0.5, 0.5)
    return Dataset("random", images, labels, images, labels, 10, channel, channel, True, 4).to(device)


def make_weights(depth: int) -> dict[str, Tensor]:
    """Make a teacher's weights."""
    return resnet(depth, 10, generator=torch.Generator().manual_seed(1)).state_dict()


def engine_step(config: RunConfig, data: Dataset, mode: Mode) -> Step:
    """Build a step as the example runs it.

    Args:
        config: Settings of the student.
        data: Its training images are the batch.
        mode: See `cifar.engine.MODES`.

    Returns:
        The step; it returns the sum of the losses so far.
    """
    engine = Run(config, data, make_weights(config.student), mode=mode).engine
    index = torch.arange(len(data.train_labels), device=data.train_labels.device)
    engine.start_epoch()

    def step() -> Tensor:
        engine.step(index)
        return engine.meter.tensors()[0][0]

    return step


class Jobs:
    """Engines side by side, each in a process with one thread, which stand still between two measurements."""

    def __init__(self, config: RunConfig, batch_size: int, count: int, inner: int) -> None:
        """Start the processes and wait until each has taken a few steps.

        Args:
            config: Settings of the student.
            batch_size: Images per step.
            count: Number of processes.
            inner: Steps of each process in one measurement.
        """
        context = multiprocessing.get_context("spawn")
        self.inner = inner
        self._pipes = []
        for _ in range(count):
            here, there = context.Pipe()
            context.Process(target=_job, args=(config, batch_size, there), daemon=True).start()
            self._pipes.append(here)
        self(3)

    def __call__(self, steps: int | None = None) -> Tensor:
        """Let every process take some steps, and wait for all of them."""
        for pipe in self._pipes:
            pipe.send(steps or self.inner)
        return torch.tensor(sum(pipe.recv() for pipe in self._pipes))


def _job(config: RunConfig, batch_size: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as the example does; the steps of the process beside it have the memory that plain has
    step = engine_step(config, make_data(batch_size, torch.device("cpu")), "eager")
    try:
        while True:
            for _ in range(pipe.recv()):
                loss = step()
            pipe.send(float(loss))
    except EOFError:
        return  # the benchmark is over


def build_steps(config: RunConfig, data: Dataset) -> dict[str, Step]:
    """Build the steps that compute the same, on the same weights and the same batch.

    Args:
        config: Settings of the student.
        data: Its training images are the batch.

    Returns:
        The steps by name; each returns its loss before the step.
    """
    images, labels = data.train_images.float() / 255 - 0.5, data.train_labels
    weights = make_weights(config.student)

    student = resnet(config.student, data.num_classes).to(images.device)
    student.load_state_dict(build_student(config, data).state_dict())
    teacher = resnet(config.student, data.num_classes).to(images.device)
    teacher.load_state_dict(weights)
    plain_sgd = torch.optim.SGD(
        student.parameters(), lr=RECIPE.lr, momentum=RECIPE.momentum, weight_decay=RECIPE.weight_decay
    )
    plain = hand_step(student, teacher, plain_sgd, "float32")

    student = build_student(config, data)
    teacher = build_teacher(config, data, weights)
    fold_batch_norms(teacher)
    hand = hand_step(student, teacher, build_optimizer(student, config), config.precision)

    distiller = build_model(config, data, weights).train()
    optimizer = build_optimizer(distiller, config)
    fast_images = images.contiguous(memory_format=torch.channels_last)
    return {
        "plain": lambda: plain(images, labels),
        "hand": lambda: hand(fast_images, labels),
        "example": lambda: train_step(distiller, optimizer, fast_images, labels, config.precision).loss.detach(),
    }


def main() -> None:
    """Run the benchmark and print what it found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--depth", type=int, default=20, help="of teacher and student, default 20")
    parser.add_argument("--batch-size", type=int, default=128, help="default 128")
    parser.add_argument("--repeats", type=int, help="repetitions, at least 2; default: what a minute allows, 5 to 60")
    parser.add_argument("--engine", choices=["auto", *MODES], default="auto", help="mode of the engine on a CPU")
    parser.add_argument("--device", default="auto", help="default: a CUDA GPU if there is one, else the CPU")
    args = parser.parse_args()
    if (args.repeats is not None and args.repeats < 2) or args.batch_size < 2:
        parser.error(f"--repeats and --batch-size must be at least 2, got {args.repeats} and {args.batch_size}")
    try:
        device = find_device(args.device)
        find_mode(args.engine, device)
        resnet(args.depth, 10)
    except ValueError as error:
        parser.error(str(error))

    precision = find_precision("auto", device)
    if device.index is not None:
        torch.cuda.set_device(device)  # a graph is captured on the current device
    torch.backends.cudnn.benchmark = True  # as the example sets it, here for every step
    recipe = dataclasses.replace(RECIPE, batch_size=args.batch_size)
    config = RunConfig(
        "logit", recipe, "random", args.depth, 1, 0, device.type, precision, args.depth, RECIPE.weight, RECIPE.at
    )
    data = make_data(args.batch_size, device)
    threads = torch.get_num_threads()

    steps = build_steps(config, data)
    first = {name: float(step()) for name, step in steps.items()}
    if abs(first["hand"] - first["example"]) > 1e-3 * first["hand"]:
        raise RuntimeError(f"the steps must compute the same loss to be compared, got {first}")
    modes = [*MODES] if device.type == "cuda" else [find_mode(args.engine, device)]
    steps |= {f"engine {mode}": engine_step(config, data, mode) for mode in modes}
    images = dict.fromkeys(steps, args.batch_size)
    if device.type == "cpu" and threads > 1:
        name = f"{threads} jobs"
        jobs = Jobs(config, args.batch_size, threads, inner=3)
        steps[name], images[name] = jobs, args.batch_size * threads * jobs.inner

    inner = 1 if device.type == "cpu" else 20
    clock = wall_clock(device)
    once = sum(map(min, time_steps(steps, 3, 1, clock).values()))
    repeats = args.repeats or min(max(round(SECONDS / (inner * once)), 5), 60)
    print(f"ResNet-{args.depth} -> {args.depth}, batch {args.batch_size}, {describe_device(device, precision)}, "
          f"torch {torch.__version__}, {repeats} repetitions", flush=True)  # fmt: skip
    seconds = time_steps(steps, repeats, inner, clock)

    for name, values in seconds.items():
        middle, low, high = quartiles([1e3 * args.batch_size * value / images[name] for value in values])
        ratio = quartiles(
            [a / b * images[name] / args.batch_size for a, b in zip(seconds["plain"], values, strict=True)]
        )
        print(f"{name:14} {middle:8.2f} ms per step (quartiles {low:.2f} to {high:.2f}), "
              f"{1e3 * args.batch_size / middle:7.0f} images/s, "
              f"{ratio[0]:.2f} times plain ({ratio[1]:.2f} to {ratio[2]:.2f})")  # fmt: skip
    middle, low, high = quartiles([100 * (b / a - 1) for a, b in zip(seconds["hand"], seconds["example"], strict=True)])
    print(f"the Distiller's overhead over hand: {middle:+.2f}% (quartiles {low:+.2f}% to {high:+.2f}%)")


if __name__ == "__main__":
    main()
