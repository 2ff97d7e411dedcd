"""What CRD's memory does: entries move with the batches, and negatives are of other classes."""

import torch
from torch import Tensor

from distill._checks import check_tensor, is_integer
from distill.losses._vectors import normalize


def move_entries(memory: Tensor, own: Tensor, embeddings: Tensor, kept: Tensor | None, momentum: float) -> None:
    """Let entries become `momentum * entry + (1 - momentum) * embedding`, divided by their norm, in place.

    Args:
        memory: `(M, d)`.
        own: Which entries, `(N,)`, int64.
        embeddings: `(N, d)`. An entry that would not be finite stays as it is.
        kept: Which of them count, bool `(N,)`; None: all.
        momentum: From 0 to less than 1.
    """
    with torch.no_grad():
        entries = memory[own]
        moved = normalize(momentum * entries + (1 - momentum) * embeddings, dim=1).to(memory.dtype)
        moves = moved.isfinite().all(1)
        if kept is not None:
            moves = moves & kept
        # A row that must not move writes what the last one that moves writes: no shape depends on how many do.
        rows = torch.arange(len(own), device=own.device)
        source = torch.where(moves, rows, torch.where(moves, rows, 0).amax())
        memory.index_copy_(0, own[source], torch.where(moves.any(), moved, entries)[source])


def by_class(num_samples: int, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Samples sorted by class, (M,), and where in them each sample's class starts and how many it has, (M, 2)."""
    check_tensor("labels", labels)
    if labels.shape != (num_samples,) or not is_integer(labels):
        raise ValueError(f"labels must be integers ({num_samples},), got {labels.dtype} {tuple(labels.shape)}")
    classes, inverse, counts = torch.unique(labels.cpu(), return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"labels must be of at least 2 classes, got {len(classes)}")
    starts = counts.cumsum(0) - counts
    return inverse.argsort(stable=True), torch.stack([starts[inverse], counts[inverse]], 1)
