"""What the losses with labels promise alike: labels that are no class, every kind of label, who may look at them."""

import itertools
import math

import pytest
import torch

from contract import make_pair
from distill import DKDLoss, NKDLoss, WSLDLoss
from distill._engine import fused

pytestmark = pytest.mark.usefixtures("form")

# With options of their own, so that no default hides that they get lost.
LOSSES = {
    "dkd": (DKDLoss, {"alpha": 0.5, "beta": 2.0, "temperature": 3.0}),
    "nkd": (NKDLoss, {"gamma": 2.0, "temperature": 3.0}),
    "wsld": (WSLDLoss, {"temperature": 3.0}),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def build(name, **options):
    loss, own = LOSSES[name]
    return loss(**own, **options)


def make_labels(*shape, classes=10, seed=1):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(loss, student, *rest, **options):
    student = student.detach().clone().requires_grad_()
    value = loss(student, *rest, **options)
    value.sum().backward()
    return value.detach(), student.grad


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("ignored", "dtype"), [(255, torch.long), (-100, torch.int32), (255, torch.uint8)])
def test_what_the_mask_hides_counts_nowhere(name, reduction, ignored, dtype):
    student, teacher = make_pair(6, 10)
    target = make_labels(6).to(dtype)
    target[[1, 4]] = ignored
    kept = target != ignored
    spoilt = student.detach().clone(), teacher.clone()
    for side, other in (spoilt, spoilt[::-1]):
        side[1, 2], side[4], other[4, :5] = math.nan, math.inf, -math.inf
    loss = build(name, reduction=reduction)
    expected, expected_gradient = value_and_gradient(loss, student[kept], teacher[kept], target[kept])
    for mask in (kept, kept.double(), kept.to(torch.uint8)):
        value, gradient = value_and_gradient(loss, *spoilt, target, mask=mask)
        same = value_and_gradient(loss, student, teacher, target, mask=mask)
        assert torch.equal(value, same[0])
        assert torch.equal(gradient, same[1])
        torch.testing.assert_close(value[kept] if reduction == "none" else value, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient[kept], expected_gradient, rtol=1e-12, atol=1e-15)
        assert (gradient[~kept] == 0).all()


@each_loss
def test_weights_that_learn_hide_labels_too(name):
    student, teacher = make_pair(6, 10)
    target = make_labels(6)
    weights = torch.rand(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights[2] = 0.0
    weights.requires_grad_()
    expected = torch.autograd.grad(build(name)(student, teacher, target, mask=weights), (student, weights))
    target[2] = 255
    results = torch.autograd.grad(build(name)(student, teacher, target, mask=weights), (student, weights))
    assert torch.equal(results[0], expected[0])
    seen = torch.arange(6) != 2
    assert torch.equal(results[1][seen], expected[1][seen])


@each_loss
@pytest.mark.parametrize("label", [-100, -1, 10, 255])
def test_a_label_that_is_no_class_and_is_not_hidden_is_refused(name, label):
    student, teacher = make_pair(6, 10)
    target = make_labels(6)
    target[3] = label
    match = f"target must be classes from 0 to 9, got {label}; a mask of 0 hides samples without a class"
    for mask in (None, torch.arange(6) != 2):
        with pytest.raises(ValueError, match=match):
            build(name)(student, teacher, target, mask=mask)


def without_others(logits):
    return all(x == -math.inf for x in logits[1:])


@each_loss
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("classes", [2, 3])
def test_classes_without_a_probability_give_what_the_limit_gives(name, classes, temperature):
    """Every pair of logits out of three values, one of them -inf, against the same with a very small number for it."""
    rows = [row for row in itertools.product((0.5, -1.0, -math.inf), repeat=classes) if max(row) > -math.inf]
    pairs = list(itertools.product(rows, repeat=2))
    # Two cases have no limit, since it depends on how one gets there. With no class left beside the label, the other
    # classes cannot be compared; and a weight of 0 (wsld, label impossible for the teacher) can meet an infinite value.
    if name == "wsld":
        pairs = [(s, t) for s, t in pairs if t[0] > -math.inf or s[0] == -math.inf]
    elif classes > 2:
        pairs = [(s, t) for s, t in pairs if not (without_others(s) or without_others(t))]
    student, teacher = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    loss = build(name, reduction="none")
    loss.temperature = temperature
    target = torch.zeros(len(pairs), dtype=torch.long)
    values, gradient = value_and_gradient(loss, student, teacher, target)
    near = [side.clamp(min=-1e9) for side in (student, teacher)]
    limits, gradient_limit = value_and_gradient(loss, *near, target)
    assert gradient.isfinite().all()
    finite = limits < 1e6
    assert 0 < finite.sum() < len(pairs)
    torch.testing.assert_close(values[finite], limits[finite], rtol=1e-6, atol=1e-8)
    assert (values[~finite] == math.inf).all()
    torch.testing.assert_close(gradient[finite], gradient_limit[finite], rtol=1e-6, atol=1e-8)


@each_loss
def test_no_pair_of_distributions_gives_nan(name):
    rows = [row for row in itertools.product((0.5, -1.0, -math.inf), repeat=3) if max(row) > -math.inf]
    pairs = itertools.product(rows, repeat=2)
    student, teacher = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    target = torch.zeros(len(student), dtype=torch.long)
    values, gradient = value_and_gradient(build(name, reduction="none"), student, teacher, target)
    assert not values.isnan().any()
    assert gradient.isfinite().all()


@each_loss
def test_a_weight_of_0_takes_away_what_is_infinite(name):
    if name == "wsld":
        pytest.skip("it has no weight")
    student = torch.tensor([[0.5, -1.0, -math.inf]], dtype=torch.float64)
    teacher = torch.tensor([[0.5, -1.0, 0.0]], dtype=torch.float64)
    loss = build(name)
    assert loss(student, teacher, torch.tensor([0])) == math.inf
    setattr(loss, "gamma" if name == "nkd" else "beta", 0.0)
    value, gradient = value_and_gradient(loss, student, teacher, torch.tensor([0]))
    assert value > 0
    assert value.isfinite()
    assert gradient.isfinite().all()


@each_loss
def test_labels_along_a_dimension_in_between(name):
    student, teacher = make_pair(2, 5, 3, 4)
    target = make_labels(2, 3, 4, classes=5)
    expected = build(name, dim=-1)(student.movedim(1, -1), teacher.movedim(1, -1), target)
    torch.testing.assert_close(build(name, dim=1)(student, teacher, target), expected, rtol=1e-12, atol=0)
    target[0, 1, 2] = 255
    assert build(name, dim=1)(student, teacher, target, mask=target != 255).isfinite()


@each_loss
def test_blocks_are_not_left_to_autograd(name):
    student, teacher = make_pair(6, 10)
    assert build(name)(student, teacher, make_labels(6)).isfinite()
    assert build(name).rows.block is not None


@each_loss
def test_labels_under_vmap(name):
    student, teacher = (x.detach() for x in make_pair(3, 6, 10))
    target = make_labels(3, 6)
    target[0, 2] = target[2, 5] = 255
    mask = target != 255
    loss = build(name)
    mapped = torch.vmap(lambda s, t, y, m: loss(s, t, y, mask=m))(student, teacher, target, mask)
    for n in range(3):
        expected = loss(student[n], teacher[n], target[n], mask=mask[n])
        torch.testing.assert_close(mapped[n], expected, rtol=1e-12, atol=0)


@each_loss
def test_labels_that_are_hidden_in_a_compiled_loss(name, form):
    if form == "blocks":  # what is compiled is the formula
        return
    student, teacher = make_pair(6, 10)
    target = make_labels(6)
    target[3] = 255
    loss = build(name)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value, gradient = value_and_gradient(compiled, student, teacher, target, mask=target != 255)
    expected = value_and_gradient(loss, student, teacher, target, mask=target != 255)
    torch.testing.assert_close(value, expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-12, atol=1e-15)


@each_loss
def test_teacher_target_and_mask_may_be_inference_tensors(name):
    student, teacher = make_pair(6, 10)
    target = make_labels(6)
    mask = torch.rand(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = value_and_gradient(build(name), student, teacher, target, mask=mask)
    with torch.inference_mode():
        constants = teacher.clone(), target.clone()
        mask = mask.clone()
    value, gradient = value_and_gradient(build(name), student, *constants, mask=mask)
    assert torch.equal(value, expected[0])
    assert torch.equal(gradient, expected[1])
    counted = torch.ones(6, dtype=torch.bool)
    assert torch.equal(
        build(name)(student, *constants, mask=mask != 0), build(name)(student, teacher, target, mask=counted)
    )


@each_loss
def test_rejects_what_is_no_tensor(name):
    student, teacher = make_pair(6, 10)
    target = make_labels(6)
    for bad in (target.tolist(), target.numpy(), 3):
        with pytest.raises(TypeError, match=f"target must be a tensor, got {type(bad).__name__}"):
            build(name)(student, teacher, bad)
    with pytest.raises(TypeError, match="student must be a tensor, got list"):
        build(name)(student.tolist(), teacher, target)
    with pytest.raises(TypeError, match="teacher must be a tensor, got NoneType"):
        build(name)(student, None, target)


@each_loss
def test_rejects_one_class_and_a_dimension_that_is_not_clear(name):
    with pytest.raises(ValueError, match=r"there must be at least 2 classes along dim -1, got shape \(6, 1\)"):
        build(name)(*make_pair(6, 1), torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"dim must be given for logits of four dimensions or more .*\(2, 5, 3, 4\)"):
        build(name)(*make_pair(2, 5, 3, 4), make_labels(2, 3, 4, classes=5))
    assert build(name)(*make_pair(2, 3, 5), make_labels(2, 3, classes=5)).isfinite()


@each_loss
def test_memory_beyond_the_inputs(name, form, monkeypatch):
    """At (64, 32000) in float32 the largest piece besides the gradient is a block, whatever autograd would keep."""
    if form == "blocks":
        pytest.skip("the fixture's blocks are of one row")
    monkeypatch.setattr(fused, "SMALL", 2**20)
    student, teacher = make_pair(64, 32000, dtype=torch.float32)
    target = make_labels(64, classes=32000)
    loss = build(name)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        value = loss(student, teacher, target)
    assert "Fused" in type(value.grad_fn).__name__
    value.backward()
    assert {x.data_ptr() for x in saved if x.numel() > 64} == {student.data_ptr(), teacher.data_ptr()}
