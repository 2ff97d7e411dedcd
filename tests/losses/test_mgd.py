"""MGDLoss against the formula of Yang et al. (2022)."""

import copy
import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, make_pair, with_weights
from distill import MGDLoss, mgd_loss
from learned import (
    assert_gradients,
    assert_survives_copies,
    average_pool,
    convolve,
    make_maps,
    weights,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def reference(student, teacher, alpha):
    """Section 3: the squared differences, summed one by one over channels and positions."""
    return np.array([alpha * sum((s - t) ** 2 for s, t in zip(*pair, strict=True)) for pair in flat(student, teacher)])


def flat(student, teacher):
    return [(s.ravel(), t.ravel()) for s, t in zip(student, teacher, strict=True)]


def reference_module(loss, student, teacher, kept):
    """Align, mask (`kept` is 0 where a position is masked), generate."""
    height, width = (min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))
    x, teacher = average_pool(student, height, width), average_pool(teacher, height, width)
    for layer in loss.align:
        x = convolve(x, *weights(layer))
    first, _, second = loss.generation
    x = convolve(np.maximum(convolve(x * kept, *weights(first)), 0), *weights(second))
    return reference(x, teacher, loss.alpha)


@pytest.mark.parametrize("alpha", [7e-5, 1.0])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 2, 5)])
def test_function_matches_reference(shape, alpha):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), alpha))
    torch.testing.assert_close(mgd_loss(student, teacher, alpha=alpha).detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [(2, 4), (4, 4)])
@pytest.mark.parametrize("sizes", [((4, 4), (4, 4)), ((6, 6), (3, 3)), ((4, 5), (7, 8)), ((2, 7), (4, 3))])
def test_module_matches_reference(sizes, channels):
    student, teacher = make_maps((3, channels[0], *sizes[0]), (3, channels[1], *sizes[1]))
    loss = MGDLoss(*channels, mask_ratio=0.4, alpha=0.5, generator=seeded(7), reduction="none")
    height, width = (min(a, b) for a, b in zip(*sizes, strict=True))
    kept = (torch.rand(3, 1, height, width, generator=seeded(7)) >= 0.4).numpy()
    expected = reference_module(with_weights(loss), student.detach().numpy(), teacher.numpy(), kept)
    torch.testing.assert_close(loss(student, teacher).detach(), torch.as_tensor(expected), rtol=1e-12, atol=1e-12)
    loss.reduction = "mean"
    loss.generator.manual_seed(7)
    torch.testing.assert_close(loss(student, teacher).item(), expected.mean().item(), rtol=1e-12, atol=1e-12)


def test_alpha_is_7e_5_by_default():
    student, teacher = make_pair(3, 4, 5)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), 7e-5))
    torch.testing.assert_close(mgd_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    assert MGDLoss(2, 3).alpha == 7e-5


def test_gradient():
    student, teacher = make_pair(3, 4, 5)
    assert torch.autograd.gradcheck(lambda s: mgd_loss(s, teacher, alpha=0.1), student)
    assert torch.autograd.gradgradcheck(lambda s: mgd_loss(s, teacher, alpha=0.1), student)
    assert_gradients(with_weights(MGDLoss(2, 3, 0.0, alpha=0.1)), *make_maps((2, 2, 3, 3), (2, 3, 2, 4)))


def test_contract():
    # Without masks, since the contract asks for the same value at every call.
    assert_loss_contract(
        lambda **options: MGDLoss(3, 5, 0.0, alpha=0.01, **options),
        shape=(6, 3, 6, 6),
        teacher_shape=(6, 5, 4, 4),
        maps=True,
    )


def bare(mask_ratio, **options):
    """A loss whose generation block changes nothing on maps that are not negative, so that the masks show."""
    loss = MGDLoss(2, 2, mask_ratio, alpha=1.0, **options)
    with torch.no_grad():
        for layer in loss.generation[::2]:
            torch.nn.init.dirac_(layer.weight)
            layer.bias.zero_()
    return loss


def masked(loss, size):
    """Where an all-one student was masked, (N, 2, H, W): the gradient 2 (kept - 0) of the squared distance to 0."""
    student = torch.ones(size, requires_grad=True)
    loss(student, torch.zeros(size)).backward()
    return student.grad == 0


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5, 0.9])
def test_masks_the_given_share_of_positions_in_all_channels(ratio):
    where = masked(bare(ratio, generator=seeded()), (16, 2, 25, 25))
    assert torch.equal(where[:, 0], where[:, 1])
    share = where[:, 0].double().mean().item()
    assert abs(share - ratio) <= 4 * math.sqrt(ratio * (1 - ratio) / 10_000)
    if ratio:
        assert not torch.equal(where[0], where[1])


def test_masked_positions_give_the_student_no_gradient_and_no_value():
    loss = bare(0.5, generator=seeded(), reduction="none")
    value = loss(torch.ones(4, 2, 5, 5), torch.zeros(4, 2, 5, 5))
    loss.generator.manual_seed(0)
    torch.testing.assert_close(value, (~masked(bare(0.5, generator=seeded()), (4, 2, 5, 5))).flatten(1).sum(1).float())


def test_masks_are_drawn_anew_and_repeat_with_the_generator():
    student, teacher = make_maps((3, 2, 6, 6), (3, 3, 6, 6))
    loss = with_weights(MGDLoss(2, 3, generator=seeded(3)))
    first, second = loss(student, teacher), loss.eval()(student, teacher)
    assert first != second
    loss.generator.manual_seed(3)
    assert loss(student, teacher) == first


def test_draws_from_the_generator_alone():
    student, teacher = make_maps((3, 2, 6, 6), (3, 3, 6, 6))
    loss = with_weights(MGDLoss(2, 3, generator=seeded()))
    state = torch.random.get_rng_state()
    loss(student, teacher)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_draws_from_the_global_generator_without_one():
    student, teacher = make_maps((3, 2, 6, 6), (3, 3, 6, 6))
    loss = with_weights(MGDLoss(2, 3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = loss(student, teacher), loss(student, teacher)
        torch.manual_seed(0)
        assert loss(student, teacher) == first != second


def test_survives_copies_with_its_generator():
    loss = with_weights(MGDLoss(2, 3, generator=seeded(5)))
    assert_survives_copies(loss, *make_maps((3, 2, 6, 6), (3, 3, 6, 6)))
    assert copy.deepcopy(MGDLoss(2, 3)).generator is None


def test_compiles_with_the_global_generator():
    torch.compiler.reset()
    loss = bare(0.5)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for batch in (8, 6, 5):  # the second has sizes that are symbols
            where = masked(compiled, (batch, 2, 25, 25))
            assert torch.equal(where[:, 0], where[:, 1])
            assert 0.4 < where.double().mean() < 0.6
        loss.mask_ratio = 0.2
        assert 0.1 < masked(compiled, (8, 2, 25, 25)).double().mean() < 0.3


def test_equal_channels_need_no_align_layer():
    assert [name for name, _ in MGDLoss(3, 3).named_parameters() if name.startswith("align")] == []
    assert MGDLoss(2, 3).align[0].weight.shape == (3, 2, 1, 1)


def test_rejects_bad_options():
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"alpha must be positive and finite, got {bad}"):
            MGDLoss(2, 3, alpha=bad)
        with pytest.raises(ValueError, match=f"alpha must be positive and finite, got {bad}"):
            mgd_loss(*make_pair(2, 3, 4), alpha=bad)
    for bad in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"mask_ratio must be at least 0 and below 1, got {bad}"):
            MGDLoss(2, 3, bad)
    with pytest.raises(ValueError, match="student_channels must be a positive integer, got 0"):
        MGDLoss(0, 3)
    with pytest.raises(ValueError, match="teacher_channels must be a positive integer, got 1.5"):
        MGDLoss(3, 1.5)


def test_rejects_bad_pairs():
    student, teacher = make_pair(2, 3, 4)
    with pytest.raises(ValueError, match=r"same shape \(nothing is broadcast\), got \("):
        mgd_loss(student, teacher[:1])


def test_repr_shows_options():
    expected = "MGDLoss(\n  student_channels=2, teacher_channels=3, mask_ratio=0.25, alpha=0.5, reduction='sum'\n"
    assert repr(MGDLoss(2, 3, 0.25, 0.5, reduction="sum")).startswith(expected)


def test_rejects_bad_options_set_later():
    loss = MGDLoss(2, 3)
    with pytest.raises(ValueError, match="mask_ratio must be at least 0 and below 1, got 1"):
        loss.mask_ratio = 1
    with pytest.raises(ValueError, match="alpha must be positive and finite, got 0"):
        loss.alpha = 0
    assert (loss.mask_ratio, loss.alpha) == (0.5, 7e-5)
