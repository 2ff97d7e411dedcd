"""Losses on logits that are never held: hidden states and heads in, value and gradients out, some rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import (
    check_count_or_none,
    check_integer,
    check_not_negative,
    check_tensor,
    ordinary,
)
from distill._engine.cross_entropy import CROSS_ENTROPY, with_cross_entropy
from distill._engine.fused import Call
from distill._engine.linear import linear_rows
from distill._engine.products import Side
from distill._engine.topk import check_fits
from distill._hidden import IGNORED, check_compared, check_hidden, find_labels, flat_mask, labelled_share
from distill._reduction import Reduction, check_denominator, divide
from distill.losses._base import RowLoss
from distill.losses._heads import AfterHeads, HeadPair, LossOfHeads, check_positions, check_scale, check_softcap
from distill.topk import TopK


class LinearLoss(LossOfHeads):
    """Any loss on logits, computed from hidden states and two heads without holding the logits.

    It gives what `loss(student_head(h_s), teacher_head(h_t), target, mask=mask)` gives, plus `cross_entropy` times the
    cross-entropy of the student's logits. Values and the gradients of the hidden states and of the student's head come
    from one pass, some rows at a time. No logits are formed twice; memory is two chunks of logits beside the gradients.
    With `reduction="none"`, in half precision and under its autocast the student's logits are formed once more in
    backward.

    Use it as a `Term` at what the heads see: `at="lm_head:input"`, or at the last norm of models, which then need no
    logits at all. The heads are referred to, not owned: they are not in the loss's `parameters()`.

    Args:
        loss: A loss of rows, one value for each sample's logits: `KLLoss`, `ReverseKLLoss`, `JSLoss`, `DKDLoss` and
            others, with its options and reduction; or one of yours that is built on `RowLoss`.
        student_head: The student's head: `nn.Linear`, `nn.Embedding` (tied or not), or another module that computes
            `W h + b` with a matrix `weight` of V rows.
        teacher_head: The teacher's head. A constant. None: each call brings a `TopK` in place of hidden states, so that
            only the student's head is multiplied. With a head a call may bring either.
        cross_entropy: What the cross-entropy is multiplied by, zero or positive. It counts samples that have a label: a
            target of -100 has none. It is over the student's whole vocabulary.
        vocab_size: Compare the first so many rows of both heads only, which must mean the same tokens.
        student_scale: What the student's logits are multiplied by.
        teacher_scale: What the teacher's logits are multiplied by.
        student_softcap: The soft cap c of the student's logits, after the scale: `c * tanh(logits / c)`. None: no cap.
        teacher_softcap: The same for the teacher's logits.
        rows: How many samples at a time; None: 256 on a CPU, 2048 elsewhere. More take more memory, fewer more time.

    Raises:
        TypeError: If the loss is no loss of rows.
        ValueError: If a head does more than `W h + b`, the vocabularies differ and `vocab_size` is None, the loss takes
            another dimension than the last, or an option is out of range.

    Examples:
        >>> import torch
        >>> from distill import KLLoss, LinearLoss
        >>> student_head, teacher_head = torch.nn.Linear(4, 100), torch.nn.Linear(8, 100)
        >>> loss = LinearLoss(KLLoss(2.0), student_head, teacher_head)
        >>> student, teacher = torch.randn(2, 16, 4), torch.randn(2, 16, 8)
        >>> formed = KLLoss(2.0)(student_head(student), teacher_head(teacher))
        >>> torch.allclose(loss(student, teacher), formed)
        True
    """

    options: ClassVar = {
        "cross_entropy": check_not_negative,
        "student_scale": check_scale,
        "teacher_scale": check_scale,
        "student_softcap": check_softcap,
        "teacher_softcap": check_softcap,
        "rows": check_count_or_none,
    }

    def __init__(
        self,
        loss: RowLoss,
        student_head: nn.Module,
        teacher_head: nn.Module | None = None,
        *,
        cross_entropy: float = 0.0,
        vocab_size: int | None = None,
        student_scale: float = 1.0,
        teacher_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        rows: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(loss, RowLoss):
            raise TypeError(
                f"loss must be a loss of rows of logits, such as KLLoss(), got {type(loss).__name__}; other losses "
                "take formed logits"
            )
        if loss.dim not in (None, -1):
            raise ValueError(f"the loss must take the last dimension, got dim={loss.dim}")
        self.loss = loss
        self.cross_entropy = cross_entropy
        self.vocab_size = vocab_size
        self.student_scale = student_scale
        self.teacher_scale = teacher_scale
        self.student_softcap = student_softcap
        self.teacher_softcap = teacher_softcap
        self.rows = rows
        self._heads = HeadPair(student_head, teacher_head)
        self._heads.check(*self._after_heads())
        self._compared()

    if TYPE_CHECKING:

        @override
        def __call__(
            self,
            student: Tensor,
            teacher: Tensor | TopK,
            target: Tensor | None = None,
            *,
            mask: Tensor | None = None,
            denominator: float | Tensor | None = None,
        ) -> Tensor: ...

    @property
    def reduction(self) -> Reduction:
        """The reduction of the loss."""
        return self.loss.reduction

    def _compared(self) -> int:
        """How many rows of the heads are compared."""
        return self._heads.compared(self.vocab_size, self.loss.rows)

    @override
    def _after_heads(self) -> AfterHeads:
        return self.student_scale, self.teacher_scale, self.student_softcap, self.teacher_softcap

    @override
    def forward(
        self,
        student: Tensor,
        teacher: Tensor | TopK,
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            student: What the student's head sees, `(..., d_s)`.
            teacher: What the teacher's head sees, `(..., d_t)`; or a `TopK` of `(...)` rows. A constant.
            target: Labels, `(...)`, where the loss or the cross-entropy uses them; -100 has no cross-entropy.
            mask: Bool or weights, `(...)`. What a 0 hides counts nowhere, and its logits are not formed.
            denominator: A mean becomes the sum divided by this number.

        Returns:
            A scalar, or with `reduction="none"` one value per sample, `(...)`.

        Raises:
            TypeError: If what must be a tensor is none.
            ValueError: If shapes, dtypes or devices do not fit, or a label is no class.
        """
        self.loss.refuse_topk(teacher)
        check_tensor("student", student)
        self._heads.check(*self._after_heads())
        weight, bias, *_ = self._heads.tensors()
        size = self._compared()
        check_hidden("student", student, weight)
        if self.cross_entropy == 0 and size < len(weight):  # the gradient of a part is a copy
            weight, bias = weight[:size], None if bias is None else bias[:size]
        ours = Side(student.reshape(-1, student.shape[-1]), weight, bias, self.student_scale, self.student_softcap)
        reduction = self.loss.reduction_over(denominator)
        dtype = torch.promote_types(torch.promote_types(student.dtype, weight.dtype), torch.float32)
        flat = flat_mask(mask, student, dtype)
        theirs: Side | Tensor
        engine, options, labels, classes = self.loss.rows, self.loss.given(), None, None
        if isinstance(teacher, TopK):
            check_fits(teacher, student.shape, student.device)
            known = teacher.reshape(-1)
            engine, options = engine.of_topk(known, size, flat, options)
            theirs, classes = known.rows(dtype, flat)
        else:
            theirs = self._teacher(student, teacher, size)
        if self.cross_entropy:
            labels = find_labels(target, student, len(weight), flat)
            factor = labelled_share(labels, flat, reduction, dtype) * self.cross_entropy
            compared = None if size == len(weight) else size
            engine = with_cross_entropy(engine, factor, compared, more=classes is not None)
        elif self.loss.rows.labels:
            labels = find_labels(target, student, size, flat)
        else:
            check_positions(target, student.shape[:-1])
        if self.loss.rows.labels and labels is not None:
            check_compared(labels, flat, size)
        if classes is not None:
            labels = classes if labels is None else torch.cat([labels, classes], -1)
        call = Call(engine, options, -1, dtype, reduction)
        value = linear_rows(call, ours, theirs, labels, flat, chunk=self.rows)
        value = value.reshape(student.shape[:-1]) if reduction == "none" else value
        return divide(value, denominator)

    def _teacher(self, student: Tensor, teacher: Tensor, size: int) -> Side:
        """What forms the teacher's logits, checked."""
        check_tensor("teacher", teacher)
        _, _, weight, bias = self._heads.tensors()
        if weight is None:
            raise ValueError("teacher must be a TopK where there is no teacher_head, got a tensor")
        check_hidden("teacher", teacher, weight)
        if student.shape[:-1] != teacher.shape[:-1] or student.device != teacher.device:
            raise ValueError(
                "hidden states must have the same shape but for their width and be on one device (nothing is "
                f"broadcast), got {tuple(student.shape)} on {student.device} and {tuple(teacher.shape)} on "
                f"{teacher.device}"
            )
        bias = None if bias is None else ordinary(bias.detach()[:size])
        hidden = ordinary(teacher.detach()).reshape(-1, teacher.shape[-1])
        return Side(hidden, ordinary(weight.detach()[:size]), bias, self.teacher_scale, self.teacher_softcap)

    @override
    def extra_repr(self) -> str:
        """Show the options and the heads' sizes in `repr`."""
        weight, _, teacher_weight, _ = self._heads.tensors()
        return (
            f"{super().extra_repr()}, vocab_size={self.vocab_size}, student_head={tuple(weight.shape)}, "
            f"teacher_head={None if teacher_weight is None else tuple(teacher_weight.shape)}"
        )


class LinearCrossEntropyLoss(LossOfHeads):
    """Cross-entropy of a head's logits from hidden states, without holding the logits.

    For a student without a teacher, or as the task loss beside other terms; `LinearLoss(..., cross_entropy=1.0)` does
    both in one pass.

    Args:
        head: `nn.Linear`, `nn.Embedding`, or another module that computes `W h + b`. Referred to, not owned.
        scale: What the logits are multiplied by.
        softcap: The soft cap of the logits, as in `LinearLoss`; None: no cap.
        ignore_index: A label that means "none".
        reduction: Over samples: `"mean"`, `"sum"` or `"none"`.
        rows: As in `LinearLoss`.

    Raises:
        ValueError: If the head does more than `W h + b`, or an option is out of range.

    Examples:
        >>> import torch
        >>> from distill import LinearCrossEntropyLoss
        >>> head = torch.nn.Linear(8, 100)
        >>> hidden, labels = torch.randn(4, 8), torch.randint(100, (4,))
        >>> formed = torch.nn.functional.cross_entropy(head(hidden), labels)
        >>> torch.allclose(LinearCrossEntropyLoss(head)(hidden, labels), formed)
        True
    """

    options: ClassVar = {
        "scale": check_scale,
        "softcap": check_softcap,
        "ignore_index": check_integer,
        "rows": check_count_or_none,
    }

    def __init__(
        self,
        head: nn.Module,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = IGNORED,
        reduction: Reduction = "mean",
        rows: int | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.softcap = softcap
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.rows = rows
        self._heads = HeadPair(head, None)
        self._heads.check(*self._after_heads())

    @override
    def _after_heads(self) -> AfterHeads:
        return self.scale, 1.0, self.softcap, None

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
            student: What the head sees, `(..., d)`.
            target: Labels, `(...)`.
            mask: Bool or weights, `(...)`.
            denominator: A mean becomes the sum divided by this number.

        Returns:
            A scalar, or with `reduction="none"` one value per sample, `(...)`.

        Raises:
            TypeError: If what must be a tensor is none.
            ValueError: If shapes, dtypes or devices do not fit, or a label is no class.
        """
        check_tensor("student", student)
        self._heads.check(*self._after_heads())
        weight, bias, *_ = self._heads.tensors()
        check_hidden("student", student, weight)
        check_denominator(denominator, self.reduction)
        dtype = torch.promote_types(torch.promote_types(student.dtype, weight.dtype), torch.float32)
        flat = flat_mask(mask, student, dtype)
        labels = find_labels(target, student, len(weight), flat, self.ignore_index)
        counted = (labels.squeeze(-1) >= 0).to(dtype)
        flat = counted if flat is None else flat * counted
        side = Side(student.reshape(-1, student.shape[-1]), weight, bias, self.scale, self.softcap)
        call = Call(CROSS_ENTROPY, {}, -1, dtype, self.reduction if denominator is None else "sum")
        value = linear_rows(call, side, None, labels, flat, chunk=self.rows)
        value = value.reshape(student.shape[:-1]) if self.reduction == "none" else value
        return divide(value, denominator)

    @override
    def extra_repr(self) -> str:
        """Show the options and the head's size in `repr`."""
        return f"{super().extra_repr()}, head={tuple(self._heads.tensors()[0].shape)}"
