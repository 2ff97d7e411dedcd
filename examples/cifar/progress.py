"""What a person sees of a run: a bar per epoch on a terminal, a line per epoch, and TensorBoard events if asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm  # type: ignore[import-untyped]  # tqdm ships no types

from cifar.report import EpochRecord
from cifar.settings import RunConfig

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

REFRESH_SECONDS = 0.5  # how often the numbers are fetched from the device; between two fetches nothing waits for it


class Progress:
    """Shows one run; a context manager.

    Lines go to stdout. The bar goes to stderr, and only if that is a terminal.
    """

    def __init__(self, config: RunConfig, out: Path, *, done: int, tensorboard: bool) -> None:
        """Start showing a run.

        Args:
            config: The run's settings.
            out: The output folder; TensorBoard events go to `out/tensorboard/<run>`.
            done: Epochs that an earlier invocation has done.
            tensorboard: Whether to write TensorBoard events.
        """
        self._config = config
        self._done = self._first = done
        self._start = time.perf_counter()
        self._writer: SummaryWriter | None = None
        if tensorboard:
            # Imported here: only those who ask for events need the package.
            from torch.utils.tensorboard import SummaryWriter

            # Events that a killed run wrote after its last checkpoint are dropped.
            self._writer = SummaryWriter(out / "tensorboard" / config.run_id, purge_step=done + 1)
        self._name = config.label if config.method == "teacher" else f"{config.label} seed {config.seed}"
        if 0 < done < config.epochs:
            print(f"{self._name}: goes on after epoch {done}", flush=True)

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
            disable=not sys.stderr.isatty(),
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
        print(
            f"{self._name}  epoch {record.epoch:{len(str(self._config.epochs))}}/{self._config.epochs}"
            f"  lr {record.lr:g}  loss {record.loss:.4f} ({terms})"
            f"  train {record.train_acc:.2f}%  test {record.test_acc_all:.2f}%"
            f"  {record.images_per_second:.0f} images/s  left {self.time_left(0.0)}",
            flush=True,
        )
        if self._writer is None:
            return
        scalars = {"lr": record.lr, "loss/total": record.loss}
        scalars |= {f"loss/{name}": value for name, value in record.terms.items()}
        scalars |= {"accuracy/train": record.train_acc, "accuracy/test": record.test_acc_all}
        scalars |= {"accuracy/test_whole_batches": record.test_acc, "images_per_second": record.images_per_second}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, record.epoch)

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
        left = self._progress.time_left(images / self._images)
        self._bar.set_postfix_str(f"loss {loss:.3f} {parts} acc {train_acc:.1f}% run {left}", refresh=False)
        self._bar.update(images - self._bar.n)
