"""What a person sees of the runs: a bar on a terminal, a line per epoch, and TensorBoard events if asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm  # type: ignore[import-untyped]  # tqdm ships no types

from cifar.records import EpochRecord
from cifar.settings import RunConfig, exactly

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

REFRESH_SECONDS = 0.5  # how often the numbers are fetched from the device; between two fetches nothing waits for it


class Overview:
    """All runs of a command: their names, how far each is, and about how long the rest takes."""

    def __init__(
        self,
        runs: Sequence[RunConfig],
        done: Collection[str] = (),
        *,
        names: Mapping[str, str] | None = None,
        tell: Callable[[float, str], None] | None = None,
    ) -> None:
        """Start the clock.

        Args:
            runs: The runs of the command.
            done: Names of the files (`RunConfig.run_id`) of those that are finished.
            names: What to call each run, by `run_id`; by default method and seed, with what else tells them apart.
            tell: Takes epochs done and a line of text in place of the screen; for a process that trains one run for
                another.
        """
        self.names = dict(names) if names is not None else _names(runs)
        self.tell = tell
        self._runs = {run.run_id: run for run in runs}
        self._epochs = {name: float(run.epochs if name in done else 0) for name, run in self._runs.items()}
        self._seen = {name: self._epochs[name] for name in done}
        self._start = time.perf_counter()
        self._bar: tqdm | None = None

    def show(self, run: RunConfig, epochs: float, text: str = "") -> None:
        """Note how far a run is, and print a line.

        Args:
            run: The run.
            epochs: Its epochs done so far, whole or in parts.
            text: The line; nothing is printed for an empty one.
        """
        self._epochs[run.run_id] = epochs
        self._seen.setdefault(run.run_id, epochs)  # what an earlier invocation did was not done in this time
        if self.tell is not None:
            self.tell(epochs, text)
            return
        if text:
            rest = f", all runs {self.left()}" if len(self._runs) > 1 else ""
            tqdm.write(text + rest, file=sys.stdout)
            sys.stdout.flush()
        if self._bar is not None:
            under_way = [
                f"{self.names[name]} {epochs:.1f}/{self._runs[name].epochs}"
                for name, epochs in self._epochs.items()
                if name in self._seen and epochs < self._runs[name].epochs
            ]
            self._bar.set_description_str("; ".join(under_way) or "starting", refresh=False)
            self._bar.set_postfix_str(f"left {self.left()}", refresh=False)
            self._bar.n = 100 * self._share()
            self._bar.refresh()

    def drop(self, run: RunConfig, text: str) -> None:
        """Note that a run will not come to its end, so that nobody waits for it, and print a line.

        Args:
            run: The run.
            text: The line.
        """
        for known in (self._runs, self._epochs, self._seen):
            known.pop(run.run_id, None)
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    @contextmanager
    def bar(self) -> Iterator[None]:
        """Show one bar for everything meanwhile, if there is a terminal."""
        shape = "{percentage:3.0f}%|{bar:12}| {desc}{postfix}"
        with tqdm(total=100, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty(), bar_format=shape) as bar:
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None

    def left(self) -> str:
        """Estimate how long all runs together still take.

        Returns:
            The time as `h:mm:ss` or `mm:ss`, or `?` before there is anything to judge by.
        """
        done = sum(_cost(self._runs[name]) * (self._epochs[name] - seen) for name, seen in self._seen.items())
        if done <= 0:
            return "?"
        rest = sum(_cost(run) * (run.epochs - self._epochs[name]) for name, run in self._runs.items())
        return str(tqdm.format_interval((time.perf_counter() - self._start) / done * rest))

    def _share(self) -> float:
        total = sum(_cost(run) * run.epochs for run in self._runs.values())
        return sum(_cost(run) * self._epochs[name] for name, run in self._runs.items()) / total


def _cost(run: RunConfig) -> float:
    """What an epoch costs, in forward passes of a block; a backward pass costs two forward ones."""
    return 3 * (run.student - 2) + (run.teacher - 2 if run.teacher is not None else 0)


def _names(runs: Sequence[RunConfig]) -> dict[str, str]:
    settings = {(run.dataset, run.recipe.name, run.student) for run in runs if run.method != "teacher"}
    weights: dict[str, set[float | None]] = {}
    for run in runs:
        weights.setdefault(run.label, set()).add(run.weight)
    names = {}
    for run in runs:
        name = run.label + f" weight {exactly(run.weight)}" * (len(weights[run.label]) > 1)
        name = name if run.method == "teacher" else f"{name} seed {run.seed}"
        if len(settings) > 1:
            pair = f"resnet{run.student}" + (f" from resnet{run.teacher}" if run.teacher is not None else "")
            name = f"{run.dataset} {pair} {name}"
        names[run.run_id] = name
    return names


class Progress:
    """Shows one run; a context manager.

    Lines go to stdout. The bar goes to stderr, and only if that is a terminal.
    """

    def __init__(self, config: RunConfig, out: Path, *, done: int, tensorboard: bool, overview: Overview) -> None:
        """Start showing a run.

        Args:
            config: The run's settings.
            out: The output folder; TensorBoard events go to `out/tensorboard/<run>`.
            done: Epochs that an earlier invocation has done.
            tensorboard: Whether to write TensorBoard events.
            overview: The runs that this one belongs to.
        """
        self._config = config
        self._overview = overview
        self._done = self._first = done
        self._start = time.perf_counter()
        self._writer: SummaryWriter | None = None
        if tensorboard:
            # Imported here: only those who ask for events need the package.
            from torch.utils.tensorboard import SummaryWriter

            # Events that a killed run wrote after its last checkpoint are dropped.
            self._writer = SummaryWriter(out / "tensorboard" / config.run_id, purge_step=done + 1)
        self._name = overview.names[config.run_id]
        goes_on = f"{self._name}: goes on after epoch {done}" if 0 < done < config.epochs else ""
        overview.show(config, done, goes_on)

    def __enter__(self) -> Progress:
        """Return the object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()

    @contextmanager
    def epoch(self, epoch: int, images: int) -> Iterator[EpochBar]:
        """Show an epoch while it is trained.

        Args:
            epoch: Number of the epoch, from 1.
            images: Training images of the epoch.

        Yields:
            The bar.
        """
        bar = tqdm(
            total=images,
            desc=f"{self._name} {epoch}/{self._config.epochs}",
            unit=" img",
            leave=False,
            dynamic_ncols=True,
            disable=self._overview.tell is not None or not sys.stderr.isatty(),
            bar_format="{desc} {percentage:3.0f}%|{bar:12}| {rate_noinv_fmt} {remaining}{postfix}",
        )
        with bar:
            yield EpochBar(self, bar, images)

    def log(self, record: EpochRecord) -> None:
        """Print the line of a finished epoch, and write its events.

        Args:
            record: What the epoch measured.
        """
        self._done = record.epoch
        terms = ", ".join(f"{name} {value:.4f}" for name, value in record.terms.items())
        self._overview.show(
            self._config,
            record.epoch,
            f"{self._name}  epoch {record.epoch:{len(str(self._config.epochs))}}/{self._config.epochs}"
            f"  lr {record.lr:g}  loss {record.loss:.4f} ({terms})"
            f"  train {record.train_acc:.2f}%  test {record.test_acc_all:.2f}%"
            f"  {record.images_per_second:.0f} images/s  left {self.time_left(0.0)}",
        )
        if self._writer is None:
            return
        scalars = {"lr": record.lr, "loss/total": record.loss}
        scalars |= {f"loss/{name}": value for name, value in record.terms.items()}
        scalars |= {"accuracy/train": record.train_acc, "accuracy/test": record.test_acc_all}
        scalars |= {"accuracy/test_whole_batches": record.test_acc, "images_per_second": record.images_per_second}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, record.epoch)

    def advance(self, share: float) -> str:
        """Note how far the epoch under way is.

        Args:
            share: How much of it is done, in 0..1.

        Returns:
            What `time_left` returns.
        """
        self._overview.show(self._config, self._done + share)
        return self.time_left(share)

    def time_left(self, share: float) -> str:
        """Estimate how long the run still takes.

        Args:
            share: How much of the epoch under way is done, in 0..1.

        Returns:
            The time as `h:mm:ss` or `m:ss`, or `?` before there is anything to judge by.
        """
        done = self._done - self._first + share
        if done == 0:
            return "?"
        left = self._config.epochs - self._done - share
        return str(tqdm.format_interval((time.perf_counter() - self._start) / done * left))


class EpochBar:
    """The bar of one epoch."""

    def __init__(self, progress: Progress, bar: tqdm, images: int) -> None:
        """Wrap the bar; `Progress.epoch` makes it."""
        self._progress = progress
        self._bar = bar
        self._images = images
        self._shown = time.perf_counter()

    def due(self) -> bool:
        """Say whether it is time to fetch the numbers and show them."""
        return time.perf_counter() - self._shown >= REFRESH_SECONDS

    def show(self, images: int, loss: float, terms: Mapping[str, float], train_acc: float) -> None:
        """Show how far the epoch is.

        Args:
            images: Images trained so far in this epoch.
            loss: Mean loss so far.
            terms: Mean of each unweighted term so far.
            train_acc: Training accuracy so far, in %.
        """
        self._shown = time.perf_counter()
        parts = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
        left = self._progress.advance(images / self._images)
        self._bar.set_postfix_str(f"loss {loss:.3f} {parts} acc {train_acc:.1f}% run {left}", refresh=False)
        self._bar.update(images - self._bar.n)
