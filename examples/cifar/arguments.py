"""The command line of `cifar_resnet.py`: its options, what they must be, and what follows from them."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cifar.engine import MODES, find_mode
from cifar.losses import SETUPS, find_setup
from cifar.reproduce import RUNS, Setting, published_settings
from cifar.settings import RECIPES, TEACHER_SEED, find_device, find_precision, find_usual
from distill import create_loss, list_losses

DEEPEST, MOST_RUNS, MOST_EPOCHS, MOST_THREADS = 1202, 1000, 10**6, 256
EPOCHS = {"digits": 20, "cifar10": 200, "cifar100": 200}
LOGITS = "logits"
DEFAULT = "default"


def build_parser(text: str) -> argparse.ArgumentParser:
    """Return the parser of the command line.

    Args:
        text: What `--help` says of the command: a first line, an empty one, and the rest.
    """
    summary, _, rest = text.partition("\n\n")
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
    add(
        "--weight",
        type=_weights,
        metavar="WEIGHTS",
        help="of the loss, or of each of several after commas: a number, or default: the recipe's for logit, "
        "the published one for others; a loss that is named twice is compared at two weights",
    )
    add("--at", type=_places, metavar="PATHS", help="what the loss compares: logits, or modules, see cifar/losses.py")
    add(
        "--warmup",
        type=_share,
        metavar="SHARE",
        help="of the run, over which the loss's weight rises from 0; default: the published one, 0 for most",
    )
    add("--task-weight", type=_weight, help="of the cross-entropy; default: the published one, 1 for most")
    add(
        "--calibrate",
        type=_part,
        nargs="?",
        const=0.5,
        metavar="SHARE",
        help="train the teacher alone, then print for each --loss the weight with which it starts with this share of "
        "the student's gradient; default: 0.5",
    )
    add("--epochs", type=_up_to(MOST_EPOCHS), help=f"default: {epochs}")
    add(
        "--teacher-epochs",
        type=_up_to(MOST_EPOCHS),
        metavar="EPOCHS",
        help="of the teacher, which is trained, or found under --out; default: as many as the students'",
    )
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


def read_arguments(arguments: Sequence[str] | None, text: str) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line, refuse what cannot be run, and fill in what depends on other options.

    Args:
        arguments: The arguments; those of the process by default.
        text: As in `build_parser`.

    Returns:
        The parser, for errors found later, and the arguments.
    """
    parser = build_parser(text)
    args = parser.parse_args(arguments)
    args.losses = [name.strip() for name in args.loss.split(",")]
    for name in dict.fromkeys(args.losses):
        try:
            if name not in SETUPS or name not in list_losses():
                create_loss(name)
        except (KeyError, ImportError) as error:
            parser.error(f"argument --loss: {error.args[0]}")
        except Exception as error:  # a loss of somebody else's may raise anything
            parser.error(f"argument --loss: {name!r} cannot be built without arguments: {error}")
    weights = [DEFAULT] * len(args.losses) if args.weight is None else args.weight.split(",")
    if len(weights) != len(args.losses):
        parser.error(f"argument --weight: must be one for each --loss, {len(args.losses)}, got {len(weights)}")
    for option in ("at", "warmup", "task_weight"):
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
    if args.calibrate is not None:
        none_of = ["weight", "warmup", "runs", "no_baseline", "reproduce"]
        _refuse(parser, args, arguments, none_of, "not with --calibrate, which trains no student")
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
    args.teacher_epochs = None if args.teacher_epochs == args.epochs else args.teacher_epochs
    args.use = []
    for name, weight in zip(args.losses, weights, strict=True):
        if (use := (name, _use(name, weight, args))) not in args.use:
            args.use.append(use)
    several = [f"{name} at {use['at']}" for name, use in args.use if "," in (use["at"] or "")]
    if args.calibrate is not None and several:
        parser.error(f"argument --calibrate: a loss must compare one place, which --at sets, got {several[0]}")
    return parser, args


def _use(name: str, weight: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return how a loss is used: the fields `weight`, `at`, `warmup` and `task_weight` of its runs."""
    setup, usual = find_setup(name), find_usual(name, RECIPES[args.recipe])
    task_weight = setup.task_weight if args.task_weight is None else args.task_weight
    return {
        "weight": usual.weight if weight == DEFAULT else float(weight),
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
    fixed = [*("dataset", "student", "teacher", "teacher_epochs", "loss", "weight", "at", "warmup", "task_weight")]
    fixed += ["no_baseline"]
    _refuse(parser, args, arguments, fixed, "fixed by --reproduce")
    try:
        args.settings = published_settings(args.recipe, args.only)
    except ValueError as error:
        parser.error(f"argument --only: {error}")


def _refuse(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    arguments: Sequence[str] | None,
    names: Sequence[str],
    why: str,
) -> None:
    """End with an error if one of these options is given."""
    given = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(names)))  # without the defaults
    for name in names:
        if getattr(given, name) is not None:
            parser.error(f"argument --{name.replace('_', '-')}: {why}, got {getattr(args, name)!r}")


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


def _part(text: str) -> float:
    part: float = _number(float, text)
    if not 0 < part < 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 1, got {text}")
    return part


def _weights(text: str) -> str:
    weights = text.replace(" ", "").split(",")
    for weight in weights:
        if weight != DEFAULT:
            _weight(weight)
    return ",".join(weights)


def _weight(text: str) -> float:
    weight: float = _number(float, text)
    if not 0 < weight < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return weight
