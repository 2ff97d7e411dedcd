"""Two linear heads and what they see: the checks, and the way to the form that compares them."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distill._checks import check_numbers, check_tensor, ordinary, without_autocast
from distill._engine.squared.classes import by_blocks, forms_early, reduce_by_blocks
from distill._engine.squared.gram import Factor, Heads, by_factor, by_gram, factorise, teacher_gram
from distill._engine.squared.plan import Size, has_float64, is_tiny
from distill._reduction import Reduction, check_mask, hide, reduce

_PLAIN = (Tensor, nn.Parameter)


class Problem(NamedTuple):
    """Checked inputs: hidden states and the rows of both heads to compare, the teacher's side detached."""

    hidden: Tensor  # (..., d_s)
    teacher_hidden: Tensor  # (..., d_t)
    weight: Tensor  # (V, d_s)
    teacher_weight: Tensor  # (V, d_t)
    bias: Tensor | None  # (V,)
    teacher_bias: Tensor | None
    scale: float  # what the student's logits are multiplied by
    teacher_scale: float
    dtype: torch.dtype

    def heads(self) -> Heads:
        """The heads, their biases as one column in the widest dtype there is."""
        wide = torch.float64 if has_float64(self.hidden.device) else torch.float32
        column = None
        if self.bias is not None:
            column = _scaled(ordinary(self.bias)[:, None].to(wide), self.scale)
        if self.teacher_bias is not None:
            theirs = _scaled(ordinary(self.teacher_bias)[:, None].to(wide), self.teacher_scale)
            column = -theirs if column is None else column - theirs
        return Heads(self.weight, self.teacher_weight, column)

    def trains(self) -> bool:
        """Whether the student's head gets a gradient."""
        return torch.is_grad_enabled() and (
            self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        )

    def is_tiny(self) -> bool:
        """See the function."""
        vocabulary, columns = self.weight.shape
        return is_tiny(self.hidden.numel() // columns, vocabulary, columns, self.teacher_weight.shape[1])

    def size(self, *, reduction: Reduction = "none", may_factor: bool = False, keeps_teacher: bool = False) -> Size:
        """What the costs of the forms depend on."""
        vocabulary, columns = self.weight.shape
        return Size(
            self.hidden.numel() // columns,
            vocabulary,
            columns + (self.bias is not None or self.teacher_bias is not None),
            self.teacher_weight.shape[1],
            device=self.hidden.device,
            trains=self.trains(),
            may_factor=may_factor,
            keeps_teacher=keeps_teacher,
            early=forms_early(self.weight, reduction, None),
        )

    def check_possible(self, method: str) -> None:
        """Raise ValueError if a form cannot be taken here."""
        if method == "factor" and self.trains():
            raise ValueError("method 'factor' must have a student's head that needs no gradient, got one that does")
        if method in ("factor", "gram") and not has_float64(self.hidden.device):
            raise ValueError(f"method {method!r} must have a device with float64, got {self.hidden.device.type}")

    def without_hidden(self, mask: Tensor) -> "Problem":
        """The same with 0 wherever the mask is 0, so that what is there reaches neither values nor gradients."""
        shape = self.hidden.shape[:-1]
        if check_tensor("mask", mask).shape != shape:
            raise ValueError(
                f"mask must be shaped like the per-sample values, {tuple(shape)}, got {tuple(mask.shape)}{FEWER}"
            )
        check_mask(mask, shape, self.hidden.device)
        # Not `_replace`, which PyTorch 2.5 does not trace.
        return Problem(hide(self.hidden, mask, dim=-1), hide(self.teacher_hidden, mask, dim=-1), *self[2:])

    def logits(self) -> tuple[Tensor, Tensor]:
        """Both logits, (..., V)."""
        student = ordinary(self.hidden), ordinary(self.weight), self.bias
        teacher = self.teacher_hidden, self.teacher_weight, self.teacher_bias
        with without_autocast(self.hidden):
            return _linear(*student, self.scale, self.dtype), _linear(*teacher, self.teacher_scale, self.dtype)

    def loss(
        self,
        method: str,
        reduction: Reduction = "none",
        mask: Tensor | None = None,
        *,
        factor: Factor | None = None,
        theirs: Tensor | None = None,
    ) -> Tensor:
        """The loss by a form that never has all logits.

        Args:
            method: `"factor"`, `"gram"` or `"blocks"`.
            reduction: As in `reduce`.
            mask: As in `reduce`, checked by `without_hidden`.
            factor: What `factorise` gave before, for `"factor"`.
            theirs: What `teacher_gram` gave before, for `"gram"`.
        """
        shape, heads = self.hidden.shape[:-1], self.heads()
        with without_autocast(self.hidden):
            hidden = _rows(self.hidden, self.scale, self.dtype)
            teacher_hidden = _rows(self.teacher_hidden, self.teacher_scale, self.dtype)
            if method != "factor":  # which needs no weight in backward
                heads = Heads(ordinary(heads.weight), ordinary(heads.teacher_weight), heads.column)
            if method == "blocks":
                if forms_early(self.weight, reduction, mask):
                    mask = None if mask is None else ordinary(mask).reshape(-1)
                    return reduce_by_blocks(hidden, teacher_hidden, heads, reduction, mask)
                values = by_blocks(hidden, teacher_hidden, heads)
            else:
                if heads.column is not None:
                    hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)
                if method == "factor":
                    values = by_factor(hidden, teacher_hidden, factorise(heads) if factor is None else factor)
                else:
                    theirs = teacher_gram(heads.teacher_weight) if theirs is None else theirs
                    values = by_gram(hidden, teacher_hidden, heads, theirs)
                values = (values / len(heads.weight)).to(self.dtype)
            return reduce(values.reshape(shape), reduction, mask)


FEWER = (
    "; where the heads see fewer positions than the batch has (a model with logits_to_keep), let the loss listen at "
    "the module before them"
)


def check_heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    *,
    vocab_size: int | None,
    scale: float,
    teacher_scale: float,
) -> Problem:
    """Check hidden states and heads, and make them ready.

    Returns:
        The problem: only the rows to compare, the teacher's side detached.

    Raises:
        TypeError: As `linear_logit_loss` says.
        ValueError: As `linear_logit_loss` says.
    """
    given = (hidden, teacher_hidden, weight, bias, teacher_weight, teacher_bias)
    if not all(type(tensor) in _PLAIN for tensor in (hidden, teacher_hidden, weight, teacher_weight)) or not all(
        tensor is None or type(tensor) in _PLAIN for tensor in (bias, teacher_bias)
    ):
        _check_kinds(*given)
    # Each look at a tensor's shape, dtype or device costs as much as some of these comparisons: once is enough.
    shape, theirs = weight.shape, teacher_weight.shape
    for name, matrix in (("student_weight", shape), ("teacher_weight", theirs)):
        if len(matrix) != 2 or 0 in matrix:
            raise ValueError(f"{name} must be a matrix (V, d) and not empty, got shape {tuple(matrix)}")
    ours, others = hidden.shape, teacher_hidden.shape
    if ours[-1:] != shape[1:] or others[-1:] != theirs[1:] or ours[:-1] != others[:-1]:
        raise ValueError(
            f"hidden states must have their heads' sizes, {shape[1]} and {theirs[1]}, as the last dimension and else "
            f"the same shape (nothing is broadcast), got {tuple(ours)} and {tuple(others)}"
        )
    dtype, device = torch.float32, hidden.device
    for tensor in given:
        if tensor is None:
            continue
        kind = tensor.dtype
        if not kind.is_floating_point:
            states = tensor is hidden or tensor is teacher_hidden
            those = (hidden, teacher_hidden) if states else (weight, teacher_weight, bias, teacher_bias)
            dtypes = " and ".join(str(x.dtype) for x in those if x is not None)
            raise ValueError(f"{'hidden states' if states else 'heads'} must be floating-point, got {dtypes}")
        if tensor.device != device:
            raise ValueError(f"hidden states and heads must be on the same device, got {device} and {tensor.device}")
        if kind != torch.float32:
            check_numbers("hidden states and heads", tensor)
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
        hidden,
        teacher_hidden.detach(),
        weight,
        teacher_weight.detach(),
        bias,
        None if teacher_bias is None else teacher_bias.detach(),
        scale,
        teacher_scale,
        dtype,
    )


def _check_kinds(*given: Tensor | None) -> None:
    """Raise TypeError for what is no tensor, ValueError for a tensor whose numbers are not simply there."""
    names = "student_hidden", "teacher_hidden", "student_weight", "student_bias", "teacher_weight", "teacher_bias"
    for name, tensor in zip(names, given, strict=True):
        if tensor is not None or "bias" not in name:
            check_whole(name, tensor)


def check_whole(name: str, tensor: Any) -> None:
    """Raise TypeError for what is no tensor, ValueError for one that other tensors stand for."""
    if type(check_tensor(name, tensor)) in _PLAIN:
        return
    kind = type(tensor).__name__
    if hasattr(tensor, "full_tensor"):
        raise ValueError(  # pragma: no cover - in a process of the test's own
            f"{name} must be whole in each process, got a {kind} (sharded by FSDP or tensor parallelism): build the "
            "loss before fully_shard, and keep what holds the head whole after its forward "
            "(fully_shard(..., reshard_after_forward=False)), or call linear_logit_loss with its weight.full_tensor()"
        )
    if hasattr(tensor, "__tensor_flatten__") or is_lazy(tensor):
        raise ValueError(f"{name} must be an ordinary tensor, got a {kind}: dequantise or initialise it, and give that")


def _rows(hidden: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return ordinary(_scaled(hidden.reshape(-1, hidden.shape[-1]).to(dtype), scale))


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    if hidden.dtype != dtype:
        hidden = hidden.to(dtype)
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    return F.linear(_scaled(hidden, scale), weight, None if bias is None else _scaled(bias, scale))


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


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
