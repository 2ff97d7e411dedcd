"""Distil a ResNet on handwritten digits or CIFAR: a teacher, a student, and the same student without a teacher.

commands:
    python examples/cifar_resnet.py                                             # digits, half a minute on 2 cores
    python examples/cifar_resnet.py --dataset cifar10 --runs 3                  # ResNet-20 -> 20, 200 epochs
    python examples/cifar_resnet.py --dataset cifar100 --student 20 --teacher 110 --recipe logits
    python examples/cifar_resnet.py --dataset cifar10 --loss logit,kl,dkd,at    # losses beside one another
    python examples/cifar_resnet.py --reproduce                                 # the whole published table
    python examples/cifar_resnet.py --reproduce --recipe logits --only 20/cifar10,20-110/cifar10

It trains the teacher once, then for each seed a baseline (cross-entropy only) and the student, which start from the
same weights and see the same batches; the teacher's last epoch is what teaches. Under --out lie the table
(results.md, results.csv), the curves (curves.png, curves.csv), a file per run (runs/) and the trained networks
(weights/). Stopped at any moment, the same command goes on after the last whole epoch; what is done is not done again.

Measured so far, with `--dataset cifar10 --epochs 15 --runs 3` on 2 cores of an AMD EPYC (bfloat16, torch 2.13.0), test
accuracy after the last epoch in %, mean and standard deviation over 3 seeds: student 85.69 +/- 0.20, baseline
85.42 +/- 0.41; the teacher (1 run) 84.79. With `--recipe logits`: student 87.59 +/- 0.05, baseline 87.34 +/- 0.13,
teacher 87.31. With `--dataset cifar100`: student 55.95 +/- 0.14, baseline 53.85 +/- 1.03, teacher 52.96. The published
200 epochs have not been run yet; see docs/results.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cifar.agreement import measure_agreement
from cifar.checkpoints import CheckpointError, RunFiles, read_result
from cifar.crew import EXPECTED, STOPPING, Place, RunError, train_all
from cifar.data import Dataset, load_dataset
from cifar.engine import MODES, find_mode
from cifar.files import remove_leftovers
from cifar.losses import SETUPS, find_setup
from cifar.progress import Overview
from cifar.records import RunResult
from cifar.report import write_report
from cifar.reproduce import RUNS, Setting, published_settings
from cifar.settings import RECIPES, TEACHER_SEED, RunConfig, describe_device, find_device, find_precision, find_usual
from cifar.training import check_student
from distill import create_loss, list_losses

DEEPEST, MOST_RUNS, MOST_EPOCHS, MOST_THREADS = 1202, 1000, 10**6, 256
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
    add(
        "--loss",
        default="logit",
        metavar="NAMES",
        help=f"one, or several after commas to compare them; default: logit; known: {', '.join(list_losses())}",
    )
    add("--weight", type=_weight, help="of the loss; default: the recipe's for logit, the published one for others")
    add("--at", type=_places, metavar="PATHS", help="what the loss compares: logits, or modules, see cifar/losses.py")
    add(
        "--warmup",
        type=_share,
        metavar="SHARE",
        help="of the run, over which the loss's weight rises from 0; default: the published one, 0 for most",
    )
    add("--task-weight", type=_weight, help="of the cross-entropy; default: the published one, 1 for most")
    add("--epochs", type=_up_to(MOST_EPOCHS), help=f"default: {epochs}")
    add("--runs", type=_up_to(MOST_RUNS), help=f"seeds per method; default: 1, with --reproduce {RUNS}")
    add("--seed", type=_seed, default=0, help="the first seed; default: 0")
    add("--no-baseline", action="store_true", help="do not train the student without a teacher")
    add(
        "--teacher-batch-statistics",
        action="store_true",
        help="study option: the teacher's batch norms use the batch's statistics, as in the reference's code",
    )

    add = parser.add_argument_group("the published table").add_argument
    add("--reproduce", action="store_true", help="run every row of the recipe's published table")
    add(
        "--only",
        metavar="ROWS",
        help="of these rows, such as 20/cifar10,110/cifar100, or 20-110/cifar10: student-teacher",
    )

    add = parser.add_argument_group("where and how").add_argument
    add("--data-dir", type=Path, help="folder of the CIFAR files, downloaded if missing; default: data")
    add("--out", type=Path, default=Path("runs"), help="folder of all results; default: runs")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: a CUDA GPU if there is one")
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="default: bfloat16 where native")
    add(
        "--engine",
        choices=["auto", *MODES],
        default="auto",
        help="how a step is run; default: graph on CUDA, else eager",
    )
    add(
        "--jobs",
        type=_up_to(MOST_THREADS),
        help="runs side by side; default: 1, with --reproduce on a CPU one for each core",
    )
    add(
        "--threads",
        type=_up_to(MOST_THREADS),
        help="threads of a run on the CPU; default: PyTorch's, shared by the jobs",
    )
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
    args.losses = list(dict.fromkeys(name.strip() for name in args.loss.split(",")))
    for name in args.losses:
        try:
            if name not in SETUPS or name not in list_losses():
                create_loss(name)
        except (KeyError, ImportError) as error:
            parser.error(f"argument --loss: {error.args[0]}")
        except Exception as error:  # a loss of somebody else's may raise anything
            parser.error(f"argument --loss: {name!r} cannot be built without arguments: {error}")
    for option in ("weight", "at", "warmup", "task_weight"):
        if len(args.losses) > 1 and getattr(args, option) is not None:
            parser.error(f"argument --{option.replace('_', '-')}: only with one --loss, got {args.loss}")
    try:
        args.device = find_device(args.device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    try:
        args.engine = find_mode(args.engine, args.device)
    except ValueError as error:
        parser.error(f"argument --engine: {error}")
    _complete_reproduction(parser, args, arguments)
    if args.threads is not None and args.device.type != "cpu":
        parser.error(f"argument --threads: only for the CPU, got device {args.device}")
    if args.data_dir is not None and not args.reproduce and args.dataset == "digits":
        parser.error("argument --data-dir: only for CIFAR, the digits come with scikit-learn")
    if args.seed <= TEACHER_SEED < args.seed + args.runs:
        parser.error(f"argument --seed: {TEACHER_SEED} is the teacher's, got {args.seed} and {args.runs} runs")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error('argument --tensorboard: the package tensorboard is missing; pip install -e ".[examples]"')
    args.precision = find_precision(args.precision, args.device)
    args.data_dir = args.data_dir or Path("data")
    args.epochs = args.epochs or max(EPOCHS[setting.dataset] for setting in args.settings)
    args.use = {name: _use(name, args) for name in args.losses}
    return parser, args


def _use(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return how a loss is used: the fields `weight`, `at`, `warmup` and `task_weight` of its runs."""
    setup, usual = find_setup(name), find_usual(name, RECIPES[args.recipe])
    task_weight = setup.task_weight if args.task_weight is None else args.task_weight
    return {
        "weight": usual.weight if args.weight is None else args.weight,
        "at": usual.at if args.at is None else None if args.at == LOGITS else args.at,
        "warmup": setup.warmup if args.warmup is None else args.warmup or None,
        "task_weight": None if task_weight == 1 else task_weight,
    }


def _complete_reproduction(
    parser: argparse.ArgumentParser, args: argparse.Namespace, arguments: Sequence[str] | None
) -> None:
    """Fill in the settings to run, and refuse what does not go with a published table."""
    args.runs = args.runs or (RUNS if args.reproduce else 1)
    if not args.reproduce:
        if args.only is not None:
            parser.error("argument --only: needs --reproduce")
        args.settings = [Setting(args.student, args.teacher, args.dataset)]
        return
    fixed = ("dataset", "student", "teacher", "loss", "weight", "at", "warmup", "task_weight", "no_baseline")
    given = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(fixed)))  # without the defaults
    for name in fixed:
        if getattr(given, name) is not None:
            parser.error(f"argument --{name.replace('_', '-')}: fixed by --reproduce, got {getattr(args, name)!r}")
    try:
        args.settings = published_settings(args.recipe, args.only)
    except ValueError as error:
        parser.error(f"argument --only: {error}")


def plan(args: argparse.Namespace) -> list[RunConfig]:
    """List the runs of a command in their order: of each setting the teacher, then baseline and student of each seed.

    Args:
        args: What `parse_arguments` returned.

    Returns:
        The settings of each run; settings that share a teacher or a baseline have it once.
    """
    runs = []
    for setting in args.settings:
        common = {
            "recipe": RECIPES[args.recipe],
            "dataset": setting.dataset,
            "student": setting.student,
            "epochs": args.epochs,
            "device": args.device.type,
            "precision": args.precision,
        }
        students = [
            RunConfig(
                method=name,
                seed=seed,
                teacher=setting.teacher,
                teacher_batch_statistics=args.teacher_batch_statistics,
                **use,
                **common,
            )
            for seed in range(args.seed, args.seed + args.runs)
            for name, use in args.use.items()
        ]
        runs.append(students[0].teacher_config())
        for student in students:
            runs += [] if args.no_baseline else [RunConfig(method="baseline", seed=student.seed, **common)]
            runs.append(student)
    return list(dict.fromkeys(runs))


def share_out(args: argparse.Namespace, runs: int, unfinished: int) -> None:
    """Settle how many runs go side by side and how many threads each gets.

    The threads depend on the command and the machine, not on what is left to do: with other threads, sums are taken in
    another order, and a run that goes on would end with other weights.

    Args:
        args: What `parse_arguments` returned; `jobs` and `threads` are filled in.
        runs: Number of runs of the command.
        unfinished: Number of those that remain.
    """
    cores = torch.get_num_threads()
    if args.jobs is None:
        # Networks this small do not keep two cores busy together: on a CPU each run gets its own.
        args.jobs = cores // (args.threads or 1) if args.reproduce and args.device.type == "cpu" else 1
    if args.threads is None and args.device.type == "cpu":
        args.threads = max(1, cores // max(1, min(args.jobs, runs)))
    args.jobs = max(1, min(args.jobs, unfinished))


def describe(args: argparse.Namespace, runs: list[RunConfig], datasets: dict[str, Dataset], done: int) -> str:
    """Say in words what is about to be run.

    Args:
        args: What `parse_arguments` and `share_out` have filled in.
        runs: What `plan` returned.
        datasets: The data sets by name.
        done: Number of runs that are finished.

    Returns:
        A few lines.
    """
    recipe = RECIPES[args.recipe]
    statistics = "batch norms on batch statistics" if args.teacher_batch_statistics else "in eval mode"
    lines = []
    for data in datasets.values():
        channels, height, width = data.train_images.shape[1:]
        lines.append(
            f"data:     {data.name}, {len(data.train_labels):,} training and {len(data.test_labels):,} test images "
            f"of {channels} x {height} x {width}, {data.num_classes} classes"
        )
    lines.append(
        f"recipe:   {recipe.name}, {recipe.stem} stem, SGD lr {recipe.lr:g} momentum {recipe.momentum:g}"
        f"{' nesterov' if recipe.nesterov else ''} weight decay {recipe.weight_decay:g}, "
        f"batch {recipe.batch_size}, {args.epochs} epochs, lr x 0.1 at 1/2 and 3/4"
    )
    for setting in args.settings:
        where = f" on {setting.dataset}" if len(args.settings) > 1 else ""
        lines += [
            f"student:  resnet{setting.student}{where}, "
            f"loss = {'' if use['task_weight'] is None else format(use['task_weight'], 'g') + ' * '}cross-entropy "
            f"+ {use['weight']:g} * {name}, "
            f"compared at {use['at'] or 'the class logits'}"
            + ("" if use["warmup"] is None else f", its weight rising over {use['warmup']:.1%} of the run")
            for name, use in args.use.items()
        ]
        lines.append(f"teacher:  resnet{setting.teacher}{where}, its last epoch, {statistics}")
    side = f", {args.jobs} side by side" if args.jobs > 1 else ""
    return "\n".join(
        [
            *lines,
            f"device:   {describe_device(args.device, args.precision)}, torch {torch.__version__}",
            f"engine:   {MODES[args.engine]}",
            f"runs:     {len(runs)} ({done} done){side}, into {args.out}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The arguments; those of the process by default.

    Returns:
        Exit code: 0, or 1 after an error, or 128 and the signal's number after Ctrl-C and its like, 141 where nobody
        reads the output any more; argparse itself exits with 2.
    """
    # What somebody has set already, such as nohup, stays.
    answered = [number for number in STOPPING if signal.getsignal(number) is signal.SIG_DFL]
    for number in answered:
        signal.signal(number, _stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal's encoding lacks must not end the command
            stream.reconfigure(errors="replace")
    try:
        return _run(*parse_arguments(arguments))
    except BrokenPipeError:
        # Nobody reads on, as after `| head`. Python would flush once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        print("Stopped: nobody reads the output any more. The same command goes on.", file=sys.stderr)
        return 141
    except KeyboardInterrupt as stop:
        print("\nStopped. The same command goes on after the last whole epoch.", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except (RunError, *EXPECTED) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        for number in answered:
            signal.signal(number, signal.SIG_DFL)


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    runs = plan(args)
    try:
        finished = [run for run in runs if RunFiles.of(args.out, run).result.exists()]
        remove_leftovers(args.out)
    except OSError as error:
        parser.error(f"argument --out: must be a folder that can be searched, got {args.out}: {error.strerror}")
    share_out(args, len(runs), len(runs) - len(finished))
    place = Place(args.data_dir, args.out, str(args.device), args.threads, args.engine, args.tensorboard)
    place.prepare()
    names = dict.fromkeys(setting.dataset for setting in args.settings)
    datasets = {name: load_dataset(name, args.data_dir).to(args.device) for name in names}
    for run in runs:
        # A teacher may take hours: what its student would stumble over is found before.
        if run.teacher is not None and run.seed == args.seed:
            try:
                check_student(run, datasets[run.dataset])
            except Exception as error:  # a loss of somebody else's may raise anything
                parser.error(f"--loss {run.method} at {run.at or LOGITS} does not work here: {error}")
    _check_writable(parser, args.out)
    print(describe(args, runs, datasets, len(finished)), flush=True)

    def report(_run: RunConfig) -> None:
        measure_agreement(runs, args.out, datasets)
        results, left_out = read_finished(args.out)
        for problem in left_out:
            if problem not in told:
                told.append(problem)
                print(f"warning: left out of the table: {problem}", file=sys.stderr, flush=True)
        write_report(args.out, results)

    told: list[str] = []
    overview = Overview(runs, {run.run_id for run in finished})
    train_all(runs, place, datasets, jobs=args.jobs, overview=overview, finished=report)
    report(runs[-1])
    print(f"\n{(args.out / 'results.md').read_text(encoding='utf-8')}")
    print(f"Table: {args.out / 'results.md'}  curves: {args.out / 'curves.png'}  networks: {args.out / 'weights'}")
    return 0


def _stop(number: int, _frame: object) -> None:
    """Answer what a batch system or a closed terminal sends as Ctrl-C is answered."""
    raise KeyboardInterrupt(number)


def finished_runs(out: Path) -> list[RunResult]:
    """Read every finished run under a folder, also those of earlier commands.

    Args:
        out: The output folder.

    Returns:
        The runs, as `read_finished` returns them.
    """
    return read_finished(out)[0]


def read_finished(out: Path) -> tuple[list[RunResult], list[str]]:
    """Read every finished run under a folder, also those of earlier commands, and say what could not be read.

    Args:
        out: The output folder.

    Returns:
        The runs, the earliest first; of those that started within one second, teachers and baselines first. A copy of
        one counts once. And a line for each file that is no run's; hidden ones are passed over.
    """
    order = {"teacher": 0, "baseline": 1}
    results: list[RunResult] = []
    problems = []
    for path in sorted((out / "runs").glob("*.json")):
        if path.name.startswith("."):  # such as those that macOS leaves on other systems' disks
            continue
        try:
            result = read_result(path)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
            continue
        if result not in results:
            results.append(result)
    return sorted(results, key=lambda result: (result.start_time, order.get(result.method, 2))), problems


def _check_writable(parser: argparse.ArgumentParser, out: Path) -> None:
    """Find out before the first epoch whether its checkpoint can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        parser.error(f"argument --out: must be a folder that can be written, got {out}: {error.strerror}")


def _number(kind: type[int] | type[float], text: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        must = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {must}, got {text!r}") from error


def _places(text: str) -> str:
    places = text.replace(" ", "")
    if not all(places.replace("+", ",").split(",")):
        raise argparse.ArgumentTypeError(f"must be {LOGITS}, or module paths with commas or plus signs, got {text!r}")
    return places


def _depth(text: str) -> int:
    depth: int = _number(int, text)
    if depth < 8 or depth % 6 != 2:
        raise argparse.ArgumentTypeError(f"must be 6n+2 with n >= 1 (8, 14, 20, ..., 110), got {text}")
    if depth > DEEPEST:
        raise argparse.ArgumentTypeError(f"must be at most {DEEPEST}, got {text}")
    return depth


def _up_to(most: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        number: int = _number(int, text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
        if number > most:
            raise argparse.ArgumentTypeError(f"must be at most {most:,}, got {text}")
        return number

    return count


def _seed(text: str) -> int:
    seed: int = _number(int, text)
    if not 0 <= seed < 2**30:
        raise argparse.ArgumentTypeError(f"must be in 0..2**30-1, got {text}")
    return seed


def _share(text: str) -> float:
    share: float = _number(float, text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return share


def _weight(text: str) -> float:
    weight: float = _number(float, text)
    if not 0 < weight < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return weight


if __name__ == "__main__":
    sys.exit(main())
