"""What the benchmarks share: interleaved timing, its statistics, and the peak memory of a step."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

Step = Callable[[], object]
Clock = Callable[[Step, int], float]  # a step and how often to run it in a row -> seconds per run
STATUS = Path("/proc/self/status")  # Linux: VmRSS is what the process holds now, VmHWM the most it ever held
CLEAR_REFS = Path("/proc/self/clear_refs")  # writing 5 sets VmHWM back to VmRSS


def wall_clock(device: torch.device) -> Clock:
    """Return a clock that runs the step in a row and divides; on CUDA it waits for the device before and after."""

    def clock(step: Step, inner: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(inner):
            step()
        _wait(device)
        return (time.perf_counter() - start) / inner

    return clock


def find_clock(device: torch.device) -> Clock:
    """Return the clock for a loss: `triton.testing.do_bench` on CUDA, which empties the cache between runs."""
    if device.type != "cuda":
        return wall_clock(device)
    # By name: Triton comes with PyTorch for CUDA, and only there, so elsewhere type checkers would miss it.
    do_bench = importlib.import_module("triton.testing").do_bench
    return lambda step, _: do_bench(step, return_mode="median") / 1e3


def time_steps(
    steps: Mapping[str, Step], repeats: int, inner: Mapping[str, int] | int, clock: Clock
) -> dict[str, list[float]]:
    """Time the steps, interleaved, in an order that turns from one repetition to the next.

    Args:
        steps: The steps by name.
        repeats: Repetitions.
        inner: Steps in a row that make one measurement, by name or for all.
        clock: Measures one of them.

    Returns:
        Seconds per step, one value for each repetition, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(clock(steps[name], inner if isinstance(inner, int) else inner[name]))
    return seconds


def find_repeats(seconds: Mapping[str, float], budget: float) -> tuple[int, dict[str, int]]:
    """Choose how often to measure steps that take so long.

    Args:
        seconds: What one run of each step takes, by name.
        budget: Seconds that all measurements may take together; five repetitions are made whatever it says.

    Returns:
        Repetitions, an odd number from 5 to 101, and for each step how many in a row make a measurement of about 2 ms.
    """
    seconds = {name: max(value, 1e-6) for name, value in seconds.items()}
    inner = {name: max(1, round(0.002 / value)) for name, value in seconds.items()}
    repeats = round(budget / sum(inner[name] * value for name, value in seconds.items()))
    return min(max(repeats, 5), 101) | 1, inner


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the two quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def peak_extra_bytes(step: Step, device: torch.device) -> int | None:
    """Measure how much more memory a step holds at its peak than before it; its result counts.

    On the CPU it is the resident memory of the whole process, so nothing else may run in it; free blocks that the
    allocator keeps are given back first, or the step would seem to need less.

    Args:
        step: What to run. Run it once before, so that what is set up on first use is not counted.
        device: Where it runs.

    Returns:
        Bytes, or None where the system does not tell (CPU, other than Linux).
    """
    gc.collect()
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        with contextlib.suppress(OSError, AttributeError):  # another C library than GNU's
            ctypes.CDLL(None).malloc_trim(0)
        CLEAR_REFS.write_text("5")
        before = _status("VmRSS")
        step()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def settle_allocator() -> None:
    """Bring the allocator to where a training process has it after its first step.

    GNU's C library takes blocks from the system and gives them back one by one until a block of that size was freed,
    of at most 32 MiB, and keeps smaller ones from then on. In a fresh process a tensor of 4 MB would cost the system's
    fresh memory at every call, which takes several times as long as reading and writing it.
    """
    torch.ones(31 << 18)


def limit_memory(spare: int = 1 << 30) -> None:
    """Let allocations fail, as a Python error, where the system would begin to kill processes; Linux only.

    Args:
        spare: Bytes to leave to everybody else.
    """
    if sys.platform != "linux":
        return
    import resource

    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError):  # MemAvailable counts what the file cache would give back, too
        available = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + max(available - spare, 0), resource.RLIM_INFINITY))


def describe_machine(device: torch.device) -> str:
    """Name the hardware and the number of threads, such as `"AMD EPYC, 2 cores, 2 threads"`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _kilobytes(path: Path, name: str) -> int:
    """Read a line such as `VmRSS:  1234 kB`, in bytes."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{path} must have a line {name!r}")


def _status(name: str) -> int:
    return _kilobytes(STATUS, name)
