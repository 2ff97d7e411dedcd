"""Two linear heads and what they see: the checks, and the way to the form that compares them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill._checks import without_autocast
from distill._engine.squared.classes import by_blocks, forms_early, reduce_by_blocks
from distill._engine.squared.gram import Factor, Heads, by_factor, by_gram, factorise, teacher_gram
from distill._engine.squared.plan import Size, has_float64, is_tiny
from distill._reduction import Reduction, check_mask, reduce


class Problem(NamedTuple):
    """Checked inputs: hidden states and the rows of both heads to compare, the teacher's side detached."""

    student: Tensor  # (..., d_s)
    teacher: Tensor  # (..., d_t)
    student_weight: Tensor  # (V, d_s)
    teacher_weight: Tensor  # (V, d_t)
    student_bias: Tensor | None  # (V,)
    teacher_bias: Tensor | None
    dtype: torch.dtype

    def heads(self) -> Heads:
        """The heads, their biases as one column in the widest dtype there is."""
        wide = torch.float64 if has_float64(self.student.device) else torch.float32
        column = None if self.student_bias is None else self.student_bias[:, None].to(wide)
        if self.teacher_bias is not None:
            theirs = self.teacher_bias[:, None].to(wide)
            column = -theirs if column is None else column - theirs
        return Heads(self.student_weight, self.teacher_weight, column)

    def trains(self) -> bool:
        """Whether the student's head gets a gradient."""
        bias = self.student_bias
        return torch.is_grad_enabled() and (
            self.student_weight.requires_grad or (bias is not None and bias.requires_grad)
        )

    def is_tiny(self) -> bool:
        """See the function."""
        vocabulary, columns = self.student_weight.shape
        return is_tiny(self.student.numel() // columns, vocabulary, columns, self.teacher_weight.shape[1])

    def size(self, *, reduction: Reduction = "none", may_factor: bool = False, keeps_teacher: bool = False) -> Size:
        """What the costs of the forms depend on."""
        vocabulary, columns = self.student_weight.shape
        return Size(
            self.student.numel() // columns,
            vocabulary,
            columns + (self.student_bias is not None or self.teacher_bias is not None),
            self.teacher_weight.shape[1],
            device=self.student.device,
            trains=self.trains(),
            may_factor=may_factor,
            keeps_teacher=keeps_teacher,
            early=forms_early(self.student_weight, reduction, None),
        )

    def check_possible(self, method: str) -> None:
        """Raise ValueError if a form cannot be taken here."""
        if method == "factor" and self.trains():
            raise ValueError("method 'factor' must have a student's head that needs no gradient, got one that does")
        if method in ("factor", "gram") and not has_float64(self.student.device):
            raise ValueError(f"method {method!r} must have a device with float64, got {self.student.device.type}")

    def logits(self) -> tuple[Tensor, Tensor]:
        """Both logits, (..., V)."""
        student = self.student, self.student_weight, self.student_bias
        teacher = self.teacher, self.teacher_weight, self.teacher_bias
        with without_autocast(self.student):
            return _linear(*student, self.dtype), _linear(*teacher, self.dtype)

    def loss(
        self,
        method: str,
        reduction: Reduction = "none",
        mask: Tensor | None = None,
        *,
        factor: Factor | None = None,
        own: Tensor | None = None,
    ) -> Tensor:
        """The loss by a form that never has all logits.

        Args:
            method: `"factor"`, `"gram"` or `"blocks"`.
            reduction: As in `reduce`.
            mask: As in `reduce`.
            factor: What `factorise` gave before, for `"factor"`.
            own: What `teacher_gram` gave before, for `"gram"`.
        """
        shape, heads = self.student.shape[:-1], self.heads()
        with without_autocast(self.student):
            student = self.student.reshape(-1, self.student.shape[-1]).to(self.dtype)
            teacher = self.teacher.reshape(-1, self.teacher.shape[-1]).to(self.dtype)
            if method == "blocks":
                if forms_early(self.student_weight, reduction, mask):
                    if mask is not None:
                        check_mask(mask, shape, student.device)
                        mask = mask.reshape(-1)
                    return reduce_by_blocks(student, teacher, heads, reduction, mask)
                values = by_blocks(student, teacher, heads)
            else:
                if heads.column is not None:
                    ones = student.new_ones(len(student), 1)
                    student = torch.cat([student, ones], 1)
                if method == "factor":
                    values = by_factor(student, teacher, factorise(heads) if factor is None else factor)
                else:
                    values = by_gram(student, teacher, heads, teacher_gram(heads.teacher) if own is None else own)
                values = (values / len(heads.student)).to(self.dtype)
            return reduce(values.reshape(shape), reduction, mask)


def check_heads(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    vocab_size: int | None,
) -> Problem:
    """Check hidden states and heads, and make them ready.

    Returns:
        The problem: only the rows to compare, the teacher's side detached.

    Raises:
        ValueError: As `linear_logit_loss` says.
    """
    # Each look at a tensor's shape, dtype or device costs as much as some of these comparisons: once is enough.
    shape, theirs = weight.shape, teacher_weight.shape
    for name, matrix in (("student_weight", shape), ("teacher_weight", theirs)):
        if len(matrix) != 2 or 0 in matrix:
            raise ValueError(f"{name} must be a matrix (V, d) and not empty, got shape {tuple(matrix)}")
    ours, others = student.shape, teacher.shape
    if ours[-1:] != shape[1:] or others[-1:] != theirs[1:] or ours[:-1] != others[:-1]:
        raise ValueError(
            f"hidden states must have their heads' sizes, {shape[1]} and {theirs[1]}, as the last dimension and else "
            f"the same shape (nothing is broadcast), got {tuple(ours)} and {tuple(others)}"
        )
    dtype, device = torch.float32, student.device
    for tensor in (student, teacher, weight, bias, teacher_weight, teacher_bias):
        if tensor is None:
            continue
        kind = tensor.dtype
        if not kind.is_floating_point:
            states = tensor is student or tensor is teacher
            given = (student, teacher) if states else (weight, teacher_weight, bias, teacher_bias)
            dtypes = " and ".join(str(x.dtype) for x in given if x is not None)
            raise ValueError(f"{'hidden states' if states else 'heads'} must be floating-point, got {dtypes}")
        if tensor.device != device:
            raise ValueError(f"hidden states and heads must be on the same device, got {device} and {tensor.device}")
        if kind != torch.float32:
            dtype = torch.promote_types(dtype, kind)
    if 0 in ours:
        raise ValueError(f"hidden states must not be empty, got shape {tuple(ours)}")
    rows, their_rows = shape[0], theirs[0]
    size = check_vocabulary(rows, their_rows, vocab_size)
    for name, vector, count in (("student_bias", bias, rows), ("teacher_bias", teacher_bias, their_rows)):
        if vector is not None and vector.shape != (count,):
            raise ValueError(
                f"{name} must have one value per row of its weight, {count}, got shape {tuple(vector.shape)}"
            )
    # A slice of all rows would cost one more gradient of the weight's size in backward.
    if rows != size:
        weight, bias = weight[:size], None if bias is None else bias[:size]
    if their_rows != size:
        teacher_weight, teacher_bias = teacher_weight[:size], None if teacher_bias is None else teacher_bias[:size]
    return Problem(
        student,
        teacher.detach(),
        weight,
        teacher_weight.detach(),
        bias,
        None if teacher_bias is None else teacher_bias.detach(),
        dtype,
    )


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if hidden.dtype != dtype:
        hidden = hidden.to(dtype)
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    return F.linear(hidden, weight, bias)


def check_vocabulary(student: int, teacher: int, size: int | None) -> int:
    """Return how many rows of two heads are compared, else raise ValueError."""
    if size is None:
        if student != teacher:
            raise ValueError(
                f"both heads must have the same vocabulary, got {student} and {teacher} rows; vocab_size= compares the "
                "first rows only, where they mean the same tokens"
            )
        return student
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= min(student, teacher):
        raise ValueError(
            f"vocab_size must be an integer between 1 and the rows of both heads, {student} and {teacher}, got {size!r}"
        )
    return size
