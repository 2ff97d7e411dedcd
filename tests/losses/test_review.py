"""ReviewLoss against the formulas of Chen et al. (2021)."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from contract import assert_loss_contract, make_pair, with_weights
from distill import Distiller, ReviewLoss, Term, review_loss
from learned import (
    Levels,
    assert_gradients,
    average_pool,
    batch_norm,
    convolve,
    nearest,
    weights,
)


def reference(student, teacher):
    """Hierarchical context, squared distances at the full size and of 4, 2, 1 bins, each half the weight before."""
    values = np.zeros(len(student[0]))
    for s, t in zip(student, teacher, strict=True):
        sizes = [k for k in (4, 2, 1) if k < s.shape[2]]
        distances = [((s - t) ** 2).mean((1, 2, 3))]
        distances += [((average_pool(s, k, k) - average_pool(t, k, k)) ** 2).mean((1, 2, 3)) for k in sizes]
        values += np.average(distances, axis=0, weights=[0.5**i for i in range(len(distances))])
    return values


def reference_module(loss, student, teacher):
    """The attention based fusion, from the deepest level to the shallowest."""
    fused, deeper = [], None
    for level in reversed(range(len(student))):
        s, t = (x.reshape(*x.shape, 1, 1) if x.ndim == 2 else x for x in (student[level], teacher[level]))
        convolution, norm = loss.inputs[level]
        here = batch_norm(convolve(s, *weights(convolution)), *weights(norm))
        if deeper is not None:
            deeper = nearest(deeper, *here.shape[2:])
            both = np.concatenate([here, deeper], axis=1)
            attention = 1 / (1 + np.exp(-convolve(both, *weights(loss.attention[level]))))
            here = attention[:, [0]] * here + attention[:, [1]] * deeper
        deeper = nearest(here, *t.shape[2:])
        convolution, norm = loss.outputs[level]
        fused.insert(0, batch_norm(convolve(deeper, *weights(convolution)), *weights(norm)))
    return reference(fused, [t.reshape(*t.shape, 1, 1) if t.ndim == 2 else t for t in teacher])


def make_levels(shapes, channels, seed=0):
    """Maps of these sizes, from shallow to deep; a size of None stands for pooled features."""
    return [
        make_pair(3, c, *(size or ()), seed=seed + i)[0].detach()
        for i, (size, c) in enumerate(zip(shapes, channels, strict=True))
    ]


def arrays(maps):
    return [x.numpy() for x in maps]


@pytest.mark.parametrize(
    "sizes", [[(8, 8), (5, 5), (4, 4)], [(3, 3), (2, 2), (1, 1)], [(6, 9)], [(3, 7), (1, 5)], [(9, 3), (5, 1)]]
)
def test_function_matches_reference(sizes):
    student = make_levels(sizes, [2, 3, 4][: len(sizes)])
    teacher = make_levels(sizes, [2, 3, 4][: len(sizes)], seed=10)
    expected = torch.as_tensor(reference(arrays(student), arrays(teacher)))
    torch.testing.assert_close(review_loss(student, teacher), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(review_loss(tuple(student), tuple(teacher)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("student_sizes", "teacher_sizes"),
    [
        ([(8, 8), (4, 4), None], [(8, 8), (4, 4), None]),
        ([(6, 6), (5, 3), (2, 2)], [(9, 9), (4, 5), (1, 1)]),
        ([(4, 4), (4, 4), (1, 1)], [(2, 2), (4, 6), None]),
    ],
)
def test_module_matches_reference(student_sizes, teacher_sizes):
    student, teacher = make_levels(student_sizes, [2, 3, 4]), make_levels(teacher_sizes, [3, 2, 5], seed=10)
    loss = with_weights(ReviewLoss((2, 3, 4), (3, 2, 5), mid_channels=3, reduction="none"))
    expected = reference_module(loss, arrays(student), arrays(teacher))
    torch.testing.assert_close(loss(student, teacher).detach(), torch.as_tensor(expected), rtol=1e-12, atol=1e-12)
    loss.reduction = "mean"
    torch.testing.assert_close(loss(student, teacher).item(), expected.mean().item(), rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(2, 2, 5, 3)
    assert torch.autograd.gradcheck(
        lambda s: review_loss((s, s[..., :2, :2]), (teacher, teacher[..., :2, :2])), student
    )
    assert torch.autograd.gradgradcheck(lambda s: review_loss((s,), (teacher,)), student)
    loss = Levels(with_weights(ReviewLoss((2, 2, 2), (2, 2, 2))))
    assert_gradients(loss, student, teacher)


def test_contract():
    assert_loss_contract(
        lambda **options: Levels(ReviewLoss((3, 3, 3), (4, 4, 4), mid_channels=5, **options)),
        shape=(6, 3, 6, 6),
        teacher_shape=(6, 4, 3, 5),
        maps=True,
        meet=True,
    )


def test_levels_of_the_pyramid_count_one_half_quarter_and_eighth():
    ones, zeros = torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    torch.testing.assert_close(review_loss((ones,), (zeros,)), torch.ones(1))  # all four levels are 1
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    torch.testing.assert_close(review_loss((board[None, None],), (zeros,)), torch.tensor([8 / 15]))  # only the first is


def test_pooled_features_are_a_map_of_one_position():
    student, teacher = make_pair(3, 4)
    expected = (student - teacher).square().mean(1)
    torch.testing.assert_close(review_loss((student,), (teacher,)), expected, rtol=1e-12, atol=1e-12)


def test_sums_over_levels():
    a, b, c = (torch.full((2, 1, 8, 8), float(value)) for value in (1, 2, 3))
    torch.testing.assert_close(review_loss((a, b, c), (0 * a, 0 * b, 0 * c)), torch.full((2,), 14.0))


def test_deep_maps_reach_shallow_levels_but_not_the_other_way_round():
    channels = (2, 3, 4)
    loss = with_weights(ReviewLoss(channels, channels)).double()
    student = [x.requires_grad_() for x in make_levels([(8, 8), (4, 4), (2, 2)], channels)]
    pairs = [(s, s.detach()) for s in student]
    for level, fused in enumerate(loss._fuse(pairs, None)):
        gradients = torch.autograd.grad(fused.square().sum(), student, retain_graph=True, allow_unused=True)
        assert [g is not None and bool(g.abs().max() > 0) for g in gradients] == [i >= level for i in range(3)]


def test_one_level_is_fused_with_nothing():
    loss = ReviewLoss((2,), (3,))
    assert len(loss.attention) == 0
    assert dict(loss.named_buffers()) == {}  # the batch norms keep no running state
    assert loss((torch.ones(2, 2, 4, 4),), (torch.ones(2, 3, 4, 4),)).isfinite()


def test_middle_has_the_deepest_channels_but_at_most_512():
    assert ReviewLoss((16, 32), (8, 8)).mid_channels == 32
    assert ReviewLoss((16, 600), (8, 8)).mid_channels == 512
    assert ReviewLoss((16, 600), (8, 8), mid_channels=7).inputs[0][0].weight.shape == (7, 16, 1, 1)


def test_convolutions_start_as_published():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = ReviewLoss((64,), (64,))
    for (convolution, norm), fan_in in ((loss.inputs[0], 64), (loss.outputs[0], 64 * 9)):
        bound = math.sqrt(3 / fan_in)  # uniform, Kaiming's with a = 1
        assert 0.99 * bound < convolution.weight.abs().max() <= bound
        assert convolution.bias is None
        assert (norm.weight == 1).all()


def test_taps_of_the_distiller_give_the_tuples():
    def net(width):
        blocks = (nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(*blocks, nn.Linear(width, 2))

    levels = ("0", "1", "4:input")
    distiller = Distiller(net(2), net(4), Term(ReviewLoss((2, 2, 2), (4, 4, 4)), at=(levels, levels)))
    distiller(make_pair(4, 3, 8, 8, dtype=torch.float32)[1], torch.tensor([0, 1, 1, 0])).loss.backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())


def test_rejects_bad_channels():
    for bad in ((), (2,), (2, 2, 2)):
        with pytest.raises(ValueError, match="must be as many, and at least one, got"):
            ReviewLoss(bad, (2, 2) if bad else ())
    with pytest.raises(ValueError, match="each of student_channels must be a positive integer, got 0"):
        ReviewLoss((2, 0), (2, 2))
    with pytest.raises(ValueError, match="each of teacher_channels must be a positive integer, got 2.0"):
        ReviewLoss((2, 2), (2, 2.0))
    with pytest.raises(ValueError, match="mid_channels must be a positive integer, got 0"):
        ReviewLoss((2, 2), (2, 2), mid_channels=0)


def test_rejects_what_is_no_tuple_of_maps():
    x = torch.ones(2, 2, 4, 4)
    for loss in (ReviewLoss((2,), (2,)), review_loss):
        for bad, got in (
            (x, "Tensor"),
            ("xy", "str"),
            (None, "NoneType"),
            (("x",), "str at 0"),
            ((x, None), "NoneType at"),
        ):
            with pytest.raises(TypeError, match=f"student must be a tuple of .* maps .*, got {got}"):
                loss(bad, (x,))
            with pytest.raises(TypeError, match=f"teacher must be a tuple of .* maps .*, got {got}"):
                loss((x,), bad)
        with pytest.raises(ValueError, match=r"student must be a tuple of (1|one or more) maps .*, got 0"):
            loss((), ())
        with pytest.raises(ValueError, match=r"of the same N.*got .* and \[\(1, 2, 4, 4\)\]"):
            loss((x,), (x[:1],))
        with pytest.raises(ValueError, match=r"of the same N.*got \[\(\)\] and"):
            loss((x.sum(),), (x,))
    with pytest.raises(ValueError, match=r"as many on both sides, got \[\(2, 2, 4, 4\)\] and \[\(2.*, \(2"):
        review_loss((x,), (x, x))
    with pytest.raises(ValueError, match="of the same N"):
        review_loss((x, x[:1]), (x, x[:1]))
    with pytest.raises(ValueError, match="the student's maps must be on one device, got .'cpu', 'meta'."):
        review_loss((x, x.to("meta")), (x, x.to("meta")))
    with pytest.raises(ValueError, match="student must be a tuple of 1 maps .*, got 2"):
        ReviewLoss((2,), (2,))((x, x), (x, x))


def test_rejects_bad_maps():
    x = torch.ones(2, 2, 4, 4)
    with pytest.raises(ValueError, match=r"same shape \(nothing is broadcast\), got \("):
        review_loss((x,), (x[:, :1],))
    with pytest.raises(ValueError, match=r"must be tuples of maps \(N, C, H, W\), got \(2, 2, 4\)"):
        review_loss((x[..., 0],), (x[..., 0],))
    with pytest.raises(ValueError, match=r"must be maps \(N, C, H, W\) of the same N, got \(2, 2, 4\)"):
        ReviewLoss((2,), (2,))((x[..., 0],), (x,))


def test_repr_shows_options():
    expected = "ReviewLoss(\n  student_channels=(2, 3), teacher_channels=(4, 5), mid_channels=3, reduction='sum'\n"
    assert repr(ReviewLoss((2, 3), (4, 5), reduction="sum")).startswith(expected)


def test_a_mask_leaves_the_value_of_the_kept_samples_alone():
    def levels(maps):
        return maps, maps[..., ::2, ::2]

    student, teacher = make_pair(5, 2, 6, 4, teacher_shape=(5, 3, 6, 4))
    loss = with_weights(ReviewLoss((2, 2), (3, 3)))
    for mask in (torch.tensor([True, False, True, True, False]), torch.tensor([2.0, 0.0, 2.0, 2.0, 0.0])):
        alone = loss(levels(student[mask != 0]), levels(teacher[mask != 0]))
        torch.testing.assert_close(loss(levels(student), levels(teacher), mask=mask), alone, rtol=1e-12, atol=1e-12)
    student = student.detach().clone()
    student[1], student[4] = torch.nan, torch.inf
    torch.testing.assert_close(loss(levels(student), levels(teacher), mask=mask), alone, rtol=1e-12, atol=1e-12)
