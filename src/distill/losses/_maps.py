"""What losses on feature maps share: what must hold of them, and pooling to one size."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill._checks import check_tensor, check_tensors, make_ready, ordinary, without_autocast

ANY = (1, 2, 3)  # positions along a line, in a plane, in a volume
_LAYOUTS = {1: "(N, C, L)", 2: "(N, C, H, W)", 3: "(N, C, D, H, W)"}
_POOLS: dict[int, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    1: (F.avg_pool1d, F.adaptive_avg_pool1d),
    2: (F.avg_pool2d, F.adaptive_avg_pool2d),
    3: (F.avg_pool3d, F.adaptive_avg_pool3d),
}


def check_maps(
    student: Tensor,
    teacher: Tensor,
    *,
    same_channels: bool = False,
    channels: tuple[int, int] | None = None,
    positions: Sequence[int] = (2,),
) -> tuple[Tensor, Tensor]:
    """Check two feature maps, whose heights and widths may differ, and make them ready for a comparison.

    A map (N, H, W, C) beside one (N, C, H, W) is refused where it can be recognised: by its channels if they must be
    certain ones, else by its aspect, which is that of the other map if the channels are last and quite another if they
    are first. Two maps (N, H, W, C) cannot be recognised, nor can tokens (B, T, C), which look like a map (N, C, L),
    nor one position beside any map.

    Args:
        student: The student's map, `(N, C, H, W)`.
        teacher: The teacher's map, `(N, C, H, W)` of the same N.
        same_channels: Whether C must be the same too.
        channels: The student's and the teacher's C, where a loss has layers built for them.
        positions: How many dimensions of positions the loss takes, each from 1 to 3.

    Returns:
        The student and the detached teacher as they are in size, both in the dtype in which the loss is computed: the
        wider one of the two, and at least float32.

    Raises:
        TypeError: If an input is no tensor.
        ValueError: If an input is no map or looks like one of another layout, N or C are not as they must be, an input
            is not floating-point, the devices differ, or an input is empty.
    """
    check_tensors(student, teacher)
    same = 2 if same_channels else 1
    if not (
        student.ndim == teacher.ndim and student.ndim - 2 in positions and student.shape[:same] == teacher.shape[:same]
    ):
        *others, last = (_LAYOUTS[number] for number in positions)
        layouts = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(
            f"student and teacher must be maps {layouts} of the same {'N and C' if same_channels else 'N'}, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}{_way_out(student, teacher, positions)}"
        )
    if channels is not None:
        for name, tensor, expected in (("student", student, channels[0]), ("teacher", teacher, channels[1])):
            if tensor.shape[1] != expected:
                raise ValueError(
                    f"{name} must have {expected} channels, got shape {tuple(tensor.shape)}"
                    + _channels_last(tensor, (expected,))
                )
    elif not same_channels:
        _check_layout(student, teacher)
    return make_ready(student, teacher)


def _way_out(student: Tensor, teacher: Tensor, positions: Sequence[int]) -> str:
    """What to do about two maps that do not go together: move the channels of one, or learn a layer between them."""
    learn = ""
    if student.ndim == teacher.ndim and student.ndim - 2 in positions and len(student) == len(teacher):
        sizes = f"{student.shape[1]}, {teacher.shape[1]}"
        learn = f"; student=nn.Conv{student.ndim - 2}d({sizes}, 1) in the Term learns to map one to the other"
    if learn and student.shape[2:] == teacher.shape[2:]:
        return learn
    return _channels_last(student, teacher.shape[1:2]) or _channels_last(teacher, student.shape[1:2]) or learn


def _channels_last(tensor: Tensor, channels: Sequence[int]) -> str:
    """What to do about a map whose last dimension, and not its second, has these channels."""
    if tensor.ndim not in (4, 5) or tuple(tensor.shape[-1:]) != tuple(channels):
        return ""
    move = "distill.adapt.NHWC()" if tensor.ndim == 4 else ".movedim(-1, 1)"
    return f"; {move} brings channels from the last dimension to the second"


def _check_layout(student: Tensor, teacher: Tensor) -> None:
    """Raise ValueError if one of two maps, whose channels may be any, has them last."""
    for name, tensor, other in (("student", student, teacher.shape[2:]), ("teacher", teacher, student.shape[2:])):
        first, last = tensor.shape[2:], tensor.shape[1:-1]  # its positions if the channels are first, if they are last
        if len(other) == 1 or max(other) == 1 or min(last) == 1 or first == other:
            continue
        # Maps of one input hardly differ in aspect: less than by 4/3, or 6/5 where strides round.
        exactly = last == other or (_alike(last, other, 1, 1) and not _alike(first, other, 4, 3))
        if exactly or (_alike(last, other, 6, 5) and not _alike(first, other, 3, 1)):
            raise ValueError(
                f"student and teacher must be maps {_LAYOUTS[len(other)]}, got {tuple(student.shape)} and "
                f"{tuple(teacher.shape)}, which fit if the {name}'s channels are last"
                f"{_channels_last(tensor, tensor.shape[-1:])} (if they are not last, pool both maps to one size first)"
            )


def _alike(size: Sequence[int], other: Sequence[int], most: int, of: int) -> bool:
    """Whether the aspects of two sizes differ by a factor of at most most/of."""
    pairs = [(i, j) for i in range(len(size)) for j in range(len(size)) if i != j]
    return all(of * size[i] * other[j] <= most * size[j] * other[i] for i, j in pairs)


def check_tuples(student: Any, teacher: Any, *, number: int | None = None) -> None:
    """Check two tuples of maps; what must hold of each pair is left to `check_maps`.

    Args:
        student: The student's maps.
        teacher: The teacher's maps.
        number: How many there must be; None: at least one.

    Raises:
        TypeError: If a side is no tuple or list, or holds what is no tensor.
        ValueError: If the sides are not of that number, samples differ, or the student's devices do.
    """
    for name, maps in (("student", student), ("teacher", teacher)):
        must = f"{name} must be a tuple of {number or 'one or more'} maps (in a Term: a tuple of paths)"
        # A tensor is iterable too, over its samples.
        if not isinstance(maps, (tuple, list)):
            raise TypeError(f"{must}, got {type(maps).__name__}")
        for index, item in enumerate(maps):
            if not isinstance(item, Tensor):
                raise TypeError(f"{must}, got {type(item).__name__} at {index}")
        if len(maps) != (number or max(1, len(maps))):
            raise ValueError(f"{must}, got {len(maps)}")
    if len(student) != len(teacher) or any(tensor.shape[:1] != student[0].shape[:1] for tensor in (*student, *teacher)):
        raise ValueError(
            "student and teacher must be maps (N, C, ...) of the same N, as many on both sides, "
            f"got {[tuple(tensor.shape) for tensor in student]} and {[tuple(tensor.shape) for tensor in teacher]}"
        )
    if len({tensor.device for tensor in student}) > 1:
        raise ValueError(f"the student's maps must be on one device, got {[str(tensor.device) for tensor in student]}")


def per_channel(name: str, values: Tensor, maps: Tensor) -> Tensor:
    """Check what a loss has for each channel, `(C,)`, and bring it to the dtype of the maps `(N, C, ...)`."""
    expected = tuple(maps.shape[1:2])
    if check_tensor(name, values).shape != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(values.shape)}")
    if values.device != maps.device:
        raise ValueError(f"{name} must be on the device of the maps, {maps.device}, got {values.device}")
    return ordinary(values).to(maps.dtype)


def pool_to_smaller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two maps `(N, C, *positions)` to the smaller size in each dimension of the positions."""
    size = tuple(min(sizes) for sizes in zip(first.shape[2:], second.shape[2:], strict=True))
    return pool(first, size), pool(second, size)


def pool(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Average-pool maps `(N, C, *positions)` to a size, as PyTorch's adaptive pooling does."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    if torch.compiler.is_compiling():  # inductor cannot pool adaptively where sizes are symbols
        for dim, part in enumerate(size, 2):
            if part == 1:  # a single operation for what is most often pooled to
                maps = maps.mean(dim, keepdim=True)
                continue
            if part == maps.shape[dim]:
                continue
            with without_autocast(maps):
                maps = (maps.movedim(dim, -1) @ _shares(maps, maps.shape[dim], part)).movedim(-1, dim)
        return maps
    pool_whole, adaptive_pool = _POOLS[len(size)]
    # Windows that do not overlap: the same, and faster on a CPU, but for a single one, which is mean().
    if max(size) > 1 and all(whole % part == 0 for whole, part in zip(maps.shape[2:], size, strict=True)):
        return pool_whole(maps, tuple(whole // part for whole, part in zip(maps.shape[2:], size, strict=True)))
    return adaptive_pool(maps, size)


def _shares(maps: Tensor, whole: int, part: int) -> Tensor:
    """What each of `whole` positions counts for in each of `part` bins, `(whole, part)`.

    Bin i goes from floor(i whole / part) to ceil((i + 1) whole / part).
    """
    position = torch.arange(whole, device=maps.device).unsqueeze(1)
    bins = torch.arange(part, device=maps.device)
    first, end = bins * whole // part, ((bins + 1) * whole + part - 1) // part
    return ((position >= first) & (position < end)).to(maps.dtype) / (end - first)
