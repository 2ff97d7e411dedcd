"""What must hold of options, pairs of tensors and labels: each check says what must hold, then what was got."""

import math
import numbers
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

_NUMBERS = (float, int)  # to ask for these first costs a call of a loss next to nothing


def check_number(name: str, value: Any) -> None:
    """Raise TypeError if `value` is no number, which a bool is not, or ValueError if it is a tensor of several."""
    if type(value) in _NUMBERS:
        return
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
    elif not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")


def as_constant(name: str, value: Any) -> Any:
    """Return an option that is kept, with the number that a tensor holds in its place; one that trains is refused.

    A function may get a temperature with a gradient. What keeps one cannot: a Parameter would be trained past its
    check, and another tensor would be neither in an optimizer nor saved.

    Args:
        name: The option.
        value: A tensor of one number, a tuple that may hold some, or anything else, which stays as it is.

    Raises:
        TypeError: If a tensor wants a gradient or is a Parameter.
    """
    if type(value) in _NUMBERS:
        return value
    if isinstance(value, tuple):
        return tuple(as_constant(name, each) for each in value)
    if not isinstance(value, Tensor):
        return value
    if value.requires_grad or isinstance(value, nn.Parameter):
        raise TypeError(
            f"{name} must be a number that does not train, got a {type(value).__name__} that does; what learns belongs "
            "into a loss of yours, which gives it to the function"
        )
    return value.item()


def check_positive(name: str, value: float) -> float:
    """Return `value` if it is positive and finite, else raise an error that names the option."""
    if type(value) not in _NUMBERS:
        check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return value


def check_not_negative(name: str, value: float) -> float:
    """Return `value` if it is zero or positive and finite, else raise an error that names the option."""
    if type(value) not in _NUMBERS:
        check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be zero or positive and finite, got {value!r}")
    return value


def check_count(name: str, value: int, *, least: int = 1) -> int:
    """Return `value` if it is an integer of at least `least`, else raise ValueError that names the option."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        must = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {must}, got {value!r}")
    return value


def check_count_or_none(name: str, value: int | None) -> int | None:
    """Return `value` if it is None or a positive integer, else raise ValueError that names the option."""
    return None if value is None else check_count(name, value)


def check_integer(name: str, value: int) -> int:
    """Return `value` if it is an integer, else raise ValueError that names the option."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return value


def check_fraction(name: str, value: float, *, zero: bool = False) -> float:
    """Return `value` if it is between 0 and 1, or with `zero` also 0, else raise an error that names the option."""
    if type(value) not in _NUMBERS:
        check_number(name, value)
    if not (0 < value < 1 or (zero and value == 0)):
        must = "at least 0 and below 1" if zero else "above 0 and below 1"
        raise ValueError(f"{name} must be {must}, got {value!r}")
    return value


def check_dim(value: int | None) -> int | None:
    """Return a dimension if it is an integer or None, else raise TypeError."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise TypeError(f"dim must be an integer or None, got {value!r}")
    return value


def check_flag(name: str, value: bool) -> bool:
    """Return `value` if it is True or False, else raise ValueError that names the option."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def is_function(value: object) -> bool:
    """Whether a value can be called for what it gives: a module or function, and no class."""
    return callable(value) and not isinstance(value, type)


def check_tensor(name: str, value: Tensor) -> Tensor:
    """Return `value` if it is a tensor, else raise TypeError that names it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    return value


def check_tensors(student: Tensor, teacher: Tensor) -> None:
    """Raise TypeError if one of two inputs is no tensor."""
    if not (isinstance(student, Tensor) and isinstance(teacher, Tensor)):
        check_tensor("student", student)
        check_tensor("teacher", teacher)


def check_kinds(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Check what does not depend on the shapes, and return the dtype in which the loss is computed."""
    ours, theirs = student.dtype, teacher.dtype
    # What is asked for most costs least.
    usual = ours is theirs is torch.float32 and student.layout is teacher.layout is torch.strided
    if not usual:
        if not (ours.is_floating_point and theirs.is_floating_point):
            raise ValueError(f"student and teacher must be floating-point, got {ours} and {theirs}")
        check_numbers("student", student)
        check_numbers("teacher", teacher)
    if student.device != teacher.device:
        raise ValueError(f"student and teacher must be on the same device, got {student.device} and {teacher.device}")
    if student.numel() == 0 or teacher.numel() == 0:
        empty = student if student.numel() == 0 else teacher
        raise ValueError(f"student and teacher must not be empty, got shape {tuple(empty.shape)}")
    return ours if usual else torch.promote_types(torch.promote_types(ours, theirs), torch.float32)


def check_numbers(name: str, tensor: Tensor) -> None:
    """Raise ValueError for numbers that PyTorch does little with: sparse or nested ones, and floats of 8 bits."""
    if tensor.layout is not torch.strided:
        way = ".to_dense() makes a sparse tensor so, .values() a nested one"
        raise ValueError(f"{name} must be dense (torch.strided), got {tensor.layout}; {way}")
    if tensor.dtype.itemsize < 2 and tensor.is_floating_point():
        raise ValueError(f"{name} must have 16 bits or more a number, got {tensor.dtype}; .float() widens it")


def make_ready(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Check what does not depend on the shapes, detach the teacher and bring both to the dtype of the loss."""
    dtype = check_kinds(student, teacher)
    return widen(student, dtype), widen(ordinary(teacher.detach()), dtype)


def widen(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring a tensor to the dtype of the loss; to ask first is cheaper than a call that changes nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def ordinary(tensor: Tensor) -> Tensor:
    """An inference tensor as one that autograd can save; any other tensor as it is."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def check_inputs(student: Tensor, teacher: Tensor, *, dim: int, columns: bool = False) -> torch.dtype:
    """Check that two tensors can be compared along `dim`, and say in which dtype.

    Args:
        student: The student's tensor, any shape with a dimension `dim`.
        teacher: The teacher's tensor, of the same shape.
        dim: The dimension that the loss sums over.
        columns: Whether they may be logits of vocabularies: a message then says how to compare the first columns.

    Returns:
        The dtype in which the loss is computed: the wider one of the two, and at least float32.

    Raises:
        TypeError: If an input is no tensor.
        ValueError: If the shapes differ (they are never broadcast), an input is not floating-point, the devices
            differ, the tensors are empty, or `dim` is out of range.
    """
    if not (isinstance(student, Tensor) and isinstance(teacher, Tensor)):
        check_tensors(student, teacher)
    shape = student.shape
    if shape != teacher.shape:
        hint = _columns_hint(student, teacher) if columns else ""
        raise ValueError(
            "student and teacher must have the same shape (nothing is broadcast), "
            f"got {tuple(shape)} and {tuple(teacher.shape)}{hint}"
        )
    dtype = check_kinds(student, teacher)
    if type(dim) is not int:
        check_dim(dim)
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"dim must be a dimension of the inputs, got {dim} for shape {tuple(shape)}")
    return dtype


def _columns_hint(student: Tensor, teacher: Tensor) -> str:
    """What to do about two vocabularies, where the shapes differ in nothing else."""
    if student.ndim != teacher.ndim or student.shape[:-1] != teacher.shape[:-1]:
        return ""
    ours, theirs = student.shape[-1], teacher.shape[-1]
    return (
        f": {ours} and {theirs} columns; where the first {min(ours, theirs)} mean the same tokens, "
        f"adapt.Columns({min(ours, theirs)}) on both sides (student= and teacher= of a Term) compares those"
    )


def check_pair(student: Tensor, teacher: Tensor, *, dim: int, columns: bool = False) -> tuple[Tensor, Tensor]:
    """Check that two tensors can be compared along `dim`, and make them ready for it.

    Args:
        student: The student's tensor, any shape with a dimension `dim`.
        teacher: The teacher's tensor, of the same shape.
        dim: The dimension that the loss sums over.
        columns: As in `check_inputs`.

    Returns:
        The student and the detached teacher, both in the dtype in which the loss is computed: the wider one of the
        two, and at least float32.

    Raises:
        ValueError: As `check_inputs`.
    """
    dtype = check_inputs(student, teacher, dim=dim, columns=columns)
    return widen(student, dtype), widen(ordinary(teacher.detach()), dtype)


def check_classes(logits: Tensor, *, dim: int | None, least: int = 2) -> int:
    """Return the dimension of the classes; raise ValueError if it is not clear or there are too few classes.

    Args:
        logits: The logits, of any shape.
        dim: Their dimension, a valid one, or None for the last of at most three.
        least: How many there must be.
    """
    if dim is None:
        if logits.ndim > 3:
            raise ValueError(
                "dim must be given for logits of four dimensions or more (dim=1 for maps (N, C, H, W), dim=-1 where "
                f"the classes come last), got shape {tuple(logits.shape)}"
            )
        dim = -1
    if logits.shape[dim] < least:
        raise ValueError(f"there must be at least {least} classes along dim {dim}, got shape {tuple(logits.shape)}")
    return dim


def check_labels(target: Tensor | None, logits: Tensor, *, dim: int, mask: Tensor | None = None) -> Tensor:
    """Check class labels, and make them an index for `gather` and `scatter` along `dim`.

    Args:
        target: One class per sample: shaped like the logits without `dim`, integers from 0 to C - 1. On a GPU, compiled
            or under `torch.func` their range is left to `gather`: to look at it would wait for the device, or cannot
            be traced.
        logits: The logits that the labels belong to.
        dim: The dimension of the C classes.
        mask: Bool or weights, shaped like the target: a label where it is 0 may be anything, and becomes 0.

    Returns:
        The labels as int64, with a dimension of size 1 at `dim`.

    Raises:
        TypeError: If the target is no tensor.
        ValueError: If there are no labels, they have another shape or device or are no integers, or one is no class.
    """
    if target is None:
        raise ValueError("target must be the class of every sample, got None")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    axis = dim % logits.ndim
    shape = logits.shape[:axis] + logits.shape[axis + 1 :]
    if target.shape != shape:
        raise ValueError(
            f"target must be one class per sample, of shape {tuple(shape)}, got shape {tuple(target.shape)}"
        )
    if not is_integer(target):
        raise ValueError(f"target must be integers, got {target.dtype}")
    if target.device != logits.device:
        raise ValueError(f"target must be on the device of the logits, {logits.device}, got {target.device}")
    labels = ordinary(target).long()
    if mask is not None:
        labels = labels.masked_fill(mask == 0, 0)
    if may_look(labels):
        low, high = map(int, labels.aminmax())
        if low < 0 or high >= logits.shape[dim]:
            raise ValueError(
                f"target must be classes from 0 to {logits.shape[dim] - 1}, got {low if low < 0 else high}; a mask of "
                "0 hides samples without a class"
            )
    return labels.unsqueeze(dim)


def may_look(tensor: Tensor) -> bool:
    """Whether to branch on a value: on a GPU it would wait for the device, and what is traced cannot."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def is_integer(tensor: Tensor) -> bool:
    """Whether a tensor holds integers, which bools are not."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def check_samples(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Check two batches whose samples are compared within each batch, and flatten every sample.

    Args:
        student: The student's batch, `(N, ...)`.
        teacher: The teacher's batch, `(N, ...)` of the same N; its other dimensions are its own.

    Returns:
        The student and the detached teacher, `(N, D)` each with a D of its own, both in the dtype in which the loss is
        computed: the wider one of the two, and at least float32.

    Raises:
        ValueError: If N differs, an input has fewer than two dimensions, is not floating-point or is empty, or the
            devices differ.
    """
    check_tensors(student, teacher)
    if min(student.ndim, teacher.ndim) < 2 or len(student) != len(teacher):
        raise ValueError(
            "student and teacher must be batches (N, ...) of the same N samples, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    student, teacher = make_ready(student, teacher)
    return student.flatten(1), teacher.flatten(1)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast leaves products of matrices on the tensor's device in the dtype they come in."""
    device = tensor.device.type
    # To switch off costs as much as a small product, so only what is on; the meta device has none to ask for.
    if device == "meta" or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device)):
        return nullcontext()
    return torch.autocast(device, enabled=False)
