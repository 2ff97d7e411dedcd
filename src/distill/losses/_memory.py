"""What memories of embeddings do: entries move with the batches, and negatives are of other classes."""

import torch
from torch import Tensor, nn

from distill._checks import check_tensor, is_integer, ordinary
from distill.losses._gather import gather_batches, is_alone
from distill.losses._vectors import normalize_each

if not hasattr(torch.ops.distill, "as_now"):  # the module may be loaded again
    # In parts: `torch.library.custom_op` takes milliseconds at import. The kernel is that of fake tensors too.
    torch.library.define("distill::as_now", "(Tensor tensor) -> Tensor")
    torch.library.impl("distill::as_now", "CompositeExplicitAutograd", torch.clone)


def as_now(tensor: Tensor) -> Tensor:
    """Keep what was read of a memory for the backward pass, which runs after the memory has changed.

    Eager mode keeps it anyway. A compiled backward pass may instead read the memory again, as it is by then, even where
    the forward pass copied it; it never computes the result of an operator again that PyTorch does not know.
    """
    if not torch.compiler.is_compiling():
        return tensor
    kept: Tensor = torch.ops.distill.as_now(tensor)  # pragma: no cover - traced
    return kept  # pragma: no cover - traced


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
        moved = normalize_each(momentum * entries + (1 - momentum) * embeddings, dim=1).to(memory.dtype)
        moves = moved.isfinite().all(1)
        if kept is not None:
            moves = moves & kept
        # A row that must not move writes what the last one that moves writes: no shape depends on how many do.
        rows = torch.arange(len(own), device=own.device)
        source = torch.where(moves, rows, torch.where(moves, rows, 0).amax())
        memory.index_copy_(0, own[source], torch.where(moves.any(), moved, entries)[source])


def enter(queue: Tensor, entered: Tensor, embeddings: Tensor, kept: Tensor | None) -> None:
    """Put embeddings in the places of the oldest entries of a queue, in place; those of all processes, in their order.

    Args:
        queue: `(K, D)`.
        entered: How many have ever entered, int64 without dimensions.
        embeddings: `(N, D)`; N may differ between the processes. One that is not finite does not enter.
        kept: Which of them may enter, bool `(N,)`; None: all.
    """
    with torch.no_grad():
        moves = embeddings.isfinite().all(1)
        if kept is not None:
            moves = moves & kept
        if not is_alone():  # pragma: no cover - in the test's processes
            joined = gather_batches(embeddings=embeddings, moves=moves)
            embeddings, moves = (part for part in joined if part is not None)
        size, number = len(queue), moves.sum()
        rank = moves.cumsum(0) - 1
        moves = moves & (rank >= number - size)  # of more than there is room for the last ones
        place = (entered + rank) % size
        # A row that must not move writes what the last one that moves writes: no shape depends on how many do.
        rows = torch.arange(len(moves), device=moves.device)
        source = torch.where(moves, rows, torch.where(moves, rows, 0).amax())
        place = place[source]
        queue.index_copy_(0, place, torch.where(number > 0, embeddings[source].to(queue.dtype), queue[place]))
        entered.add_(number)


def make_ordinary(module: nn.Module) -> None:
    """The memory of a module that was built or loaded in inference mode must move outside of it."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        if (usable := ordinary(buffer)) is not buffer:
            setattr(module, name, usable)


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
