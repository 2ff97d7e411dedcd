"""The student's loss on labels, beside its teacher: cross-entropy with a mask."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from distill._checks import check_fraction, check_integer, check_labels, is_integer, widen
from distill._options import Options
from distill._reduction import Reduction, check_denominator, check_mask, divide, hide, reduce


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
            target: Labels, shaped like the logits without the classes; or probabilities, shaped like the logits.
            mask: Bool or weights, one per sample. What a 0 hides counts nowhere.
            denominator: A mean becomes the sum divided by this number. Not used with another reduction.

        Returns:
            A scalar, or with `reduction="none"` one value per sample.

        Raises:
            TypeError: If student or target is no tensor.
            ValueError: If the shapes do not fit or fit in two ways, a label is no class, or the mask has another shape.
        """
        for name, value in (("student", student), ("target", target)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        check_denominator(denominator, self.reduction)
        dim = _class_dim(student, target, self.dim)
        logits = widen(student, torch.promote_types(student.dtype, torch.float32)).movedim(dim, -1)
        if mask is not None:
            check_mask(mask, logits.shape[:-1], logits.device)
            logits = hide(logits, mask, dim=-1)
        columns = logits.shape[-1]
        if not is_integer(target):
            goal = target.to(logits.dtype).movedim(dim, -1).reshape(-1, columns)
            values = F.cross_entropy(
                logits.reshape(-1, columns), goal, reduction="none", label_smoothing=self.label_smoothing
            )
            return self._reduced(values.reshape(logits.shape[:-1]), mask, denominator)
        counts = target != self.ignore_index
        weights = counts if mask is None else mask * counts
        labels = check_labels(target, logits, dim=-1, mask=weights.detach()).squeeze(-1)
        values = F.cross_entropy(
            logits.reshape(-1, columns), labels.reshape(-1), reduction="none", label_smoothing=self.label_smoothing
        )
        return self._reduced(values.reshape(labels.shape), weights, denominator)

    def _reduced(self, values: Tensor, mask: Tensor | None, denominator: float | Tensor | None) -> Tensor:
        if denominator is None:
            return reduce(values, self.reduction, mask)
        return divide(reduce(values, "sum", mask), denominator)


def _class_dim(logits: Tensor, target: Tensor, dim: int | None) -> int:
    """The dimension of the classes: as given, or where the labels have none."""
    shape, labels = tuple(logits.shape), tuple(target.shape)
    if not logits.is_floating_point() or logits.ndim == 0 or 0 in shape:
        raise ValueError(f"logits must be floating-point and not empty, got {logits.dtype} of shape {shape}")
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
