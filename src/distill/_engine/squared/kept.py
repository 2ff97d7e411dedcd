"""What is computed from weights once and kept between calls, until the weights hold other numbers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Words of 8 bytes that are added up at a time; of so many words one is looked at itself.
_BLOCK = 128
_EVERY = 997


class Fingerprint(NamedTuple):
    """What tells whether tensors hold the numbers that they held before, whatever has written to them since.

    PyTorch counts the changes of a tensor, but not all: fused optimizers, writes through `.data` or a NumPy view and
    other processes leave no trace. So the numbers themselves are read. That costs a small part of what is kept.
    """

    kinds: list[tuple[Any, ...]]
    numbers: list[Tensor]

    def equals(self, other: "Fingerprint") -> bool:
        """Whether both are of the same numbers. On a GPU it waits for the device."""
        return self.kinds == other.kinds and all(map(torch.equal, self.numbers, other.numbers))


class Kept:
    """Results by name, each with the fingerprint of what it was computed from."""

    def __init__(self) -> None:
        self._results: dict[str, tuple[Fingerprint, Any]] = {}

    def get(self, name: str, tensors: Sequence[Tensor | None], compute: Callable[[], Any], *options: Any) -> Any:
        """What `compute` gives: the result of an earlier call, if tensors and options are what they were then."""
        if not may_keep(tensors):
            return compute()
        with torch.inference_mode(False), torch.no_grad():
            now = fingerprint(tensors, *options)
            last, result = self._results.get(name, (None, None))
            if last is None or not now.equals(last):
                result = compute()
                self._results[name] = now, result
        return result

    def clear(self) -> None:
        """Drop everything."""
        self._results.clear()


def may_keep(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the tensors have numbers that can be read: not traced, not transformed, and in no CUDA graph."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and all(type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta for tensor in given)
        and not (any(tensor.is_cuda for tensor in given) and torch.cuda.is_current_stream_capturing())
    )


def fingerprint(tensors: Sequence[Tensor | None], *options: Any) -> Fingerprint:
    """Read tensors whole, and note options with them.

    Any one number that changes is noticed, to its last bit, and so is whatever changes many. Only numbers that change
    places within a block of 1 KB, uncounted and away from the words that are looked at themselves, are not.
    """
    kinds: list[tuple[Any, ...]] = [options]
    numbers: list[Tensor] = []
    for tensor in tensors:
        if tensor is None:
            kinds.append(())
            continue
        version = None if tensor.is_inference() else tensor._version
        kinds.append((version, tensor.dtype, tensor.device, tensor.shape))
        numbers += _numbers(tensor.detach())
    return Fingerprint(kinds, numbers)


def _numbers(tensor: Tensor) -> list[Tensor]:
    size = tensor.element_size()
    if not tensor.is_contiguous() or tensor.storage_offset() * size % 8:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    flat = tensor.view(-1)
    whole = len(flat) * size // (8 * _BLOCK) * (8 * _BLOCK) // size  # the numbers in full blocks
    words = flat[:whole].view(torch.int64)
    # The sum of integers wraps and is exact: the same in any order, and not the same if one of them differs.
    sums = words.view(len(words) // _BLOCK, _BLOCK).sum(1)
    return [sums, words[::_EVERY].clone(), flat[whole:].clone().view(torch.uint8)]
