"""Checks, pooling and layers of losses on feature maps; each loss's own test shows the messages."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from contract import make_pair
from distill import (
    ATLoss,
    CWDLoss,
    FSPLoss,
    HintLoss,
    MGDLoss,
    NSTLoss,
    OFDLoss,
    ReviewLoss,
    VIDLoss,
    ofd_loss,
    vid_loss,
)
from distill.losses._maps import ANY, check_maps, pool, pool_to_smaller
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


@pytest.mark.parametrize(
    ("whole", "part"), [((7, 4), (3, 4)), ((5,), (2,)), ((6, 4), (3, 2)), ((9, 5, 4), (4, 5, 1)), ((3, 2), (4, 4))]
)
def test_pooling_by_products_as_compiled_is_that_of_pytorch(whole, part, monkeypatch):
    maps = make_pair(2, 3, *whole)[0]
    expected = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(whole)](maps, part)
    torch.testing.assert_close(pool(maps, part), expected, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    products = pool(maps, part)
    torch.testing.assert_close(products, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(pooled.pow(3).sum(), maps)[0] for pooled in (products, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(pool(maps.float(), part), expected.float())


def test_maps_of_unequal_size_compile_with_sizes_as_symbols():
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    loss = ATLoss()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for teacher in ((2, 9, 3, 3), (2, 9, 5, 5)):
        maps = make_maps((2, 8, 7, 7), teacher)  # fewer positions than channels, or a graph would keep it
        torch.testing.assert_close(compiled(*maps), loss(*maps))
    assert len(graphs) == 1
    assert not any("pool" in target for graph in graphs for target in graph)  # inductor has no pooling for symbols


def test_pool_to_smaller_leaves_equal_sizes_alone():
    student, teacher = make_pair(2, 3, 4, 5)
    a, b = pool_to_smaller(student, teacher)
    assert a is student
    assert b is teacher


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


@pytest.mark.parametrize("loss", [ATLoss(), NSTLoss()], ids=["at", "nst"])
@pytest.mark.parametrize(
    ("first", "last"),
    [
        ((512, 7, 7), (7, 7, 768)),  # the last stages of a ResNet and a Swin transformer
        ((64, 56, 56), (56, 56, 96)),  # the first stages
        ((64, 64, 64), (64, 64, 96)),
        ((64, 112, 112), (56, 56, 96)),  # of another size
        ((512, 25, 34), (25, 34, 768)),  # not square
        ((512, 25, 34), (13, 17, 768)),  # rounded by the strides
        ((8, 4, 7, 7), (4, 7, 7, 96)),  # over time
    ],
)
def test_a_map_with_its_channels_last_is_recognised_by_its_aspect(loss, first, last):
    student, teacher = torch.ones(2, *first), torch.ones(2, *last)
    way_out = "distill.adapt.NHWC()" if len(first) == 3 else ".movedim(-1, 1)"
    with pytest.raises(ValueError, match=rf"must be maps \(N, C, .*which fit if the teacher's.*{re.escape(way_out)}"):
        loss(student, teacher)
    with pytest.raises(ValueError, match=rf"must be maps \(N, C, .*which fit if the student's.*{re.escape(way_out)}"):
        loss(teacher, student)
    assert loss(student, teacher.movedim(-1, 1)).isfinite()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((7, 7, 7), (512, 7, 7)),  # either way
        ((7, 7, 768), (7, 7, 768)),  # both alike: cannot be told
        ((512, 1, 1), (7, 7, 768)),  # one position has no aspect
        ((64, 16, 16), (32, 32, 32)),
        ((64, 8, 100), (512, 4, 100)),  # a network that pools one dimension alone
        ((20, 16, 18), (64, 16, 16)),  # a little off square
        ((1, 56, 96), (1, 96, 56)),  # one channel
        ((32, 64), (64, 128)),  # lengths differ as they like
    ],
)
def test_maps_that_may_have_their_channels_first_are_taken(first, second):
    for pair in ((first, second), (second, first)):
        student, teacher = check_maps(*(torch.ones(2, *shape) for shape in pair), positions=ANY)
        assert (student.shape[1:], teacher.shape[1:]) == pair


def test_sizes_made_equal_are_taken_whatever_the_channels():
    check_maps(torch.ones(2, 64, 7, 768), torch.ones(2, 7, 7, 768))


@pytest.mark.parametrize("loss", [HintLoss(), CWDLoss()], ids=["hint", "cwd"])
def test_channels_that_must_agree_tell_the_layout(loss):
    student, teacher = torch.ones(2, 24, 7, 7), torch.ones(2, 7, 7, 24)
    for pair in ((student, teacher), (teacher, student)):
        with pytest.raises(
            ValueError, match=r"of the same N and C, got \(2, .*; distill.adapt.NHWC\(\) brings channels"
        ):
            loss(*pair)
    with pytest.raises(
        ValueError,
        match=r"of the same N and C, got \(2, 24, 7, 7\) and \(2, 23, 7, 7\); student=nn.Conv2d\(24, 23, 1\)",
    ):
        loss(student, student[:, 1:])


@pytest.mark.parametrize(
    "loss",
    [HintLoss(16, 24), VIDLoss(16, 24), OFDLoss(16, 24, torch.zeros(24)), MGDLoss(16, 24), ReviewLoss((16,), (24,))],
    ids=["hint", "vid", "ofd", "mgd", "review"],
)
def test_channels_that_are_given_tell_the_layout(loss):
    def side(tensor):
        return (tensor,) if isinstance(loss, ReviewLoss) else tensor

    student, teacher = torch.rand(2, 16, 7, 7), torch.rand(2, 24, 7, 7)
    with pytest.raises(
        ValueError, match=r"teacher must have 24 channels, got .*7, 24\); distill.adapt.NHWC\(\) brings"
    ):
        loss(side(student), side(teacher.movedim(1, -1)))
    with pytest.raises(
        ValueError, match=r"student must have 16 channels, got .*7, 16\); distill.adapt.NHWC\(\) brings"
    ):
        loss(side(student.movedim(1, -1)), side(teacher))
    assert loss(side(student), side(teacher)).isfinite()


@pytest.mark.parametrize("loss", [ATLoss(), NSTLoss(), CWDLoss(), FSPLoss()], ids=["at", "nst", "cwd", "fsp"])
def test_pooled_features_and_maps_without_positions_are_refused(loss):
    def side(tensor):
        return (tensor, tensor) if isinstance(loss, FSPLoss) else tensor

    with pytest.raises(
        ValueError, match=r"must be maps \(N, C, L\), \(N, C, H, W\) or \(N, C, D, H, W\) of the same N"
    ):
        loss(side(torch.ones(2, 3)), side(torch.ones(2, 3)))
    with pytest.raises(ValueError, match=r"must be maps \(N, C, L\), .*, got \(2, 3, 2, 2\) and \(2, 3, 2\)"):
        loss(side(torch.ones(2, 3, 2, 2)), side(torch.ones(2, 3, 2)))
    with pytest.raises(ValueError, match=r"must not be empty, got shape \(2, 3, 0\)"):
        loss(side(torch.ones(2, 3, 0)), side(torch.ones(2, 3, 4)))


@pytest.mark.parametrize(
    ("first", "second"), [((6,), (4,)), ((6,), (3,)), ((4, 3, 6), (2, 5, 3)), ((4, 2, 6), (2, 2, 3))]
)
def test_pool_to_smaller_in_one_and_three_dimensions(first, second):
    smaller = tuple(map(min, first, second))
    maps = make_maps((2, 3, *first), (2, 1, *second))
    for pooled, whole in zip(pool_to_smaller(*maps), maps, strict=True):
        whole = whole.detach().numpy()
        expected = np.zeros((*whole.shape[:2], *smaller))
        for bins in np.ndindex(*smaller):
            part = [
                slice(i * size // n, -(-(i + 1) * size // n))
                for i, n, size in zip(bins, smaller, whole.shape[2:], strict=True)
            ]
            expected[(..., *bins)] = whole[(..., *part)].reshape(*whole.shape[:2], -1).mean(-1)
        torch.testing.assert_close(pooled.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


LOSSES = {
    "hint": lambda: HintLoss(3, 5),
    "at": ATLoss,
    "at to the 3": lambda: ATLoss(3),
    "nst": NSTLoss,
    "cwd": CWDLoss,
    "fsp": FSPLoss,
    "vid": lambda: VIDLoss(3, 5),
    "ofd": lambda: OFDLoss(3, 5, -torch.arange(5.0)),
    "review": lambda: ReviewLoss((3, 3), (5, 5)),
    "mgd": lambda: MGDLoss(3, 5),
}


def make_sides(loss, dtype=torch.float32):
    """A student and a teacher of another size, with tuples where the loss takes them."""
    student, teacher = make_maps((4, 3, 6, 6), (4, 5, 4, 4), dtype=dtype)
    student = student.detach()
    if isinstance(loss, (CWDLoss, FSPLoss)):
        teacher = teacher[:, :3].clone()
    if isinstance(loss, FSPLoss):
        return (student, student[:, :2].clone()), (teacher, teacher[:, :2].clone())
    if isinstance(loss, ReviewLoss):
        return (student, student[..., :3, :3].clone()), (teacher, teacher[..., :2, :2].clone())
    return student, teacher


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_not_finite_shows_unless_a_mask_hides_it(name):
    loss = LOSSES[name]()
    for side in (0, 1):
        for bad in (math.nan, math.inf, -math.inf):
            if name in ("cwd", "ofd") and side == 1 and bad == -math.inf:
                continue  # a position without probability, and one below the margin: right by the formula
            sides = make_sides(loss)
            tensor = sides[side] if isinstance(sides[side], torch.Tensor) else sides[side][0]
            tensor[1, 1, 2, 3] = bad
            assert not loss(*sides).isfinite()
            assert loss(*sides, mask=torch.tensor([1, 0, 1, 1])).isfinite()


@pytest.mark.parametrize("name", LOSSES)
def test_every_constant_may_be_an_inference_tensor(name):
    loss = LOSSES[name]()
    with torch.inference_mode():
        mask = torch.tensor([1.0, 0.0, 2.0, 1.0])
        _, teacher = make_sides(loss)
    student, _ = make_sides(loss)
    for tensor in [student] if isinstance(student, torch.Tensor) else student:
        tensor.requires_grad_()
    loss(student, teacher, mask=mask).backward()
    assert all(p.grad.isfinite().all() for p in loss.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_no_tensor_is_a_type_error(name):
    loss = LOSSES[name]()
    student, teacher = make_sides(loss)
    kind = "tuple of . maps .*" if isinstance(student, tuple) else "tensor"
    for bad in (None, 3.0, "map", [[1.0]]):
        got = "list at 0" if isinstance(bad, list) and isinstance(student, tuple) else type(bad).__name__
        with pytest.raises(TypeError, match=f"student must be a {kind}, got {got}"):
            loss(bad, teacher)
        with pytest.raises(TypeError, match=f"teacher must be a {kind}, got {got}"):
            loss(student, bad)
        if bad is not None:
            with pytest.raises(TypeError, match=f"mask must be a tensor, got {type(bad).__name__}"):
                loss(student, teacher, mask=bad)


def test_what_a_function_has_for_each_channel_is_on_the_device_of_the_maps():
    maps = torch.ones(2, 3, 4)
    for name, call in {
        "variance": lambda values: vid_loss(maps, maps, variance=values),
        "margin": lambda values: ofd_loss(maps, maps, margin=values),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be on the device of the maps, cpu, got meta"):
            call(torch.ones(3, device="meta"))
