"""The parts that losses share, where the losses' own tests do not reach."""

import pytest
import torch

from distill._checks import check_pair, check_positive, without_autocast
from distill._reduction import hide, reduce


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


def test_products_stay_as_they_are_without_autocast():
    matrix = torch.eye(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with without_autocast(matrix):
            assert (matrix @ matrix).dtype == torch.float32
        assert (matrix @ matrix).dtype == torch.bfloat16
    with without_autocast(matrix.to("meta")):
        assert (matrix.to("meta") @ matrix.to("meta")).shape == (2, 2)


@pytest.mark.parametrize("mask", [torch.tensor([True, False, True]), torch.tensor([0.5, 0.0, 2.0])])
@pytest.mark.parametrize("dim", [None, 1])
def test_hidden_samples_are_0_and_get_no_gradient(mask, dim):
    tensor = torch.tensor([[1.0, 2.0], [torch.nan, -torch.inf], [3.0, 4.0]], requires_grad=True)
    with torch.inference_mode():
        constant = mask.clone()
    for given in (mask, constant):
        hidden = hide(tensor, given, dim=dim)
        assert hidden.tolist() == [[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]
        (gradient,) = torch.autograd.grad((hidden * torch.tensor([[1.0], [torch.nan], [2.0]])).sum(), tensor)
        assert gradient.tolist() == [[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]]


def test_hides_along_the_samples_also_where_their_values_lie_between():
    maps = torch.ones(2, 3, 2)
    mask = torch.tensor([[True, False], [False, True]])
    assert hide(maps, mask, dim=1).sum(1).tolist() == [[3.0, 0.0], [0.0, 3.0]]
