"""Looks at two models for layers that may be compared: candidate pairs by stage, with the adapters that they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import nn
from typing_extensions import override

from distill._checks import check_count
from distill._distiller.terms import Term
from distill._stages import Layer, Side
from distill._table import as_html, table
from distill.adapt import NHWC, Select, Tokens, TokensToMap
from distill.diagnostics import tap_shapes
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
            words = [
                "one of yours" if len(ours) < len(other) else _in_words(adapter)  # tokens of no grid beside a map
                for ours, other, adapter in zip(
                    pair.compared, pair.compared[::-1], (pair.student_adapter, pair.teacher_adapter), strict=True
                )
            ]
            sides = (
                (pair.student, str(pair.student_shape), words[0]),
                (pair.teacher, str(pair.teacher_shape), words[1]),
            )
            needed = f"{pair.overwritten}: copy=True" if pair.overwritten else ""
            rows.append((pair.stage, *sides[0], *sides[1], needed))
        return table(rows)

    def _repr_html_(self) -> str:
        return as_html(repr(self))


def pair_layers(
    student: nn.Module, teacher: nn.Module, inputs: Any, *, teacher_inputs: Any = None, shares: int = 4
) -> LayerPairs:
    """Run both models once and propose layers to compare: where to start when writing terms.

    Where both models have maps of several resolutions, the last layer at each resolution that both have makes a pair:
    of the levels of a pyramid, or of the backbone where a segmentation head runs layers on all its stages. A model
    whose blocks all have one size, such as a ViT, is cut into equal shares of its depth, as many as the other model has
    stages, and the last block of each share is taken. It is a proposal from shapes and order; of names it only knows
    `encoder` and, beside it, `decoder`, whose tokens are queries and no map. Which pairs help has to be tried.

    Tokens that are not those of a whole grid (the visible patches of a masked autoencoder, YOLOS with its detection
    tokens) get no adapter. Beside a map they need one of yours, and the table says so.

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
        sides.append(Side(name, model, tap_shapes(model, given), given))
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


def _pair(stage: str, ours: Layer, theirs: Layer) -> LayerPair:
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


def _adapter(layer: Layer, *, tokens: bool) -> nn.Module | None:
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
