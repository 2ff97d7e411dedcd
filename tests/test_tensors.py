"""The parts that losses share, where the losses' own tests do not reach."""

import pytest
import torch

from distill._tensors import (
    check_maps,
    check_pair,
    check_positive,
    normalize,
    pool_to_smaller,
    reduce,
    without_autocast,
)


def test_pair_is_computed_in_the_wider_dtype_and_at_least_float32():
    for student, teacher, expected in [
        (torch.half, torch.half, torch.float32),
        (torch.bfloat16, torch.half, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ]:
        pair = check_pair(torch.ones(2, 3, dtype=student), torch.ones(2, 3, dtype=teacher), dim=-1)
        assert [x.dtype for x in pair] == [expected, expected]


def test_pair_keeps_the_students_graph_and_cuts_the_teachers():
    student, teacher = check_pair(torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True), dim=-1)
    assert student.requires_grad
    assert not teacher.requires_grad


def test_check_positive_names_the_option():
    assert check_positive("gamma", 0.5) == 0.5
    with pytest.raises(ValueError, match=r"gamma must be positive and finite, got -0\.5"):
        check_positive("gamma", -0.5)


def test_mean_divides_by_the_sum_of_weights_even_when_it_is_below_one():
    assert reduce(torch.tensor([2.0, 6.0]), "mean", torch.tensor([0.125, 0.375])) == 5.0


def test_values_of_weight_zero_do_not_count_even_if_not_finite():
    values = torch.tensor([1.0, torch.inf, torch.nan])
    mask = torch.tensor([True, False, False])
    assert reduce(values, "mean", mask) == 1
    assert reduce(values, "sum", mask) == 1
    assert reduce(values, "none", mask).tolist() == [1, 0, 0]


def test_half_mask_is_taken_in_the_precision_of_the_values():
    values = torch.ones(4096)
    assert reduce(values, "sum", torch.ones(4096, dtype=torch.bfloat16)) == 4096


def test_maps_come_out_ready_and_in_their_own_size():
    student, teacher = torch.ones(2, 3, 4, 4, dtype=torch.half, requires_grad=True), torch.ones(2, 5, 2, 6).double()
    ready = check_maps(student, teacher.requires_grad_(), same_channels=False)
    assert [x.shape for x in ready] == [student.shape, teacher.shape]
    assert [x.dtype for x in ready] == [torch.float64, torch.float64]
    assert [x.requires_grad for x in ready] == [True, False]


def test_maps_of_other_channels_are_refused_where_they_must_be_the_same():
    student, teacher = torch.ones(2, 3, 4, 4), torch.ones(2, 5, 4, 4)
    with pytest.raises(ValueError, match=r"of the same N and C, got \(2, 3, 4, 4\) and \(2, 5, 4, 4\)"):
        check_maps(student, teacher, same_channels=True)
    with pytest.raises(ValueError, match=r"of the same N, got \(2, 3, 4, 4\) and \(1, 5, 4, 4\)"):
        check_maps(student, teacher[:1], same_channels=False)


def test_an_empty_map_is_refused_on_either_side():
    full, empty = torch.ones(2, 3, 4, 4), torch.ones(2, 3, 0, 4)
    for pair in ((full, empty), (empty, full)):
        with pytest.raises(ValueError, match=r"must not be empty, got shape \(2, 3, 0, 4\)"):
            check_maps(*pair, same_channels=True)


def test_pooling_takes_the_smaller_height_and_the_smaller_width():
    first, second = torch.arange(8.0).reshape(1, 1, 2, 4), torch.arange(6.0).reshape(1, 1, 3, 2)
    pooled, other = pool_to_smaller(first, second)
    assert pooled.tolist() == [[[[0.5, 2.5], [4.5, 6.5]]]]
    assert other.shape == (1, 1, 2, 2)
    assert pool_to_smaller(first, first)[0] is first


def test_normalize_divides_by_the_norm_and_keeps_zero_out_of_the_gradient():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-13, 0.0]], requires_grad=True)
    normalized = normalize(rows, dim=1)
    torch.testing.assert_close(normalized, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]))
    (normalized * torch.tensor([1.0, 2.0])).sum().backward()
    torch.testing.assert_close(rows.grad, torch.tensor([[-0.064, 0.048], [0.0, 0.0], [0.0, 0.0]]))


def test_products_stay_as_they_are_without_autocast():
    matrix = torch.eye(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with without_autocast(matrix):
            assert (matrix @ matrix).dtype == torch.float32
        assert (matrix @ matrix).dtype == torch.bfloat16
    with without_autocast(matrix.to("meta")):
        assert (matrix.to("meta") @ matrix.to("meta")).shape == (2, 2)
