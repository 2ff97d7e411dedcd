"""From the rows of single samples to a batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from distill._store.header import Header, Part
from distill._store.packing import Array, unpack_ids
from distill._store.parts import Batch
from distill._store.shards import Shard, bits, spoken
from distill.topk import TopK


def gather(header: Header, name: str, number: int, samples: list[tuple[Shard, int]], batch: Batch) -> Tensor | TopK:
    """One part of some samples: sequences side by side, the shorter ones padded.

    Args:
        header: What is stored.
        name: The part.
        number: Its place in the header.
        samples: The shard of each sample, and its row there.
        batch: What was asked with: it may say where the rows go.

    Raises:
        ValueError: If a sequence has another length than what was asked with.
        StoreError: If a sample is damaged.
    """
    part = header.parts[name]
    slots: list[Any] = [(slice(at, at + 1),) for at in range(len(samples))]
    lead, filled = [len(samples)], True
    if part.sequence:
        lengths = [int(shard.lengths[number][row]) for shard, row in samples]
        lead.append(max(lengths) if batch.positions is None else batch.positions)
        filled = min(lengths) == lead[1]
        slots = [(at, where) for at, where in enumerate(_places(name, samples, lengths, batch))]
    # Each is copied as soon as it was compared with its checksum, while it is in the cache.
    pieces = (shard.read(row, number) for shard, row in samples)
    if part.kind == "top-k":
        return _topk(header, part, lead, filled, pieces, slots)
    out = (torch.empty if filled else torch.zeros)(*lead, *part.shape, dtype=getattr(torch, part.dtype))
    view = bits(out)
    for (array,), slot in zip(pieces, slots, strict=True):
        view[slot] = array
    return out


def _places(name: str, samples: list[tuple[Shard, int]], lengths: list[int], batch: Batch) -> list[Any]:
    """Where the rows of each sequence go."""
    if batch.mask is None:
        if batch.positions is not None and lengths != [batch.positions] * len(lengths):
            at = next(at for at, length in enumerate(lengths) if length != batch.positions)
            _refuse(name, samples[at], lengths[at], f"{batch.positions} tokens (a padded batch needs its mask)")
        return [slice(0, length) for length in lengths]
    places: list[Any] = []
    for at, (length, shown) in enumerate(zip(lengths, batch.mask.numpy(), strict=True)):
        first = int(shown.argmax())
        if int(shown.sum()) != length:
            _refuse(name, samples[at], length, f"{int(shown.sum())} in the mask")
        whole = slice(first, first + length)
        places.append(whole if shown[whole].all() else shown.nonzero()[0])
    return places


def _refuse(name: str, sample: tuple[Shard, int], length: int, got: str) -> None:
    shard, row = sample
    raise ValueError(f"the {name} of id {spoken(shard.ids[row])} has {length} positions, got {got}")


def _topk(
    header: Header, part: Part, lead: list[int], filled: bool, pieces: Iterable[list[Array]], slots: list[Any]
) -> TopK:
    exact, classes = header.k or 0, header.vocabulary or 0
    k = exact + header.samples
    shape = (*lead, *part.shape)
    indices = torch.empty(*shape, k, dtype=torch.int32)
    log_probs, log_tail = torch.empty(*shape, k, dtype=torch.float16), torch.empty(shape)
    if not filled:  # all classes alike, as logits of 0
        indices[:] = torch.arange(k, dtype=torch.int32) % classes
        log_probs.fill_(-math.log(classes))
        log_tail.fill_(math.log1p(-exact / classes) if exact < classes else -math.inf)
    views = indices.numpy(), bits(log_probs), bits(log_tail)
    for arrays, slot in zip(pieces, slots, strict=True):
        if isinstance(slot[-1], slice):
            unpack_ids(arrays[0], arrays[1] if len(arrays) == 4 else None, views[0][slot])
        else:  # a view of scattered rows there is none
            ids = views[0][slot]
            unpack_ids(arrays[0], arrays[1] if len(arrays) == 4 else None, ids)
            views[0][slot] = ids
        views[1][slot], views[2][slot] = arrays[-2:]
    return TopK(indices, log_probs, log_tail, header.temperature or 1.0, samples=header.samples)
