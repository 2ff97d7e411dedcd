"""The parts that losses share, where the losses' own tests do not reach."""

import re

import numpy as np
import pytest
import torch

from contract import make_pair
from distill import (
    CrossEntropyLoss,
    Distiller,
    KLLoss,
    LinearLoss,
    LogitLoss,
    MatryoshkaLoss,
    Teachers,
    TopK,
    kl_loss,
)
from distill._checks import check_fraction, check_not_negative, check_pair, check_positive, without_autocast
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


@pytest.mark.parametrize("value", ["4", None, True, [4.0], 4j])
def test_an_option_that_is_no_number_is_named(value):
    for check in (check_positive, check_not_negative, check_fraction):
        with pytest.raises(TypeError, match=rf"gamma must be a number, got {re.escape(repr(value))}"):
            check("gamma", value)
    with pytest.raises(TypeError, match="temperature must be a number, got"):
        kl_loss(torch.ones(2, 3), torch.ones(2, 3), temperature=value)


def test_an_option_may_be_a_number_of_another_library_or_a_tensor_of_one():
    assert check_positive("gamma", np.float32(0.5)) == 0.5
    assert check_positive("gamma", torch.tensor(0.5)) == 0.5
    with pytest.raises(ValueError, match=r"gamma must be one number, got a tensor of shape \(2,\)"):
        check_positive("gamma", torch.ones(2))


@pytest.mark.parametrize("dim", ["a", 1.0, True])
def test_a_dim_that_is_no_integer_is_named(dim):
    teacher = TopK.of(torch.zeros(2, 3), k=2)
    for call in (
        lambda: KLLoss(dim=dim),
        lambda: kl_loss(torch.ones(2, 3), torch.ones(2, 3), dim=dim),
        lambda: kl_loss(torch.ones(2, 3), teacher, temperature=1.0, dim=dim),
    ):
        with pytest.raises(TypeError, match=rf"dim must be an integer or None, got {dim!r}"):
            call()


def test_what_is_not_dense_is_refused():
    dense = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"student must be dense \(torch.strided\), got torch.sparse_coo; .to_dense"):
        kl_loss(dense.to_sparse(), dense)


def test_floats_of_8_bits_are_refused():
    narrow = torch.ones(2, 3).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"teacher must have 16 bits or more a number, got torch.float8_e4m3fn"):
        check_pair(torch.ones(2, 3), narrow, dim=-1)


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


@pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda number: number.requires_grad_()])
def test_what_is_kept_takes_no_number_that_trains(kind):
    number = kind(torch.tensor(0.5))
    student, teacher = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    distiller = Distiller(student, teacher, KLLoss())
    for name, build in {
        "temperature": lambda: KLLoss(number),
        "weights": lambda: MatryoshkaLoss(LogitLoss(), (2,), (number,)),
        "label_smoothing": lambda: CrossEntropyLoss(label_smoothing=number),
        "cross_entropy": lambda: LinearLoss(KLLoss(), student, teacher, cross_entropy=number),
        "the weight of 'a'": lambda: Teachers(a=teacher, weights={"a": number}, combine="logits"),
        "decay": lambda: distiller.update_teacher(number),
        "temperature ": lambda: TopK.of(torch.ones(2, 3), 1, temperature=number),
    }.items():
        with pytest.raises(
            TypeError, match=rf"^{name.strip()} must be a number that does not train, got a \w+ that does"
        ):
            build()
    values = kl_loss(
        *make_pair(4, 3), temperature=number
    )  # a function keeps nothing: the gradient goes where it came from
    assert torch.autograd.grad(values.sum(), number)[0] != 0


def test_of_a_tensor_the_number_is_kept():
    weights = MatryoshkaLoss(LogitLoss(), (2, 1), (torch.tensor(0.5), 1.0)).weights
    assert weights == (0.5, 1.0)
    assert all(type(weight) is float for weight in weights)
    assert repr(KLLoss(torch.tensor(2.0))) == repr(KLLoss(2.0))
    assert Teachers(a=torch.nn.Identity(), weights={"a": torch.tensor(2.0)}, combine="logits").shares == {"a": 1.0}
