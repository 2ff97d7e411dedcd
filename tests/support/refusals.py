"""What every loss refuses, and with which words: a part of the contract."""

import contextlib
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.losses._base import Loss


def check_pairs(
    loss: nn.Module,
    student: Any,
    teacher: Any,
    target: Tensor | None,
    *,
    maps: bool,
    batches: bool,
    learned: bool,
    widths: bool = False,
) -> None:
    """Pairs whose shapes, dtypes or devices do not fit, and what is no tensor."""

    def each(change: Callable[[Tensor], Any], side: Any) -> Any:
        return change(side) if isinstance(side, Tensor) else tuple(map(change, side))

    match = r"same shape.* \(nothing is broadcast\), got \("
    changes: list[Callable[[Tensor], Tensor]] = [lambda t: t[:1], lambda t: t[0]]  # these would broadcast
    if maps:
        match = r"must be .*maps.* of the same N.*, got \[?\("
    elif batches:
        match = r"must be batches \(N, \.\.\.\) of the same N samples, got \("
    elif not widths:
        changes.append(lambda t: t[..., :1])
    for change in changes:
        with pytest.raises(ValueError, match=match):
            loss(student, each(change, teacher), target)
    if maps and learned:
        with pytest.raises(ValueError, match=rf"teacher must have {teacher.shape[1]} channels, got shape \("):
            loss(student, teacher[:, :1])
        with pytest.raises(ValueError, match=rf"student must have {student.shape[1]} channels, got shape \("):
            loss(student[:, :1], teacher)
    with pytest.raises(ValueError, match=r"must be floating-point, got torch.int64 and torch.float64"):
        loss(each(lambda s: s.detach().long(), student), teacher, target)
    with pytest.raises(ValueError, match=r"must be floating-point, got torch.float64 and torch.complex128"):
        loss(student, each(lambda t: t + 0j, teacher), target)
    with pytest.raises(ValueError, match="on the same device, got cpu and meta"):
        loss(student, each(lambda t: t.to("meta"), teacher), target)
    with pytest.raises(ValueError, match=r"must not be empty, got shape \(0, "):
        loss(each(lambda s: s[:0], student), each(lambda t: t[:0], teacher), target)
    if not isinstance(loss, Loss):  # what stands around it takes tensors only
        return
    with pytest.raises(TypeError, match=r"must be a (tensor|tuple of \d maps).*, got list"):
        loss(each(lambda s: s.tolist(), student), teacher, target)
    with pytest.raises(TypeError, match=r"must be a (tensor|tuple of \d maps).*, got ndarray"):
        loss(student, each(lambda t: t.numpy(), teacher), target)
    if target is not None:
        with pytest.raises(TypeError, match="target must be a tensor, got list"):
            loss(student, teacher, target.tolist())


def check_later_options(loss: nn.Module) -> None:
    """An option is checked whenever it is set, and stays as it was where it is refused."""
    loss = loss if isinstance(loss, Loss) else getattr(loss, "loss", loss)
    numbers = {name for name in getattr(loss, "options", ()) if isinstance(getattr(loss, name), (int, float))}
    bad = dict.fromkeys(numbers, math.nan)
    if hasattr(loss, "reduction"):
        bad["reduction"] = "avg"
    for name, value in bad.items():
        before = getattr(loss, name)
        with pytest.raises(ValueError, match=rf"{name} must be .*, got {value!r}"):
            setattr(loss, name, value)
        assert getattr(loss, name) == before
    for name in numbers:
        for value in ("4", [4.0]) if isinstance(getattr(loss, name), bool) else ("4", [4.0], True):
            with pytest.raises((TypeError, ValueError), match=rf"{name} must be .*, got {re.escape(repr(value))}"):
                setattr(loss, name, value)
    # A tensor would be trained past its check, or be neither moved nor saved: what is kept is a number.
    for name in numbers:
        before = getattr(loss, name)
        number = torch.tensor(float(before), dtype=torch.float64)
        for value in (nn.Parameter(number), number.clone().requires_grad_()):
            with pytest.raises((TypeError, ValueError), match=rf"^{name} must be "):
                setattr(loss, name, value)
        assert getattr(loss, name) == before
        assert name not in loss.state_dict()
        if isinstance(before, float) and name not in loss.built:
            with contextlib.suppress(ValueError):  # the scales of heads take no tensors at all
                setattr(loss, name, number)
            assert type(getattr(loss, name)) is float
            assert getattr(loss, name) == before
    if hasattr(loss, "dim"):
        with pytest.raises((TypeError, ValueError), match=r"dim must be .*, got 1\.0"):
            loss.dim = 1.0


def check_classes(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    """A softmax, which a loss with a temperature takes along its `dim`: over what must be clear."""
    if not hasattr(loss, "dim") or "temperature" not in loss.options:
        return
    dim = -1 if loss.dim is None else loss.dim
    target = None if target is None else torch.zeros_like(target)
    one = [side.narrow(dim, 0, 1) for side in (student, teacher)]
    if getattr(getattr(loss, "rows", None), "classes", 2) > 1:
        with pytest.raises(ValueError, match=r"at least 2 classes along dim -?\d, got shape \("):
            loss(*one, target)
    loss.dim = None
    maps = torch.zeros(2, 3, 4, 5)
    labels = None if target is None else torch.zeros(2, 3, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"dim must be given for .*four dimensions.*, got shape \(2, 3, 4, 5\)"):
        loss(maps, maps, labels)


def check_masks(
    build: Callable[..., nn.Module],
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *,
    elementwise: bool,
) -> None:
    """Reductions that are none, and masks that do not fit."""
    for bad in ("avg", "Mean", None):
        with pytest.raises(ValueError, match=f"reduction must be 'mean', 'sum' or 'none', got {bad!r}"):
            build(reduction=bad)
    loss = build()
    mask = torch.ones_like(build(reduction="none")(student, teacher, target), dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask must be shaped like the per-sample values, \(.*got \(1,"):
        loss(student, teacher, target, mask=mask[:1])
    with pytest.raises(ValueError, match="mask must be shaped like the per-sample values"):
        loss(student, teacher, target, mask=torch.ones(student.shape[:-1] if elementwise else student.shape))
    with pytest.raises(ValueError, match="mask must be on the device of the values, cpu, got meta"):
        loss(student, teacher, target, mask=mask.to("meta"))
    with pytest.raises(ValueError, match=r"mask must be bool or real weights, got torch.complex64"):
        loss(student, teacher, target, mask=mask.to(torch.complex64))
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        loss(student, teacher, target, mask=mask.tolist())


def check_selection(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor | None, mask: Tensor) -> None:
    """Masks that do not select samples."""
    with pytest.raises(ValueError, match=r"mask must select samples.*, got torch.float32"):
        loss(student, teacher, target, mask=mask.float())
    for wrong in (mask[:1], torch.ones(student.shape, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"mask must be .*, got \("):
            loss(student, teacher, target, mask=wrong)
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        loss(student, teacher, target, mask=mask.tolist())
