"""What losses with layers read off the shapes that they will compare: how many channels there are."""

from collections.abc import Collection
from typing import Any, NamedTuple


class Size(NamedTuple):
    """Where the channels stand in a shape.

    Args:
        layout: The shape in words.
        axis: The dimension of the channels.
        dimensions: How many dimensions there may be.
    """

    layout: str
    axis: int
    dimensions: Collection[int]

    def read(self, side: str, given: Any, dim: int | None) -> int:
        """The channels of a shape, of a tensor's, or of that of an entry of `tap_shapes`.

        Args:
            side: `"student"` or `"teacher"`.
            given: The shape, or what has it.
            dim: What a loss is told of where the channels are, if it is.

        Raises:
            TypeError: If it has no shape, such as an entry that says in words what is no tensor.
            ValueError: If there is another number of dimensions.
        """
        shape = getattr(given, "shape", given)
        if not isinstance(shape, (tuple, list)) or not all(isinstance(size, int) for size in shape):
            raise TypeError(
                f"the {side}'s shape must be a tuple of sizes, a tensor or an entry of tap_shapes that gave one, "
                f"got {shape!r}"
            )
        where = VECTORS if self is LAYERS and (dim == -1 or (dim is None and len(shape) != 4)) else self
        if len(shape) not in where.dimensions:
            raise ValueError(f"the {side}'s shape must be {where.layout}, got {tuple(shape)}")
        return int(shape[where.axis])


MAPS = Size("(N, C, H, W)", 1, (4,))
FEATURES = Size("(N, C, ...)", 1, range(2, 6))
EMBEDDINGS = Size("(N, D)", 1, (2,))
VECTORS = Size("(..., C)", -1, range(1, 100))
LAYERS = Size("(N, C, ...)", 1, range(3, 6))  # maps; or vectors, as `dim` says, where they are not of four dimensions
