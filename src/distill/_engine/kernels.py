"""The Triton kernels of a GPU, from where they are used: tried where there is one, and imported nowhere else."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def kernel_first(kernel: Callable[[], Any], block: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give a block function that takes the kernel where that can do the rows, for losses that are part of another."""

    def run(student: Tensor, teacher: Tensor, *rest: Any, **options: Any) -> Tensor:
        *labels, factors, gradient, _ = rest
        values = student.new_empty(len(student))
        counts, out = (None, None) if factors is None else (factors.view(-1), gradient)
        if run_kernel(kernel, student, teacher, *labels, values, counts, out, **options):
            return values
        return block(student, teacher, *rest, **options)

    return run


def run_kernel(kernel: Callable[[], Any] | None, student: Tensor, *rest: Any, **options: Any) -> bool:
    """Let a kernel, if there is one, fill in values and gradient, and say whether it did; `rest` as in `triton.run`."""
    _, *labels, values, _, _ = rest
    if kernel is None or (kernels := _kernels(student, values.dtype)) is None:
        return False
    return bool((kernel() if labels else functools.partial(kernels.run, kernel()))(student, *rest, **options))


def scale(gradient: Tensor, factor: Tensor) -> None:
    """Multiply in place, but not by one: that would read and write the whole gradient for nothing."""
    kernels = _kernels(gradient, factor.dtype)
    if kernels is not None and gradient.is_contiguous():
        kernels.scale(gradient, factor)
    elif gradient.is_cuda or float(factor) != 1:  # on a GPU the comparison would wait for the device
        gradient.mul_(factor)


def _kernels(x: Tensor, dtype: torch.dtype) -> ModuleType | None:
    """Give the module of Triton kernels, where they can compute on this tensor in this dtype."""
    return _import_triton(x.device) if x.is_cuda and dtype == torch.float32 else None


@functools.cache
def _import_triton(device: torch.device) -> ModuleType | None:
    """Give the module of Triton kernels if they run on a device; only there is Triton imported at all."""
    try:
        kernels = importlib.import_module("distill._engine.triton")
    except ImportError:
        return None
    try:
        kernels.scale(torch.zeros(16, device=device), torch.ones((), device=device))
    except Exception as error:  # whatever Triton raises for a GPU too old or a missing C compiler
        warnings.warn(
            f"Triton does not run on {device}, so that large losses take plain operations in blocks of rows: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return kernels
