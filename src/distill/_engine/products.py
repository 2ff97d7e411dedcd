"""The matrix products of a linear head: the logits of some samples, and what their gradient gives.

`linear.py` runs them, some samples at a time.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill._checks import without_autocast

# Samples whose logits are formed at a time, where the caller does not say: few enough for memory, enough for products.
_CPU, _GPU = 256, 2048
# Chunks up to which a head in half precision may add up its gradient in that precision.
_FEW = 8


class Side(NamedTuple):
    """What forms one side's logits: `scale * (weight @ hidden + bias)`, under a soft cap where there is one."""

    hidden: Tensor  # (N, d)
    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None = None

    def logits(self) -> Tensor:
        """All logits, (N, V)."""
        tensors = self.hidden, self.weight, self.bias
        kinds = {tensor.dtype for tensor in tensors if tensor is not None}
        if len(kinds) > 1:  # what `product` does, too; autocast narrows after that
            wide = functools.reduce(torch.promote_types, kinds)
            tensors = tuple(None if tensor is None else tensor.to(wide) for tensor in tensors)  # type: ignore[assignment]
        logits = F.linear(*tensors)
        return capped(logits if self.scale == 1 else logits * self.scale, self.softcap)

    def product(self, dtype: torch.dtype) -> Side:
        """What a chunk multiplies: the same with the scale in the hidden states and the bias, all in one dtype."""
        hidden, bias = self.hidden.detach().to(dtype), self.bias
        bias = None if bias is None else bias.detach().to(dtype)
        if self.scale != 1:
            hidden, bias = hidden * self.scale, None if bias is None else bias * self.scale
        return Side(hidden, self.weight.detach().to(dtype), bias, 1.0, self.softcap)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits under a soft cap c, which is c tanh(logits / c)."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def chunk_rows(chunk: int | None, device: torch.device, count: int) -> int:
    """How many samples at a time, in chunks of equal size."""
    most = chunk or (_CPU if device.type == "cpu" else _GPU)
    pieces = max(-(-count // most), 1)
    return max(-(-count // pieces), 1)


def product_dtype(side: Side) -> torch.dtype:
    """The dtype in which hidden states and head are multiplied: that of autocast where it is on, but for float64."""
    wide = torch.promote_types(side.hidden.dtype, side.weight.dtype)
    return wide if wide == torch.float64 else autocast_dtype(side.hidden) or wide


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of autocast on a tensor's device; None where it is off."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def under_autocast(dtype: torch.dtype | None, tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast is as `autocast_dtype` found it: a backward pass runs outside the forward's."""
    return without_autocast(tensor) if dtype is None else torch.autocast(tensor.device.type, dtype=dtype)


def logits_dtype(side: Side) -> torch.dtype:
    """The dtype in which a chunk's logits come: float32 also from half precision, where PyTorch gives that."""
    hidden = side.hidden
    return torch.float32 if _gives_float32(hidden.device, hidden.dtype) else hidden.dtype


@functools.cache
def _gives_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrices in half precision can be multiplied into float32: on CUDA from PyTorch 2.8 on."""
    if dtype not in (torch.half, torch.bfloat16):
        return False
    few = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(few, few, out_dtype=torch.float32, out=few.float())
    except (TypeError, RuntimeError):  # no such argument, or not on this device
        return False
    return True


def multiply(side: Side, piece: slice, buffer: Tensor) -> Tensor:
    """Put the logits of some samples into a buffer, and return them."""
    rows = side.hidden[piece]
    out = buffer[: len(rows)]
    if out.dtype != rows.dtype:
        torch.mm(rows, side.weight.T, out_dtype=out.dtype, out=out)
        if side.bias is not None:
            out.add_(side.bias)
    elif side.bias is None:
        torch.mm(rows, side.weight.T, out=out)
    else:
        torch.addmm(side.bias, rows, side.weight.T, out=out)
    return out if side.softcap is None else out.mul_(1 / side.softcap).tanh_().mul_(side.softcap)


class Gradients:
    """Adds up the gradients of hidden states, weight and bias over the chunks."""

    def __init__(self, student: Side, needs: tuple[bool, ...], count: int, chunk: int | None) -> None:
        self.scale = student.scale
        product = product_dtype(student)
        many = -(-count // chunk_rows(chunk, student.hidden.device, count)) > _FEW if count else False
        weight = torch.float32 if many and student.weight.dtype.itemsize < 4 else student.weight.dtype
        self.hidden = torch.empty_like(student.hidden, dtype=product) if needs[0] else None
        self.weight = torch.empty_like(student.weight, dtype=weight) if needs[1] else None
        self.empty = True  # the first chunk writes, the others add
        wide = torch.promote_types(product, torch.float32)
        self.bias = torch.zeros_like(student.bias, dtype=wide) if needs[2] and student.bias is not None else None
        self.dtypes = student.weight.dtype, None if student.bias is None else student.bias.dtype

    def add(self, gradient: Tensor, side: Side, piece: slice, spare: Tensor | None) -> None:
        """Add what the gradient of some logits, (R, V), gives; `spare` may be overwritten."""
        hidden, weight = side.hidden, side.weight
        if self.bias is not None:
            self.bias.add_(gradient.sum(0, dtype=self.bias.dtype))
        if gradient.dtype != hidden.dtype:
            gradient = _narrow(gradient, hidden.dtype, spare)
        if self.hidden is not None:
            torch.mm(gradient, weight, out=self.hidden[piece])
        if self.weight is not None:
            if self.weight.dtype != gradient.dtype:
                part = gradient.T @ hidden[piece]
                self.weight.copy_(part) if self.empty else self.weight.add_(part)
            elif self.empty:
                torch.mm(gradient.T, hidden[piece], out=self.weight)
            else:
                self.weight.addmm_(gradient.T, hidden[piece])
            self.empty = False

    def finished(self, whole: Tensor, kept: Tensor | None) -> list[Tensor | None]:
        """The gradients in the dtypes of what they belong to; of hidden states that were left out they are 0."""
        hidden = self.hidden
        if hidden is not None:
            hidden = (hidden if self.scale == 1 else hidden * self.scale).to(whole.dtype)
            if kept is not None:
                hidden = torch.zeros_like(whole).index_copy(0, kept, hidden)
        if self.weight is not None and self.empty:
            self.weight.zero_()
        weight = None if self.weight is None else self.weight.to(self.dtypes[0])
        bias = None if self.bias is None else self.bias.mul_(self.scale).to(self.dtypes[1])
        return [hidden, weight, bias]


def _narrow(gradient: Tensor, dtype: torch.dtype, spare: Tensor | None) -> Tensor:
    """The gradient in half precision, in the memory of logits that are not needed any more where there is enough."""
    if spare is None or spare.numel() < gradient.numel():
        return gradient.to(dtype)
    return spare.view(dtype).view(-1)[: gradient.numel()].view_as(gradient).copy_(gradient)
