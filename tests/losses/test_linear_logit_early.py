"""LinearLogitLoss in blocks: gradients that are formed together with the values."""

import functools
import itertools

import pytest
import torch

import distill._engine.squared.classes
from contract import gradient
from distill import LinearLogitLoss, LogitLoss
from distill._engine.squared.gram import Heads
from linear_heads import by_logits, heads, hidden, make

WEIGHTS = torch.rand(7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
MASKS = [None, WEIGHTS, WEIGHTS > 0.4, torch.zeros(7)]


class Counter:
    """Counts how often the logits of some classes are formed."""

    def __init__(self, monkeypatch):
        self.calls = 0
        self.function = distill._engine.squared.classes._difference
        monkeypatch.setattr(distill._engine.squared.classes, "_difference", self)

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 classes, of 40, and no differences kept."""
    monkeypatch.setattr(distill._engine.squared.classes, "_LOGITS", 1)
    monkeypatch.setattr(distill._engine.squared.classes, "KEPT", 0)


def wanted(pair, states):
    return [states[0], *(parameter for parameter in pair[0].parameters() if parameter.requires_grad)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_equals_formed_logits(small_blocks, reduction, bias, trains):
    pair = heads(bias=bias, trains=trains, dtype=torch.float64)
    states = hidden(7, dtype=torch.float64)
    ours = LinearLogitLoss(*pair, method="blocks", reduction=reduction)
    theirs = LogitLoss(reduction=reduction)
    for mask, factor in itertools.product(MASKS, (1.0, -0.3)):
        value = factor * ours(*states, mask=mask)
        expected = factor * theirs(pair[0](states[0]), pair[1](states[1]), mask=mask)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(
            torch.autograd.grad(value, wanted(pair, states)), torch.autograd.grad(expected, wanted(pair, states))
        )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_differentiates_twice(small_blocks, reduction):
    (student, weight, teacher, teacher_weight), _ = make((3,), 20)
    column = WEIGHTS[:1].expand(20, 1).clone().requires_grad_()
    for mask in (None, WEIGHTS[:3]):

        def call(student, weight, column, mask=mask):
            both = Heads(weight, teacher_weight, column)
            return distill._engine.squared.classes.reduce_by_blocks(student, teacher, both, reduction, mask)

        assert torch.autograd.gradcheck(call, (student, weight, column))
        assert torch.autograd.gradgradcheck(call, (student, weight, column))
    assert torch.autograd.gradgradcheck(functools.partial(call, column=None), (student, weight))


def test_logits_are_formed_once(small_blocks, monkeypatch):
    counter = Counter(monkeypatch)
    pair, states = heads(), hidden(7)
    blocks = 3
    LinearLogitLoss(*pair, method="blocks")(*states).backward()
    assert counter.calls == blocks
    LinearLogitLoss(*pair, method="blocks", reduction="none")(*states).sum().backward()
    assert counter.calls == blocks + 2 * blocks  # what the values count for is not known before backward


def test_backward_twice_gives_the_same_and_leaves_the_first_alone(small_blocks):
    pair, states = heads(dtype=torch.float64), hidden(7, dtype=torch.float64)
    value = LinearLogitLoss(*pair, method="blocks")(*states)
    first = torch.autograd.grad(3 * value, wanted(pair, states), retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.zero_()
    second = torch.autograd.grad(3 * value, wanted(pair, states))
    torch.testing.assert_close(list(second), kept)


@pytest.mark.parametrize("which", ["student", "teacher", "weight", "mask"])
def test_change_in_place_before_backward_is_noticed(small_blocks, which):
    pair, states = heads(), hidden(7)
    mask = torch.ones(7) if which == "mask" else None
    tensors = {"student": states[0] * 1, "teacher": states[1], "weight": pair[1].weight, "mask": mask}
    value = LinearLogitLoss(*pair, method="blocks")(tensors["student"], tensors["teacher"], mask=mask)
    with torch.no_grad():
        tensors[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("which", [0, 1])
def test_change_in_place_of_masked_states_changes_no_gradient(small_blocks, which):
    """A mask takes copies, so that what backward needs is as it was."""
    pair, states = heads(), hidden(7)
    given = [states[0] * 1, states[1].clone()]
    mask = torch.arange(7) > 2
    value = LinearLogitLoss(*pair, method="blocks")(*given, mask=mask)
    with torch.no_grad():
        given[which].mul_(2)
    expected = LogitLoss()(pair[0](states[0]), pair[1](states[1]), mask=mask)
    torch.testing.assert_close(
        torch.autograd.grad(value, wanted(pair, states)), torch.autograd.grad(expected, wanted(pair, states))
    )


def test_weights_that_learn_get_their_gradient(small_blocks):
    pair, states = heads(dtype=torch.float64), hidden(7, dtype=torch.float64)
    weights = WEIGHTS.clone().requires_grad_()
    ours = LinearLogitLoss(*pair, method="blocks")(*states, mask=weights)
    theirs = LogitLoss()(pair[0](states[0]), pair[1](states[1]), mask=weights)
    everything = [*wanted(pair, states), weights]
    torch.testing.assert_close(torch.autograd.grad(ours, everything), torch.autograd.grad(theirs, everything))


def test_rows_without_weight_do_not_spoil_the_value(small_blocks):
    pair, states = heads(), hidden(7)
    kept = torch.arange(7) > 0
    clean = LinearLogitLoss(*pair, method="blocks")(*states, mask=kept)
    states[1][0] = torch.inf
    assert LinearLogitLoss(*pair, method="blocks")(*states, mask=kept) == clean


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_low_precision_heads_with_wider_states(small_blocks, dtype):
    pair, states = heads(dtype=dtype), hidden(7)
    value = LinearLogitLoss(*pair, method="blocks")(*states)
    wide = heads()
    for ours, theirs in zip(pair, wide, strict=True):
        theirs.load_state_dict(ours.state_dict())
    expected = by_logits(wide, states)
    torch.testing.assert_close(value, expected)
    ours = torch.autograd.grad(0.1 * value, wanted(pair, states))
    theirs = torch.autograd.grad(0.1 * expected, wanted(wide, states))
    for got, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.float(), exact, rtol=2**-7 if got.dtype == dtype else 1e-5, atol=1e-6)
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]


def test_gradient_of_a_head_in_half_survives_until_the_scaler(small_blocks):
    pair, states = heads(dtype=torch.half), hidden(4096)
    with torch.no_grad():
        for head in pair:
            head.weight.mul_(1e-4)
            head.bias.zero_()
    states = states[0].detach() * 1e-3, states[1] * 1e-3
    (LinearLogitLoss(*pair, method="blocks")(*states) * 2.0**30).backward()
    wide = heads()
    for ours, theirs in zip(pair, wide, strict=True):
        theirs.load_state_dict(ours.state_dict())
    (by_logits(wide, states) * 2.0**30).backward()
    assert wide[0].weight.grad.abs().max() > 1e-3
    torch.testing.assert_close(pair[0].weight.grad.float(), wide[0].weight.grad, rtol=2**-9, atol=1e-5)


def test_values_alone_take_no_gradient(small_blocks, monkeypatch):
    pair, states = heads(trains=False), hidden(7)
    loss = LinearLogitLoss(*pair, method="blocks")
    value = loss(states[0].detach(), states[1])
    assert not value.requires_grad
    with torch.no_grad():
        assert torch.equal(loss(*states), value)
    assert gradient(loss, *states).shape == states[0].shape


def test_rejects_a_mask_of_another_shape(small_blocks):
    with pytest.raises(ValueError, match=r"mask must be shaped like the per-sample values, \(7,\), got \(1, 7\)"):
        LinearLogitLoss(*heads(), method="blocks")(*hidden(7), mask=torch.ones(1, 7))
