"""From what a teacher gave for a batch to what is stored of it: rows in one dtype, and the length of each sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill._checks import check_tensor, is_integer
from distill._distiller.taps import parse_path
from distill._distiller.terms import TeacherOutput
from distill._store.fingerprint import sample_hash
from distill._store.header import Part
from distill._store.index import Integers
from distill._store.packing import pack_ids
from distill._store.shards import Stored
from distill.topk import TopK

OUTPUT, FEATURE = "output", "feature/"
_NO_MODULES = ("", "ids", "read")  # the model itself, and the methods of a StoredTeacher
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def found_in(output: Any) -> dict[str, Any]:
    """What a teacher gave, by the name of the part: its output, and its features."""
    output, features = output if isinstance(output, TeacherOutput) else (output, {})
    parts: dict[str, Any] = {}
    if output is not None:
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
        if not isinstance(logits, (Tensor, TopK, list)):
            raise TypeError(
                "an output to store must be a tensor, a TopK, a list of one of them for each sample, or have .logits, "
                f"got {type(output).__name__}; what else there is goes into TeacherOutput(features=...)"
            )
        parts[OUTPUT] = logits
    for path, feature in features.items():
        if parse_path(path)[0].split(".")[0] in _NO_MODULES:
            raise ValueError(
                f"a feature must have the path of a module in the model, none of {_NO_MODULES}, got {path!r}"
            )
        parts[FEATURE + path] = feature
    if not parts:
        raise ValueError("there must be something to store, got neither an output nor features")
    return dict(sorted(parts.items()))


class Batch:
    """Ids, and what is known of the lengths of their samples.

    Attributes:
        size: How many samples.
        mask: `(N, T)`, bool, of the positions that count, or None.
        positions: T, or None where nothing says it.
    """

    def __init__(self, size: int, tokens: Any, mask: Any) -> None:
        self.size = size
        self.mask: Tensor | None = None if mask is None else self._checked(mask)
        self.positions: int | None = None if self.mask is None else self.mask.shape[1]
        self.tokens: list[Tensor] | None = None if tokens is None else self._each(tokens)

    def _checked(self, given: Any) -> Tensor:
        mask = check_tensor("mask", given).cpu()
        if mask.ndim != 2 or len(mask) != self.size or mask.is_floating_point():
            raise ValueError(
                f"mask must be bools or integers (N, T) for the {self.size} ids, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}"
            )
        mask = mask != 0
        if not bool(mask.any(1).all()):
            raise ValueError("mask must leave a position of every sample, got a sample without")
        return mask

    def _each(self, tokens: Any) -> list[Tensor]:
        """The tokens or pixels of each sample, without what the mask hides."""
        if isinstance(tokens, list):
            if len(tokens) != self.size:
                raise ValueError(f"tokens must be one tensor for each of the {self.size} ids, got {len(tokens)}")
            return [check_tensor("tokens", sample).detach().cpu() for sample in tokens]
        tokens = check_tensor("tokens", tokens).detach().cpu()
        if tokens.ndim == 0 or len(tokens) != self.size:
            raise ValueError(f"tokens must be (N, ...) for the {self.size} ids, got shape {tuple(tokens.shape)}")
        if self.mask is not None:
            if tokens.shape[:2] != self.mask.shape:
                raise ValueError(
                    f"tokens and mask must have the same (N, T), got {tuple(tokens.shape)} and {tuple(self.mask.shape)}"
                )
            return [sample[shown] for sample, shown in zip(tokens, self.mask, strict=True)]
        if tokens.ndim == 2 and is_integer(tokens):
            self.positions = tokens.shape[1]
        return list(tokens)

    def hashes(self) -> Integers | None:
        """One for each sample, or None where there are no tokens."""
        return None if self.tokens is None else np.array([sample_hash(sample) for sample in self.tokens])

    def rows(self, name: str, value: Any) -> tuple[Tensor | TopK, Integers | None]:
        """The rows of all samples in one tensor or `TopK`, and how many each has; None: one each.

        Args:
            name: The part, for messages.
            value: A tensor or `TopK` with a first dimension of samples, or a list of one for each sample.
        """
        if isinstance(value, list):
            return _joined(name, value, self.size)
        if not isinstance(value, (Tensor, TopK)):
            raise TypeError(f"{name} must be a tensor, or a list of one for each sample, got {type(value).__name__}")
        shape = value.shape
        if not len(shape) or shape[0] != self.size:
            raise ValueError(f"{name} must be (N, ...) for the {self.size} ids, got shape {tuple(shape)}")
        inner = len(shape) - (1 if isinstance(value, TopK) else 2)  # between the samples and the channels or classes
        if inner < 1 or (inner > 1 if self.positions is None else shape[1] != self.positions):
            return value, None
        if self.mask is not None:
            return value[self.mask.to(value.device)], self.mask.sum(1).numpy()
        return value.reshape(-1, *shape[2:]), np.full(self.size, shape[1])


def _joined(name: str, values: list[Any], size: int) -> tuple[Tensor | TopK, Integers]:
    """A list of one tensor or `TopK` for each sample as one."""
    kind = TopK if isinstance(values[0], TopK) else Tensor
    if len(values) != size or not all(isinstance(value, kind) and len(value.shape) for value in values):
        got = sorted({type(value).__name__ for value in values})
        raise ValueError(f"{name} must be a tensor (T, ...) for each of the {size} ids, got {len(values)} of {got}")
    ends = {tuple((value.indices if isinstance(value, TopK) else value).shape[1:]) for value in values}
    if len(ends) != 1 or not all(map(len, values)):
        raise ValueError(f"{name} must be (T, ...) for each id, alike but for a T of at least 1, got {sorted(ends)}")
    lengths = np.array([len(value) for value in values])
    if kind is Tensor:
        return torch.cat(values), lengths
    first = values[0]
    if any((value.temperature, value.samples) != (first.temperature, first.samples) for value in values):
        raise ValueError(f"{name} must have one temperature and one number of samples, got {values}")
    indices, log_probs, tail = (
        torch.cat([getattr(value, column) for value in values]) for column in ("indices", "log_probs", "log_tail")
    )
    return TopK(indices, log_probs, tail, first.temperature, samples=first.samples), lengths


def stored_tensor(name: str, rows: Tensor, lengths: Integers | None, dtype: torch.dtype | None) -> Stored:
    """A tensor in the dtype that it is stored in."""
    dtype = dtype or rows.dtype
    if dtype not in DTYPES:
        raise ValueError(
            f"{name} must be float16, bfloat16 or float32, got {rows.dtype}; dtype= says what to store it in"
        )
    if not rows.is_floating_point():
        raise ValueError(f"{name} must be floating-point, got {rows.dtype}")
    if bool(rows.isnan().any()):
        raise ValueError(f"{name} must have no NaN, got one")
    kept = rows.detach().to("cpu", dtype, copy=True).contiguous()  # what was given may change before it is written
    if kept.isinf().sum() != rows.isinf().sum():
        raise ValueError(
            f"{name} must fit into {dtype}, got values to {float(rows.abs().max())}; dtype= says what to use"
        )
    return Stored(Part("tensor", str(dtype)[6:], tuple(kept.shape[1:]), lengths is not None), {"": kept}, lengths)


def stored_topk(topk: TopK, lengths: Integers | None, vocabulary: int) -> Stored:
    """A `TopK` in the packed form."""
    topk = topk.to("cpu").to(torch.float16).check(vocabulary)
    arrays = {f"/{end}": ids for end, ids in pack_ids(topk.indices, vocabulary).items()}
    arrays |= {"/log_probs": topk.log_probs, "/log_tail": topk.log_tail.float()}
    arrays = {end: array.clone(memory_format=torch.contiguous_format) for end, array in arrays.items()}
    return Stored(Part("top-k", "float16", tuple(topk.shape[1:]), lengths is not None), arrays, lengths)
