"""LogitLoss against the formula of Ba and Caruana (2014) and against nn.MSELoss."""

import numpy as np
import pytest
import torch
from torch import nn

from contract import assert_loss_contract, gradient, make_pair
from distill import LogitLoss, logit_loss

pytestmark = pytest.mark.usefixtures("form")


def reference(student, teacher, axis=-1):
    """The mean over classes of the squared difference of the logits, sample by sample."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        values[sample] = sum((float(a) - float(b)) ** 2 for a, b in zip(s[sample], t[sample], strict=True))
    return values / s.shape[-1]


@pytest.mark.parametrize(
    ("shape", "dim"), [((5, 10), -1), ((5, 1), 1), ((10,), 0), ((3, 4, 7), -1), ((3, 4, 7), 1), ((2, 5, 3, 4), 1)]
)
def test_matches_reference(shape, dim):
    student, teacher = make_pair(*shape)
    expected = reference(student.detach().numpy(), teacher.numpy(), dim)
    torch.testing.assert_close(
        logit_loss(student, teacher, dim=dim).detach(), torch.as_tensor(expected), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        LogitLoss(dim=dim)(student, teacher).item(), expected.mean().item(), rtol=1e-12, atol=1e-12
    )


def test_gradient():
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: logit_loss(s, teacher), student)
    assert torch.autograd.gradgradcheck(lambda s: logit_loss(s, teacher), student)
    torch.testing.assert_close(gradient(LogitLoss(), student, teacher), 2 * (student.detach() - teacher) / 20)


def test_contract():
    assert_loss_contract(LogitLoss, shape=(6, 10))
    assert_loss_contract(LogitLoss, shape=(4, 3, 7))
    assert_loss_contract(lambda **options: LogitLoss(dim=1, **options), shape=(4, 5, 3, 2))


def test_is_half_c_times_smaller_than_the_paper():
    student, teacher = make_pair(6, 10)
    paper = 0.5 * np.mean(np.sum((student.detach().numpy() - teacher.numpy()) ** 2, axis=1))
    torch.testing.assert_close(10 / 2 * LogitLoss()(student, teacher).item(), paper.item(), rtol=1e-12, atol=0)


def test_equals_mse_loss_to_the_bit_where_sums_are_exact():
    # Multiples of 1/8 below 4 in sizes that are powers of two: no sum or quotient rounds, so the order cannot matter.
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randint(-32, 32, (2, 64, 16), generator=generator, dtype=torch.float64) / 8
    assert torch.equal(LogitLoss()(student, teacher), nn.MSELoss()(student, teacher))
    assert torch.equal(gradient(LogitLoss(), student, teacher), gradient(nn.MSELoss(), student, teacher))


@pytest.mark.parametrize("shape", [(1, 1), (7, 10), (128, 100), (3, 5, 11), (64, 1000)])
def test_equals_mse_loss_but_for_the_order_of_summing(shape):
    student, teacher = make_pair(*shape)
    torch.testing.assert_close(
        LogitLoss()(student, teacher), nn.MSELoss()(student, teacher), rtol=4 * np.finfo(float).eps, atol=0
    )
    torch.testing.assert_close(
        gradient(LogitLoss(), student, teacher),
        gradient(nn.MSELoss(), student, teacher),
        rtol=4 * np.finfo(float).eps,
        atol=0,
    )


def test_zero_when_equal():
    student, _ = make_pair(6, 10)
    assert LogitLoss()(student, student.detach()) == 0
    assert gradient(LogitLoss(), student, student.detach()).abs().max() == 0


def test_counts_shifts():
    _, teacher = make_pair(6, 10)
    shifted = LogitLoss()(teacher + 3, teacher)
    torch.testing.assert_close(shifted.item(), 9.0, rtol=1e-12, atol=0)


def test_finite_on_extreme_logits():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = LogitLoss()(student, -student.detach())
    value.backward()
    torch.testing.assert_close(value.item(), 2 * 4e8 / 3)
    assert student.grad.isfinite().all()


def test_half_does_not_overflow():
    student = torch.full((2, 4), 300.0, dtype=torch.half, requires_grad=True)  # 300^2 > 65504, the largest half
    assert LogitLoss()(student, torch.zeros_like(student)) == 90000


@pytest.mark.parametrize("dim", [2, -3])
def test_rejects_dim_out_of_range(dim):
    with pytest.raises(ValueError, match=rf"dim must be a dimension of the inputs, got {dim} for shape \(6, 10\)"):
        LogitLoss(dim=dim)(*make_pair(6, 10))


def test_rejects_scalars():
    with pytest.raises(ValueError, match=r"dim must be a dimension of the inputs, got -1 for shape \(\)"):
        logit_loss(torch.tensor(1.0), torch.tensor(1.0))


def test_repr_shows_options():
    assert repr(LogitLoss(reduction="sum", dim=1)) == "LogitLoss(reduction='sum', dim=1)"
