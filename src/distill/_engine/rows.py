"""What a loss of rows is: its formula, how to do it fast, and the checks of what it is given."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill._checks import check_classes, check_inputs, check_labels, ordinary
from distill._engine import fused
from distill._engine.blocks import block_by_autograd
from distill._engine.kernels import kernel_first
from distill._engine.topk import check_rows, merged, ready_student, refusal
from distill._reduction import Reduction, check_mask, hide, reduce
from distill.topk import TopK

_FIRST = 1 / fused.SMALL  # from the first element on
_FEW_APART = 1 / 128  # below it the copies show


@dataclass(frozen=True)
class Rows:
    """A loss that treats each row by itself: what it is, and how to do it fast where the inputs are large.

    Args:
        formula: `formula(student, teacher, dim=..., **options)` gives the per-sample values with plain, differentiable
            operations. Both tensors come in the dtype of the computation, the teacher detached. With `labels` a third
            tensor follows: one int64 label per row, with a dimension of size 1 at `dim`.
        block: `block(student, teacher, factors, gradient, spare, **options)` gives the values `(R,)` of a block of rows
            `(R, C)`; with `labels` these, `(R, 1)`, come third. It only reads its inputs, and may use `gradient` and
            `spare`, `(R, C)`, as it likes; but where `factors`, `(R, 1)` or one number for all, is not None, it leaves
            in `gradient` the values' gradient for the student, each row times its factor. None: autograd finds the
            gradient of the formula, block by block.
        few: `few(student, teacher, factors, **options)` does the same for so few rows that each operation shows more
            than what it computes. It gives the values and, where there are factors, the gradient; None for rows that
            it leaves to `block`.
        kernel: A function that imports the kernel of `triton.py` that does the same on a GPU, and returns it; with
            `labels` it returns a function that is called as `triton.run` is, with the labels after the teacher. None:
            blocks there too.
        mean: Whether the formula takes `mean=True`, and then gives the mean of its values over all samples: in fewer
            operations than to find each value first.
        single: Whether that mean is a single operation of PyTorch, which rows of less than `fused.SHORT` columns always
            take.
        fused_from: From how many times `fused.SMALL` elements on the fused form pays on a CPU, and elsewhere from at
            least 1. None: where there is a block function from the first element on, since to form the gradient with
            the values takes fewer operations than to find it later; else from 1 on.
        masked_from: The same with a mask. None as there: a block function pays at once, where the formula copies both
            inputs to hide rows.
        longer: How many times as long as others' its blocks may be where none is copied: for a loss of so few passes
            that it gains nothing from the cache. Long blocks wait less often for a thread that another process delays.
        transposed: Whether the block function pays even where the numbers of a row are not side by side, so that each
            block is copied into a buffer and back. Else the formula does slabs in their own layout, from `fused.SMALL`
            elements on.
        softmax: Whether the rows are logits, so that it must be clear along which dimension.
        classes: How many logits a row must have at least: two for a softmax.
        labels: Whether the formula needs the label of each row.
        topk: Whether it compares distributions over any classes, and has a temperature: then it takes a `TopK`, whose
            rest is one class more.
        sampled: The same from a `TopK` of which some classes were drawn, `formula(student, teacher, indices, dim=...,
            samples=..., **options)` with the teacher as in `TopK.rows`. None: it would be biased.
    """

    formula: Callable[..., Tensor]
    block: Callable[..., Tensor] | None = None
    few: Callable[..., tuple[Tensor, Tensor | None] | None] | None = None
    kernel: Callable[[], Any] | None = None
    mean: bool = False
    single: bool = False
    fused_from: float | None = None
    masked_from: float | None = None
    longer: int = 1
    transposed: bool = False
    softmax: bool = True
    classes: int = 2
    labels: bool = False
    topk: bool = False
    sampled: Rows | None = None
    _merged: Rows | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.topk:
            return
        changed: dict[str, Any] = {
            "few": None,
            "mean": False,
            "labels": True,
            "fused_from": 1 / 4,
            "masked_from": 1 / 4,
            "topk": False,
        }
        # Here and not where it is needed: PyTorch 2.5 does not trace `replace`.
        object.__setattr__(self, "_merged", dataclasses.replace(self, **merged(self.formula), **changed))

    @functools.cached_property
    def least(self) -> float:
        """From how many times `fused.SMALL` elements on the fused form pays on a CPU."""
        return self._default() if self.fused_from is None else self.fused_from

    @functools.cached_property
    def least_masked(self) -> float:
        """The same with a mask."""
        return self._default() if self.masked_from is None else self.masked_from

    def _default(self) -> float:
        return 1.0 if self.block is None else _FIRST

    def apart(self, least: float, *, alone: bool) -> float:
        """From how many times `fused.SMALL` elements on it pays where the numbers of a row are not side by side.

        Args:
            least: The same where they are.
            alone: Whether the formula is a single operation.
        """
        if alone:
            return math.inf
        return max(least, _FEW_APART) if self.transposed else max(least, 1.0)

    def own_block(self) -> Callable[..., Tensor]:
        """The block function: its own, or the formula's by autograd."""
        return self.block or functools.partial(block_by_autograd, self.formula)

    def in_blocks(self) -> Callable[..., Tensor]:
        """The block function: on a GPU its kernel, if it has one and that takes the block."""
        return self.own_block() if self.kernel is None else kernel_first(self.kernel, self.own_block())

    def of_topk(
        self, topk: TopK, classes: int, mask: Tensor | None, options: dict[str, Any]
    ) -> tuple[Rows, dict[str, Any]]:
        """The loss that takes the rows of a `TopK`, and its options.

        Raises:
            TypeError: If the loss takes no `TopK`.
            ValueError: If it takes none with drawn classes, and as `check_rows`.
        """
        if self._merged is None:
            raise TypeError(refusal("the loss"))
        if topk.samples and self.sampled is None:
            raise ValueError(
                f"only kl takes a TopK with classes drawn from the rest, since others are biased by it, got {topk}"
            )
        check_rows(topk, classes, mask, options["temperature"])
        if topk.samples and self.sampled is not None:
            return self.sampled, {**options, "samples": topk.samples}
        return self._merged, options

    def values(
        self,
        student: Tensor,
        teacher: Tensor | TopK,
        target: Tensor | None = None,
        *,
        dim: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Check the inputs and compute one value per sample, as `formula` would; see `reduced`."""
        return self.reduced(student, teacher, target, dim=dim, reduction="none", **options)

    def reduced(
        self,
        student: Tensor,
        teacher: Tensor | TopK,
        target: Tensor | None = None,
        *,
        dim: int | None,
        reduction: Reduction,
        mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Check the inputs and compute the loss, as `reduce(formula(...), reduction, mask)` would.

        What the mask hides counts nowhere, not even where it is NaN, infinite or a label that is no class.

        Args:
            student: `(..., C)`, or with the `C` values along `dim`.
            teacher: Same shape, or for a loss that takes one a `TopK` of `(...)` rows. A constant.
            target: `(...)`, the label of each row, for a loss that uses it.
            dim: The dimension of a row. None: the last one, of at most three where the rows are logits.
            reduction: As in `reduce`.
            mask: As in `reduce`.
            options: What the formula takes.

        Returns:
            What `reduce` returns.

        Raises:
            TypeError: If student or teacher is no tensor.
            ValueError: As `check_inputs`, `check_classes`, `check_labels` and `check_mask`.
        """
        loss, labels = self, None
        if isinstance(teacher, TopK):
            student, dim = ready_student(student, teacher, dim=dim, mask=mask), -1
            mask = None if mask is None else ordinary(mask)
            loss, options = self.of_topk(teacher, student.shape[-1], mask, options)
            dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
            teacher, labels = teacher.rows(dtype, mask)
        else:
            dtype = check_inputs(student, teacher, dim=-1 if dim is None else dim, columns=dim in (None, -1))
            teacher = teacher.detach()
            dim = check_classes(student, dim=dim, least=self.classes) if self.softmax else -1 if dim is None else dim
            if mask is not None:
                check_mask(mask, student.movedim(dim, -1).shape[:-1], student.device)
                mask = ordinary(mask)
            if self.labels:
                labels = check_labels(target, student, dim=dim, mask=mask)
        operands = () if labels is None else (labels,)
        mean = loss.mean and reduction == "mean" and mask is None
        traced = torch.compiler.is_compiling()
        mixed = not student.dtype is teacher.dtype is dtype
        if mixed and not traced and student.is_cpu and student.numel() <= fused.FEW:
            student, teacher = student.to(dtype), teacher.to(dtype)  # a few rows cost less in one piece than in buffers
            mixed = False
        # Untraced only: before Python 3.12 a property that is kept is behind a lock, which Dynamo does not know.
        least = 0.0 if traced else loss.least if mask is None else loss.least_masked
        # `can_fuse` asks for no fewer elements, and costs more to ask.
        if (
            not traced
            and student.numel() >= fused.SMALL * least
            and fused.can_fuse(
                student,
                teacher,
                dim,
                options,
                least=least,
                apart=loss.apart(least, alone=mean and loss.single),
                shortest=fused.SHORT if mean and loss.single else 1,
            )
        ):
            if mask is None or not mask.requires_grad:
                call = fused.Call(loss, options, dim, dtype, reduction)
                return fused.run(student, teacher, labels, None if mask is None else mask.to(dtype), call)
            # Weights that learn: the gradient needs the values.
            call = fused.Call(loss, options, dim, dtype, "none")
            return reduce(fused.run(student, teacher, labels, (mask.detach() != 0).to(dtype), call), reduction, mask)
        if mask is not None:
            student, teacher = hide(student, mask, dim=dim), hide(teacher, mask, dim=dim)
        if not traced and teacher.is_inference():
            teacher = ordinary(teacher)
        if mixed:
            student, teacher = student.to(dtype), teacher.to(dtype)
        if mean:
            return loss.formula(student, teacher, *operands, dim=dim, mean=True, **options)
        return reduce(loss.formula(student, teacher, *operands, dim=dim, **options), reduction, mask)
