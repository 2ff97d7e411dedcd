"""FGDLoss against the formula of Yang et al. (2022)."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair, with_weights
from distill import FGDLoss, fgd_loss
from learned import convolve, weights

ALL = {"alpha": 0.3, "beta": 0.7, "gamma": 0.2, "delta": 0.05}


def make_boxes(n, m=3, seed=4):
    """Boxes in fractions, the last of each sample empty."""
    corners = torch.rand(n, m, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    boxes = torch.cat([corners.amin(2), corners.amax(2)], 2)
    boxes[:, -1] = 0.0
    return boxes


def focal(s, t, boxes, alpha, beta, gamma, temperature):
    """The three parts of one sample, position by position."""
    channels, height, width = s.shape
    inside = np.zeros((height, width))
    for x1, y1, x2, y2 in boxes:
        if x2 <= x1 or y2 <= y1:
            continue
        left, right = math.floor(x1 * width), math.ceil(x2 * width)
        top, bottom = math.floor(y1 * height), math.ceil(y2 * height)
        for i, j in np.ndindex(height, width):
            if top <= i <= bottom and left <= j <= right:
                inside[i, j] = max(inside[i, j], 1 / (bottom + 1 - top) / (right + 1 - left))
    outside = (inside == 0) / max((inside == 0).sum(), 1)
    attention = []
    for x in (s, t):
        where, which = np.exp(np.abs(x).mean(0) / temperature), np.exp(np.abs(x).mean((1, 2)) / temperature)
        attention.append((height * width * where / where.sum(), channels * which / which.sum()))
    (where, which), (their_where, their_which) = attention
    total = gamma * (np.abs(where - their_where).sum() + np.abs(which - their_which).sum())
    for c, i, j in np.ndindex(*s.shape):
        counts = alpha * inside[i, j] + beta * outside[i, j]
        total += counts * their_where[i, j] * their_which[c] * (s[c, i, j] - t[c, i, j]) ** 2
    return total


def relate(x, attention, context):
    """R of maps (N, C, H, W): what an attention over the positions collects, through two layers, at each position."""
    first, norm, _, last = context
    scores = np.exp(convolve(x, *weights(attention[0])))
    scores = scores / scores.sum((2, 3), keepdims=True)
    hidden = convolve((x * scores).sum((2, 3), keepdims=True), *weights(first))
    mean, variance = hidden.mean(1, keepdims=True), hidden.var(1, keepdims=True)
    weight, bias = weights(norm)
    hidden = (hidden - mean) / np.sqrt(variance + 1e-5) * weight + bias
    return x + convolve(np.maximum(hidden, 0), *weights(last))


@pytest.mark.parametrize(
    ("options", "temperature"), [((1.0, 0.0, 0.0), 0.5), ((0.0, 1.0, 0.0), 0.8), ((0.3, 0.7, 0.2), 2.0)]
)
def test_matches_reference(options, temperature):
    student, teacher = make_pair(4, 3, 5, 6)
    boxes = make_boxes(4)
    pairs = zip(student.detach().numpy(), teacher.numpy(), boxes.numpy(), strict=True)
    expected = torch.tensor([focal(s, t, b, *options, temperature) for s, t, b in pairs], dtype=torch.float64)
    named = dict(zip(("alpha", "beta", "gamma"), options, strict=True))
    values = fgd_loss(student, teacher, boxes, temperature=temperature, **named)
    torch.testing.assert_close(values.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [(3, 4), (4, 4)])
def test_matches_reference_through_the_learned_layers(channels):
    student, teacher = make_pair(3, channels[0], 4, 5, teacher_shape=(3, channels[1], 4, 5))
    loss = with_weights(FGDLoss(*channels, **ALL, reduction="none"))
    boxes = make_boxes(3)
    s, t = student.detach().numpy(), teacher.numpy()
    s = convolve(s, *weights(loss.align[0])) if len(loss.align) else s
    relations = [relate(x, loss.attention[k], loss.context[k]) for k, x in enumerate((s, t))]
    expected = [focal(*sample, 0.3, 0.7, 0.2, 0.5) for sample in zip(s, t, boxes.numpy(), strict=True)]
    expected = torch.tensor(expected, dtype=torch.float64)
    expected += 0.05 * torch.from_numpy(((relations[0] - relations[1]) ** 2).sum((1, 2, 3)))
    torch.testing.assert_close(loss(student, teacher, boxes).detach(), expected, rtol=1e-12, atol=1e-12)


def test_defaults_are_those_of_retinanet():
    loss = FGDLoss(3, 4)
    assert (loss.alpha, loss.beta, loss.gamma, loss.delta, loss.temperature) == (1e-3, 5e-4, 5e-4, 5e-6, 0.5)


def test_relations_start_as_the_maps():
    student, teacher = make_pair(3, 4, 4, 5)
    boxes = make_boxes(3)
    only = FGDLoss(4, 4, 0.0, 0.0, 0.0, 2.0, reduction="none")
    torch.testing.assert_close(only(student, teacher, boxes), 2 * (student - teacher).square().flatten(1).sum(1))


def test_gradient():
    student, teacher = make_pair(2, 3, 3, 4, teacher_shape=(2, 4, 3, 4))
    boxes, loss = make_boxes(2), with_weights(FGDLoss(3, 4, **ALL)).double()
    names = [name for name, _ in loss.named_parameters()]

    def value(student, *parameters):
        return torch.func.functional_call(loss, dict(zip(names, parameters, strict=True)), (student, teacher, boxes))

    assert torch.autograd.gradcheck(value, (student, *loss.parameters()))


def test_contract():
    def build(**options):
        return with_weights(FGDLoss(3, 4, 0.3, 0.7, 0.2, 0.05, **options))

    assert_loss_contract(build, shape=(5, 3, 2, 4), teacher_shape=(5, 4, 4, 2), target=make_boxes(5), maps=True)


def test_a_larger_box_counts_no_more_than_a_small_one_and_nothing_counts_twice():
    student, teacher = torch.zeros(1, 2, 8, 8), torch.ones(1, 2, 8, 8)
    only = {"alpha": 1.0, "beta": 0.0, "gamma": 0.0}
    small, large = torch.tensor([[[0.0, 0.0, 0.1, 0.1]]]), torch.tensor([[[0.0, 0.0, 0.8, 0.8]]])
    values = [fgd_loss(student, teacher, boxes, **only) for boxes in (small, large)]
    torch.testing.assert_close(values, [torch.tensor([2.0])] * 2)
    # In the large box a small one: its four positions count for the small one alone.
    both = fgd_loss(student, teacher, torch.cat([small, large], 1), **only)
    torch.testing.assert_close(both, torch.tensor([2.0 + 2.0 * (64 - 4) / 64]))


def test_without_boxes_all_is_background_and_without_background_it_counts_0():
    student, teacher = torch.zeros(2, 2, 4, 4), torch.ones(2, 2, 4, 4)
    only = {"alpha": 1.0, "beta": 1.0, "gamma": 0.0}
    for boxes in (torch.zeros(2, 0, 4), torch.zeros(2, 3, 4)):
        torch.testing.assert_close(fgd_loss(student, teacher, boxes, **only), torch.tensor([2.0, 2.0]))
    whole = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]] * 2)
    value = fgd_loss(student, teacher, whole, alpha=0.0, beta=1.0, gamma=0.0)
    assert (value == 0).all()


def test_zero_when_equal():
    student, _ = make_pair(3, 4, 4, 5)
    boxes = make_boxes(3)
    loss = FGDLoss(4, 4, **ALL)
    assert loss(student, student.detach(), boxes) == 0
    assert gradient(loss, student, student.detach(), boxes).abs().max() == 0


def test_hidden_samples_may_have_any_boxes():
    student, teacher = make_pair(3, 4, 4, 5)
    boxes = make_boxes(3)
    mask = torch.tensor([True, True, False])
    loss = FGDLoss(4, 4, **ALL)
    expected = loss(student, teacher, boxes, mask=mask)
    boxes[2] = 500.0
    assert torch.equal(loss(student, teacher, boxes, mask=mask), expected)
    boxes[2] = math.nan
    assert torch.equal(loss(student, teacher, boxes, mask=mask), expected)


def test_rejects_boxes_that_are_none():
    student, teacher = make_pair(3, 4, 4, 5)
    for call in (lambda boxes: FGDLoss(4, 4)(student, teacher, boxes), lambda boxes: fgd_loss(student, teacher, boxes)):
        with pytest.raises(ValueError, match=r"target must be the boxes of every sample, \(N, M, 4\), got None"):
            call(None)
        for bad in (torch.zeros(3, 4), torch.zeros(2, 1, 4), torch.zeros(3, 1, 5), torch.zeros(3, 1, 4).long()):
            with pytest.raises(ValueError, match=r"target must be boxes \(3, M, 4\), floating-point fractions .*, got"):
                call(bad)
        with pytest.raises(ValueError, match=r"from 0 to 1, got 500\.0: divide pixels by the picture's size"):
            call(torch.full((3, 1, 4), 500.0))
        with pytest.raises(ValueError, match=r"from 0 to 1, got nan"):
            call(torch.full((3, 1, 4), math.nan))
        boxes = torch.zeros(3, 2, 4)
        boxes[2, 1] = torch.tensor([0.5, 0.25, 0.125, 0.5])  # centre and size, as other detectors have them
        with pytest.raises(
            ValueError, match=r"x1 and y1 before .*, got \[0\.5, 0\.25, 0\.125, 0\.5\]: a center and a size"
        ):
            call(boxes)
        with pytest.raises(ValueError, match="target must be on the device of the maps, cpu, got meta"):
            call(torch.zeros(3, 1, 4, device="meta"))


def test_rejects_relations_and_maps_that_do_not_fit():
    student, teacher = make_pair(3, 4, 4, 5)
    with pytest.raises(ValueError, match=r"relations must be shaped like the maps, \(3, 4, 4, 5\), got \(3, 4\)"):
        fgd_loss(student, teacher, make_boxes(3), relations=(student[..., 0, 0], teacher))
    with pytest.raises(ValueError, match=r"must be maps \(N, C, H, W\), got shape \(3, 4\)"):
        fgd_loss(*make_pair(3, 4), make_boxes(3))


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "delta"])
@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_rejects_bad_weights(name, bad):
    match = f"{name} must be zero or positive and finite, got {bad}"
    with pytest.raises(ValueError, match=match):
        FGDLoss(3, 4, **{name: bad})
    with pytest.raises(ValueError, match=match):
        fgd_loss(*make_pair(3, 4, 4, 5), make_boxes(3), **{name: bad})


def test_rejects_bad_temperatures_and_channels():
    with pytest.raises(ValueError, match=r"temperature must be positive and finite, got 0\.0"):
        FGDLoss(3, 4, temperature=0.0)
    with pytest.raises(ValueError, match="teacher_channels must be an integer of at least 2, got 1"):
        FGDLoss(3, 1)


def test_every_parameter_gets_a_gradient_and_the_state_names_them():
    loss = with_weights(FGDLoss(3, 8, **ALL))
    student, teacher = make_pair(2, 3, 3, 4, teacher_shape=(2, 8, 3, 4), dtype=torch.float32)
    loss(student, teacher, make_boxes(2)).backward()
    assert all(parameter.grad.abs().max() > 1e-5 for parameter in loss.parameters())
    assert sorted({name.split(".")[0] for name in loss.state_dict()}) == ["align", "attention", "context"]


def test_repr_shows_options():
    assert "student_channels=3, teacher_channels=4, alpha=0.001, beta=0.0005" in repr(FGDLoss(3, 4))
