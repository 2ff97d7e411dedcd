"""Distil a ResNet on handwritten digits or CIFAR: a teacher, a student, and the same student without a teacher.

    python examples/cifar_resnet.py                                             # digits, half a minute on 2 cores
    python examples/cifar_resnet.py --dataset cifar10 --runs 3                  # ResNet-20 -> 20, 200 epochs
    python examples/cifar_resnet.py --dataset cifar100 --student 20 --teacher 110 --recipe logits

It trains the teacher once, then for each seed a baseline (cross-entropy only) and the student, which start from the
same weights and see the same batches; the teacher's last epoch is what teaches. Under --out lie the table
(results.md, results.csv), the curves (curves.png, curves.csv), a file per run (runs/) and the trained networks
(weights/). Stopped at any moment, the same command goes on after the last whole epoch; what is done is not done again.

Measured so far, with `--dataset cifar10 --epochs 15 --runs 3` on 2 cores of an AMD EPYC (bfloat16, torch 2.13.0), test
accuracy after the last epoch in %, mean and standard deviation over 3 seeds: student 85.69 +/- 0.20, baseline
85.42 +/- 0.41; the teacher (1 run) 84.79. The published 200 epochs have not been run yet; see docs/results.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cifar.checkpoints import CheckpointError, RunFiles, read_result
from cifar.data import Dataset, load_dataset
from cifar.report import RunResult, write_report
from cifar.settings import RECIPES, TEACHER_SEED, RunConfig, describe_device, find_device, find_precision
from cifar.steps import NonFiniteLossError
from cifar.training import check_student, train
from distill import create_loss, list_losses

EPOCHS = {"digits": 20, "cifar10": 200, "cifar100": 200}
LOGITS = "logits"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    epochs = ", ".join(f"{count} for {name}" for name, count in EPOCHS.items())

    add = parser.add_argument_group("what is trained").add_argument
    add("--dataset", choices=list(EPOCHS), default="digits", help="default: digits, which needs no download")
    add("--student", type=_depth, default=20, metavar="DEPTH", help="layers, 6n+2; default: 20")
    add("--teacher", type=_depth, default=20, metavar="DEPTH", help="layers, 6n+2; default: 20")
    add("--recipe", choices=list(RECIPES), default="pooled", help="what the networks regress; default: pooled")
    add("--loss", default="logit", metavar="NAME", help=f"default: logit; known: {', '.join(list_losses())}")
    add("--weight", type=_weight, help="of the loss; default: the recipe's for logit, 1 for any other")
    add("--at", metavar="PATH", help="module whose output, or input (fc:input), the loss compares, or logits")
    add("--epochs", type=_count, help=f"default: {epochs}")
    add("--runs", type=_count, default=1, help="seeds per method; default: 1")
    add("--seed", type=_seed, default=0, help="the first seed; default: 0")
    add("--no-baseline", action="store_true", help="do not train the student without a teacher")
    add(
        "--teacher-batch-statistics",
        action="store_true",
        help="study option: the teacher's batch norms use the batch's statistics, as in the reference's code",
    )

    add = parser.add_argument_group("where and how").add_argument
    add("--data-dir", type=Path, help="folder of the CIFAR files, downloaded if missing; default: data")
    add("--out", type=Path, default=Path("runs"), help="folder of all results; default: runs")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: a CUDA GPU if there is one")
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="default: bfloat16 where native")
    add("--threads", type=_count, help="threads on the CPU; default: PyTorch's")
    add("--tensorboard", action="store_true", help="write TensorBoard events to OUT/tensorboard")
    return parser


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line, refuse what cannot be run, and fill in what depends on other options.

    Args:
        arguments: The arguments; those of the process by default.

    Returns:
        The parser, for errors found later, and the arguments.
    """
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        create_loss(args.loss)
    except (KeyError, ImportError, ValueError) as error:
        parser.error(f"argument --loss: {error.args[0]}")
    except TypeError as error:
        parser.error(f"argument --loss: {args.loss!r} cannot be built without arguments: {error}")
    try:
        args.device = find_device(args.device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    if args.threads is not None and args.device.type != "cpu":
        parser.error(f"argument --threads: only for the CPU, got device {args.device}")
    if args.data_dir is not None and args.dataset == "digits":
        parser.error("argument --data-dir: only for CIFAR, the digits come with scikit-learn")
    if args.seed <= TEACHER_SEED < args.seed + args.runs:
        parser.error(f"argument --seed: {TEACHER_SEED} is the teacher's, got {args.seed} and {args.runs} runs")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error('argument --tensorboard: the package tensorboard is missing; pip install -e ".[examples]"')
    args.precision = find_precision(args.precision, args.device)
    args.data_dir = args.data_dir or Path("data")
    args.epochs = args.epochs or EPOCHS[args.dataset]
    recipe = RECIPES[args.recipe]
    # The recipe's weight and place were chosen for the logit loss; they would mean nothing for another.
    weight, at = (recipe.weight, recipe.at) if args.loss == "logit" else (1.0, None)
    args.weight = weight if args.weight is None else args.weight
    args.at = at if args.at is None else None if args.at == LOGITS else args.at
    return parser, args


def plan(args: argparse.Namespace) -> list[RunConfig]:
    """List the runs of a command in their order: the teacher, then baseline and student of each seed.

    Args:
        args: What `parse_arguments` returned.

    Returns:
        The settings of each run.
    """
    common = {
        "recipe": RECIPES[args.recipe],
        "dataset": args.dataset,
        "student": args.student,
        "epochs": args.epochs,
        "device": args.device.type,
        "precision": args.precision,
    }
    runs = []
    for seed in range(args.seed, args.seed + args.runs):
        student = RunConfig(
            method=args.loss,
            seed=seed,
            teacher=args.teacher,
            weight=args.weight,
            at=args.at,
            teacher_batch_statistics=args.teacher_batch_statistics,
            **common,
        )
        runs += [] if args.no_baseline else [RunConfig(method="baseline", seed=seed, **common)]
        runs += [student]
    return [runs[-1].teacher_config(), *runs]


def describe(args: argparse.Namespace, runs: list[RunConfig], data: Dataset) -> str:
    """Say in words what is about to be run.

    Args:
        args: What `parse_arguments` returned.
        runs: What `plan` returned.
        data: The data set.

    Returns:
        A few lines.
    """
    recipe = RECIPES[args.recipe]
    channels, height, width = data.train_images.shape[1:]
    done = sum(RunFiles.of(args.out, run).result.exists() for run in runs)
    statistics = "batch norms on batch statistics" if args.teacher_batch_statistics else "in eval mode"
    return "\n".join(
        [
            f"data:     {data.name}, {len(data.train_labels):,} training and {len(data.test_labels):,} test images "
            f"of {channels} x {height} x {width}, {data.num_classes} classes",
            f"recipe:   {recipe.name}, {recipe.stem} stem, SGD lr {recipe.lr:g} momentum {recipe.momentum:g}"
            f"{' nesterov' if recipe.nesterov else ''} weight decay {recipe.weight_decay:g}, "
            f"batch {recipe.batch_size}, {args.epochs} epochs, lr x 0.1 at 1/2 and 3/4",
            f"student:  resnet{args.student}, loss = cross-entropy + {args.weight:g} * {args.loss}, "
            f"compared at {args.at or 'the class logits'}",
            f"teacher:  resnet{args.teacher}, its last epoch, {statistics}",
            f"device:   {describe_device(args.device, args.precision)}, torch {torch.__version__}",
            f"runs:     {len(runs)} ({done} done), into {args.out}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The arguments; those of the process by default.

    Returns:
        Exit code: 0, or 1 after an error, or 130 after Ctrl-C; argparse itself exits with 2.
    """
    parser, args = parse_arguments(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    runs = plan(args)
    try:
        data = load_dataset(args.dataset, args.data_dir).to(args.device)
        try:
            # A teacher may take hours: what its student would stumble over is found before.
            check_student(runs[-1], data)
        except (ValueError, TypeError, RuntimeError) as error:
            parser.error(f"--loss {args.loss} at {args.at or LOGITS} does not work here: {error}")
        print(describe(args, runs, data), flush=True)
        for run in runs:
            train(run, data, args.out, tensorboard=args.tensorboard)
            write_report(args.out, finished_runs(args.out))
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on after the last whole epoch.", file=sys.stderr)
        return 130
    except (CheckpointError, NonFiniteLossError, ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{(args.out / 'results.md').read_text(encoding='utf-8')}")
    print(f"Table: {args.out / 'results.md'}  curves: {args.out / 'curves.png'}  networks: {args.out / 'weights'}")
    return 0


def finished_runs(out: Path) -> list[RunResult]:
    """Read every finished run under a folder, also those of earlier commands.

    Args:
        out: The output folder.

    Returns:
        The runs, the earliest first; of those that started within one second, teachers and baselines first.
    """
    order = {"teacher": 0, "baseline": 1}
    results = [read_result(path) for path in sorted((out / "runs").glob("*.json"))]
    return sorted(results, key=lambda result: (result.start_time, order.get(result.method, 2)))


def _depth(text: str) -> int:
    depth = int(text)
    if depth < 8 or depth % 6 != 2:
        raise argparse.ArgumentTypeError(f"must be 6n+2 with n >= 1 (8, 14, 20, ..., 110), got {text}")
    return depth


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def _seed(text: str) -> int:
    if not 0 <= int(text) < 2**30:
        raise argparse.ArgumentTypeError(f"must be in 0..2**30-1, got {text}")
    return int(text)


def _weight(text: str) -> float:
    if not (math.isfinite(float(text)) and float(text) > 0):
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return float(text)


if __name__ == "__main__":
    sys.exit(main())
