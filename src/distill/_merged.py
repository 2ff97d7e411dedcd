"""Rows of logits as k given classes and one for all the rest: what `TopK` and the engine compute with it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distill._checks import may_look

_BLOCK = 2**20  # elements of logits that are widened and searched at a time


def merge_rest(logits: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Logits of k + 1 classes: the given ones, and one that has the probability of all others together.

    The softmax over the temperature of what comes is that of the logits, with the others added up. What is added is
    never found as what the given ones leave of one, which has no digits left where that is little.

    Args:
        logits: `(..., C)`.
        indices: `(..., k)`, int64, different ones.
        temperature: What the logits will be divided by.

    Returns:
        `(..., k + 1)`; with k = C there are no others, and it is `(..., C)`.
    """
    given = logits.gather(-1, indices)
    if indices.shape[-1] == logits.shape[-1]:
        return given
    others = logits.scatter(-1, indices, -math.inf)
    others = others if temperature == 1 else others / temperature
    largest = others.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    total = (others - largest).exp().sum(-1, keepdim=True)
    none = total == 0
    rest = (total.masked_fill(none, 1.0).log() + largest) * temperature
    return torch.cat([given, rest.masked_fill(none, -math.inf)], -1)


def log_probs_of(logits: Tensor, indices: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the given classes, and of the rest."""
    merged = torch.log_softmax(merge_rest(logits, indices, temperature) / temperature, -1)
    k = indices.shape[-1]
    if k == logits.shape[-1]:
        return merged, merged.new_full(merged.shape[:-1], -math.inf)
    return merged[..., :k], merged[..., k]


def draw(
    logits: Tensor, indices: Tensor, temperature: float, samples: int, generator: torch.Generator | None
) -> Tensor:
    """Classes drawn from all but the given ones, with replacement, `(..., samples)`."""
    others = logits.scatter(-1, indices, -math.inf) / temperature
    chances = (others - others.amax(-1, keepdim=True)).exp()
    # Where no other class has a chance, or nothing is a number, any of them stands for a share of 0, or for NaN.
    any_other = torch.ones_like(chances).scatter(-1, indices, 0.0)
    chances = torch.where(chances.sum(-1, keepdim=True) > 0, chances, any_other)
    flat = chances.reshape(-1, logits.shape[-1])
    drawn = torch.multinomial(flat, samples, replacement=True, generator=generator)
    return drawn.reshape(*logits.shape[:-1], samples)


def in_blocks(
    rows: Callable[..., tuple[Tensor, ...]], logits: Tensor, indices: Tensor | None = None
) -> tuple[Tensor, ...]:
    """What a function of rows gives for logits in float32 or wider, some rows at a time where they are many."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    given = (logits,) if indices is None else (logits, indices)
    step = max(_BLOCK // logits.shape[-1], 1)
    if logits.numel() <= _BLOCK or not (may_look(logits) or logits.is_cuda):
        return rows(logits.to(dtype), *given[1:])
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in given]
    parts = [
        rows(flat[0][start : start + step].to(dtype), *(tensor[start : start + step] for tensor in flat[1:]))
        for start in range(0, len(flat[0]), step)
    ]
    joined = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
    return tuple(tensor.reshape(*logits.shape[:-1], *tensor.shape[1:]) for tensor in joined)


def wide(tensor: Tensor) -> Tensor:
    """In float64 where the device has it: what is left of one has few digits otherwise."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def exact(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none: for few numbers that need the digits."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def rest_of(log_probs: Tensor) -> Tensor:
    """The logarithm of what rows leave of one, in float32 or wider; -inf where nothing is left."""
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    return torch.log1p(-wide(log_probs).exp().sum(-1).clamp(max=1.0)).to(dtype)


def round_rows(log_probs: Tensor, log_tail: Tensor, dtype: torch.dtype, k: int) -> tuple[Tensor, Tensor]:
    """Round to a narrower dtype, and give what the rounded rows leave of one."""
    near = log_probs.to(dtype)
    before, tail = wide(log_probs), wide(log_tail).exp()

    def rest(rounded: Tensor) -> Tensor:  # what rounding took from the rows is the rest's
        given = before[..., :k].exp() - wide(rounded[..., :k]).exp()
        return tail + given.sum(-1)

    short = rest(near) < tail / 2
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    lower = (near.view(integer) + 1).view(dtype)  # the next number of a larger size: these are all negative
    near = torch.where(short.unsqueeze(-1) & (wide(near) > before), lower, near)
    return near, rest(near).clamp(min=0.0).log().to(torch.promote_types(log_tail.dtype, torch.float32))
