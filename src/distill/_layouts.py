"""What the shape of a layer's output says: whether it is a map or tokens, and of which grid."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_PREFIXES = 17  # class, distillation and register tokens: at most so many, less one


def first_tensor(seen: tuple[int, ...] | str | None) -> tuple[tuple[int, ...] | None, bool]:
    """The shape of a tensor, or of the first of a tuple of outputs, and whether it is the latter."""
    if not isinstance(seen, str):
        return seen, False
    first = re.match(r"\[\(([\d, ]+)\)", seen)  # a tuple or list in words
    return (tuple(map(int, first[1].rstrip(", ").split(", "))), True) if first else (None, False)


def read_layout(shape: tuple[int, ...], picture: tuple[int, int] | None) -> tuple[str, tuple[int, int] | None, int]:
    """The layout of a map or of tokens, their grid, and how many tokens stand before it."""
    if len(shape) == 4:
        first, last = shape[2:], shape[1:3]
        if picture is not None and distortion(last, picture) < distortion(first, picture):
            return "NHWC", (last[0], last[1]), 0
        return "NCHW", (first[0], first[1]), 0
    if picture is not None and shape[2] > 1:  # what was pooled is no token
        for prefix in range(min(_PREFIXES, shape[1])):
            height = max(round(math.sqrt((shape[1] - prefix) * picture[0] / picture[1])), 1)
            width = (shape[1] - prefix) // height
            patches = {math.ceil(of / by) for of, by in zip(picture, (height, width), strict=True) if by}
            if height * width == shape[1] - prefix and len(patches) == 1:  # patches are squares
                return "tokens", (height, width), prefix
    return "tokens", None, 0


def distortion(grid: Sequence[int], picture: tuple[int, int]) -> float:
    """How far a grid is from the aspect of the picture; 0 within what strides round."""
    ratio = abs(math.log(grid[0] * picture[1] / (grid[1] * picture[0])))
    return 0.0 if ratio <= math.log((min(grid) + 1) / min(grid)) and ratio < math.log(4 / 3) else ratio
