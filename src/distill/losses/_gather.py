"""The batches of all processes as one, for losses that compare the samples of a batch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override


def is_alone() -> bool:
    """Whether there is no other process whose batch could be gathered."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def gather_batches(**tensors: Tensor | None) -> list[Tensor | None]:
    """Join what the processes hold along the samples, dimension 0, in the order of their ranks.

    The gradient of a process is that of its own samples, multiplied by the number of processes: the mean of the
    processes' gradients, which DDP and FSDP take, is then that of one process with the whole batch. So backward needs
    no further exchange, but all processes must compute the same from what is gathered.

    Args:
        tensors: What to join, by name, `(N, ...)`; None stays None. N may differ between the processes.

    Returns:
        The joined tensors, in the order given.

    Raises:
        ValueError: If a tensor differs between the processes in more than N, only some of them give it, or the tensors
            of a process have not the same N. All processes raise it, so that none waits for another.
    """
    described = [tensor if tensor is None else (tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors.values()]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, described)
    _check_everywhere(list(tensors), everywhere)
    sizes = [shapes[0][0][0] for shapes in everywhere]
    return [tensor if tensor is None else _join(tensor, sizes) for tensor in tensors.values()]


def _check_everywhere(names: list[str], everywhere: list[Any]) -> None:
    for name, *found in zip(names, *everywhere, strict=True):
        if len({one if one is None else (one[0][1:], one[1]) for one in found}) > 1:
            got = " and ".join("None" if one is None else f"{one[1]} {one[0]}" for one in found)
            raise ValueError(
                f"with gather=True {name} must have the same shape and dtype on all processes, but for the number of "
                f"samples in dimension 0, got {got}"
            )
    for rank, found in enumerate(everywhere):
        shapes = {name: one[0] for name, one in zip(names, found, strict=True) if one is not None}
        if len({shape[:1] for shape in shapes.values()}) > 1:
            raise ValueError(
                f"with gather=True all must have the same samples in dimension 0, got {shapes} on process {rank}"
            )


def _join(tensor: Tensor, sizes: list[int]) -> Tensor:
    """The tensors of all processes, of so many samples each, one after the other."""
    own = tensor.detach()
    missing = max(sizes) - len(own)
    if missing:  # all must send as much
        own = torch.cat([own, own.new_zeros(missing, *own.shape[1:])])  # pragma: no cover - in a process of its own
    sent = own.contiguous().flatten().view(torch.uint8)  # bytes: every backend knows them
    received = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(received, sent)
    pieces = [piece.view(tensor.dtype).reshape(own.shape)[:size] for piece, size in zip(received, sizes, strict=True)]
    if tensor.requires_grad:
        pieces[dist.get_rank()] = _ScaledGradient.apply(tensor, len(sizes))  # type: ignore[no-untyped-call]
    return torch.cat(pieces)


class _ScaledGradient(torch.autograd.Function):
    """The identity, with a gradient that is multiplied."""

    @staticmethod
    @override
    def forward(tensor: Tensor, factor: int) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
