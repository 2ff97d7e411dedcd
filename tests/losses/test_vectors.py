"""Vectors of unit norm, of any size."""

import math

import pytest
import torch

from distill.losses._vectors import normalize, over_largest


def test_normalize_divides_by_the_norm_and_keeps_zero_out_of_the_gradient():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-3e-13, 4e-13]], requires_grad=True)
    normalized = normalize(rows, dim=1)
    torch.testing.assert_close(normalized, torch.tensor([[0.6, 0.8], [0.0, 0.0], [-0.6, 0.8]]))
    (normalized * torch.tensor([1.0, 2.0])).sum().backward()
    torch.testing.assert_close(rows.grad[:2], torch.tensor([[-0.064, 0.048], [0.0, 0.0]]))
    torch.testing.assert_close(rows.grad[2] * 5e-13, torch.tensor([1.6, 1.2]))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-15, 1e15, 1e30, 1e38])
def test_normalize_takes_the_whole_range_of_float32(scale):
    rows = torch.tensor([[0.3, -0.4], [1.0, 2.0]])
    torch.testing.assert_close(normalize(rows * scale, dim=1), normalize(rows, dim=1))
    assert over_largest(rows * scale, dim=1).abs().amax(1).tolist() == [1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_normalize_shows_what_is_not_finite(bad):
    rows = torch.tensor([[3.0, bad], [3.0, 4.0]])
    assert normalize(rows, dim=1).isfinite().all(1).tolist() == [False, True]


def test_normalize_has_second_derivatives_where_the_norm_is_0():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(normalize(rows, dim=1).square().sum(1)[1] + rows.sum(), rows, create_graph=True)
    assert slope.tolist() == [[1, 1], [1, 1]]
    hessian = torch.autograd.functional.hessian(lambda x: normalize(x, dim=1)[:, 0].sum(), rows)
    assert hessian.isfinite().all()
    assert hessian[1].abs().max() == hessian[:, :, 1].abs().max() == 0
    assert hessian.abs().max() > 0
