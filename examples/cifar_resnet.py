"""Distil a ResNet on handwritten digits or CIFAR: a teacher, a student, and the same student without a teacher.

commands:
    python examples/cifar_resnet.py                                             # digits, half a minute on 2 cores
    python examples/cifar_resnet.py --dataset cifar10 --runs 3                  # ResNet-20 -> 20, 200 epochs
    python examples/cifar_resnet.py --dataset cifar100 --student 20 --teacher 110 --recipe logits
    python examples/cifar_resnet.py --dataset cifar10 --loss logit,kl,dkd,at    # losses beside one another
    python examples/cifar_resnet.py --dataset cifar10 --loss at,at --weight default,90 --epochs 15 --teacher-epochs 50
    python examples/cifar_resnet.py --dataset cifar10 --loss kl,sp --calibrate  # weights for half of the gradient
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
import io
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from cifar.agreement import measure_agreement
from cifar.arguments import LOGITS, read_arguments
from cifar.calibration import describe_weights
from cifar.checkpoints import CheckpointError, RunFiles, read_result
from cifar.crew import EXPECTED, STOPPING, Place, RunError, train_all
from cifar.data import Dataset, load_dataset
from cifar.engine import MODES
from cifar.files import remove_leftovers
from cifar.progress import Overview
from cifar.records import RunResult
from cifar.report import write_report
from cifar.settings import RECIPES, RunConfig, describe_device, exactly
from cifar.training import check_student


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line, as `read_arguments` does."""
    return read_arguments(arguments, __doc__ or "")


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
                teacher_epochs=args.teacher_epochs,
                **use,
                **common,
            )
            for seed in range(args.seed, args.seed + args.runs)
            for name, use in args.use
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
            f"+ {exactly(use['weight'])} * {name}, "
            f"compared at {use['at'] or 'the class logits'}"
            + ("" if use["warmup"] is None else f", its weight rising over {use['warmup']:.1%} of the run")
            for name, use in args.use
        ]
        last = "" if args.teacher_epochs is None else f" of {args.teacher_epochs}"
        lines.append(f"teacher:  resnet{setting.teacher}{where}, its last epoch{last}, {statistics}")
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
    students = [run for run in runs if run.teacher is not None]
    if args.calibrate is not None:
        runs = [students[0].teacher_config()]
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
    for run in students:
        # A teacher may take hours: what would stop its student is found before.
        if run.seed == args.seed:
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
    if args.calibrate is not None:
        print(f"\n{describe_weights(students, args.out, datasets, args.calibrate)}")
        return 0
    remove_leftovers(args.out)  # of another command, killed meanwhile
    print(f"\n{(args.out / 'results.md').read_text(encoding='utf-8')}")
    print(f"Table: {args.out / 'results.md'}  curves: {args.out / 'curves.png'}  networks: {args.out / 'weights'}")
    return 0


def _stop(number: int, _frame: object) -> None:
    """Answer what a batch system or a closed terminal sends as Ctrl-C is answered."""
    raise KeyboardInterrupt(number)


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


if __name__ == "__main__":
    sys.exit(main())
