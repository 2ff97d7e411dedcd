"""GramLoss against the formula of DINOv3 (2025)."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import GramLoss, gram_loss


def reference(student, teacher):
    """The mean over all pairs of tokens of the squared difference of their cosines, sample by sample."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        total = 0.0
        for i, j in np.ndindex(len(s), len(s)):
            ours, theirs = (x[i] @ x[j] / math.sqrt((x[i] @ x[i]) * (x[j] @ x[j])) for x in (s, t))
            total += (ours - theirs) ** 2
        values.append(total / len(s) ** 2)
    return np.array(values)


@pytest.mark.parametrize(("shape", "width"), [((4, 6, 5), 5), ((3, 2, 7), 3), ((1, 9, 2), 4)])
def test_matches_reference(shape, width):
    student, teacher = make_pair(*shape, teacher_shape=(*shape[:2], width))
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy()))
    torch.testing.assert_close(gram_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(GramLoss()(student, teacher).detach(), expected.mean(), rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(2, 3, 4)
    assert torch.autograd.gradcheck(lambda s: gram_loss(s, teacher), student)


def test_contract():
    assert_loss_contract(GramLoss, shape=(5, 4, 3), widths=True)


def test_zero_when_equal_also_up_to_a_rotation_and_lengths():
    student, _ = make_pair(3, 6, 5)
    rotation, _ = torch.linalg.qr(make_pair(5, 5)[1])
    lengths = torch.rand(3, 6, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    assert GramLoss()(student, student.detach()) == 0
    assert GramLoss()(lengths * student @ rotation, student.detach()) < 1e-24
    assert gradient(GramLoss(), student, student.detach()).abs().max() == 0


def test_largest_where_all_is_the_opposite():
    teacher = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    torch.testing.assert_close(gram_loss(torch.tensor([[[1.0], [-1.0]]]), teacher), torch.tensor([2.0]))


def test_negative_cosines_count():
    teacher = torch.tensor([[[1.0, 0.0], [-1.0, 0.1]]])
    assert gram_loss(torch.eye(2)[None], teacher) > 0.4


def test_finite_where_tokens_are_zero():
    zeros, (_, teacher) = torch.zeros(2, 4, 3), make_pair(2, 4, 3)
    assert gradient(GramLoss(), zeros, teacher).abs().max() == 0
    assert GramLoss()(zeros, teacher).isfinite()


def test_rejects_what_are_no_tokens():
    with pytest.raises(ValueError, match=r"must be tokens \(N, L, D\) .*, got \(2, 3, 4, 4\) .*; maps .* \.flatten"):
        gram_loss(*make_pair(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"there must be at least 2 tokens, got shape \(2, 1, 4\)"):
        gram_loss(*make_pair(2, 1, 4))


def test_repr_shows_options():
    assert repr(GramLoss(reduction="sum")) == "GramLoss(reduction='sum')"
