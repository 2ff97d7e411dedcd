"""Two linear heads and what they see: the checks, and the way to the form that compares them."""

from typing import NamedTuple

import torch
from torch import Tensor

from distill._gram import (
    Factor,
    Heads,
    Plan,
    by_blocks,
    by_factor,
    by_gram,
    factorise,
    has_float64,
    make_plan,
    teacher_gram,
)


class Problem(NamedTuple):
    """Checked inputs: hidden states as matrices, both heads, and what the result looks like."""

    student: Tensor  # (N, d_s)
    teacher: Tensor  # (N, d_t)
    heads: Heads
    shape: torch.Size
    dtype: torch.dtype

    def plan(self, *, may_factor: bool = False, keeps_teacher: bool = False) -> Plan:
        """Which form to take; see `make_plan`."""
        return make_plan(
            len(self.student),
            len(self.heads.student),
            sum(part.shape[1] for part in self.heads.left()),
            self.teacher.shape[1],
            device=self.student.device,
            trains=self.heads.trains(),
            may_factor=may_factor,
            keeps_teacher=keeps_teacher,
        )

    def check_possible(self, method: str) -> None:
        """Raise ValueError if a form cannot be taken here."""
        if method == "factor" and self.heads.trains():
            raise ValueError("method 'factor' must have a student's head that needs no gradient, got one that does")
        if method != "blocks" and not has_float64(self.student.device):
            raise ValueError(f"method {method!r} must have a device with float64, got {self.student.device.type}")

    def loss(self, method: str, *, factor: Factor | None = None, own: Tensor | None = None) -> Tensor:
        """Per-sample values by the form of that name.

        Args:
            method: `"factor"`, `"gram"` or `"blocks"`.
            factor: What `factorise` gave before, for `"factor"`.
            own: What `teacher_gram` gave before, for `"gram"`.
        """
        self.check_possible(method)
        student, teacher, heads = self.student, self.teacher, self.heads
        with torch.autocast(student.device.type, enabled=False):
            student, teacher = student.to(self.dtype), teacher.to(self.dtype)
            if method == "blocks":
                values = by_blocks(student, teacher, heads)
            else:
                if heads.column is not None:
                    ones = student.new_ones(len(student), 1)
                    student = torch.cat([student, ones], 1)
                if method == "factor":
                    values = by_factor(student, teacher, factorise(heads) if factor is None else factor)
                else:
                    values = by_gram(student, teacher, heads, teacher_gram(heads.teacher) if own is None else own)
            return (values / len(heads.student)).to(self.dtype).reshape(self.shape)


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
        The problem: hidden states as matrices, only the rows to compare, the teacher's side detached.

    Raises:
        ValueError: As `linear_logit_loss` says.
    """
    for name, matrix in (("student_weight", weight), ("teacher_weight", teacher_weight)):
        if matrix.ndim != 2 or matrix.numel() == 0:
            raise ValueError(f"{name} must be a matrix (V, d) and not empty, got shape {tuple(matrix.shape)}")
    if (*student.shape[-1:], *teacher.shape[-1:]) != (weight.shape[1], teacher_weight.shape[1]) or (
        student.shape[:-1] != teacher.shape[:-1]
    ):
        raise ValueError(
            f"hidden states must have their heads' sizes, {weight.shape[1]} and {teacher_weight.shape[1]}, as the last "
            "dimension and else the same shape (nothing is broadcast), "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    for what, given in (
        ("hidden states", (student, teacher)),
        ("heads", (weight, teacher_weight, bias, teacher_bias)),
    ):
        if not all(tensor.is_floating_point() for tensor in given if tensor is not None):
            dtypes = " and ".join(str(tensor.dtype) for tensor in given if tensor is not None)
            raise ValueError(f"{what} must be floating-point, got {dtypes}")
    tensors = [
        tensor for tensor in (student, weight, bias, teacher, teacher_weight, teacher_bias) if tensor is not None
    ]
    devices = dict.fromkeys(str(tensor.device) for tensor in tensors)
    if len(devices) > 1:
        raise ValueError(f"hidden states and heads must be on the same device, got {' and '.join(devices)}")
    if student.numel() == 0:
        raise ValueError(f"hidden states must not be empty, got shape {tuple(student.shape)}")
    size = check_vocabulary(len(weight), len(teacher_weight), vocab_size)
    for name, vector, matrix in (("student_bias", bias, weight), ("teacher_bias", teacher_bias, teacher_weight)):
        if vector is not None and vector.shape != matrix.shape[:1]:
            raise ValueError(
                f"{name} must have one value per row of its weight, {len(matrix)}, got shape {tuple(vector.shape)}"
            )
    wide = torch.float64 if has_float64(student.device) else torch.float32
    column = None if bias is None else _first(bias, size)[:, None].to(wide)
    if teacher_bias is not None:
        theirs = teacher_bias.detach()[:size, None].to(wide)
        column = -theirs if column is None else column - theirs
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return Problem(
        student.reshape(-1, student.shape[-1]),
        teacher.detach().reshape(-1, teacher.shape[-1]),
        Heads(_first(weight, size), _first(teacher_weight.detach(), size), column),
        student.shape[:-1],
        dtype,
    )


def _first(tensor: Tensor, size: int) -> Tensor:
    # A slice of all rows would cost one more gradient of the weight's size in backward.
    return tensor if len(tensor) == size else tensor[:size]


def check_vocabulary(student: int, teacher: int, size: int | None) -> int:
    """Return how many rows of two heads are compared, else raise ValueError."""
    if size is None:
        if student != teacher:
            raise ValueError(
                f"both heads must have the same vocabulary, got {student} and {teacher} rows; vocab_size= compares the "
                "first rows only, where they mean the same tokens"
            )
        return student
    if not 1 <= size <= min(student, teacher):
        raise ValueError(
            f"vocab_size must be between 1 and the rows of both heads, {student} and {teacher}, got {size}"
        )
    return size
