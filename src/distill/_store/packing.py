"""Class ids of a top-k in 16 bits and a packed 17th."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_NARROW, _WIDE = 1 << 16, 1 << 17  # vocabularies whose ids fit into 16 and into 17 bits
# For each byte of packed bits what its eight ids get: looking it up is the fastest that NumPy has for this.
_HIGH = np.unpackbits(np.arange(256, dtype=np.uint8)[:, np.newaxis], axis=1).astype(np.int32) << 16


def pack_ids(indices: Tensor, vocabulary: int) -> dict[str, Tensor]:
    """Class ids `(..., k)` as they are stored, by the end of the array's name.

    A vocabulary to 65,536 takes 16 bits an id. One to 131,072 takes a bit more: eight to a byte, the first in the
    highest bit, each row in bytes of its own. A larger one takes 32 bits.
    """
    if vocabulary > _WIDE:
        return {"indices": indices.int()}
    packed = {"indices": indices.to(torch.int16)}  # the lowest 16 bits; the file calls them unsigned
    if vocabulary > _NARROW:
        bits = np.packbits((indices >> 16).to(torch.uint8).numpy(), axis=-1)
        packed["indices_high"] = torch.from_numpy(bits)
    return packed


def unpack_ids(stored: Array, high: Array | None, out: Array) -> None:
    """Class ids from what `pack_ids` gave, into an int32 array `(..., k)`."""
    out[...] = stored
    if high is not None:
        bits = _HIGH.take(high.reshape(-1), axis=0).reshape(*high.shape[:-1], -1)
        out |= bits[..., : out.shape[-1]]
