"""All runs of a command, one after the other or several side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm  # type: ignore[import-untyped]  # tqdm ships no types

from cifar.checkpoints import CheckpointError, RunFiles
from cifar.claims import Claims
from cifar.data import Dataset, load_dataset
from cifar.engine import Mode, keep_freed_memory
from cifar.progress import Overview
from cifar.settings import RunConfig
from cifar.steps import NonFiniteLossError
from cifar.training import train

if TYPE_CHECKING:  # the second is not there on Windows
    from multiprocessing.context import ForkServerContext, SpawnContext

# Imported once, by the process that the workers are forked from: a worker then starts in a tenth of a second.
# PyTorch imports its compiler with the first optimizer.
PRELOADED = ["torch", "torch._dynamo", "sklearn.datasets", "scipy.special", "matplotlib.figure", "tqdm", "distill"]
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
LOOK = 1.0  # seconds between two looks at what other commands do
# What a run may stop with for reasons that its message explains.
EXPECTED = (CheckpointError, NonFiniteLossError, ImportError, OSError, ValueError)


class RunError(Exception):
    """A run in a process of its own stopped; the message says which and why."""


@dataclass(frozen=True)
class Place:
    """Where and how runs are trained.

    Attributes:
        data_dir: Folder of the data sets.
        out: Folder of all results.
        device: Name of the device.
        threads: Threads of the CPU per run; None leaves PyTorch's number.
        mode: How the steps are run, see `cifar.engine.MODES`.
        tensorboard: Whether to write TensorBoard events.
    """

    data_dir: Path
    out: Path
    device: str
    threads: int | None
    mode: Mode
    tensorboard: bool

    def prepare(self) -> None:
        """Set PyTorch up in this process."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if (index := torch.device(self.device).index) is not None:
            torch.cuda.set_device(index)  # a graph is captured on the current device
        # The shapes of a run never change: the fastest convolution is looked for once.
        torch.backends.cudnn.benchmark = True
        keep_freed_memory()


def train_all(
    runs: Sequence[RunConfig],
    place: Place,
    datasets: Mapping[str, Dataset],
    *,
    jobs: int,
    overview: Overview,
    finished: Callable[[RunConfig], None],
) -> None:
    """Train every run that is not done yet; a student waits for its teacher.

    A run that another command trains in the same folder is left to it, and waited for after all others.

    Args:
        runs: The runs; they start in this order, except that one which has to wait lets others go first.
        place: Where and how.
        datasets: The data sets by name, on the device; for runs in this process.
        jobs: How many runs are trained side by side. 1 trains them in this process.
        overview: Shows how far everything is.
        finished: Called with each run that this command has brought to its end, in this process.

    Raises:
        RunError: If a run in a process of its own stops before its end; the others are stopped too, and lose the epoch
            under way. And if the loss of a student or baseline is no longer finite, which stops none of the others:
            after these.
        CheckpointError, NonFiniteLossError, ImportError, OSError, ValueError: As `train`, for a run in this process.
    """
    diverged: list[str] = []

    def lost(run: RunConfig, message: str) -> None:
        diverged.append(message)
        overview.drop(run, message)

    with Claims(place.out) as claims:
        queue = _Queue(runs, place.out, claims, overview)
        if jobs == 1:
            for run in queue.wait():
                data = datasets[run.dataset]
                try:
                    train(run, data, place.out, tensorboard=place.tensorboard, mode=place.mode, overview=overview)
                except NonFiniteLossError as error:
                    if run.method == "teacher":
                        raise
                    lost(run, f"{overview.names[run.run_id]}: {error}")
                else:
                    finished(run)
                queue.end(run)
        else:
            with overview.bar(), _Processes(place) as processes:
                _side_by_side(queue, processes, jobs, overview, finished, lost)
    if diverged:
        raise RunError("; ".join(diverged))


def _side_by_side(
    queue: _Queue,
    processes: _Processes,
    jobs: int,
    overview: Overview,
    finished: Callable[[RunConfig], None],
    lost: Callable[[RunConfig, str], None],
) -> None:
    while queue.left or processes.active:
        while len(processes.active) < jobs and (run := queue.next()) is not None:
            queue.hand_over(run, processes.start(run, overview.names[run.run_id]))
        if not processes.active:
            if queue.left:
                time.sleep(LOOK)
            continue
        for run, message in processes.messages():
            if message is not None and not isinstance(message, str):
                overview.show(run, *message)
                continue
            if message is None:
                finished(run)
            else:
                lost(run, message)
            queue.end(run)


class _Queue:
    """The runs of a command that are not done; those that another command trains come last."""

    def __init__(self, runs: Sequence[RunConfig], out: Path, claims: Claims, overview: Overview) -> None:
        self.left = dict.fromkeys(runs)
        self._open = dict.fromkeys(runs)  # those not under way in this command
        self._out, self._claims, self._overview = out, claims, overview
        self._told: set[tuple[RunConfig, str]] = set()

    def next(self) -> RunConfig | None:
        """Claim the first run that can be trained now, and return it; None if there is none."""
        for run in list(self._open):
            if RunFiles.of(self._out, run).load_result(run) is not None:
                self._overview.show(run, run.epochs)
                del self._open[run], self.left[run]
            elif run.teacher is not None and run.teacher_config() in self.left:
                continue
            elif self._claims.take(run):
                del self._open[run]
                return run
            else:
                self._tell(run)
        return None

    def wait(self) -> Iterator[RunConfig]:
        """Yield every run as soon as it can be trained here."""
        while self.left:
            if (run := self.next()) is not None:
                yield run
            elif self.left:
                time.sleep(LOOK)

    def hand_over(self, run: RunConfig, pid: int) -> None:
        """Note which process trains a run."""
        self._claims.hand_over(run, pid)

    def end(self, run: RunConfig) -> None:
        """Note that a run is done, or will not be."""
        del self.left[run]
        self._claims.release(run)

    def _tell(self, run: RunConfig) -> None:
        if (told := (run, self._claims.holder(run))) not in self._told:
            self._told.add(told)
            name = self._overview.names[run.run_id]
            tqdm.write(f"{name}: is being trained by {told[1]}; other runs go first", file=sys.stdout)
            sys.stdout.flush()


class _Processes:
    """The processes of the runs under way; leaving the context stops them."""

    def __init__(self, place: Place) -> None:
        self.active: dict[Connection, tuple[multiprocessing.process.BaseProcess, RunConfig]] = {}
        self._place = place
        # A fork of this process could not use CUDA. On Linux the workers are forks of a process that only imports.
        self._context: SpawnContext | ForkServerContext
        if sys.platform == "linux":
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload(PRELOADED)
        else:
            self._context = multiprocessing.get_context("spawn")

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process, _run in self.active.values():
            process.kill()  # its files are whole at any moment
        for process, _run in self.active.values():
            process.join()

    def start(self, run: RunConfig, name: str) -> int:
        """Train a run in a new process, and return its number."""
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(run, name, self._place, there), daemon=True)
        # Ctrl-C reaches every process of a terminal, and a batch system ends a whole job, but only this one answers
        # it, and ends the others. Inherited, so that there is no moment at which they would.
        answers = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
        try:
            process.start()
        finally:
            for number, answer in answers.items():
                signal.signal(number, answer)
        there.close()  # the other process has it now; its end is seen as the end of the pipe
        self.active[here] = process, run
        return int(process.pid or 0)

    def messages(self) -> Iterator[tuple[RunConfig, tuple[float, str] | str | None]]:
        """Wait for news: epochs done and a line of text, None at the run's end, or how its loss ceased to be finite."""
        ready = wait(list(self.active))
        for connection in list(self.active):
            if connection not in ready:
                continue
            process, run = self.active[connection]
            try:
                kind, *content = connection.recv()
            except EOFError:
                kind, content = "end", []
            if kind == "shown":
                yield run, (content[0], content[1])
                continue
            process.join()
            del self.active[connection]
            if kind == "diverged" and run.method != "teacher":
                yield run, content[0]
                continue
            if kind in ("error", "diverged"):
                raise RunError(content[0])
            if process.exitcode != 0:
                raise RunError(
                    f"the process that trained {run.run_id} ended with exit code {process.exitcode}; "
                    "the same command goes on after its last whole epoch"
                )
            yield run, None


def _work(run: RunConfig, name: str, place: Place, connection: Connection) -> None:
    """Train one run in this process and tell the parent about it."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own default leaves a semaphore behind when this process is stopped
    place.prepare()
    tell = lambda epochs, text: connection.send(("shown", epochs, text))  # noqa: E731
    overview = Overview([run], names={run.run_id: name}, tell=tell)
    try:
        data = load_dataset(run.dataset, place.data_dir).to(torch.device(place.device))
        train(run, data, place.out, tensorboard=place.tensorboard, mode=place.mode, overview=overview)
    except EXPECTED as error:
        connection.send(("diverged" if isinstance(error, NonFiniteLossError) else "error", f"{name}: {error}"))
        raise SystemExit(1) from error


def _end_with_parent() -> None:
    """A killed parent must not leave processes behind that write into a folder which its next call uses."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
