"""Vectors of unit norm, as losses on maps and on relations between samples compare them."""

import functools
import math

import torch
from torch import Tensor

from distill._checks import may_look

_MIDDLE = 1e-12, 1e12  # between them are sizes whose squares, and sums of those, float32 holds with all digits


def normalize(tensor: Tensor, *, dim: int) -> Tensor:
    """Divide by the L2 norm along `dim`, whatever its size; what is 0 everywhere stays 0 and gets no gradient.

    What is NaN or infinite gives NaN. `F.normalize` divides by a small number where the norm is smaller still, and
    multiplies the gradient there by 1e12.
    """
    if may_look(tensor):  # what is ordinary takes half the passes
        norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim, keepdim=True)
        if are_ordinary(norm):
            return tensor / norm
    return normalize_each(tensor, dim=dim)


def normalize_each(tensor: Tensor, *, dim: int) -> Tensor:
    """Do what `normalize` does, each vector by itself: what others hold changes nothing, not even the rounding."""
    largest = magnitude(tensor, dim)
    zero = largest == 0
    # Squares of numbers of at most 1 do not overflow. Where all are 0 a vector of ones has the norm, so that no
    # derivative, of any order, is taken of a norm of 0; what is then divided by infinity is 0, and so is its gradient.
    scaled = (tensor / largest.masked_fill(zero, 1.0)).add_(zero.to(tensor.dtype))
    norm: Tensor = torch.linalg.vector_norm(scaled, dim=dim, keepdim=True)
    return scaled / norm.masked_fill(zero, math.inf)


def similarities(rows: Tensor) -> Tensor:
    """Products of all pairs of rows `(..., R, D)`, over the L2 norm of each row's: `(..., R, R)`.

    The scale of the rows does not count, and products of any size neither over- nor underflow.
    """
    if may_look(rows):
        products = rows @ rows.mT
        norm: Tensor = torch.linalg.vector_norm(products, dim=-1, keepdim=True)
        if are_ordinary(norm):
            return products / norm
    rows = over_largest(rows.flatten(-2), dim=-1).reshape(rows.shape)
    return normalize(rows @ rows.mT, dim=-1)


def length(tensor: Tensor, dim: int) -> Tensor:
    """The L2 norm along `dim`; where it is 0 it has no derivative, and gets 0, of any order."""
    if may_look(tensor):
        norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim)
        if float(norm.detach().amin()) > 0:
            return norm
    squares = tensor.square().sum(dim)
    zero = squares == 0
    return squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def over_largest(tensor: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Divide by the largest magnitude along `dim`, where only proportions count: products neither over- nor underflow.

    The largest is a constant in the gradient: right where what follows does not depend on the scale.
    """
    largest = magnitude(tensor, dim)
    return tensor / largest.masked_fill(largest == 0, 1.0)


def are_ordinary(sizes: Tensor) -> bool:
    """Whether sizes of numbers, on the CPU, are all such that squares need no care: not 0, NaN or infinite either."""
    least, most = _MIDDLE
    return least < float(sizes.detach().amin()) and float(sizes.detach().amax()) < most


def not_ordinary(*sizes: Tensor) -> Tensor | None:
    """The indices of the rows of which `are_ordinary` does not hold, of sizes `(R, 1)` each; None for none."""
    if all(map(are_ordinary, sizes)):
        return None
    least, most = _MIDDLE
    good = [(least < size) & (size < most) for size in sizes]  # False for NaN
    return torch.logical_not(functools.reduce(torch.logical_and, good)).squeeze(-1).nonzero().squeeze(-1)


def magnitude(tensor: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The largest magnitude along `dim`, which is kept with size 1; without a graph."""
    tensor = tensor.detach()
    return torch.maximum(tensor.amax(dim, keepdim=True), -tensor.amin(dim, keepdim=True))
