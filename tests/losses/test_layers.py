"""How losses run the layers that they learn; each loss's own test holds the layers against its reference."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from contract import make_pair
from distill import HintLoss, MGDLoss, OFDLoss, ReviewLoss, VIDLoss
from distill.losses._layers import run_layers
from workers import run_workers

WORKER = Path(__file__).parents[1] / "support/sync_norm_worker.py"


def test_run_layers_equals_the_layers_themselves():
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Sigmoid()
    )
    x = make_pair(2, 3, 4, 5, dtype=torch.float32)[0]
    torch.testing.assert_close(run_layers(layers, x), layers(x))
    torch.testing.assert_close(run_layers(layers, x.double()), layers.double()(x.double()))
    assert run_layers(nn.Sequential(), x) is x


@pytest.mark.parametrize("mask", [torch.tensor([1, 0, 1, 0]), torch.tensor([0.5, 0.0, 7.0, 0.0]), torch.ones(4)])
def test_a_batch_norm_takes_the_statistics_of_the_samples_that_count(mask):
    layer = nn.BatchNorm2d(3, eps=0.1).double()
    x, _ = make_pair(4, 3, 2, 5)
    kept = mask != 0
    found, expected = run_layers(nn.Sequential(layer), x, mask)[kept], run_layers(nn.Sequential(layer), x[kept])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found.pow(3).sum(), [x, *layer.parameters()]),
        torch.autograd.grad(expected.pow(3).sum(), [x, *layer.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_slope_of_a_relu_at_0_is_0_and_minus_infinity_shows():
    x = torch.tensor([[[[-1.0, 0.0, 2.0]]]], requires_grad=True)
    result = run_layers(nn.Sequential(nn.ReLU()), x)
    assert result.tolist() == [[[[0.0, 0.0, 2.0]]]]
    assert torch.autograd.grad(result.sum(), x)[0].tolist() == [[[[0.0, 0.0, 1.0]]]]
    assert run_layers(nn.Sequential(nn.ReLU()), torch.tensor([[[[-torch.inf, torch.nan]]]])).isnan().all()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_a_batch_of_one_value_per_channel_has_no_statistics(norm):
    layers = nn.Sequential(norm(3))
    with pytest.raises(
        ValueError, match=r"more than 1 value per channel \(samples times pos.*, got maps \(1, 3, 1, 1\)"
    ):
        run_layers(layers, torch.ones(1, 3, 1, 1))
    # Under a mask nobody looks at the values; the variance of one is 0, and so is the gradient.
    x = make_pair(2, 3, 1, 1)[0]
    kept = run_layers(layers, x, torch.tensor([1, 0]))[:1]
    assert torch.equal(kept, torch.zeros_like(kept))
    assert torch.autograd.grad(kept.sum(), x)[0].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_converted_batch_norm_is_computed_in_the_dtype_of_the_maps(dtype):
    student, teacher = make_pair(4, 3, 4, 5, teacher_shape=(4, 4, 4, 5), dtype=torch.float32)
    ofd, review = OFDLoss(3, 4, -torch.arange(4.0)), ReviewLoss((3,), (4,))
    for loss, sides in ((ofd, (student, teacher)), (review, ((student,), (teacher,)))):
        loss = loss.to(dtype)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(loss))
        assert any(isinstance(layer, nn.SyncBatchNorm) for layer in converted.modules())
        assert list(converted.state_dict()) == list(loss.state_dict())
        for mask in (None, torch.tensor([True, False, True, True])):
            value = converted(*sides, mask=mask)
            assert value.dtype == torch.float32
            assert torch.equal(value, loss(*sides, mask=mask))
        value.backward()
        assert all(parameter.grad.dtype == dtype for parameter in converted.parameters())


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What one process finds, and what each of two finds."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    tmp_path = tmp_path_factory.mktemp("processes")
    runs = [(0, 1), (0, 2), (1, 2)]
    run_workers(WORKER, [(rank, world, tmp_path) for rank, world in runs])
    return [torch.load(tmp_path / f"{rank} of {world}.pt", weights_only=True) for rank, world in runs]


def test_converted_batch_norms_of_two_processes_are_those_of_the_joined_batch(processes):
    whole, first, second = processes
    for name in ("ofd", "ofd masked", "review", "review masked"):
        joined = whole[name]
        assert len(joined) > 4
        torch.testing.assert_close(
            torch.cat([first[name].pop("student"), second[name].pop("student")]), joined.pop("student")
        )
        for key, expected in joined.items():
            torch.testing.assert_close(first[name][key] + second[name][key], expected, rtol=1e-10, atol=1e-10)
    for name in ("ofd", "review"):  # the first process's three samples, which the mask hides above
        assert whole[f"{name} alone"]["value"] > first[f"{name} alone"]["value"] > 0


def test_networks_between_maps_show_what_is_not_finite():
    # A ReLU that makes 0 of minus infinity would hide it, where the weights are negative.
    for loss in (VIDLoss(3, 4), MGDLoss(3, 4, mask_ratio=0.0)):
        with torch.no_grad():
            for parameter in loss.parameters():
                parameter.copy_(-parameter.abs())
        student, teacher = make_pair(2, 3, 4, 4, teacher_shape=(2, 4, 4, 4), dtype=torch.float32)
        for bad in (torch.inf, -torch.inf, torch.nan):
            spoilt = student.detach().clone()
            spoilt[1, :, 2, 3] = bad
            assert not loss(spoilt, teacher).isfinite()


@pytest.mark.parametrize(
    "loss", [HintLoss(3, 4), VIDLoss(3, 4), MGDLoss(3, 4), OFDLoss(3, 4, torch.zeros(4)), ReviewLoss((3,), (4,))]
)
def test_a_loss_left_on_another_device_is_an_error(loss):
    sides = [(x,) if isinstance(loss, ReviewLoss) else x for x in (torch.ones(2, 3, 4, 4), torch.ones(2, 4, 4, 4))]
    with pytest.raises(ValueError, match=r"must be on the device of what it compares, cpu, got meta: .*\.to\(device\)"):
        copy.deepcopy(loss).to("meta")(*sides)


@pytest.mark.parametrize(
    ("loss", "name", "was", "other"),
    [
        (HintLoss(3, 4), "student_channels", 3, 4),
        (HintLoss(), "teacher_channels", None, 4),
        (VIDLoss(3, 4), "init_variance", 5.0, 4.0),
        (OFDLoss(3, 4, torch.zeros(4)), "teacher_channels", 4, 3),
        (MGDLoss(3, 4), "teacher_channels", 4, 3),
        (ReviewLoss((3,), (4,)), "student_channels", (3,), (4,)),
        (ReviewLoss((3,), (4,)), "mid_channels", 3, 4),
    ],
)
def test_what_made_the_layers_cannot_be_changed_without_effect(loss, name, was, other):
    with pytest.raises(ValueError, match=re.escape(f"{name} made the layers and must stay {was!r}, got {other!r}")):
        setattr(loss, name, other)
    setattr(loss, name, was)
    assert getattr(copy.deepcopy(loss), name) == was


def test_a_queue_of_two_processes_holds_the_embeddings_of_both(processes):
    whole, first, second = (found["queue"] for found in processes)
    assert whole["entered"] == 4
    for name, expected in whole.items():
        assert torch.equal(first[name], expected)
        assert torch.equal(second[name], expected)
