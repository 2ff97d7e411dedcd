"""TokenSimilarityLoss against the formula of LightlyTrain's third distillation."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import TokenSimilarityLoss, token_similarity_loss


def cosines(tokens):
    """The cosine of each pair of tokens (L, D), pair by pair."""
    return np.array([[a @ b / math.sqrt((a @ a) * (b @ b)) for b in tokens] for a in tokens])


def reference(student, teacher, temperature):
    """The mean over the tokens of KL(softmax(cosines of the teacher / T) || the student's), sample by sample."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        q, p = np.exp(cosines(s) / temperature), np.exp(cosines(t) / temperature)
        q, p = q / q.sum(1, keepdims=True), p / p.sum(1, keepdims=True)
        values.append(sum(p[i, j] * math.log(p[i, j] / q[i, j]) for i, j in np.ndindex(p.shape)) / len(p))
    return np.array(values)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize(("shape", "width"), [((4, 6, 5), 5), ((3, 2, 7), 3), ((1, 9, 2), 4)])
def test_matches_reference(shape, width, temperature):
    student, teacher = make_pair(*shape, teacher_shape=(*shape[:2], width))
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), temperature))
    values = token_similarity_loss(student, teacher, temperature=temperature).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = TokenSimilarityLoss(temperature)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_temperature_is_007_by_default():
    student, teacher = make_pair(3, 6, 5)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 0.07))
    torch.testing.assert_close(token_similarity_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    values = TokenSimilarityLoss(reduction="none")(student, teacher).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(2, 3, 4)
    assert torch.autograd.gradcheck(lambda s: token_similarity_loss(s, teacher, temperature=0.5), student)


def test_contract():
    assert_loss_contract(TokenSimilarityLoss, shape=(5, 4, 3), widths=True)
    assert_loss_contract(
        lambda **options: TokenSimilarityLoss(0.5, **options), shape=(5, 3, 2), teacher_shape=(5, 3, 5), widths=True
    )


def test_zero_when_equal_also_up_to_a_rotation_and_lengths():
    student, _ = make_pair(3, 6, 5)
    rotation, _ = torch.linalg.qr(make_pair(5, 5)[1])
    lengths = torch.rand(3, 6, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    assert TokenSimilarityLoss()(student, student.detach()) == 0
    assert TokenSimilarityLoss()(lengths * student @ rotation, student.detach()) < 1e-12
    assert gradient(TokenSimilarityLoss(), student, student.detach()).abs().max() < 1e-12


def test_order_of_tokens_counts_only_where_it_differs():
    student, teacher = make_pair(3, 6, 5)
    value = token_similarity_loss(student, teacher)
    torch.testing.assert_close(token_similarity_loss(student.flip(1), teacher.flip(1)), value)
    assert (token_similarity_loss(student.flip(1), teacher) - value).abs().max() > 1e-3
    assert (value > 0).all()


def test_samples_do_not_meet():
    student, teacher = make_pair(3, 6, 5)
    alone = torch.cat([token_similarity_loss(student[i : i + 1], teacher[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(token_similarity_loss(student, teacher), alone)


def test_finite_where_tokens_are_zero_or_equal():
    student = torch.zeros(2, 4, 3, requires_grad=True)
    for teacher in (torch.zeros(2, 4, 3), make_pair(2, 4, 3)[1].float(), torch.ones(2, 4, 3)):
        value = TokenSimilarityLoss()(student, teacher)
        assert value.isfinite()
        assert gradient(TokenSimilarityLoss(), student, teacher).abs().max() == 0
        assert gradient(TokenSimilarityLoss(), torch.ones(2, 4, 3), teacher).isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        TokenSimilarityLoss(temperature)
    with pytest.raises(ValueError, match=match):
        token_similarity_loss(*make_pair(2, 3, 4), temperature=temperature)


def test_rejects_what_are_no_tokens():
    with pytest.raises(ValueError, match=r"must be tokens \(N, L, D\) .*, got \(2, 3\) and \(2, 3\); maps"):
        token_similarity_loss(*make_pair(2, 3))
    with pytest.raises(ValueError, match=r"must be tokens \(N, L, D\) .*, got \(2, 3, 4\) and \(2, 4, 4\)"):
        token_similarity_loss(*make_pair(2, 3, 4, teacher_shape=(2, 4, 4)))
    with pytest.raises(ValueError, match=r"there must be at least 2 tokens, got shape \(2, 1, 4\)"):
        token_similarity_loss(*make_pair(2, 1, 4))


def test_repr_shows_options():
    assert repr(TokenSimilarityLoss(0.5)) == "TokenSimilarityLoss(temperature=0.5, reduction='mean')"
