"""Made-up runs of the CIFAR example for the tests of records, tables and pictures."""

import random
from dataclasses import replace

from cifar.records import EpochRecord, RunResult


def epoch(number: int, test_acc: float, **changes) -> EpochRecord:
    values = {"lr": 0.1, "loss": 1.5, "terms": {"task": 1.25}, "train_acc": 50.0, "test_acc_all": test_acc}
    values |= {"images_per_second": 640.0, "seconds": 2.5} | changes
    return EpochRecord(epoch=number, test_acc=test_acc, **values)


def run(method: str = "baseline", accs: tuple[float, ...] = (90.0,), last: float | None = None, **changes) -> RunResult:
    """A run with the given `test_acc` per epoch and the given `acc_last`."""
    history = [epoch(number, acc) for number, acc in enumerate(accs, 1)]
    history[-1] = replace(history[-1], test_acc_all=accs[-1] if last is None else last)
    distilled = method not in ("teacher", "baseline")
    values = {"recipe": "pooled", "dataset": "cifar10", "student": "resnet20", "seed": 0}
    values |= {"teacher": "resnet20" if distilled else "-", "weight": 1.0 if distilled else None}
    values |= {"start_time": "2025-03-01T12:00:00+00:00", "lr": 0.1, "batch_size": 128}
    values |= {"device": "cpu", "torch": "2.9.0", "history": tuple(history)} | changes
    return RunResult(method=method, **values)


def course(method: str, epochs: int, seed: int, **changes) -> RunResult:
    """A run with a plausible course: steep, then noisy."""
    noise = random.Random(f"{method} {seed}")
    accs = tuple(90 - 50 * 0.9**number + noise.gauss(0, 2) for number in range(1, epochs + 1))
    return run(method, accs, seed=seed, **changes)
