"""Looks at two models for layers that may be compared: candidate pairs by stage, with the adapters that they need."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from distill._checks import check_count
from distill._distiller.terms import Term
from distill._layouts import distortion, first_tensor, read_layout
from distill._table import table
from distill.adapt import NHWC, Select, Tokens, TokensToMap
from distill.diagnostics import TapShapes, tap_shapes
from distill.losses.hint import HintLoss

__all__ = ["LayerPair", "LayerPairs", "pair_layers"]


class LayerPair(NamedTuple):
    """Two layers that may be compared; an entry of `pair_layers`.

    Attributes:
        stage: What they have in common: a resolution, or a share of the depth.
        student: The student's path.
        teacher: The teacher's path.
        student_shape: What the student's layer gave, in its first tensor.
        teacher_shape: The same of the teacher's.
        student_adapter: What brings the student's layer into the form that is compared; None: nothing is needed.
        teacher_adapter: The same of the teacher's.
        overwritten: `"student"`, `"teacher"`, `"both"` or `""`: whose layer is changed in place later in the forward,
            so that a tap needs `copy=True`.
    """

    stage: str
    student: str
    teacher: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    student_adapter: nn.Module | None
    teacher_adapter: nn.Module | None
    overwritten: str

    @property
    def compared(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of both sides after their adapters, as maps `(N, C, H, W)` or tokens `(N, T, C)`."""
        return _after(self.student_adapter, self.student_shape), _after(self.teacher_adapter, self.teacher_shape)


class LayerPairs(Sequence[LayerPair]):
    """What `pair_layers` gives: a `LayerPair` for each stage, from the first to the last; prints as a table."""

    def __init__(self, pairs: Sequence[LayerPair]) -> None:
        self._pairs = tuple(pairs)

    @overload
    def __getitem__(self, index: int) -> LayerPair: ...

    @overload
    def __getitem__(self, index: slice) -> LayerPairs: ...

    @override
    def __getitem__(self, index: int | slice) -> LayerPair | LayerPairs:
        return LayerPairs(self._pairs[index]) if isinstance(index, slice) else self._pairs[index]

    @override
    def __len__(self) -> int:
        return len(self._pairs)

    def terms(
        self, build: Callable[[tuple[int, ...], tuple[int, ...]], nn.Module] | None = None, *, weight: float = 1.0
    ) -> dict[str, Term]:
        """Terms to start from, one for each pair, for a Distiller.

        Args:
            build: Gives the loss for the shapes of the student's and the teacher's layer after the adapters. None:
                `HintLoss.between`.
            weight: The weight of each term.

        Returns:
            A new dict of new losses; their names are `stage1`, `stage2` and so on.
        """
        make = HintLoss.between if build is None else build
        return {
            f"stage{number}": Term(
                make(*pair.compared),
                at=(pair.student, pair.teacher),
                weight=weight,
                student=pair.student_adapter,
                teacher=pair.teacher_adapter,
                copy=bool(pair.overwritten),
            )
            for number, pair in enumerate(self, 1)
        }

    @override
    def __repr__(self) -> str:
        rows = [("stage", "student", "gives", "adapter", "teacher", "gives", "adapter", "overwritten later")]
        for pair in self:
            sides = (
                (pair.student, str(pair.student_shape), _in_words(pair.student_adapter)),
                (pair.teacher, str(pair.teacher_shape), _in_words(pair.teacher_adapter)),
            )
            needed = f"{pair.overwritten}: copy=True" if pair.overwritten else ""
            rows.append((pair.stage, *sides[0], *sides[1], needed))
        return table(rows)


def pair_layers(
    student: nn.Module, teacher: nn.Module, inputs: Any, *, teacher_inputs: Any = None, shares: int = 4
) -> LayerPairs:
    """Run both models once and propose layers to compare: where to start when writing terms.

    Where both models have maps of several resolutions, the last layer at each resolution that both have makes a pair.
    A model whose blocks all have one size, such as a ViT, is cut into equal shares of its depth, as many as the other
    model has stages, and the last block of each share is taken. It is a proposal from shapes and order alone: which
    pairs help has to be tried.

    Both models run in eval mode and without gradients, and are afterwards as they were.

    Args:
        student: The student.
        teacher: The teacher.
        inputs: For both models, as the Distiller takes them: pictures, a mapping for `model(**inputs)`, or for a
            detector `(pictures,)` with a list of pictures.
        teacher_inputs: For the teacher, where it takes others.
        shares: Into how many shares two models without resolutions are cut.

    Returns:
        The pairs, from the first stage to the last; printed, a table. Its `terms()` go into a Distiller.

    Raises:
        TypeError: If a model is no module.
        ValueError: If there is no pair, since a model has neither maps nor blocks that repeat.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from distill import pair_layers
        >>> def network(width):
        ...     stages = [nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, 2 * width, 3, 2, 1)]
        ...     return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))
        >>> pairs = pair_layers(network(4), network(8), torch.zeros(2, 3, 16, 16))
        >>> print(pairs)
        stage  student  gives         adapter  teacher  gives          adapter  overwritten later
        8 x 8  0        (2, 4, 8, 8)           0        (2, 8, 8, 8)
        4 x 4  1        (2, 8, 4, 4)           1        (2, 16, 4, 4)
        >>> list(pairs.terms())
        ['stage1', 'stage2']
    """
    check_count("shares", shares)
    sides = []
    for name, model, given in (("student", student, inputs), ("teacher", teacher, teacher_inputs)):
        given = inputs if given is None else given
        if not isinstance(model, nn.Module):
            raise TypeError(f"the {name} must be an nn.Module, got {type(model).__name__}")
        sides.append(_Side(name, model, tap_shapes(model, given), given))
    ours, theirs = sides
    if ours.stages and theirs.stages:
        both = [size for size in ours.stages if size in theirs.stages]
        pairs = [(f"{h} x {w}", ours.stages[h, w], theirs.stages[h, w]) for h, w in both]
        if not pairs:  # the same order, from the end
            number = min(len(ours.stages), len(theirs.stages))
            lasts = [list(side.stages.values())[-number:] for side in sides]
            pairs = [(f"stage {k}", *pair) for k, pair in enumerate(zip(*lasts, strict=True), 1)]
    else:
        number = len(ours.stages) or len(theirs.stages) or shares
        cut = [list(side.stages.values()) or side.at_shares(number) for side in sides]
        number = min(map(len, cut))
        lasts = [layers[-number:] for layers in cut]
        pairs = [(f"depth {k}/{number}", *pair) for k, pair in enumerate(zip(*lasts, strict=True), 1)]
    return LayerPairs([_pair(*pair) for pair in pairs])


class _Layer(NamedTuple):
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


class _Side:
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
        known = self._known_grids(layers, shapes)
        # Queries of a detector are tokens too, but no patches, however many they are.
        self.layers = [layer if layer.grid in known else layer._replace(grid=None, prefix=0) for layer in layers]
        self.stages = self._stages(shapes)

    def _layer(self, path: str, shapes: TapShapes, module: nn.Module) -> _Layer | None:
        entry = shapes[path]
        shape, selected = first_tensor(entry.shape)
        if entry.calls != 1 or shape is None or len(shape) not in (3, 4) or shape[0] != (self.samples or shape[0]):
            return None  # windows and attention biases have another number of samples
        layout, grid, prefix = read_layout(shape, self.picture)
        leaf = next(module.children(), None) is None
        return _Layer(
            path, shape, selected, leaf, type(module), grid, prefix, layout, entry.overwritten, shapes.order[path]
        )

    def _known_grids(self, layers: Sequence[_Layer], shapes: TapShapes) -> set[tuple[int, int] | None]:
        """Grids of patches: of maps, of tokens before any map or with the picture's numbers, and of what follows."""
        known = {layer.grid for layer in layers if layer.layout != "tokens" or layer is layers[0]}
        for layer in layers:
            given = first_tensor(shapes[layer.path].inputs[0])[0]
            if given is None or len(given) != 3:
                continue
            if math.prod(given[1:]) == self.numbers or read_layout(given, self.picture)[1] in known - {None}:
                known.add(layer.grid)
        return known

    def _stages(self, shapes: TapShapes) -> dict[tuple[int, int], _Layer]:
        stages = _last_of_each([layer for layer in self.layers if self._is_map(layer, shapes)])
        if any(not layer.leaf for layer in stages.values()):  # a stem's last operation is no stage
            blocks = [
                layer
                for layer in self.layers
                if not layer.leaf or not (layer.layout == "NCHW" or issubclass(layer.kind, nn.Linear))
            ]
            stages = _last_of_each([layer for layer in blocks if self._is_map(layer, shapes)])
        ordered = dict(sorted(stages.items(), key=lambda item: -math.prod(item[0])))
        return ordered if len(ordered) > 1 else {}

    def _is_map(self, layer: _Layer, shapes: TapShapes) -> bool:
        """Whether the layer may stand for its resolution."""
        if layer.grid is None or max(layer.grid) < 2:
            return False
        if self.picture is not None and distortion(layer.grid, self.picture) > 0:
            return False  # the heads of an attention, (N, heads, tokens, C)
        return not self._inside_a_step_down(layer, shapes)

    def _inside_a_step_down(self, layer: _Layer, shapes: TapShapes) -> bool:
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

    def at_shares(self, number: int) -> list[_Layer]:
        """The last block of each of so many equal shares of the depth."""
        groups: dict[tuple[Any, ...], list[_Layer]] = {}
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


def _last_of_each(layers: Sequence[_Layer]) -> dict[tuple[int, int], _Layer]:
    """The last layer of each resolution."""
    return {layer.grid: layer for layer in layers if layer.grid is not None}


def _pair(stage: str, ours: _Layer, theirs: _Layer) -> LayerPair:
    same = (ours.grid, ours.layout) == (theirs.grid, theirs.layout) and ours.layout == "tokens"
    tokens = same and ours.shape[1] - ours.prefix == theirs.shape[1] - theirs.prefix
    whose = [name for name, layer in (("student", ours), ("teacher", theirs)) if layer.overwritten]
    return LayerPair(
        stage,
        ours.path,
        theirs.path,
        ours.shape,
        theirs.shape,
        _adapter(ours, tokens=tokens),
        _adapter(theirs, tokens=tokens),
        "both" if len(whose) == 2 else "".join(whose),
    )


def _adapter(layer: _Layer, *, tokens: bool) -> nn.Module | None:
    """What makes of a layer a map, or tokens of the grid alone."""
    steps: list[nn.Module] = [Select(0)] if layer.selected else []
    if layer.layout == "NHWC":
        steps.append(NHWC())
    elif layer.layout == "tokens" and tokens:
        steps += [Tokens(layer.prefix)] if layer.prefix else []
    elif layer.layout == "tokens" and layer.grid is not None:
        square = layer.grid[0] == layer.grid[1]
        steps.append(TokensToMap(layer.prefix, None if square else layer.grid))
    return nn.Sequential(*steps) if len(steps) > 1 else steps[0] if steps else None


def _after(adapter: nn.Module | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    if adapter is None:
        return shape
    steps = list(adapter) if isinstance(adapter, nn.Sequential) else [adapter]
    x: Any = torch.empty(shape, device="meta")
    for step in steps:
        x = x if isinstance(step, Select) else step(x)
    return tuple(x.shape)


def _in_words(adapter: nn.Module | None) -> str:
    if adapter is None:
        return ""
    return ", ".join(map(repr, adapter)) if isinstance(adapter, nn.Sequential) else repr(adapter)
