"""CrossEntropyLoss against the formula, and what it refuses."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from contract import make_pair
from distill import CrossEntropyLoss


def reference(logits, labels, smoothing):
    """-sum of the goal times log softmax, sample by sample; the goal is the label with a share spread evenly."""
    values = []
    for row, label in zip(logits, labels, strict=True):
        log_q = row - math.log(sum(math.exp(x) for x in row))
        goal = np.full(len(row), smoothing / len(row))
        goal[label] += 1 - smoothing
        values.append(-float((goal * log_q).sum()))
    return values


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_matches_reference(smoothing):
    logits, _ = make_pair(6, 5)
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    loss = CrossEntropyLoss(label_smoothing=smoothing, reduction="none")
    expected = torch.tensor(reference(logits.detach().numpy(), labels, smoothing), dtype=torch.float64)
    torch.testing.assert_close(loss(logits, labels).detach(), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: loss(s, labels), logits)


def test_finds_the_classes_or_is_told():
    tokens, labels = torch.randn(2, 7, 11), torch.randint(11, (2, 7))
    torch.testing.assert_close(CrossEntropyLoss()(tokens, labels), F.cross_entropy(tokens.mT, labels))
    maps, pixels = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    torch.testing.assert_close(CrossEntropyLoss()(maps, pixels), F.cross_entropy(maps, pixels))
    square = torch.randn(2, 5, 5)
    labels = torch.randint(5, (2, 5))
    with pytest.raises(ValueError, match=r"can be read in two ways: give CrossEntropyLoss\(dim=1\)"):
        CrossEntropyLoss()(square, labels)
    torch.testing.assert_close(CrossEntropyLoss(dim=1)(square, labels), F.cross_entropy(square, labels))
    torch.testing.assert_close(CrossEntropyLoss(dim=-1)(square, labels), F.cross_entropy(square.mT, labels))


def test_mask_and_ignored_labels_count_nowhere():
    logits = torch.randn(2, 4, 6, dtype=torch.float64)
    labels = torch.tensor([[1, 2, -100, 5], [0, 999, 3, -100]])
    mask = torch.tensor([[1.0, 0.5, 1.0, 2.0], [1.0, 0.0, 0.25, 1.0]], dtype=torch.float64)
    logits[1, 1] = torch.nan
    logits.requires_grad_()
    loss = CrossEntropyLoss()(logits, labels, mask=mask)
    kept = [(0, 0, 1.0), (0, 1, 0.5), (0, 3, 2.0), (1, 0, 1.0), (1, 2, 0.25)]
    values = [w * F.cross_entropy(logits[i, j], labels[i, j]).item() for i, j, w in kept]
    assert loss.item() == pytest.approx(sum(values) / sum(w for *_, w in kept), rel=1e-12)
    loss.backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[1, 1] == 0).all()
    assert (logits.grad[0, 2] == 0).all()
    divided = CrossEntropyLoss()(logits, labels, mask=mask, denominator=10)
    assert divided.item() == pytest.approx(sum(values) / 10, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_of_an_ignored_label_count_nowhere_also_where_they_are_nan(smoothing):
    logits, labels = make_pair(2, 3, 5)[0], torch.tensor([[0, -100, 2], [1, 4, -100]])
    loss = CrossEntropyLoss(label_smoothing=smoothing)
    expected = loss(logits, labels)
    (slope,) = torch.autograd.grad(expected, logits)
    for bad in (torch.nan, torch.inf):
        spoilt = logits.detach().masked_fill((labels == -100).unsqueeze(-1), bad).requires_grad_()
        value = loss(spoilt, labels)
        assert value == expected
        assert torch.equal(torch.autograd.grad(value, spoilt)[0], slope)


def test_all_labels_ignored_give_0_with_a_graph():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = CrossEntropyLoss()(logits, torch.full((2, 3), -100))
    assert loss == 0
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_equals_that_of_torch_and_takes_probabilities():
    logits, labels = torch.randn(8, 5), torch.randint(5, (8,))
    labels[2] = -100
    torch.testing.assert_close(CrossEntropyLoss()(logits, labels), nn.CrossEntropyLoss()(logits, labels))
    mixed = torch.rand(8, 5).softmax(-1)
    torch.testing.assert_close(CrossEntropyLoss()(logits, mixed), nn.CrossEntropyLoss()(logits, mixed))
    torch.testing.assert_close(
        CrossEntropyLoss(reduction="sum")(logits, mixed), nn.CrossEntropyLoss(reduction="sum")(logits, mixed)
    )


def test_targets_that_are_no_distributions_are_refused_or_show_nan():
    logits = torch.zeros(3, 4)
    several = torch.tensor([[1.0, 1, 0, 0], [0.25, 0.25, 0.25, 0.25], [0, 0, 0, 1]])
    negative = torch.tensor([[0.5, 0.5, 0, 0], [1.5, -0.5, 0, 0], [0, 0, 0, 1]])
    for target, match in (
        (several, "got a sum of 2 and a smallest of 0"),
        (negative, "a sum of 1 and a smallest of -0.5"),
    ):
        with pytest.raises(ValueError, match=f"must be probabilities, .* {match}; for several .*BCEWithLogitsLoss"):
            CrossEntropyLoss()(logits, target)
        # Where nobody may look: no wait, but no number either.
        values = torch.vmap(CrossEntropyLoss(reduction="none"))(logits.unsqueeze(0), target.unsqueeze(0))[0]
        assert values.isnan().tolist() == [row == (0 if target is several else 1) for row in range(3)]
    # What the mask hides may be anything; halves may round.
    kept = CrossEntropyLoss()(logits, several, mask=torch.tensor([False, True, True]))
    assert kept.item() == pytest.approx(math.log(4))
    soft = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for dtype in (torch.bfloat16, torch.half):
        CrossEntropyLoss()(torch.zeros(64, 1000), soft.to(dtype))


def test_half_is_computed_in_float32():
    logits, labels = torch.randn(8, 5).bfloat16(), torch.randint(5, (8,))
    loss = CrossEntropyLoss()(logits, labels)
    assert loss.dtype == torch.float32
    assert loss == CrossEntropyLoss()(logits.float(), labels)


def test_compiles_whole():
    logits, labels = torch.randn(2, 7, 11), torch.randint(11, (2, 7))
    compiled = torch.compile(CrossEntropyLoss(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, labels), CrossEntropyLoss()(logits, labels))


@pytest.mark.parametrize(
    ("logits", "labels", "error", "match"),
    [
        (
            torch.zeros(2, 50, 7),
            torch.zeros(2, 6, dtype=torch.int64),
            ValueError,
            r"labels must be shaped like the",
        ),
        (torch.zeros(4, 3), torch.full((4,), 3), ValueError, "target must be classes from 0 to 2, got 3"),
        (torch.zeros(4, 3), torch.full((4,), -1), ValueError, "target must be classes from 0 to 2, got -1"),
        (torch.zeros(4, 3), torch.zeros(4), ValueError, "target must be integers .labels., or probabilities"),
        (torch.zeros(4, 3), [0, 1, 2, 0], TypeError, "target must be a tensor, got list"),
        (torch.zeros(4, 1), torch.zeros(4).long(), ValueError, r"at least 2 classes, got logits of shape \(4, 1\)"),
        (torch.zeros(4, 3, device="meta"), torch.zeros(4).long(), ValueError, "must be on the same device, got meta"),
        (torch.zeros(4, 3).long(), torch.zeros(4).long(), ValueError, "logits must be floating-point and not empty"),
    ],
)
def test_rejects(logits, labels, error, match):
    with pytest.raises(error, match=match):
        CrossEntropyLoss()(logits, labels)


def test_rejects_options_of_a_call():
    logits, labels = torch.zeros(4, 3), torch.zeros(4).long()
    with pytest.raises(ValueError, match="dim must be a dimension of the logits, got 2 for shape"):
        CrossEntropyLoss(dim=2)(logits, labels)
    with pytest.raises(ValueError, match=r"denominator must be one number, got a tensor of shape \(2,\)"):
        CrossEntropyLoss()(logits, labels, denominator=torch.ones(2))
