"""The student's loss on labels, beside its teacher: cross-entropy with a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_fraction, check_labels, is_integer, widen
from distill._reduction import Reduction, check_mask, check_reduction, hide, reduce


class CrossEntropyLoss(nn.Module):
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

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        dim: int | None = None,
    ) -> None:
        super().__init__()
        self.label_smoothing = check_fraction("label_smoothing", label_smoothing, zero=True)
        self.ignore_index = ignore_index
        self.reduction = check_reduction(reduction)
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
        if denominator is None or self.reduction != "mean":
            return reduce(values, self.reduction, mask)
        return reduce(values, "sum", mask) / denominator

    @override
    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        return (
            f"label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}, dim={self.dim}"
        )


def _class_dim(logits: Tensor, target: Tensor, dim: int | None) -> int:
    """The dimension of the classes: as given, or where the labels have none."""
    shape, labels = tuple(logits.shape), tuple(target.shape)
    if not logits.is_floating_point() or logits.ndim == 0 or 0 in shape:
        raise ValueError(f"logits must be floating-point and not empty, got {logits.dtype} of shape {shape}")
    if logits.device != target.device:
        raise ValueError(f"logits and labels must be on the same device, got {logits.device} and {target.device}")
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
        return fitting.pop()
    if fitting:
        raise ValueError(
            f"the dimension of the classes must be clear, but logits of shape {shape} and a target of shape {labels} "
            "can be read in two ways: give CrossEntropyLoss(dim=1) or CrossEntropyLoss(dim=-1)"
        )
    raise ValueError(
        "labels must be shaped like the logits without the dimension of the classes, "
        f"got logits of shape {shape} and labels of shape {labels}"
    )
