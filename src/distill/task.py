"""The student's loss on labels, beside its teacher: cross-entropy with a mask."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from distill._checks import check_fraction, check_integer, check_labels, check_numbers, is_integer, may_look, widen
from distill._options import Options
from distill._reduction import Reduction, check_denominator, check_mask, divide, hide, reduce

_ROUNDING = 0.01  # how far probabilities in half precision may sum from 1


class CrossEntropyLoss(Options):
    """Cross-entropy of logits and labels, with a mask: the default task loss of a `Distiller`.

        loss = -log softmax(s)_y,  averaged over the samples that have a label and are not masked

    As `nn.CrossEntropyLoss`, but the class dimension is found or given, a mask is taken, and where nothing is left to
    average the loss is 0 with a gradient of 0, not NaN.

    Args:
        label_smoothing: The share of a label that is spread evenly over all classes, at least 0 and below 1.
        ignore_index: A label that means "none": such samples do not count.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the classes in the logits. None: found from the labels' shape, and refused where it could
            be two.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> import torch
        >>> from distill import CrossEntropyLoss
        >>> loss = CrossEntropyLoss()
        >>> logits = torch.zeros(2, 3, 4)  # batch, tokens, vocabulary
        >>> loss(logits, torch.tensor([[0, 1, -100], [3, -100, -100]]))  # log 4
        tensor(1.3863)
    """

    options: ClassVar = {"label_smoothing": partial(check_fraction, zero=True), "ignore_index": check_integer}

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        dim: int | None = None,
    ) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.dim = dim

    if TYPE_CHECKING:

        @override
        def __call__(
            self,
            student: Tensor,
            target: Tensor,
            *,
            mask: Tensor | None = None,
            denominator: float | Tensor | None = None,
        ) -> Tensor: ...

    @override
    def forward(
        self,
        student: Tensor,
        target: Tensor,
        *,
        mask: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            student: Logits, `(..., C)` or `(N, C, ...)`. Half and bfloat16 are computed in float32.
            target: Labels, shaped like the logits without the classes; or probabilities, shaped like the logits, whose
                sum over the classes is 1. (Several right classes a sample are no distribution: use
                `nn.BCEWithLogitsLoss`.)
            mask: Bool or weights, one per sample. What a 0 or an ignored label hides counts nowhere, also where the
                logits are NaN.
            denominator: A mean becomes the sum divided by this number. Not used with another reduction.

        Returns:
            A scalar, or with `reduction="none"` one value per sample. On a GPU and compiled, where to look at
            probabilities would wait for the device, NaN where they are none.

        Raises:
            TypeError: If student or target is no tensor.
            ValueError: If the shapes do not fit or fit in two ways, a label is no class, probabilities are negative or
                do not sum to 1, or the mask has another shape.
        """
        for name, value in (("student", student), ("target", target)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        check_denominator(denominator, self.reduction)
        dim = _class_dim(student, target, self.dim)
        logits = widen(student, torch.promote_types(student.dtype, torch.float32)).movedim(dim, -1)
        if mask is not None:
            check_mask(mask, logits.shape[:-1], logits.device)
        if is_integer(target):
            target = target.long()  # as unsigned bytes, 156 would equal -100
            counts = target != self.ignore_index
            mask = counts if mask is None else mask * counts
            goal = check_labels(target, logits, dim=-1, mask=mask.detach()).reshape(-1)
        else:
            goal = _probabilities(target.to(logits.dtype).movedim(dim, -1), mask).reshape(-1, logits.shape[-1])
        if mask is not None and not (may_look(mask) and (mask != 0).all()):  # to hide costs a copy of the logits
            logits = hide(logits, mask, dim=-1)
        rows = logits.reshape(-1, logits.shape[-1])
        values = F.cross_entropy(rows, goal, reduction="none", label_smoothing=self.label_smoothing)
        values = values.reshape(logits.shape[:-1])
        if denominator is None:
            return reduce(values, self.reduction, mask)
        return divide(reduce(values, "sum", mask), denominator)


def _probabilities(goal: Tensor, mask: Tensor | None) -> Tensor:
    """Check probabilities `(..., C)`; where to look at them would wait for a device, bad ones become NaN."""
    bad = ((goal.sum(-1) - 1).abs() > _ROUNDING) | (goal < 0).any(-1)
    if mask is not None:
        bad = bad & (mask.detach() != 0)
        goal = hide(goal, mask, dim=-1)
    if not may_look(goal):
        return goal.masked_fill(bad.unsqueeze(-1), torch.nan)
    if bad.any():
        row = goal[bad][0]
        raise ValueError(
            "a target of floating-point numbers must be probabilities, not negative and with a sum of 1 over the "
            f"classes, got a sum of {row.sum():.6g} and a smallest of {row.min():.6g}; for several right classes a "
            "sample use nn.BCEWithLogitsLoss, for the weight of a sample a mask"
        )
    return goal


def _class_dim(logits: Tensor, target: Tensor, dim: int | None) -> int:
    """The dimension of the classes: as given, or where the labels have none."""
    shape, labels = tuple(logits.shape), tuple(target.shape)
    if not logits.is_floating_point() or logits.ndim == 0 or 0 in shape:
        raise ValueError(f"logits must be floating-point and not empty, got {logits.dtype} of shape {shape}")
    check_numbers("logits", logits)
    if logits.device != target.device:
        raise ValueError(f"logits and labels must be on the same device, got {logits.device} and {target.device}")
    if dim is not None and (not isinstance(dim, int) or not -logits.ndim <= dim < logits.ndim):
        raise ValueError(f"dim must be a dimension of the logits, got {dim!r} for shape {shape}")
    candidates = {-1 % logits.ndim, min(1, logits.ndim - 1)} if dim is None else {dim % logits.ndim}
    if not is_integer(target):
        if target.shape != logits.shape or not target.is_floating_point():
            raise ValueError(
                "target must be integers (labels), or probabilities shaped like the logits, "
                f"got {target.dtype} of shape {labels} for logits of shape {shape}"
            )
        fitting = candidates
    else:
        fitting = {d for d in candidates if shape[:d] + shape[d + 1 :] == labels}
    if len(fitting) == 1:
        (found,) = fitting
        if shape[found] < 2:
            raise ValueError(f"there must be at least 2 classes, got logits of shape {shape}")
        return found
    if fitting:
        raise ValueError(
            f"the dimension of the classes must be clear, but logits of shape {shape} and a target of shape {labels} "
            "can be read in two ways: give CrossEntropyLoss(dim=1) or CrossEntropyLoss(dim=-1)"
        )
    raise ValueError(
        "labels must be shaped like the logits without the dimension of the classes, "
        f"got logits of shape {shape} and labels of shape {labels}"
    )
