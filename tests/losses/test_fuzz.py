"""Every loss on inputs as they come: any strides, dtypes, masks and reductions, in blocks of rows or at once.

The oracle is the loss itself on one plain tensor of float64 a side, where its own tests prove it against the paper, and
the meaning of reduction and mask written out. `FUZZ=400 python -m pytest tests/losses/test_fuzz.py` tries that many
inputs for each loss.
"""

import copy
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contract import inner, is_learned, prepare
from distill._engine import fused as engine
from distill.losses._base import RowLoss
from twins import STEMS, find_contracts

EXAMPLES = int(os.environ.get("FUZZ", "6"))
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.half: 4e-3}


def lay_out(draw, x):
    """The same values with other strides: dimensions in another order, and every second element of a larger tensor.

    Half of them keep their rows in one piece, as only those are computed in blocks.
    """
    order = list(draw(st.permutations(range(x.ndim))))
    steps = [draw(st.sampled_from([2, 1])) for _ in order]  # what stands first is tried first
    if draw(st.sampled_from([True, False])):
        order.remove(x.ndim - 1)
        order.append(x.ndim - 1)
        steps[-1] = 1
    large = torch.full([x.shape[d] * step for d, step in zip(order, steps, strict=True)], math.nan, dtype=x.dtype)
    view = large[tuple(slice(None, None, step) for step in steps)].permute([order.index(d) for d in range(x.ndim)])
    return view.copy_(x)


def reduced(values, reduction, weights):
    """The meaning of reduction and mask, written out; a weight of 0 hides."""
    if weights is None:
        weights = torch.ones_like(values)
    values = torch.where(weights == 0, 0.0, weights * values)
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / (weights.sum() if weights.any() else 1.0)


def slope(value, student, upstream):
    (gradient,) = torch.autograd.grad((value.double() * upstream).sum(), student)
    return gradient.double()


@pytest.mark.parametrize("stem", STEMS)
def test_strides_dtypes_masks_and_reductions_change_nothing(stem, monkeypatch):
    (contract, *_) = find_contracts(stem)
    options = {"moves": True, "per_sample": True, "meet": False, "target": None, **contract}
    learned = is_learned(options["build"], options["moves"])
    build, pair = prepare(options["build"], options["shape"], options.get("teacher_shape"), learned=learned)
    dtypes = [torch.float64, torch.float32] if learned else list(TOLERANCE)
    rows = isinstance(inner(build()), RowLoss)

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )
    @given(st.data())
    def check(data):
        draw = data.draw
        dtype = draw(st.sampled_from(dtypes)) if options["moves"] else torch.float64
        student, teacher = (side.detach().to(dtype) for side in pair(seed=draw(st.integers(0, 999))))
        target = options["target"]
        monkeypatch.setattr(engine, "SMALL", math.inf)
        loss = build()
        plain = copy.deepcopy(loss).double() if options["moves"] else copy.deepcopy(loss)
        if dtype == torch.float64:
            loss = copy.deepcopy(plain)
        exact = student.double().requires_grad_()
        if options["per_sample"]:
            inner(plain).reduction = "none"
            values = plain(exact, teacher.double(), target)
            kinds = ["none"] if options["meet"] else ["none", "bool", "weights", "nothing"]
        else:
            values, kinds = None, ["none", "bool"]
        kind = draw(st.sampled_from(kinds))
        reduction = draw(st.sampled_from(["mean", "sum", "none"])) if options["per_sample"] else None
        shape = values.shape if options["per_sample"] else student.shape[:1]
        weights = torch.rand(
            shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))), dtype=torch.float64
        )
        mask = {"none": None, "bool": weights > 0.3, "weights": weights.float(), "nothing": torch.zeros(shape)}[kind]
        if options["per_sample"]:
            expected = reduced(values, reduction, None if mask is None else mask.double())
            inner(loss).reduction = reduction
        else:
            kept = slice(None) if mask is None else mask
            if mask is not None and mask.sum() < 3:
                return
            expected = plain(exact[kept], teacher.double()[kept], None if target is None else target[kept])
        if rows:
            monkeypatch.setattr(engine, "SMALL", draw(st.sampled_from([0, math.inf])))
            monkeypatch.setattr(engine, "FEW", draw(st.sampled_from([0, 2**15])))
            monkeypatch.setattr(engine, "SHORT", 1)
            elements = draw(st.sampled_from([64, 16, 1000]))  # several rows, one, all
            monkeypatch.setattr(engine, "_block_elements", lambda device: elements)
        ours = lay_out(draw, student).requires_grad_()
        value = loss(ours, lay_out(draw, teacher), target, **({} if mask is None else {"mask": mask}))
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        close = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
        torch.testing.assert_close(value.double(), expected, rtol=close, atol=close)
        upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gradient, wanted = slope(value, ours, upstream), slope(expected, exact, upstream)
        scale = max(wanted.abs().max().item(), 1e-3)
        torch.testing.assert_close(gradient, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)

    check()
