"""Modules that give a tensor the shape that a loss needs: the adapters of a `Term`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_count

__all__ = ["NHWC", "Columns", "MapToTokens", "Select", "Tokens", "TokensToMap"]


class NHWC(nn.Module):
    """Maps with the channels last, `(N, H, W, C)`, to `(N, C, H, W)`: what Swin and other transformers give.

    Examples:
        >>> import torch
        >>> from distill import adapt
        >>> adapt.NHWC()(torch.zeros(2, 7, 7, 96)).shape
        torch.Size([2, 96, 7, 7])
    """

    @override
    def forward(self, maps: Tensor) -> Tensor:
        """Move the channels.

        Args:
            maps: `(N, H, W, C)`.

        Returns:
            `(N, C, H, W)`, a view.

        Raises:
            TypeError: If the maps are no tensor.
            ValueError: If they have not four dimensions.
        """
        _check(maps, 4, "maps (N, H, W, C)")
        return maps.permute(0, 3, 1, 2)


class Tokens(nn.Module):
    """Drops the tokens in front of those of the image or text: class, distillation and register tokens.

    Args:
        prefix: How many there are: 1 for a class token, 2 for DeiT's, 1 and the registers for DINO's.

    Raises:
        ValueError: If the number is negative or no integer.

    Examples:
        >>> import torch
        >>> from distill import adapt
        >>> adapt.Tokens(1)(torch.zeros(2, 197, 384)).shape
        torch.Size([2, 196, 384])
    """

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = check_count("prefix", prefix, least=0)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Drop the first tokens.

        Args:
            tokens: `(N, T, C)`.

        Returns:
            `(N, T - prefix, C)`, a view.

        Raises:
            TypeError: If the tokens are no tensor.
            ValueError: If they have not three dimensions, or there are no more than `prefix`.
        """
        _check(tokens, 3, "tokens (N, T, C)")
        if tokens.shape[1] <= self.prefix:
            raise ValueError(f"there must be more than {self.prefix} tokens, got shape {tuple(tokens.shape)}")
        return tokens[:, self.prefix :]

    @override
    def extra_repr(self) -> str:
        """Show the option in `repr`."""
        return f"{self.prefix}"


class TokensToMap(nn.Module):
    """Tokens of image patches, `(N, prefix + H * W, C)`, to maps `(N, C, H, W)`; the patches come row by row.

    Args:
        prefix: How many tokens stand before the patches.
        grid: `(H, W)`, how many patches there are. None: a square.

    Raises:
        ValueError: If `prefix` is negative, or the grid is no pair of positive integers.

    Examples:
        >>> import torch
        >>> from distill import adapt
        >>> adapt.TokensToMap(prefix=1)(torch.zeros(2, 197, 384)).shape
        torch.Size([2, 384, 14, 14])
    """

    def __init__(self, prefix: int = 0, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.prefix = check_count("prefix", prefix, least=0)
        if grid is not None and (not isinstance(grid, tuple) or len(grid) != 2):
            raise ValueError(f"grid must be a pair (H, W) or None, got {grid!r}")
        self.grid = grid and (check_count("grid's H", grid[0]), check_count("grid's W", grid[1]))

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Arrange the patches.

        Args:
            tokens: `(N, prefix + H * W, C)`.

        Returns:
            `(N, C, H, W)`, a view.

        Raises:
            TypeError: If the tokens are no tensor.
            ValueError: If they have not three dimensions, or their number does not fit the grid.
        """
        _check(tokens, 3, "tokens (N, T, C)")
        patches = tokens.shape[1] - self.prefix
        side = math.isqrt(max(patches, 0))
        height, width = self.grid or (side, side)
        if patches != height * width or patches < 1:
            must = f"{height} x {width} patches" if self.grid else "a square of patches"
            raise ValueError(
                f"after {self.prefix} tokens there must be {must}, got {patches} in shape {tuple(tokens.shape)}; "
                "prefix= drops class and register tokens, grid= says (H, W)"
            )
        kept = tokens[:, self.prefix :]
        return kept.view(len(kept), height, width, kept.shape[2]).permute(0, 3, 1, 2)

    @override
    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        return f"prefix={self.prefix}, grid={self.grid}"


class MapToTokens(nn.Module):
    """Maps `(N, C, H, W)` to tokens `(N, H * W, C)`, row by row: a convolutional network beside a transformer.

    Where the grids differ, resize first: `nn.Sequential(nn.Upsample((14, 14), mode="bilinear"), MapToTokens())`.

    Examples:
        >>> import torch
        >>> from distill import adapt
        >>> adapt.MapToTokens()(torch.zeros(2, 512, 7, 7)).shape
        torch.Size([2, 49, 512])
    """

    @override
    def forward(self, maps: Tensor) -> Tensor:
        """Line the positions up.

        Args:
            maps: `(N, C, H, W)`.

        Returns:
            `(N, H * W, C)`, a view where the maps lie in memory as they are.

        Raises:
            TypeError: If the maps are no tensor.
            ValueError: If they have not four dimensions.
        """
        _check(maps, 4, "maps (N, C, H, W)")
        return maps.flatten(2).mT


class Columns(nn.Module):
    """The first columns of logits: for vocabularies of which one continues the other, or is padded at the end.

    On both sides of a `Term` it compares the tokens that both models know, and gives them all of the probability. The
    task loss keeps the student's whole softmax. A label that is no kept column is refused by losses that use labels.

    Args:
        stop: How many columns to keep, at least 2. They must mean the same tokens on both sides.

    Raises:
        ValueError: If the number is no integer of at least 2.

    Examples:
        >>> import torch
        >>> from distill import KLLoss, Term, adapt
        >>> adapt.Columns(32000)(torch.zeros(2, 5, 32064)).shape
        torch.Size([2, 5, 32000])
        >>> both = adapt.Columns(32000)
        >>> term = Term(KLLoss(), student=both, teacher=both)
    """

    def __init__(self, stop: int) -> None:
        super().__init__()
        self.stop = check_count("stop", stop, least=2)

    @override
    def forward(self, logits: Tensor) -> Tensor:
        """Keep the first columns.

        Args:
            logits: `(..., V)`, V at least `stop`.

        Returns:
            `(..., stop)`, a view.

        Raises:
            TypeError: If the logits are no tensor.
            ValueError: If there are fewer columns.
        """
        if not isinstance(logits, Tensor):
            raise TypeError(f"logits must be a tensor, got {type(logits).__name__}; adapt.Select takes an entry of it")
        if logits.ndim == 0 or logits.shape[-1] < self.stop:
            raise ValueError(f"there must be at least {self.stop} columns, got shape {tuple(logits.shape)}")
        return logits[..., : self.stop]

    @override
    def extra_repr(self) -> str:
        """Show the option in `repr`."""
        return f"{self.stop}"


class Select(nn.Module):
    """One entry of what was tapped or returned: of a tuple or list, a mapping, or an output object.

    It may also stand as a side of `at`: `at=Select("last_hidden_state")`.

    Args:
        key: An index (an integer), or a key or the name of an attribute.

    Raises:
        TypeError: If the key is neither an integer nor a string.

    Examples:
        >>> import torch
        >>> from distill import adapt
        >>> adapt.Select("pooled")({"tokens": torch.zeros(2, 3), "pooled": torch.ones(2)})
        tensor([1., 1.])
        >>> adapt.Select(0)((torch.zeros(1), torch.ones(1)))
        tensor([0.])
    """

    def __init__(self, key: int | str) -> None:
        super().__init__()
        if not isinstance(key, (int, str)) or isinstance(key, bool):
            raise TypeError(f"key must be an index or a name, got {key!r}")
        self.key = key

    @override
    def forward(self, value: Any) -> Any:
        """Take the entry.

        Args:
            value: A tuple or list for an index; a mapping or an object for a name. An output object of `transformers`
                takes either.

        Returns:
            The entry.

        Raises:
            ValueError: If there is no such entry, or it is None (a model may have to be asked for it).
            TypeError: If an index is asked of something that has none, such as a tensor.
        """
        found: Any = None
        if isinstance(self.key, int):
            entries = value if isinstance(value, (tuple, list)) else _entries(value)
            known: Any = len(entries)
            if -len(entries) <= self.key < len(entries):
                found = entries[self.key]
            what = f"{known} entries"
        else:
            if isinstance(value, Mapping):
                found, known = value.get(self.key), list(value)
            else:
                found, known = getattr(value, self.key, None), [name for name in _names(value) if name[0] != "_"]
            what = f"a {type(value).__name__} with {known}"
        if found is None:
            raise ValueError(
                f"what was tapped must have an entry {self.key!r} that is not None, got {what}; a model may have to be "
                "asked for it (output_hidden_states=True)"
            )
        return found

    @override
    def extra_repr(self) -> str:
        """Show the key in `repr`."""
        return f"{self.key!r}"


def _entries(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Tensor) or not hasattr(value, "to_tuple"):
        raise TypeError(f"an index needs a tuple or list to select from, got {type(value).__name__}")
    return tuple(value.to_tuple())


def _names(value: Any) -> list[str]:
    """The names that an object has, for a message."""
    return list(getattr(value, "__dict__", {}))


def _check(value: Any, dimensions: int, what: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(value).__name__}; adapt.Select takes an entry of it")
    if value.ndim != dimensions:
        raise ValueError(f"{what} must have {dimensions} dimensions, got shape {tuple(value.shape)}")
