"""The layers of one model that may be compared, and its stages: the last layer of each resolution."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from distill._layouts import distortion, first_tensor, read_layout
from distill.diagnostics import TapShapes


class Layer(NamedTuple):
    """A module called once whose first output is a map or tokens."""

    path: str
    shape: tuple[int, ...]
    selected: bool  # whether the tensor is the first of a tuple
    leaf: bool
    kind: type
    grid: tuple[int, int] | None
    prefix: int  # tokens before those of the grid
    layout: str  # "NCHW", "NHWC" or "tokens"
    overwritten: bool
    order: int

    @property
    def channels(self) -> int:
        return self.shape[1] if self.layout == "NCHW" else self.shape[-1]


class Side:
    """One model: its layers, and its stages by resolution; no stages where all layers have one size."""

    def __init__(self, name: str, model: nn.Module, shapes: TapShapes, inputs: Any) -> None:
        self.name = name
        given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim > 0]
        self.samples = len(given[0]) if given else None
        first = next((x for x in given if x.ndim == 4), None)
        self.picture = None if first is None else (first.shape[2], first.shape[3])
        self.numbers = None if first is None else math.prod(first.shape[1:])
        if listed := _listed(inputs):
            sizes = {(x.shape[1], x.shape[2]) for x in listed}
            self.samples, self.picture = len(listed), sizes.pop() if len(sizes) == 1 else None
        modules = dict(model.named_modules(remove_duplicate=False))
        found = (self._layer(path, shapes, modules[path]) for path in shapes if path)
        layers = sorted((layer for layer in found if layer is not None), key=lambda layer: layer.order)
        known, queries = self._known_grids(layers, shapes), _first_query(layers)
        # Queries of a detector are tokens too, but no patches, however many they are.
        self.layers = [
            layer._replace(grid=None, prefix=0)
            if layer.grid not in known or (layer.layout == "tokens" and layer.order >= queries)
            else layer
            for layer in layers
        ]
        self.stages = self._stages(shapes)

    def _layer(self, path: str, shapes: TapShapes, module: nn.Module) -> Layer | None:
        entry = shapes[path]
        shape, selected = first_tensor(entry.shape)
        if entry.calls != 1 or shape is None or len(shape) not in (3, 4) or shape[0] != (self.samples or shape[0]):
            return None  # windows and attention biases have another number of samples
        layout, grid, prefix = read_layout(shape, self.picture)
        leaf = next(module.children(), None) is None
        return Layer(
            path, shape, selected, leaf, type(module), grid, prefix, layout, entry.overwritten, shapes.order[path]
        )

    def _known_grids(self, layers: Sequence[Layer], shapes: TapShapes) -> set[tuple[int, int] | None]:
        """Grids of patches: of maps, of tokens before any map or with the picture's numbers, and of what follows."""
        known = {layer.grid for layer in layers if layer.layout != "tokens" or layer is layers[0]}
        for layer in layers:
            given = first_tensor(shapes[layer.path].inputs[0])[0]
            if given is None or len(given) != 3:
                continue
            if math.prod(given[1:]) == self.numbers or read_layout(given, self.picture)[1] in known - {None}:
                known.add(layer.grid)
        return known

    def _stages(self, shapes: TapShapes) -> dict[tuple[int, int], Layer]:
        """The last layer of each resolution, from the largest to the smallest; none where there is only one."""
        maps = [layer for layer in self.layers if self._is_map(layer, shapes)]
        whole = _stages_of(maps)
        turns = _turns(whole)
        if turns == 0:
            return whole
        # A segmentation head that takes all stages runs layers at their resolutions again, in another order: the stages
        # are those of the backbone. A pyramid whose smallest levels come last has resolutions that no backbone has.
        backbone = next((part for part in _parts(maps) if part and _turns(part) == 0), {})
        return backbone if len(backbone) == len(whole) or (backbone and turns > 1) else whole

    def _is_map(self, layer: Layer, shapes: TapShapes) -> bool:
        """Whether the layer may stand for its resolution."""
        if layer.grid is None or max(layer.grid) < 2:
            return False
        if self.picture is not None and distortion(layer.grid, self.picture) > 0:
            return False  # the heads of an attention, (N, heads, tokens, C)
        return not self._inside_a_step_down(layer, shapes)

    def _inside_a_step_down(self, layer: Layer, shapes: TapShapes) -> bool:
        """Whether the layer is within a block that goes on to another resolution, and no step of its main path."""
        parts = layer.path.split(".")
        for end in range(1, len(parts)):
            outer = shapes[".".join(parts[:end])]
            given, gave = (first_tensor(seen[0])[0] if seen else None for seen in (outer.inputs, outer.outputs))
            if given is None or gave is None or len(given) not in (3, 4) or len(gave) not in (3, 4):
                continue
            (layout, before, _), (_, after, _) = read_layout(given, self.picture), read_layout(gave, self.picture)
            channels = given[1] if layout == "NCHW" else given[-1]
            if before == layer.grid and after != layer.grid and (layer.leaf or layer.channels != channels):
                return True
        return False

    def at_shares(self, number: int) -> list[Layer]:
        """The last block of each of so many equal shares of the depth."""
        groups: dict[tuple[Any, ...], list[Layer]] = {}
        for layer in self.layers:
            numbered = re.fullmatch(r"(.*?)\d+", layer.path)  # layers.3, encoder_layer_3
            if numbered and not layer.leaf:
                groups.setdefault((numbered[1], layer.kind, layer.shape), []).append(layer)
        blocks = max(groups.values(), key=len, default=[])
        if len(blocks) < 2:
            raise ValueError(
                f"the {self.name} must have maps of several resolutions or blocks that repeat, got neither: "
                "tap_shapes says what its modules give"
            )
        number = min(number, len(blocks))
        return [blocks[math.ceil(len(blocks) * k / number) - 1] for k in range(1, number + 1)]


def _listed(inputs: Any) -> list[Tensor]:
    """The pictures (C, H, W) of a detector, whose first input is a list; none for other inputs."""
    parts = (*inputs.values(),) if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    pictures = parts[0] if parts and isinstance(parts[0], list) else []
    return pictures if all(isinstance(x, Tensor) and x.ndim == 3 for x in pictures) else []


def _first_query(layers: Sequence[Layer]) -> float:
    """When a decoder beside an encoder first gives something: tokens are queries from then on."""
    paths = [(layer.order, layer.path.split(".")) for layer in layers]
    around = {tuple(path[:i]) for _, path in paths for i, name in enumerate(path) if name == "encoder"}
    begins = (
        order for order, path in paths for i, name in enumerate(path) if name == "decoder" and tuple(path[:i]) in around
    )
    return min(begins, default=math.inf)


def _stages_of(maps: Sequence[Layer]) -> dict[tuple[int, int], Layer]:
    """The last layer of each resolution, from the largest to the smallest; none where there is only one."""
    stages = _last_of_each(maps)
    if any(not layer.leaf for layer in stages.values()):  # a stem's last operation is no stage
        blocks = (
            layer
            for layer in maps
            if not layer.leaf or not (layer.layout == "NCHW" or issubclass(layer.kind, nn.Linear))
        )
        stages = _last_of_each(blocks)
    ordered = dict(sorted(stages.items(), key=lambda item: -math.prod(item[0])))
    return ordered if len(ordered) > 1 else {}


def _parts(maps: Sequence[Layer]) -> Iterator[dict[tuple[int, int], Layer]]:
    """The stages of each part of the model, outer parts first, and of those the ones with the most stages."""
    paths = [(layer, layer.path.split(".")) for layer in maps]
    for depth in range(1, max(len(path) for _, path in paths)):
        inside: dict[tuple[str, ...], list[Layer]] = {}
        for layer, path in paths:
            if len(path) > depth:
                inside.setdefault(tuple(path[:depth]), []).append(layer)
        yield from sorted(map(_stages_of, inside.values()), key=len, reverse=True)


def _turns(stages: Mapping[tuple[int, int], Layer]) -> int:
    """How often the forward turns between larger and smaller resolutions: 0 for a backbone, and for a decoder."""
    order = [layer.order for layer in stages.values()]
    return sum((a < b) != (b < c) for a, b, c in zip(order, order[1:], order[2:], strict=False))


def _last_of_each(layers: Iterable[Layer]) -> dict[tuple[int, int], Layer]:
    """The last layer of each resolution."""
    return {layer.grid: layer for layer in layers if layer.grid is not None}
