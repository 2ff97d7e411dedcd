"""Which form LinearLogitLoss takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import LinearLogitLoss
from distill._engine.squared import heads as problems
from distill._engine.squared import plan as costs
from linear_heads import as_if_large, by_logits, heads, hidden


def test_plan_takes_the_cheapest_and_says_why():
    loss = LinearLogitLoss(*heads((64, 128), 8000))
    plan = loss.plan(4096)
    assert plan.method == "gram"
    assert set(plan.costs) == {"gram", "blocks"}
    assert plan.costs["gram"] == min(plan.costs.values())
    assert plan.reason.startswith("gram: N=4096, V=8000, 65 and 128 columns on cpu, the student's head trains; in 10^9")
    assert loss.plan(8).method == "logits"
    loss.student_head.requires_grad_(False)
    assert loss.plan(4096).method == "factor"
    assert loss.plan(4096).reason.startswith("factor: N=4096, V=8000, 65 and 128 columns on cpu, the heads are frozen")
    assert loss.plan(1).method == "logits"  # too little for the factor to pay
    with torch.no_grad():
        loss.student_head.requires_grad_(True)
        assert set(loss.plan(64).costs) == {"gram", "blocks", "logits"}
        assert "no factor is kept" in loss.plan(64).reason
    asked = LinearLogitLoss(loss.student_head, loss.teacher_head, method="blocks").plan(4096)
    assert asked.method == "blocks"
    assert asked.reason.startswith("as asked for; by cost it would be gram")


@pytest.mark.parametrize(("samples", "sizes"), [(1, (6, 9)), (40, (6, 9)), (4000, (6, 9)), (40, (200, 300))])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_plan_is_what_is_done(samples, sizes, trains, large, monkeypatch):
    taken = []

    def note(place, name, method):
        function = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a: taken.append(method) or function(*a))

    for name in ("by_gram", "by_factor", "by_blocks"):
        note(problems, name, name[3:])
    note(problems, "reduce_by_blocks", "blocks")
    note(problems.Problem, "logits", "logits")
    if large:
        as_if_large(monkeypatch)
    for reduction in ("mean", "none"):
        loss = LinearLogitLoss(*heads(sizes, 3000, trains=trains), reduction=reduction)
        loss(*hidden(samples, sizes=sizes))
        assert taken.pop() == loss.plan(samples).method
    assert taken == []


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    samples=st.integers(1, 5000),
    vocabulary=st.integers(1, 5000),
    columns=st.integers(1, 500),
    teacher_columns=st.integers(1, 500),
    bias=st.booleans(),
    trains=st.booleans(),
)
def test_what_is_tiny_is_cheapest_formed(samples, vocabulary, columns, teacher_columns, bias, trains):
    frozen = {"trains": trains, "may_factor": not trains, "keeps_teacher": True, "early": True}
    size = costs.Size(samples, vocabulary, columns + bias, teacher_columns, device=torch.device("cpu"), **frozen)
    if costs.is_tiny(samples, vocabulary, columns, teacher_columns):
        assert costs.cheapest(size.costs()) == "logits"
    # And what is not, is not always so: the rule says something.
    assert not costs.is_tiny(samples + 2048, vocabulary + 2048, columns, teacher_columns)


def test_small_problems_form_their_logits_and_large_ones_never_do():
    def size(samples, vocabulary):
        return costs.Size(samples, vocabulary, 2048, 4096, torch.device("cpu"), True, False, True, True)

    assert costs.cheapest(size(64, 128256).costs()) == "logits"
    assert "logits" in size(64, 2**17).costs()
    assert "logits" not in size(65, 2**17).costs()


CPU = {"device": torch.device("cpu"), "may_factor": False, "keeps_teacher": True}


def test_differences_that_are_not_kept_count_twice():
    def blocks(samples, *, early):
        return costs.Size(samples, 2**15, 512, 512, **CPU, trains=True, early=early).costs()["blocks"]

    assert blocks(2**10 + 1, early=False) > 1.3 * blocks(2**10, early=False)
    assert blocks(2**10 + 1, early=True) < 1.01 * blocks(2**10, early=True)


READS = 32000 * 512 * costs._PER_READ / 1e9


def test_float64_costs_more_on_most_gpus(monkeypatch):
    gram = {}
    for capability in ((9, 0), (8, 9)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        size = costs.Size(2048, 32000, 256, 512, torch.device("cuda"), True, False, True, True)
        gram[capability] = size.costs()["gram"] - 300 * 0.04 - READS  # without what does not multiply
    assert gram[8, 9] == pytest.approx(32 * gram[9, 0])


def test_devices_without_float64_take_blocks(monkeypatch):
    size = costs.Size(2048, 32000, 256, 512, torch.device("mps"), False, True, True, True)
    assert set(size.costs()) == {"blocks"}
    monkeypatch.setattr(costs, "has_float64", lambda device: False)
    monkeypatch.setattr(problems, "has_float64", lambda device: False)
    pair = heads()
    for states in (hidden(5), hidden(2**18)):
        torch.testing.assert_close(LinearLogitLoss(*pair)(*states), by_logits(pair, states))
    with pytest.raises(ValueError, match="method 'gram' must have a device with float64, got cpu"):
        LinearLogitLoss(*pair, method="gram")(*states)
