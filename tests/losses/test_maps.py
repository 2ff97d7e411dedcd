"""Checks, pooling and layers of losses on feature maps; each loss's own test shows the messages."""

import pytest
import torch
from torch import nn

from contract import make_pair
from distill.losses._layers import run_layers
from distill.losses._maps import check_maps, pool_to_smaller
from learned import average_pool, make_maps


def test_check_maps_detaches_the_teacher_and_widens():
    student, teacher = make_maps((2, 3, 4, 4), (2, 5, 1, 6))
    s, t = check_maps(student.half(), teacher.requires_grad_(), channels=(3, 5))
    assert s.dtype == t.dtype == torch.float64
    assert s.requires_grad
    assert not t.requires_grad
    assert check_maps(student.half(), teacher.bfloat16(), channels=(3, 5))[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("first", "second", "smaller"),
    [((7, 4), (3, 6), (3, 4)), ((2, 2), (5, 5), (2, 2)), ((8, 6), (4, 2), (4, 2)), ((1, 1), (5, 5), (1, 1))],
)
def test_pool_to_smaller_averages_each_dimension_to_the_smaller_size(first, second, smaller):
    maps = make_maps((2, 3, *first), (2, 1, *second))
    for pooled, whole in zip(pool_to_smaller(*maps), maps, strict=True):
        expected = average_pool(whole.detach().numpy(), *smaller)
        torch.testing.assert_close(pooled.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_pool_to_smaller_leaves_equal_sizes_alone():
    student, teacher = make_pair(2, 3, 4, 5)
    a, b = pool_to_smaller(student, teacher)
    assert a is student
    assert b is teacher


def test_run_layers_equals_the_layers_themselves():
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Sigmoid()
    )
    x = make_pair(2, 3, 4, 5, dtype=torch.float32)[0]
    torch.testing.assert_close(run_layers(layers, x), layers(x))
    torch.testing.assert_close(run_layers(layers, x.double()), layers.double()(x.double()))
    assert run_layers(nn.Sequential(), x) is x


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
