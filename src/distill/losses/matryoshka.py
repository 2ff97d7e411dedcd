"""Leading dimensions: Kusupati et al., "Matryoshka Representation Learning" (NeurIPS 2022)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_count, check_flag, check_not_negative, check_tensor
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import Loss

FAMILY = "embeddings"


def matryoshka_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    loss: Callable[..., Tensor],
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    of_teacher: bool = True,
    **given: Any,
) -> Tensor:
    """Any loss, summed over leading dimensions of the embeddings, so that each prefix is an embedding.

        loss = sum_d w_d * loss(s[..., :d], t[..., :d])

    A student trained so may be cut to any of these widths afterwards. Name the whole width too: what lies beyond the
    largest of `dims` is not trained.

    Args:
        student: The student's embeddings, `(..., D)`.
        teacher: The teacher's embeddings, `(..., D')`, as the loss takes them. A constant for the losses of this
            library.
        target: What the loss needs of each sample, where it needs something.
        loss: Called as `loss(student, teacher, target)` with the parts; a loss of this library or one of yours.
        dims: The widths `d`, positive and different from each other.
        weights: One for each width, zero or positive; a weight of 0 leaves its width out. None: 1 each.
        of_teacher: Whether the teacher's embeddings are cut as well. With False each part of the student meets the
            whole teacher, for losses that compare relations between samples (`sp`, `pkt`, `rkd`) and take any width.
        **given: What else the loss is called with, such as `mask` or `denominator`.

    Returns:
        The weighted sum of what the loss gives, a scalar, or with a reduction of `"none"` one value per sample.

    Raises:
        TypeError: If an input is no tensor, or a weight is no number.
        ValueError: If a width is larger than the embeddings that are cut, `dims` or `weights` are out of range, the
            loss gives a value for each dimension, and as the loss itself.

    Examples:
        >>> import torch
        >>> from distill import cosine_loss, matryoshka_loss
        >>> student = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[2.0, 0.0, 1.0, 0.0]])
        >>> matryoshka_loss(student, teacher, loss=lambda s, t, _: cosine_loss(s, t), dims=(2,))  # same first half
        tensor([0.])

    Notes:
        Published with weight 1 for each width, the widths halved from the whole one to 8.

        Scale: `MatryoshkaLoss` of sentence-transformers, a sum with weights of 1. It also divides each part by its
        length, which changes nothing for a loss of directions such as `cosine`, `sp` or `pkt`; for another one give it
        normalised parts in your own function.

        Caveat: The paper sums the losses of classifiers and has no teacher.

    Reference:
        Aditya Kusupati, Gantavya Bhatt, Aniket Rege, Matthew Wallingford, Aditya Sinha, Vivek Ramanujan, William
        Howard-Snyder, Kaifeng Chen, Sham Kakade, Prateek Jain and Ali Farhadi, "Matryoshka Representation Learning",
        NeurIPS 2022 and arXiv 2205.13147, section 3.
    """
    dims, weights = _check_dims("dims", dims), _check_weights("weights", weights)
    if weights is not None and len(weights) != len(dims):
        raise ValueError(f"weights must be one for each of dims, got {len(weights)} for {len(dims)}")
    largest = max(dims)
    if _width(check_tensor("student", student)) < largest:
        raise ValueError(f"student must be at least {largest} wide for dims={dims}, got {tuple(student.shape)}")
    if _width(check_tensor("teacher", teacher)) < largest and of_teacher:
        raise ValueError(
            f"teacher must be at least {largest} wide for dims={dims}, such as of the same shape as the student "
            f"(nothing is broadcast), got {tuple(teacher.shape)}"
        )
    parts = []
    for d, weight in zip(dims, weights or (1.0,) * len(dims), strict=True):
        if weight:
            part = loss(student[..., :d], teacher[..., :d] if of_teacher else teacher, target, **given)
            parts.append(part if weight == 1 else weight * part)
    if any(part.shape != parts[0].shape for part in parts):
        raise ValueError(
            "the loss must give values of one shape for all widths, a scalar or one per sample, got "
            f"{', '.join(str(tuple(part.shape)) for part in parts)}"
        )
    return torch.stack(parts).sum(0)


def _width(embeddings: Tensor) -> int:
    return embeddings.shape[-1] if embeddings.ndim else 0


def _check_dims(name: str, value: Sequence[int]) -> tuple[int, ...]:
    if isinstance(value, (str, int)) or not len(value):
        raise ValueError(f"{name} must be at least one width, got {value!r}")
    for d in value:
        check_count(f"a width of {name}", d)
    if len(set(value)) < len(value):
        raise ValueError(f"{name} must be different from each other, got {tuple(value)!r}")
    return tuple(value)


def _check_weights(name: str, value: Sequence[float] | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    for weight in value:
        check_not_negative(f"a weight of {name}", weight)
    if not any(value):
        raise ValueError(f"{name} must have one above 0, got {tuple(value)!r}")
    return tuple(value)


@register_loss("matryoshka")
class MatryoshkaLoss(Loss):
    """Any loss, summed over leading dimensions of the embeddings; see `matryoshka_loss` for the formula.

    Reduction, mask and denominator are those of the loss inside. What it learns is learned here.

    Args:
        loss: A loss of this library or another module, called as `loss(student, teacher, target)`.
        dims: The widths, positive and different from each other; the whole one too.
        weights: One for each width, zero or positive. None: 1 each. They may be changed between steps.
        of_teacher: Whether the teacher's embeddings are cut as well.

    Raises:
        TypeError: If the loss is no module, or a weight is no number.
        ValueError: If `dims` or `weights` are out of range.

    Examples:
        >>> import torch
        >>> from distill import CosineLoss, Distiller, MatryoshkaLoss
        >>> student, teacher = torch.nn.Linear(8, 64), torch.nn.Linear(8, 64)
        >>> loss = MatryoshkaLoss(CosineLoss(), dims=(64, 32, 16, 8))
        >>> distiller = Distiller(student, teacher, loss, task_loss=None)
        >>> distiller(torch.randn(4, 8)).loss.backward()
    """

    options = {"dims": _check_dims, "weights": _check_weights, "of_teacher": check_flag}  # noqa: RUF012 - declared in the base

    def __init__(
        self,
        loss: nn.Module,
        dims: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        of_teacher: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be a module, got {type(loss).__name__}")
        self.loss = loss
        self.dims = dims
        self.weights = weights
        self.of_teacher = of_teacher
        if self.weights is not None and len(self.weights) != len(self.dims):
            raise ValueError(f"weights must be one for each of dims, got {len(self.weights)} for {len(self.dims)}")

    @property
    def reduction(self) -> Reduction:
        """The reduction of the loss inside, where it has one."""
        inner: Any = self.loss  # a module may have any attribute
        reduction: Reduction = inner.reduction
        return reduction

    @reduction.setter
    def reduction(self, value: Reduction) -> None:
        inner: Any = self.loss
        inner.reduction = value

    @override
    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            student: The student's embeddings, `(..., D)`.
            teacher: The teacher's embeddings, as the loss inside takes them.
            target: What the loss inside needs of each sample.
            mask: As the loss inside takes it.
            denominator: As the loss inside takes it, where it has a reduction.

        Returns:
            A scalar, or with a reduction of `"none"` one value per sample.

        Raises:
            TypeError: If an input is no tensor.
            ValueError: As `matryoshka_loss` and the loss inside.
        """
        self.refuse_topk(teacher)
        given: dict[str, Any] = {"mask": mask, "denominator": denominator}
        given = {name: value for name, value in given.items() if value is not None}
        return matryoshka_loss(student, teacher, target, loss=self.loss, **self.given(), **given)
