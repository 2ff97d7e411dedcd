"""Times ideas for a faster training step on a CPU against the step as it is: docs/faster-on-a-cpu.md.

    python benchmarks/step_ideas.py
    python benchmarks/step_ideas.py --groups compile       # minutes of compilation come first
    python benchmarks/step_ideas.py --groups teacher memory --repeats 25

Recipe `pooled`, teacher and student of one depth, random images, float32, one thread. The ideas of a group are timed in
turns. The clock is the CPU time of the process, so that a busy neighbour costs no more than what it takes of the cache.
The table says how many times faster than the group's first line each is: the median of the ratios within a repetition,
the smallest and the largest. A line with `bound` leaves work out, so nothing that does this work faster can gain more.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from cifar.engine import keep_freed_memory
from cifar.models import BasicBlock, fold_batch_norms
from cifar.settings import RunConfig
from cifar.steps import CrossEntropy, train_step
from cifar.training import build_model, build_optimizer, build_teacher
from distill import Distiller
from measure import Clock, describe_machine, time_steps
from measure import Step as AnyStep
from train_step import RECIPE, Step, build_steps, engine_step, make_data, make_weights

STAGES = [(16, 28), (32, 14), (64, 7)]  # channels and pixels
HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
MEMORY: dict[str, tuple[dict[str, str], str]] = {  # environment of a process and its arguments
    "as the C library comes": ({}, ""),
    "what is freed is kept": ({}, "--keep"),
    "huge pages": (HUGE, ""),
    "huge pages, and what is freed is kept": (HUGE, "--keep"),
}


class Bench:
    """What all ideas share: the settings, a batch and a teacher's weights."""

    def __init__(self, depth: int, batch_size: int) -> None:
        """Make them.

        Args:
            depth: Of teacher and student.
            batch_size: Images per step.
        """
        self.depth = depth
        recipe = dataclasses.replace(RECIPE, batch_size=batch_size)
        self.config = RunConfig(
            "logit", recipe, "random", depth, 1, 0, "cpu", "float32", depth, recipe.weight, recipe.at
        )
        self.data = make_data(batch_size, torch.device("cpu"))
        self.weights = make_weights(depth)
        images = self.data.train_images.float() / 255 - 0.5
        self.images = images.contiguous(memory_format=torch.channels_last)

    def model(self) -> Distiller:
        """Build the study's model."""
        model = build_model(self.config, self.data, self.weights)
        if not isinstance(model, Distiller):
            raise TypeError(f"the settings must be those of a distilled student, got {self.config}")
        return model.train()

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **changes: Any) -> Step:
        """Build the study's step with a model: `lr` and `images` may differ."""
        optimizer = build_optimizer(model, self.config) if optimizer is None else optimizer
        for group in optimizer.param_groups:
            group["lr"] = changes.get("lr", group["lr"])
        images = changes.get("images", self.images)
        return lambda: train_step(model, optimizer, images, self.data.train_labels, "float32").loss.detach()


def step_ideas(bench: Bench) -> dict[str, Step]:
    """Changes of the whole step."""
    contiguous, one_pass, bare = bench.model(), bench.model(), bench.model()
    for network in (contiguous.student, contiguous.teacher):
        for parameter in network.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    for model, forward in ((one_pass, _one_function), (bare, _convolutions_alone)):
        for block in model.student.modules():
            if isinstance(block, BasicBlock):
                block.forward = types.MethodType(forward, block)  # type: ignore[method-assign]
    plain_sgd = bench.model()
    sgd = torch.optim.SGD(
        plain_sgd.parameters(), RECIPE.lr, momentum=RECIPE.momentum, weight_decay=RECIPE.weight_decay, foreach=True
    )
    return {
        "today": bench.step(bench.model()),
        "the plain loop": build_steps(bench.config, bench.data)["plain"],
        "contiguous, not channels-last": bench.step(contiguous, images=bench.images.contiguous()),
        "batch norm, addition and ReLU as one function": bench.step(one_pass),
        "bound: no batch norm and no ReLU in the student's blocks": bench.step(bare, lr=0.0),
        "bound: no teacher": bench.step(CrossEntropy(bench.model().student)),
        "denormal numbers are 0": _flushed(bench.step(bench.model())),
        "SGD in its `foreach` form, not fused": bench.step(plain_sgd, sgd),
        "with augmentation and sums": engine_step(bench.config, bench.data, "eager"),
    }


def compile_ideas(bench: Bench) -> dict[str, Step]:
    """What `torch.compile` makes of the step or of parts of it, with static shapes."""
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    student, teacher, frozen, blocks = (bench.model() for _ in range(4))
    student.student.compile(**options)
    teacher.teacher.compile(**options)
    frozen.teacher.compile(**options, options={"freezing": True})
    torch._dynamo.config.recompile_limit = 64  # a block is compiled for each of its shapes
    for block in blocks.student.modules():
        if isinstance(block, BasicBlock):
            block.compile(**options)
    return {
        "today": bench.step(bench.model()),
        "the whole model": bench.step(torch.compile(bench.model(), **options)),  # type: ignore[arg-type]
        "the student": bench.step(student),
        "the student, block by block": bench.step(blocks),
        "the teacher": bench.step(teacher),
        "the teacher, its weights frozen (convolution, ReLU and sum fused)": bench.step(frozen),
    }


def teacher_ideas(bench: Bench) -> dict[str, Step]:
    """Ways through the frozen teacher."""
    networks = [build_teacher(bench.config, bench.data, bench.weights).eval() for _ in range(2)]
    kept, teacher = networks
    fold_batch_norms(teacher)
    teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = bench.images
    twice = torch.cat([images, images]).contiguous(memory_format=torch.channels_last)

    def in_parts(size: int) -> Step:
        return lambda: torch.cat([teacher(part) for part in torch.split(images, size)])

    ideas: dict[str, Step] = {
        "today": lambda: teacher(images),
        "its batch norms as they are, not folded": lambda: kept(images),
        "64 images at a time": in_parts(64),
        "16 images at a time": in_parts(16),
        "two batches at once, for both": lambda: teacher(twice),
    }
    return {name: torch.no_grad()(idea) for name, idea in ideas.items()}


def convolution_ideas(bench: Bench, channels: int, size: int) -> dict[str, Step]:
    """Ways to compute a stage's 3x3 convolution of a batch: forward, but for the two passes of its backward."""
    count = len(bench.images)
    images, gradient = (_random(count, channels, size, size, last=True) for _ in range(2))
    weight = _random(channels, channels, 3, 3, last=True)
    wide = _random(count, 32, size, size, last=True), _random(32, 32, 3, 3, last=True)
    flat = _random(count * size**2, 9 * channels), _random(9 * channels, channels)
    # Winograd's F(4x4, 3x3): 36 products for 16 pixels, where the convolution takes 144.
    tiles = _random(36, count * ((size + 3) // 4) ** 2, channels), _random(36, channels, channels)
    room = torch.empty_like(tiles[0])
    square = round((count * size**2 * 9 * channels**2) ** (1 / 3))  # as many products in one matrix product
    matrices = _random(square, square), _random(square, square)

    def backward(*mask: bool) -> Step:
        passes = torch.ops.aten.convolution_backward.default
        one = [1, 1]
        return lambda: passes(gradient, images, weight, None, one, one, one, False, [0, 0], 1, [*mask, False])

    def winograd() -> Tensor:
        room.copy_(tiles[0])
        return torch.bmm(*tiles)

    padded = {"channels padded to 32": _called(torch.conv2d, *wide, padding=1)} if channels < 32 else {}
    return {
        "today": lambda: torch.conv2d(images, weight, padding=1),
        "contiguous, not channels-last": _called(torch.conv2d, images.contiguous(), weight.contiguous(), padding=1),
        "backward, to the input": backward(True, False),
        "backward, to the weights": backward(False, True),
        "bound: a square matrix product of as many multiplications": lambda: matrices[0] @ matrices[1],
        "a matrix product of columns (im2col), without making them": lambda: flat[0] @ flat[1],
        "Winograd F(4x4, 3x3), the products alone": lambda: torch.bmm(*tiles),
        "bound: the same, and its tiles written once": winograd,
        **padded,
    }


@contextmanager
def memory_ideas(bench: Bench) -> Iterator[dict[str, Step]]:
    """Processes that take the study's steps, each with its own settings of the C library's memory."""
    processes = {}
    for name, (environment, arguments) in MEMORY.items():
        command = [sys.executable, __file__, "--serve", *arguments.split(), "--depth", str(bench.depth)]
        command += ["--batch-size", str(len(bench.images))]
        processes[name] = subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    try:
        yield {name: _called(_ask, process) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def serve(bench: Bench) -> None:
    """Take three steps for each line that comes in, and say how many seconds of the CPU one took."""
    step = engine_step(bench.config, bench.data, "eager")
    for _line in sys.stdin:
        print(cpu_clock(step, 3), flush=True)


def cpu_clock(step: AnyStep, inner: int) -> float:
    """Run the step in a row and return the CPU time of one."""
    start = time.process_time()
    for _ in range(inner):
        step()
    return (time.process_time() - start) / inner


def told_clock(step: AnyStep, _inner: int) -> float:
    """Return the seconds that the step itself says."""
    return float(cast(Tensor, step()))


def show(title: str, ideas: Mapping[str, Step], repeats: int, clock: Clock = cpu_clock) -> None:
    """Time the ideas of a group and print its table."""
    time_steps(ideas, 2, 1, clock)
    seconds = time_steps(ideas, repeats, 1, clock)
    base, *_ = seconds.values()
    print(f"\n{title}\n\n| what | ms | times faster | n |\n|---|---|---|---|")
    for name, values in seconds.items():
        values = [value / (2 if name.startswith("two batches") else 1) for value in values]
        ratios = [before / after for before, after in zip(base, values, strict=True)]
        print(f"| {name} | {1e3 * statistics.median(values):.1f} | {statistics.median(ratios):.2f} "
              f"[{min(ratios):.2f}, {max(ratios):.2f}] | {repeats} |", flush=True)  # fmt: skip


GROUPS = ("step", "teacher", "convolutions", "memory", "compile")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; exits with 2 if it refuses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS[:-1], help="default: all but compile")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.batch_size < 2:
        parser.error(f"--repeats must be at least 1 and --batch-size 2, got {args.repeats} and {args.batch_size}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    bench = Bench(args.depth, args.batch_size)
    if args.keep:
        keep_freed_memory()
    if args.serve:
        serve(bench)
        return
    name = f"ResNet-{args.depth} from {args.depth}, batch {args.batch_size}"
    print(f"{name}, float32, {describe_machine(torch.device('cpu'))}, torch {torch.__version__}")
    if "memory" in args.groups:
        with memory_ideas(bench) as ideas:
            show("memory: the step in processes of their own", ideas, args.repeats, told_clock)
    keep_freed_memory()  # from here on: no way shall pay for another's memory
    if "step" in args.groups:
        show("step", step_ideas(bench), args.repeats)
    if "teacher" in args.groups:
        show("teacher: its forward pass", teacher_ideas(bench), args.repeats)
    if "convolutions" in args.groups:
        for channels, size in STAGES:
            title = f"convolutions: 3x3, {channels} channels, {size} x {size} pixels"
            show(title, convolution_ideas(bench, channels, size), args.repeats)
    if "compile" in args.groups:
        show("compile: the step", compile_ideas(bench), args.repeats)


class _NormAddReLU(torch.autograd.Function):
    """`relu(batch_norm(x) + shortcut)`: keeps x and the result, and no third map; three kernels each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, norm: Any) -> Tensor:
        running = norm.running_mean, norm.running_var
        result, mean, scale = torch.native_batch_norm(x, weight, bias, *running, True, norm.momentum, norm.eps)
        if shortcut is not None:
            result += shortcut
        result.relu_()
        ctx.save_for_backward(x, result, weight, mean, scale)
        ctx.norm, ctx.adds = norm, shortcut is not None
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, result, weight, mean, scale = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradient, result, 0)
        running = ctx.norm.running_mean, ctx.norm.running_var
        gradients = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, *running, mean, scale, True, ctx.norm.eps, [True, True, True]
        )
        return gradients[0], gradient if ctx.adds else None, gradients[1], gradients[2], None


def _one_function(block: BasicBlock, x: Tensor) -> Tensor:
    def normed(norm: nn.BatchNorm2d, value: Tensor, shortcut: Tensor | None = None) -> Tensor:
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]  # the study's batch norms count
        apply: Callable[..., Tensor] = _NormAddReLU.apply
        return apply(value, shortcut, norm.weight, norm.bias, norm)

    return normed(block.bn2, block.conv2(normed(block.bn1, block.conv1(x))), block.shortcut(x))


def _convolutions_alone(block: BasicBlock, x: Tensor) -> Tensor:
    result: Tensor = block.conv2(block.conv1(x))
    return result + block.shortcut[0](x) if len(block.shortcut) else result


def _flushed(step: Step) -> Step:
    def flushed() -> Tensor:
        torch.set_flush_denormal(True)
        try:
            return step()
        finally:
            torch.set_flush_denormal(False)

    return flushed


def _called(function: Callable[..., Any], *args: Any, **options: Any) -> Step:
    return lambda: function(*args, **options)


def _ask(process: subprocess.Popen[str]) -> Tensor:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process must have pipes, got none")
    process.stdin.write("\n")
    process.stdin.flush()
    return torch.tensor(float(process.stdout.readline()))


def _random(*shape: int, last: bool = False) -> Tensor:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 8
    return value.contiguous(memory_format=torch.channels_last) if last else value


if __name__ == "__main__":
    main()
