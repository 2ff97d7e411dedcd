"""MarginMSELoss against the formula of Hofstaetter et al. (2020)."""

import numpy as np
import pytest
import torch
from torch import nn

from contract import assert_loss_contract, gradient, make_pair
from distill import LinearLoss, MarginMSELoss, margin_mse_loss

pytestmark = pytest.mark.usefixtures("form")


def reference(student, teacher, axis=-1):
    """The mean over the negatives of the squared difference of two margins, query by query."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for query in np.ndindex(values.shape):
        ours, theirs = s[query], t[query]
        negatives = range(1, len(ours))
        values[query] = sum(((ours[0] - ours[k]) - (theirs[0] - theirs[k])) ** 2 for k in negatives) / len(negatives)
    return values


@pytest.mark.parametrize(("shape", "dim"), [((5, 2), -1), ((5, 7), 1), ((3,), 0), ((3, 4, 6), -1), ((3, 4, 6), 1)])
def test_matches_reference(shape, dim):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), dim))
    values = margin_mse_loss(student, teacher, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = MarginMSELoss(dim=dim)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_one_negative_is_the_loss_of_the_published_code():
    student, teacher = make_pair(6, 2)
    margins = (side[:, 0] - side[:, 1] for side in (student, teacher))
    torch.testing.assert_close(MarginMSELoss()(student, teacher), nn.MSELoss()(*margins), rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: margin_mse_loss(s, teacher), student)
    assert torch.autograd.gradgradcheck(lambda s: margin_mse_loss(s, teacher), student)


def test_contract():
    assert_loss_contract(MarginMSELoss, shape=(6, 10))
    assert_loss_contract(lambda **options: MarginMSELoss(dim=1, **options), shape=(4, 5, 3))


def test_zero_when_equal():
    student, _ = make_pair(6, 10)
    assert MarginMSELoss()(student, student.detach()) == 0
    assert gradient(MarginMSELoss(), student, student.detach()).abs().max() == 0


def test_does_not_count_what_is_added_to_all_scores_of_a_query():
    student, teacher = make_pair(6, 10)
    shift = torch.linspace(-20, 20, 6)[:, None]
    torch.testing.assert_close(margin_mse_loss(student + shift, teacher - 3), margin_mse_loss(student, teacher))


def test_which_score_is_the_positive_counts_and_the_order_of_the_negatives_does_not():
    student, teacher = make_pair(6, 10)
    values = margin_mse_loss(student, teacher)
    order = [0, *range(9, 0, -1)]
    torch.testing.assert_close(margin_mse_loss(student[:, order], teacher[:, order]), values)
    assert not torch.allclose(margin_mse_loss(student.flip(1), teacher.flip(1)), values)


def test_finite_on_extreme_scores():
    student, teacher = make_pair(6, 10, dtype=torch.float32)
    assert gradient(MarginMSELoss(), 1e4 * student, -1e4 * teacher).isfinite().all()


def test_through_two_heads():
    student, teacher = make_pair(6, 4, teacher_shape=(6, 3))
    heads = nn.Linear(4, 9).double(), nn.Linear(3, 9).double()
    loss = LinearLoss(MarginMSELoss(), *heads, rows=4)
    torch.testing.assert_close(loss(student, teacher), MarginMSELoss()(heads[0](student), heads[1](teacher)))


def test_rejects_a_single_score():
    match = r"there must be a positive and at least one negative score along dim -?\d, got shape \(6, 1\)"
    for form in (margin_mse_loss, MarginMSELoss()):
        with pytest.raises(ValueError, match=match):
            form(*make_pair(6, 1))


def test_repr_shows_options():
    assert repr(MarginMSELoss(reduction="none")) == "MarginMSELoss(reduction='none', dim=-1)"
