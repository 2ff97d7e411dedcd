"""What all losses of a whole batch promise: a mask that selects samples, NaN that shows, no scale that counts."""

import copy
import math

import pytest
import torch

from compilers import needs_compiler, one_library
from contract import gradient, make_pair
from distill import CCLoss, CRDLoss, DISTLoss, ICKDLoss, PearsonLoss, PKTLoss, RKDLoss, SPLoss, crd_loss

N = 7


def learned(num_samples=None, **options):
    """CRD with seeded embeddings and, with `num_samples`, a seeded memory."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if num_samples is not None:
            options = {"num_negatives": 5, "generator": torch.Generator().manual_seed(1), **options}
        return CRDLoss(10, 6, num_samples, dim=4, temperature=0.5, **options).double()


# Each as (what builds it, the shapes of student and teacher, whether it needs the places of the samples).
FEATURES = ((N, 10), (N, 6))
LOSSES = {
    "rkd": (RKDLoss, *FEATURES, False),
    "pkt": (PKTLoss, *FEATURES, False),
    "sp": (SPLoss, *FEATURES, False),
    "cc": (CCLoss, *FEATURES, False),
    "crd": (learned, *FEATURES, False),
    "crd_memory": (lambda: learned(20), *FEATURES, True),
    "crd_classes": (lambda: learned(20, labels=torch.arange(20) % 3), *FEATURES, True),
    "dist": (DISTLoss, (N, 5), (N, 5), False),
    "pearson": (PearsonLoss, (N, 3, 2, 2), (N, 3, 4, 4), False),
}
EVERY = {**LOSSES, "ickd": (ICKDLoss, (N, 3, 2, 2), (N, 3, 4, 4), False)}
KEPT = torch.tensor([True, False, True, True, False, True, False])
PLACES = torch.tensor([3, 11, 5, 2, 0, 19, 7])


def case(name, dtype=torch.float64):
    build, shape, teacher_shape, places = EVERY[name]
    student, teacher = make_pair(*shape, teacher_shape=teacher_shape, dtype=dtype)
    return build(), student, teacher, PLACES if places else None


def alone(tensor, kept):
    return None if tensor is None else tensor[kept].detach()


@pytest.mark.parametrize("kept", [KEPT, KEPT.flip(0), torch.arange(N) < 2, torch.ones(N, dtype=torch.bool)])
@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_gives_the_value_of_the_kept_samples_alone(name, kept):
    loss, student, teacher, target = case(name)
    twin, third = copy.deepcopy(loss), copy.deepcopy(loss)
    few = alone(student, kept).requires_grad_()
    expected = twin(few, alone(teacher, kept), alone(target, kept))
    (slope,) = torch.autograd.grad(expected, few)
    with torch.no_grad():
        student[~kept], teacher[~kept] = math.nan, math.inf
    if target is not None:
        target = target.masked_fill(~kept, -100)
    value = loss(student, teacher, target, mask=kept)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    value.backward()
    torch.testing.assert_close(student.grad[kept], slope, rtol=1e-11, atol=1e-12)
    assert torch.equal(student.grad[~kept], torch.zeros_like(student[~kept]))
    assert third(student, teacher, target, mask=3 * kept.int()) == value
    for ours, theirs in zip(loss.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_no_sample_or_one_gives_a_number_with_a_graph(name, count):
    loss, student, teacher, target = case(name)
    before = copy.deepcopy(loss)
    kept = torch.arange(N) < count
    with torch.no_grad():
        student[count:] = math.nan
    value = loss(student, teacher, target, mask=kept)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())
    if count == 0:
        assert value == 0
        assert student.grad.abs().max() == 0
        for ours, theirs in zip(loss.buffers(), before.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    elif name == "crd":  # there is nothing to compare with, which without a mask is an error
        assert value == 0
    else:
        few = student.detach()[:1], teacher[:1], None if target is None else target[:1]
        torch.testing.assert_close(value.detach(), before(*few).detach(), rtol=1e-12, atol=1e-12)


def test_one_value_of_a_channel_in_what_is_kept_gives_0():
    student, teacher = make_pair(3, 2, 1, 1)
    value = PearsonLoss()(student, teacher, mask=torch.tensor([0, 1, 0]))
    assert value == 0
    assert torch.equal(torch.autograd.grad(value, student)[0], torch.zeros_like(student))


def test_the_mask_of_dist_has_the_shape_of_the_samples():
    for shape, dim in (((4, 6, 5), None), ((4, 5, 2, 3), 1)):
        student, teacher = make_pair(*shape)
        samples = student.movedim(-1 if dim is None else dim, -1).shape[:-1]
        kept = torch.rand(samples, generator=torch.Generator().manual_seed(0)) > 0.4
        rows = [side.movedim(-1 if dim is None else dim, -1)[kept] for side in (student.detach(), teacher)]
        value = DISTLoss(2.0, 3.0, 4.0, dim=dim)(student, teacher, mask=kept)
        torch.testing.assert_close(value.detach(), DISTLoss(2.0, 3.0, 4.0)(*rows), rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match=r"mask must be shaped like the per-sample values, \(4, .*got \(4,\)"):
            DISTLoss(dim=dim)(student, teacher, mask=torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize("name", LOSSES)
def test_rejects_masks_that_do_not_select_samples(name):
    loss, student, teacher, target = case(name)
    for weights in (torch.ones(N), torch.ones(N, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"mask must select samples \(bool or integers\).*, got torch\.b?float"):
            loss(student, teacher, target, mask=weights)
    with pytest.raises(ValueError, match=r"mask must be shaped like the per-sample values, \(7,\), got \(6,\)"):
        loss(student, teacher, target, mask=KEPT[1:])
    with pytest.raises(ValueError, match="mask must be on the device of the values, cpu, got meta"):
        loss(student, teacher, target, mask=KEPT.to("meta"))
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        loss(student, teacher, target, mask=KEPT.tolist())


@pytest.mark.parametrize("name", EVERY)
def test_rejects_what_is_no_tensor(name):
    loss, student, teacher, target = case(name)
    with pytest.raises(TypeError, match="student must be a tensor, got list"):
        loss(student.tolist(), teacher, target)
    with pytest.raises(TypeError, match="teacher must be a tensor, got ndarray"):
        loss(student, teacher.numpy(), target)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", EVERY)
def test_nan_and_infinity_show(name, side, bad):
    for dtype in (torch.float32, torch.float64):
        loss, *pair, target = case(name, dtype)
        if name == "dist" and bad == -math.inf:
            continue  # a class of probability 0
        with torch.no_grad():
            pair[side][(2, 1, *(0,) * (pair[side].ndim - 2))] = bad
        assert not loss(*pair, target).isfinite()


@pytest.mark.parametrize("name", EVERY)
def test_constants_may_be_inference_tensors(name):
    loss, student, teacher, target = case(name)
    twin = copy.deepcopy(loss)
    for mask in (KEPT, None):
        with torch.inference_mode():
            theirs = teacher.clone(), None if target is None else target.clone()
            hidden = None if mask is None else mask.clone()
        value = loss(student, *theirs, mask=hidden)
        assert value == twin(student, teacher, target, mask=mask)
        value.backward()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "crd"])  # whose mean is no constant to gradcheck
def test_gradients_with_a_mask(name):
    loss, student, teacher, target = case(name)
    loss.eval()

    def value(kept_ones):
        moved = student.detach().masked_scatter(KEPT.reshape(-1, *(1,) * (student.ndim - 1)), kept_ones)
        return copy.deepcopy(loss)(moved, teacher, target, mask=KEPT)

    if target is not None:
        loss.train()(student, teacher, target)  # sets the constants
        loss.eval()
    few = student.detach()[KEPT].requires_grad_()
    assert torch.autograd.gradcheck(value, few)
    assert torch.autograd.gradgradcheck(value, few)


@pytest.mark.parametrize("name", ["rkd", "pkt", "sp", "cc", "dist", "pearson", "ickd"])
def test_second_derivatives_where_nothing_has_a_norm(name):
    loss, student, teacher, _ = case(name)
    for start in (
        torch.zeros_like(student),
        student.detach() * torch.arange(N).reshape(-1, *(1,) * (student.ndim - 1)),
    ):
        start[1] = 0
        start = start.requires_grad_()
        (slope,) = torch.autograd.grad(loss(start, teacher), start, create_graph=True)
        assert slope.isfinite().all()
        (second,) = torch.autograd.grad(slope.square().sum() + slope.sum(), start)
        assert second.isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if "_" not in name])  # a memory moves for one batch at a time
def test_vmap_takes_a_mask(name):
    loss, student, teacher, _ = case(name)
    masks = torch.stack([KEPT, ~KEPT, torch.zeros_like(KEPT)])
    mapped = torch.vmap(lambda mask: loss(student.detach(), teacher, mask=mask))(masks)
    singly = torch.stack([loss(student.detach(), teacher, mask=mask) for mask in masks])
    torch.testing.assert_close(mapped, singly)


SCALES = [1e-30, 1e-15, 1e-10, 1e-5, 1e5, 1e10, 1e15, 1e30]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["rkd", "pkt", "sp", "cc", "ickd"])
def test_does_not_count_the_scale(name, scale):
    loss, student, teacher, _ = case(name, torch.float32)
    expected, slope = loss(student, teacher), gradient(loss, student, teacher)
    assert expected > 1e-4
    torch.testing.assert_close(loss(student, teacher * scale), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss(student * scale, teacher), expected, rtol=1e-5, atol=0)
    scaled = gradient(loss, student.detach() * scale, teacher)
    torch.testing.assert_close(scaled * scale, slope, rtol=1e-3, atol=1e-5 * slope.abs().max().item())


@pytest.mark.parametrize("scale", [1e5, 1e15, 1e20, 1e30])
def test_pearson_does_not_count_a_large_scale(scale):
    loss, student, teacher, _ = case("pearson", torch.float32)
    torch.testing.assert_close(loss(student * scale, teacher * scale), loss(student, teacher), rtol=1e-5, atol=0)
    slope = gradient(loss, student.detach() * scale, teacher * scale) * scale
    torch.testing.assert_close(slope, gradient(loss, student, teacher), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["pkt", "cc", "crd"])
def test_does_not_count_the_scale_of_one_sample(name):
    loss, student, teacher, _ = case(name, torch.float32)
    if name == "crd":
        loss, teacher = crd_loss, student.detach().flip(0)
    scales = torch.tensor([1e-30, 1e-12, 1e-3, 1.0, 1e3, 1e12, 1e30])[:, None]
    torch.testing.assert_close(loss(student * scales, teacher), loss(student, teacher), rtol=1e-5, atol=0)


# Losses without a memory are compiled by test_compile.py.
def assert_a_memory_compiles(name, changes, **options):
    """What two batches give, and a third after options have changed, and the memory after it, is that of eager mode."""
    loss, student, teacher, target = case(name, torch.float32)
    loss = loss.float()
    loss.generator = None  # which a compiled function cannot carry
    torch.compiler.reset()
    twin = copy.deepcopy(loss)
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, **options)
    for size in (N, 5, 6):
        for option, changed in changes.items() if size == 6 else ():
            for module in (twin, loss):
                setattr(module, option, changed)
        # Cloned: a view of a longer tensor is compiled anew.
        part = [side.detach()[:size].clone() for side in (student, teacher, target)]
        part[0].requires_grad_()
        values = []
        for module in (compiled, loss):
            with torch.random.fork_rng():
                torch.manual_seed(size)
                values.append(module(*part, mask=KEPT[:size].clone()))
        torch.testing.assert_close(*values)
        slopes = [torch.autograd.grad(value, part[0])[0] for value in values]
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(twin.buffers(), loss.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # a Function that is traced
def test_a_memory_compiles_with_a_mask_for_every_batch_size_and_changed_options():
    assert_a_memory_compiles("crd_classes", {"temperature": 0.2, "momentum": 0.2}, backend="aot_eager")


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.torch.jit")  # inductor's own imports
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@needs_compiler
def test_a_memory_compiles_to_code():
    # With the random numbers of eager mode, so that the same negatives are compared. Its backward pass may compute
    # again what the forward pass read of the memory, when that has moved on.
    with one_library():
        assert_a_memory_compiles("crd_memory", {}, options={"fallback_random": True})
