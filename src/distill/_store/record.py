"""Runs a live teacher and keeps what its modules give, to be stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from distill._distiller.evaluate import call
from distill._distiller.taps import Tap, check_path, run_with_taps
from distill._distiller.terms import TeacherOutput


@torch.no_grad()
def record(model: nn.Module, inputs: Any, at: Sequence[str] = ()) -> TeacherOutput:
    """Run a teacher and return its output and features as a `Term` would see them, for `TeacherWriter.add`.

    Args:
        model: The teacher, in eval mode.
        inputs: As a Distiller takes them: a tensor is passed as `model(x)`, a tuple as `model(*x)`, a mapping as
            `model(**x)`, anything else as `model(x)`.
        at: Paths, as in a `Term`: `"layer4"`, `"fc:input"`, `"block#1"`.

    Returns:
        What the model returned, and the features by path.

    Raises:
        TypeError: If the model is no module.
        ValueError: If it is in training mode, a path names no module, or the module is not called.

    Examples:
        >>> import torch
        >>> from distill import record
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 3)).eval()
        >>> output, features = record(teacher, torch.randn(2, 8), at=["0"])
        >>> features["0"].shape
        torch.Size([2, 4])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be an nn.Module, got {type(model).__name__}")
    if any(module.training for module in model.modules()):
        raise ValueError("a teacher whose answers are stored must be in eval mode (model.eval()), got training mode")
    for path in at:
        check_path(model, path, side="teacher")
    taps = [Tap(path, copy=True) for path in dict.fromkeys(at)]
    output, seen = run_with_taps(model, taps, lambda: call(model, inputs), side="teacher")
    return TeacherOutput(output, {tap.path: value for tap, value in seen.items()})


record.__module__ = "distill"  # a pickle that names it outlives a move
