"""What tests of `pair_layers` build and look at."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from distill import Distiller
from distill.pairing import LayerPairs

_Model = TypeVar("_Model")


def seeded(build: Callable[[], _Model], seed: int) -> _Model:
    """Build a model with weights of its own that are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def paths(pairs: LayerPairs) -> list[tuple[str, str, str]]:
    """The stage and the two paths of each pair."""
    return [(pair.stage, pair.student, pair.teacher) for pair in pairs]


def check_trains(student: nn.Module, teacher: nn.Module, pairs: LayerPairs, x: Tensor) -> None:
    """Put the terms into a Distiller; each of them reaches the student."""
    distiller = Distiller(student, teacher, pairs.terms(), task_loss=None)
    out = distiller(x)
    assert list(out.terms) == [f"stage{k}" for k in range(1, len(pairs) + 1)]
    for loss in out.losses.values():
        slopes = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True, allow_unused=True)
        assert any(slope is not None and slope.abs().max() > 0 for slope in slopes)
