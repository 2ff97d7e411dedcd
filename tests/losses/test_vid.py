"""VIDLoss against the formula of Ahn et al. (2019)."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, make_pair, with_weights
from distill import Distiller, Term, VIDLoss, vid_loss
from learned import (
    assert_gradients,
    average_pool,
    convolve,
    make_maps,
    weights,
)


def reference(mean, teacher, variance):
    """Section 2: minus the logarithm of a normal density, without its constant; averaged, as in the benchmark."""
    values = np.zeros(len(mean))
    for n, sample in enumerate(teacher):
        terms = []
        for c, *position in np.ndindex(sample.shape):
            m, t, sigma = mean[(n, c, *position)], sample[(c, *position)], math.sqrt(variance[c])
            density = math.exp(-((t - m) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
            terms.append(-math.log(density) - math.log(2 * math.pi) / 2)
        values[n] = np.mean(terms)
    return values


def reference_module(loss, student, teacher):
    """The mean network of the benchmark, and the variance as a softplus."""
    height, width = (min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))
    x, teacher = average_pool(student, height, width), average_pool(teacher, height, width)
    first, second, third = (weights(loss.mean_network[i])[0] for i in (0, 2, 4))
    x = convolve(np.maximum(convolve(np.maximum(convolve(x, first), 0), second), 0), third)
    variance = np.log(1 + np.exp(loss.raw_variance.detach().double().numpy())) + loss.eps
    return reference(x, teacher, variance)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 2, 5)])
def test_function_matches_reference(shape):
    student, teacher = make_pair(*shape)
    variance = torch.tensor([0.1, 0.5, 1.0, 7.0], dtype=torch.float64)
    expected = reference(student.detach().numpy(), teacher.numpy(), variance.numpy())
    value = vid_loss(student, teacher, variance=variance).detach()
    torch.testing.assert_close(value, torch.as_tensor(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [((4, 4), (4, 4)), ((6, 6), (3, 3)), ((4, 5), (7, 8)), ((2, 7), (4, 3))])
def test_module_matches_reference(sizes):
    student, teacher = make_maps((3, 2, *sizes[0]), (3, 4, *sizes[1]))
    loss = with_weights(VIDLoss(2, 4, eps=0.01, reduction="none"))
    expected = reference_module(loss, student.detach().numpy(), teacher.numpy())
    value = loss(student, teacher).detach()
    torch.testing.assert_close(value, torch.as_tensor(expected), rtol=1e-12, atol=1e-12)
    loss.reduction = "mean"
    torch.testing.assert_close(loss(student, teacher).item(), expected.mean().item(), rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_maps((2, 2, 3, 3), (2, 3, 2, 4))
    assert_gradients(with_weights(VIDLoss(2, 3)), student, teacher)
    mean, teacher = make_pair(3, 4, 2)
    variance = torch.tensor([0.3, 0.5, 1.0, 7.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, v: vid_loss(m, teacher, variance=v), (mean, variance))
    assert torch.autograd.gradgradcheck(lambda m, v: vid_loss(m, teacher, variance=v), (mean, variance))


def test_contract():
    assert_loss_contract(
        lambda **options: VIDLoss(3, 5, **options), shape=(6, 3, 6, 6), teacher_shape=(6, 5, 4, 4), maps=True
    )


def test_variance_is_as_asked_at_first_and_5_by_default():
    torch.testing.assert_close(VIDLoss(2, 3).variance, torch.full((3,), 5.0))
    for variance in (1e-3, 0.5, 80.0):
        torch.testing.assert_close(VIDLoss(2, 3, variance).variance, torch.full((3,), variance))
    assert VIDLoss(2, 3).half().variance.dtype == torch.float32


def test_variance_stays_above_eps():
    loss = VIDLoss(2, 3, eps=0.25)
    with torch.no_grad():
        loss.raw_variance.fill_(-1e4)
    assert (loss.variance == 0.25).all()
    student, teacher = make_maps((2, 2, 3, 3), (2, 3, 3, 3))
    loss(student, teacher).backward()
    assert loss.raw_variance.grad.isfinite().all()


def test_is_least_where_the_variance_is_the_mean_squared_error():
    student, teacher = make_pair(6, 3, 4, 4)
    best = (student.detach() - teacher).square().mean((0, 2, 3))
    raw = best.clone().requires_grad_()
    vid_loss(student.detach(), teacher, variance=raw).mean().backward()
    torch.testing.assert_close(raw.grad, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    least = vid_loss(student, teacher, variance=best).mean()
    for factor in (0.9, 1.1):
        assert vid_loss(student, teacher, variance=factor * best).mean() > least


def test_variance_one_is_half_the_mean_squared_error():
    student, teacher = make_pair(6, 3, 4, 4)
    value = vid_loss(student, teacher, variance=torch.ones(3)).mean()
    torch.testing.assert_close(value, torch.nn.functional.mse_loss(student, teacher) / 2)


def test_learned_parts_are_trained_by_the_distiller():
    student, teacher = torch.nn.Conv2d(3, 2, 3), torch.nn.Conv2d(3, 4, 3)
    distiller = Distiller(student, teacher, Term(VIDLoss(2, 4)), task_loss=None)
    distiller(make_pair(2, 3, 5, 5, dtype=torch.float32)[1]).loss.backward()
    assert len(list(distiller.parameters())) == 2 + 4
    assert all(parameter.grad is not None for parameter in distiller.parameters())


@pytest.mark.parametrize("channels", [0, -1, 2.0, None])
def test_rejects_bad_channels(channels):
    with pytest.raises(ValueError, match=f"student_channels must be a positive integer, got {channels}"):
        VIDLoss(channels, 3)
    with pytest.raises(ValueError, match=f"teacher_channels must be a positive integer, got {channels}"):
        VIDLoss(3, channels)


def test_rejects_bad_variances():
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"init_variance must be positive and finite, got {bad}"):
            VIDLoss(2, 3, bad)
        with pytest.raises(ValueError, match=f"eps must be positive and finite, got {bad}"):
            VIDLoss(2, 3, eps=bad)
    with pytest.raises(ValueError, match="init_variance must be greater than eps, got 0.1 and 0.1"):
        VIDLoss(2, 3, 0.1, 0.1)
    for shape in ((4,), (1,), (), (3, 1)):
        with pytest.raises(ValueError, match=r"variance must have shape \(3,\), got \("):
            vid_loss(*make_pair(2, 3, 4), variance=torch.ones(shape))


def test_rejects_bad_pairs():
    student, teacher = make_pair(2, 3, 4)
    with pytest.raises(ValueError, match=r"same shape \(nothing is broadcast\), got \("):
        vid_loss(student, teacher[:1], variance=torch.ones(3))


def test_repr_shows_options():
    expected = "VIDLoss(\n  student_channels=2, teacher_channels=4, init_variance=3.0, eps=0.01, reduction='sum'\n"
    assert repr(VIDLoss(2, 4, 3.0, 0.01, reduction="sum")).startswith(expected)


def test_rejects_a_variance_that_is_no_tensor_and_bad_options_set_later():
    with pytest.raises(TypeError, match="variance must be a tensor, got float"):
        vid_loss(*make_pair(2, 3, 4), variance=1.0)
    loss = VIDLoss(2, 3)
    with pytest.raises(ValueError, match="eps must be positive and finite, got 0"):
        loss.eps = 0
    assert loss.eps == 1e-5


def test_a_variance_may_be_an_inference_tensor_and_shows_what_is_not_positive():
    student, teacher = make_pair(2, 3, 4)
    with torch.inference_mode():
        variance = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    vid_loss(student, teacher, variance=variance).sum().backward()
    assert student.grad.isfinite().all()
    for bad in (-1.0, 0.0, math.nan, math.inf):
        assert not vid_loss(student, teacher, variance=torch.tensor([1.0, bad, 1.0])).isfinite().any()
