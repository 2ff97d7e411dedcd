"""What the loss classes share: options that are checked whenever they are set, the call, `repr`, reduction and mask.

A loss class is its options and, but for losses of rows, one method that calls its function.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from distill._checks import check_tensor
from distill._engine.rows import Rows
from distill._engine.topk import refusal
from distill._options import Options
from distill._reduction import Reduction, check_denominator, divide, hide, reduce
from distill.losses._gather import gather_batches, is_alone
from distill.losses._sizes import Size
from distill.topk import TopK


class Loss(Options):
    """What every loss of a student and a teacher is: its options, and how it is called."""

    gather: bool = False  # a loss that exists for a whole batch may have it as an option
    uses_target: ClassVar[bool] = False  # whether a loss of a whole batch looks at the target

    if TYPE_CHECKING:

        @override
        def __call__(  # what nn.Module declares is Any
            self,
            student: Any,
            teacher: Any,
            target: Tensor | None = None,
            *,
            mask: Tensor | None = None,
            denominator: float | Tensor | None = None,
        ) -> Tensor: ...

    size: ClassVar[Size | None] = None  # how a loss with layers reads their sizes off a shape
    several: ClassVar[bool] = False  # whether it compares several maps a side

    @classmethod
    def between(cls, student: Any, teacher: Any, *more: Any, **options: Any) -> Self:
        """Build a loss with layers for what it will compare, whose channels then need not be looked up.

        `HintLoss.between(shapes["layer2"], teacher_shapes["layers.1"])` with what `tap_shapes` gave. Where a term has
        adapters, give the shapes after them.

        Args:
            student: The student's shape, batch first; or a tensor of that shape, or an entry of `tap_shapes`. For a
                loss of several maps: a tuple of them.
            teacher: The teacher's, likewise.
            more: What else the loss must have.
            options: Options of the loss.

        Returns:
            The loss, as if it were built with the channels.

        Raises:
            TypeError: If the loss has no layers, or a shape is none.
            ValueError: If a shape has another number of dimensions than the loss takes, or an option is out of range.
        """
        # Before training and not from the first batch, as nn.LazyConv2d: the Distiller, the optimizer and DDP look at
        # the parameters when they are built, and a forward must draw no random numbers.
        if cls.size is None:
            raise TypeError(f"{cls.__name__} has no layers whose sizes follow from shapes: build it with its options")
        sides = []
        for name, given in (("student", student), ("teacher", teacher)):
            each = given if cls.several else (given,)
            if cls.several and (not isinstance(given, (tuple, list)) or not given):
                raise TypeError(f"the {name}'s shapes must be a tuple of shapes, got {given!r}")
            sizes = tuple(cls.size.read(name, shape, options.get("dim")) for shape in each)
            sides.append(sizes if cls.several else sizes[0])
        return cls(*sides, *more, **options)

    def refuse_topk(self, teacher: object) -> None:
        """Raise TypeError for a `TopK`, by the name of a loss that takes none."""
        if isinstance(teacher, TopK):
            raise TypeError(refusal(type(self).__name__))

    def gathered(
        self, student: Any, teacher: Any, target: Tensor | None, mask: Tensor | None
    ) -> tuple[Any, Any, Tensor | None, Tensor | None]:
        """What to compare: with `gather` the batches of all processes as one, but for eval mode.

        There each process compares its own, as in `nn.SyncBatchNorm`: processes may evaluate unequal numbers of
        batches, and none must wait for one that does not come.

        Raises:
            ValueError: If there is a dimension 0 of classes, or the processes' batches do not fit together.
        """
        if not self.gather:
            return student, teacher, target, mask
        labels = target if self.uses_target and isinstance(target, Tensor) else None
        given = [part for part in (student, teacher, labels, mask) if part is not None]
        if not all(isinstance(part, Tensor) and part.ndim for part in given):  # refused by the loss itself
            return student, teacher, target, mask
        dim = getattr(self, "dim", None)
        if dim is not None and dim % student.ndim == 0:
            raise ValueError(f"with gather=True dimension 0 must be the samples, got dim={dim} for the classes")
        if not self.training or is_alone():
            return student, teacher, target, mask
        gather = gather_batches
        if torch.compiler.is_compiling():  # to wait for other processes is nothing to compile
            gather = torch.compiler.disable(gather)  # type: ignore[no-untyped-call]  # pragma: no cover - traced
        student, teacher, labels, mask = gather(student=student, teacher=teacher.detach(), target=labels, mask=mask)
        return student, teacher, target if labels is None else labels, mask


class SampleLoss(Loss):
    """A loss with one value per sample: a subclass has `per_sample`, this class the reduction and the mask."""

    def __init__(self, *, reduction: Reduction) -> None:
        super().__init__()
        self.reduction = reduction

    def per_sample(self, student: Any, teacher: Any, target: Tensor | None) -> Tensor:
        """One value per sample."""
        raise NotImplementedError

    def values(self, student: Any, teacher: Any, target: Tensor | None, mask: Tensor | None) -> Tensor:
        """One value per sample, for a loss whose samples meet in a batch norm: only that one looks at the mask."""
        return self.per_sample(student, teacher, target)

    @override
    def forward(
        self,
        student: Any,
        teacher: Any,
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            student: What the student gives, as the loss's function takes it.
            teacher: What the teacher gives, as the loss's function takes it. A constant.
            target: Labels, where the loss uses them.
            mask: Bool or weights, shaped like the per-sample values. What a 0 hides counts nowhere.
            denominator: A mean becomes the sum divided by this number, such as the samples of all micro-batches.

        Returns:
            A scalar, or with `reduction="none"` one value per sample.

        Raises:
            TypeError: If what must be a tensor is none.
            ValueError: As the loss's function, and if the mask has another shape than the per-sample values.
        """
        self.refuse_topk(teacher)
        if self.gather and denominator is not None:
            raise ValueError("denominator must be None with gather=True, whose mean is over all processes already")
        student, teacher, target, mask = self.gathered(student, teacher, target, mask)
        if mask is not None:
            check_tensor("mask", mask)
            student, teacher = _hide(student, mask), _hide(teacher, mask)
        reduction = self.reduction_over(denominator)
        return divide(reduce(self.values(student, teacher, target, mask), reduction, mask), denominator)

    def reduction_over(self, denominator: float | Tensor | None) -> Reduction:
        """The reduction of a call: a mean with a denominator is a sum, which is then divided by it.

        Raises:
            ValueError: If there is a denominator but no mean.
        """
        check_denominator(denominator, self.reduction)
        return self.reduction if denominator is None else "sum"


class RowLoss(SampleLoss):
    """A loss of rows of logits, which the engine computes: a subclass is its options."""

    rows: ClassVar[Rows]

    def __init__(self, *, reduction: Reduction, dim: int | None) -> None:
        super().__init__(reduction=reduction)
        self.dim = dim

    @override
    def refuse_topk(self, teacher: object) -> None:
        if not self.rows.topk:
            super().refuse_topk(teacher)

    @override
    def forward(
        self,
        student: Tensor,
        teacher: Any,
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            student: `(..., C)`, or with the `C` values along `dim`.
            teacher: Same shape, or a `TopK` of `(...)` rows for a divergence of two distributions. A constant.
            target: The class of every sample, `(...)`, integers, where the loss uses labels.
            mask: Bool or weights, `(...)`, shaped like the per-sample values. What a 0 hides counts nowhere, also where
                it is NaN, infinite or a label that is no class.
            denominator: A mean becomes the sum divided by this number, such as the tokens of all micro-batches.

        Returns:
            A scalar, or with `reduction="none"` one value per sample, `(...)`.

        Raises:
            TypeError: If what must be a tensor is none.
            ValueError: As the loss's function, and if the mask has another shape than the per-sample values.
        """
        if isinstance(teacher, TopK):
            self.refuse_topk(teacher)
        reduction = self.reduction if denominator is None else self.reduction_over(denominator)
        value = type(self).rows.reduced(
            student, teacher, target, dim=self.dim, reduction=reduction, mask=mask, **self.given()
        )
        return value if denominator is None else divide(value, denominator)


class BatchLoss(Loss):
    """A loss that exists only for a whole batch: a subclass has `whole`, and the mask selects samples.

    Args:
        gather: Whether several processes that train together compare the batches of all of them; False: each its own.
    """

    def __init__(self, *, gather: bool = False) -> None:
        super().__init__()
        self.gather = gather

    def whole(self, student: Tensor, teacher: Tensor, target: Tensor | None, mask: Tensor | None) -> Tensor:
        """The value of the samples of a batch that the mask selects."""
        raise NotImplementedError

    @override
    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the loss.

        Args:
            student: The student's batch, `(N, ...)`.
            teacher: The teacher's batch, `(N, ...)`, as the loss's function takes it. A constant.
            target: What the loss needs of each sample, where it needs something.
            mask: Bool or integers, one per sample: where it is 0 the sample counts nowhere, whatever it holds. Weights
                are refused: they have no meaning here.

        Returns:
            A scalar, that of the selected samples alone; there is no value per sample to reduce. If there is no sample,
            0 with a gradient of 0.

        Raises:
            TypeError: If what must be a tensor is none.
            ValueError: As the loss's function, and if the mask is not one per sample or holds weights.
        """
        self.refuse_topk(teacher)
        return self.whole(*self.gathered(student, teacher, target, mask))


def _hide(side: Any, mask: Tensor) -> Any:
    """Hide samples in a tensor or a tuple of them; what does not fit the mask is left to the checks that follow."""
    if isinstance(side, (tuple, list)):
        return tuple(_hide(part, mask) for part in side)
    fits = isinstance(side, Tensor) and side.shape[: mask.ndim] == mask.shape and side.device == mask.device
    return hide(side, mask) if fits else side
