"""How much the masks of an accumulated batch count: what its means are divided by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor


def count_masks(masks: list[Any], means: Collection[str], idle: Collection[str] = ()) -> dict[str, Tensor] | None:
    """Count the masks of all micro-batches.

    Args:
        masks: Of each micro-batch: one for all terms, a mapping by name, or None.
        means: The terms that are means over what their mask counts.
        idle: Those of weight 0, counted where they have masks: a callback may switch them on before the step.

    Returns:
        By term, what its masks count; under `""` alone where they are for all terms. None where a mean has no mask.
    """
    names = [*means, *idle] if any(isinstance(mask, Mapping) for mask in masks) else [""]
    found = {}
    for name in names:
        each: list[Any] = [mask.get(name) if isinstance(mask, Mapping) else mask for mask in masks]
        if each and all(isinstance(mask, Tensor) for mask in each):
            found[name] = torch.stack([mask.float().sum() for mask in each]).sum()
        elif name not in idle:
            return None
    return found or None


def everywhere(counts: dict[str, Tensor], reduce: Callable[[Tensor], Tensor], device: Any) -> Any:
    """The counts of all processes: one number where there is one, else by term."""
    totals = reduce(torch.stack([*counts.values()]).to(device))
    return totals[0] if [*counts] == [""] else dict(zip(counts, totals, strict=True))


def divided(count: Any) -> Tensor | None:
    """What all means are divided by: with counts by term the largest, so that no factor of one is large."""
    return torch.stack([*count.values()]).max() if isinstance(count, dict) else count


def factor(count: Any, name: str) -> Any:
    """What a mean over `divided(count)` must be multiplied by to be one over its own count.

    Raises:
        ValueError: If it was not counted.
    """
    if not isinstance(count, dict):
        return 1.0
    if name not in count:
        raise ValueError(
            f"the masks must have one for {name!r} as for the other means: its weight was 0 when they were counted"
        )
    own = count[name]
    return torch.stack([*count.values()]).max() / torch.where(own == 0, 1, own)
