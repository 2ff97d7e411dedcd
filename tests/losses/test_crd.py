"""CRDLoss against the formula of Tian, Krishnan and Isola (2020), at the scale of their code."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from contract import assert_loss_contract, gradient, make_pair
from distill import CRDLoss, Distiller, Term, crd_loss
from distill.losses import crd


def build(*sizes, seed=0, **options):
    """A loss whose embeddings are the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CRDLoss(*sizes, **options)


def with_memory(num_samples=30, *, num_negatives=4, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return build(10, 7, num_samples, dim=5, num_negatives=num_negatives, generator=generator, **options)


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def reference_in_batch(student, teacher, temperature):
    """-1/N of the sum of log h of the pair and log(1 - h) of the others, over the anchors of both sides."""
    scores = np.exp(unit(student) @ unit(teacher).T / temperature)
    n = len(scores)
    h = scores / (scores + (n - 1) * scores.mean())
    total = 0.0
    for i in range(n):
        total += 2 * math.log(h[i, i])
        total += sum(math.log(1 - h[i, j]) + math.log(1 - h[j, i]) for j in range(n) if j != i)
    return -total / n


def reference_with_memory(ours, theirs, student_memory, teacher_memory, own, negatives, temperature, constants=None):
    """As the authors' code: scores over Z, Z the mean of the first batch's scores times M, noise K / M."""
    n, k, m = len(own), negatives.shape[1], len(student_memory)
    total, kept = 0.0, []
    for side, (anchors, memory) in enumerate([(ours, teacher_memory), (theirs, student_memory)]):
        scores = np.empty((n, k + 1))
        for i in range(n):
            for j, entry in enumerate([own[i], *negatives[i]]):
                scores[i, j] = math.exp(anchors[i] @ memory[entry] / temperature)
        kept.append(scores.mean() * m if constants is None else constants[side])
        p = scores / kept[-1]
        total -= np.log(p[:, 0] / (p[:, 0] + k / m)).sum() / n
        total -= np.log((k / m) / (p[:, 1:] + k / m)).sum() / n
    return total, kept


def reference_update(memory, own, embeddings, momentum):
    memory = memory.copy()
    for i, entry in enumerate(own):
        memory[entry] = unit(momentum * memory[entry] + (1 - momentum) * embeddings[i])
    return memory


def embed(layer, features):
    weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    return unit(features.detach().flatten(1).numpy() @ weight.T + bias)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3), (4, 3, 2, 2)])
def test_matches_reference_in_batch(shape, temperature):
    student, teacher = make_pair(*shape)
    s, t = (x.detach().flatten(1).numpy() for x in (student, teacher))
    expected = torch.tensor(reference_in_batch(s, t, temperature), dtype=torch.float64)
    value = crd_loss(student, teacher, temperature=temperature).detach()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_module_without_memory_compares_its_embeddings():
    loss = build(12, 7, dim=5, temperature=0.5)
    student, teacher = make_pair(6, 3, 2, 2, teacher_shape=(6, 7))
    ours, theirs = embed(loss.student_embedding, student), embed(loss.teacher_embedding, teacher)
    expected = torch.tensor(reference_in_batch(ours, theirs, 0.5), dtype=torch.float64)
    value = loss(student, teacher)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=1e-12)
    value.backward()
    assert all(p.grad.abs().max() > 0 for p in loss.parameters())


@pytest.mark.parametrize(("num_samples", "num_negatives"), [(30, 4), (6, 9)])  # entries gathered; all products
@pytest.mark.parametrize("with_labels", [False, True])
def test_matches_reference_with_memory(num_samples, num_negatives, with_labels):
    labels = torch.arange(num_samples) % 3 if with_labels else None
    loss = with_memory(num_samples, num_negatives=num_negatives, labels=labels, temperature=0.2, momentum=0.3).double()
    constants = None
    for step, own in enumerate(([3, 0, 5, 2], [1, 3, 4, 0])):
        student, teacher = make_pair(4, 10, teacher_shape=(4, 7), seed=step)
        indices = torch.tensor(own)
        negatives = copy.deepcopy(loss)._negatives(indices).numpy()
        ours, theirs = embed(loss.student_embedding, student), embed(loss.teacher_embedding, teacher)
        memories = [memory.numpy().copy() for memory in (loss.student_memory, loss.teacher_memory)]
        expected, constants = reference_with_memory(ours, theirs, *memories, own, negatives, 0.2, constants)
        value = loss(student, teacher, indices)
        torch.testing.assert_close(value.detach(), torch.tensor(expected), rtol=1e-12, atol=1e-12)
        value.backward()
        assert student.grad.abs().max() > 0
        for memory, now, embeddings in zip(
            memories, (loss.student_memory, loss.teacher_memory), (ours, theirs), strict=True
        ):
            wanted = torch.tensor(reference_update(memory, own, embeddings, 0.3))
            torch.testing.assert_close(now, wanted, rtol=1e-12, atol=1e-12)
    assert all(p.grad.abs().max() > 0 for p in loss.parameters())


def test_both_ways_to_the_scores_agree():
    entries = torch.randint(40, (3, 5), generator=torch.Generator().manual_seed(0))
    anchors, memory = make_pair(3, 6, teacher_shape=(40, 6))
    gathered = crd._scores(anchors, memory, entries)
    products = crd._scores(anchors, memory, entries.repeat(1, 4))[:, :5]
    torch.testing.assert_close(gathered, products, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gathered[1, 2], anchors[1] @ memory[entries[1, 2]], rtol=1e-12, atol=1e-12)


def test_defaults_are_those_of_the_paper():
    loss = build(8, 8, 20000)
    assert (loss.temperature, loss.momentum, loss.num_negatives) == (0.07, 0.5, 16384)
    assert loss.student_memory.shape == loss.teacher_memory.shape == (20000, 128)
    torch.testing.assert_close(loss.student_memory.square().sum(1).mean(), torch.tensor(1.0), rtol=0.01, atol=0)
    assert loss.student_memory.abs().max() <= math.sqrt(3 / 128)
    assert not torch.equal(loss.student_memory, loss.teacher_memory)


def test_gradient():
    student, teacher = make_pair(4, 3)
    # At a constant m, which the gradient takes it for.
    scores = nn.functional.normalize(student.detach()) @ nn.functional.normalize(teacher).T
    constant = crd._log_mean(scores / 0.5)

    def at_constant(s):
        z = nn.functional.normalize(s) @ nn.functional.normalize(teacher).T / 0.5 - constant - math.log(3)
        own = torch.eye(4, dtype=torch.bool)
        return -2 * (nn.functional.logsigmoid(z)[own].sum() + nn.functional.logsigmoid(-z)[~own].sum()) / 4

    of_ours = gradient(crd_loss, student, teacher, temperature=0.5)
    torch.testing.assert_close(of_ours, gradient(at_constant, student), rtol=1e-10, atol=1e-12)

    loss = with_memory(temperature=0.5).double()
    student, teacher = make_pair(4, 10, teacher_shape=(4, 7))
    own = torch.arange(4)
    loss(student, teacher, own)  # sets the constants
    loss.eval()
    assert torch.autograd.gradcheck(lambda s: copy.deepcopy(loss)(s, teacher, own), student)


def test_contract():
    loss = lambda: build(12, 7, dim=5, temperature=0.5)  # noqa: E731 - as short as it is
    assert_loss_contract(loss, shape=(4, 3, 2, 2), teacher_shape=(4, 7), per_sample=False, batches=True)


def test_memory_and_constants_move_in_training_alone():
    loss = with_memory()
    own = torch.tensor([3, 0, 5, 2])
    before = {name: buffer.clone() for name, buffer in loss.state_dict().items()}
    pair = make_pair(4, 10, teacher_shape=(4, 7), dtype=torch.float32)
    loss.eval()
    assert loss(*pair, own).isfinite()
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items() if name != "log_means")
    assert loss.log_means.isnan().all()
    loss.train()
    with torch.no_grad():
        loss(*pair, own)
    moved = (loss.student_memory != before["student_memory"]).any(1)
    assert moved.nonzero().flatten().tolist() == [0, 2, 3, 5]
    kept = loss.log_means.clone()
    loss(*make_pair(4, 10, teacher_shape=(4, 7), dtype=torch.float32, seed=1), own)
    assert torch.equal(loss.log_means, kept)


@pytest.mark.parametrize("labels", [None, torch.tensor([2, 0, 2, 9, 0, 2])])
def test_negatives_are_all_others_alike(labels):
    loss = with_memory(6, num_negatives=3000, labels=labels)
    own = torch.tensor([0, 3, 4])
    for sample, negatives in zip(own.tolist(), loss._negatives(own), strict=True):
        others = [i for i in range(6) if i != sample] if labels is None else (labels != labels[sample]).nonzero()
        counts = negatives.bincount(minlength=6)
        assert counts.nonzero().flatten().tolist() == sorted(int(i) for i in others)
        share = 3000 / len(others)
        assert (counts[counts > 0] - share).abs().max() < 6 * math.sqrt(share)


def test_negatives_differ_between_samples_and_steps():
    loss = with_memory(1000, num_negatives=50)
    first, second = loss._negatives(torch.tensor([1, 1]))
    again = loss._negatives(torch.tensor([1, 1]))[0]
    assert not torch.equal(first, second)
    assert not torch.equal(first, again)


def test_copies_draw_the_same_and_go_their_own_way():
    loss = with_memory()
    pair, own = make_pair(4, 10, teacher_shape=(4, 7), dtype=torch.float32), torch.tensor([3, 0, 5, 2])
    loss(*pair, own)
    twins = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    values = [[module(*pair, own) for _ in range(2)] for module in (loss, *twins)]
    assert values[0] == values[1] == values[2]
    assert values[0][0] != values[0][1]
    assert repr(loss) == repr(twins[0]) == repr(twins[1])
    assert isinstance(loss.generator, torch.Generator)


def test_state_dict_carries_the_memory():
    loss, other = with_memory(), with_memory(seed=1)
    pair, own = make_pair(4, 10, teacher_shape=(4, 7), dtype=torch.float32), torch.tensor([3, 0, 5, 2])
    loss(*pair, own)
    other.load_state_dict(loss.state_dict())
    other.generator.set_state(loss.generator.get_state())
    assert other(*pair, own) == loss(*pair, own)


def test_leaves_the_global_generator_alone_where_it_has_its_own():
    before = torch.random.get_rng_state()
    loss = with_memory()
    loss(*make_pair(4, 10, teacher_shape=(4, 7)), torch.arange(4))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_draws_from_the_global_generator_by_default():
    pair, own = make_pair(4, 10, teacher_shape=(4, 7), dtype=torch.float32), torch.arange(4)
    values = []
    for seed in (0, 0, 1):
        loss = build(10, 7, 30, dim=5, num_negatives=4).eval()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            values.append(loss(*pair, own).item())
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("num_samples", [30, 6])  # entries gathered; all products
def test_compiles_in_one_graph_with_memory(num_samples):
    loss = build(10, 7, num_samples, dim=5, num_negatives=4)
    twin = copy.deepcopy(loss)
    torch.compiler.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    own = torch.tensor([3, 0, 5, 2])
    for step in range(2):
        pair = make_pair(4, 10, teacher_shape=(4, 7), dtype=torch.float32, seed=step)
        values = []
        for module in (loss, compiled):
            with torch.random.fork_rng():
                torch.manual_seed(step)
                values.append(module(*pair, own))
        torch.testing.assert_close(values[1], values[0])
        torch.testing.assert_close(*(gradient_of(value, pair[0]) for value in values))
    torch.testing.assert_close(twin.student_memory, loss.student_memory)
    torch.testing.assert_close(twin.log_means, loss.log_means)


def gradient_of(value, student):
    return torch.autograd.grad(value, student)[0]


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype):
    loss = with_memory()
    student, teacher = make_pair(4, 10, teacher_shape=(4, 7), dtype=dtype)
    own = torch.arange(4)
    twin, third = copy.deepcopy(loss), copy.deepcopy(loss)
    value = loss(student, teacher, own)
    assert value.dtype == torch.float32
    assert value == twin(student.float(), teacher.float(), own)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert third(student.float(), teacher.float(), own) == value
    assert loss.to(dtype)(student, teacher, own).dtype == torch.float32
    assert loss.student_memory.dtype == dtype


def test_indices_may_stand_beside_labels_in_a_distiller():
    student, teacher = nn.Linear(6, 3), nn.Linear(6, 3)
    loss = build(6, 6, 20, dim=4, num_negatives=5, generator=torch.Generator().manual_seed(0))
    twin = copy.deepcopy(loss)
    task = nn.CrossEntropyLoss()
    distiller = Distiller(
        student,
        teacher,
        {"crd": Term(loss, at=":input", weight=0.8)},
        task_loss=lambda logits, target: task(logits, target[:, 0]),
    )
    inputs = make_pair(4, 6, dtype=torch.float32)[0]
    target = torch.tensor([[0, 17], [2, 3], [1, 0], [0, 5]])
    out = distiller(inputs, target)
    assert out.terms["crd"] == twin(inputs, inputs, target[:, 1])
    out.loss.backward()
    assert all(p.grad is not None for p in distiller.parameters())


def test_finite_on_extreme_features_and_samples_of_zeros():
    for features in (torch.zeros(4, 8), 1e4 * torch.ones(4, 8)):
        student = features.clone().requires_grad_()
        crd_loss(student, make_pair(4, 8, dtype=torch.float32)[1], temperature=1e-3).backward()
        assert student.grad.isfinite().all()


def test_falls_as_pairs_come_together():
    student, teacher = make_pair(8, 5)
    values = [crd_loss(torch.lerp(student, teacher, weight), teacher) for weight in (0.0, 0.5, 1.0)]
    assert values[0] > values[1] > values[2]


def test_rejects_bad_options():
    for name, sizes in {"student_dim": (0, 7), "teacher_dim": (10, 0)}.items():
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, got 0"):
            CRDLoss(*sizes)
    for name in ("dim", "num_negatives"):
        for bad in (0, 2.5, True, math.nan):
            with pytest.raises(ValueError, match=f"{name} must be a positive integer, got {bad}"):
                CRDLoss(10, 7, 30, **{name: bad})
    for momentum in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"momentum must be at least 0 and below 1, got {momentum}"):
            CRDLoss(10, 7, 30, momentum=momentum)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        CRDLoss(10, 7, temperature=0)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        crd_loss(*make_pair(4, 5), temperature=0)
    for bad in (1, 2.5, True):
        with pytest.raises(ValueError, match=f"num_samples must be an integer of at least 2, got {bad}"):
            CRDLoss(10, 7, bad)
    for options in (
        {"num_negatives": 5},
        {"momentum": 0.1},
        {"labels": torch.arange(3)},
        {"generator": torch.Generator()},
    ):
        with pytest.raises(ValueError, match="must be left as they are where there is no memory"):
            CRDLoss(10, 7, **options)


def test_rejects_bad_labels():
    for labels in (torch.arange(29), torch.arange(30.0), torch.arange(30) > 9, torch.arange(60).reshape(30, 2)):
        with pytest.raises(ValueError, match=r"labels must be integers \(30,\), got torch\."):
            CRDLoss(10, 7, 30, labels=labels)
    with pytest.raises(ValueError, match="labels must be of at least 2 classes, got 1"):
        CRDLoss(10, 7, 30, labels=torch.zeros(30, dtype=torch.long))


def test_rejects_bad_indices():
    loss, pair = with_memory(), make_pair(4, 10, teacher_shape=(4, 7))
    with pytest.raises(ValueError, match="needs the indices of the samples as target, got None"):
        loss(*pair)
    for target in (torch.arange(3), torch.arange(4.0), torch.ones(4, dtype=torch.bool), torch.zeros(4, 3).long()):
        with pytest.raises(ValueError, match=r"target must be the indices of the samples, integers \(4,\) or \(4, 2\)"):
            loss(*pair, target)


def test_rejects_indices_outside_the_memory():
    for labels in (None, torch.arange(30) % 3):
        loss, pair = with_memory(labels=labels), make_pair(4, 10, teacher_shape=(4, 7))
        for bad in (-1, 30):
            own = torch.tensor([3, 0, bad, 2])
            for target in (own, torch.stack([torch.zeros(4, dtype=torch.long), own], 1)):
                with pytest.raises(ValueError, match=f"target must be indices from 0 to 29, got {bad}"):
                    loss(*pair, target)
    with pytest.raises(TypeError, match="target must be a tensor, got list"):
        loss(*pair, [3, 0, 5, 2])
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        with_memory(labels=[0, 1] * 15)


def test_checks_options_when_they_are_set():
    loss = with_memory()
    for name, bad in (("temperature", 0.0), ("num_negatives", 0), ("momentum", 1.0)):
        with pytest.raises(ValueError, match=f"{name} must be .*, got {bad}"):
            setattr(loss, name, bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("first", [False, True])
def test_nan_shows_in_its_batch_alone(first, side, bad):
    loss, own = with_memory(), torch.tensor([3, 0, 5, 2])

    def batch(seed):
        return [x.detach() for x in make_pair(4, 10, teacher_shape=(4, 7), dtype=torch.float32, seed=seed)]

    if not first:
        assert loss(*batch(0), own).isfinite()
    before = copy.deepcopy(loss.state_dict())
    pair = batch(1)
    pair[side][2, 1] = bad
    assert not loss(*pair, own).isfinite()
    spoilt = ("student_memory", "teacher_memory")[side]
    memory = getattr(loss, spoilt)
    assert torch.equal(memory[5], before[spoilt][5])  # what is not finite moves nothing, and the others move
    assert all((memory[place] != before[spoilt][place]).any() for place in (3, 0, 2))
    assert loss.student_memory.isfinite().all()
    assert loss.teacher_memory.isfinite().all()
    if not first:
        assert torch.equal(loss.log_means, before["log_means"])
    assert loss(*batch(2), own).isfinite()
    assert loss.log_means.isfinite().all()


def test_an_entry_that_comes_twice_keeps_the_finite_one():
    loss = with_memory()
    student, teacher = make_pair(4, 10, teacher_shape=(4, 7), dtype=torch.float32)
    with torch.no_grad():
        student[3] = math.nan
    before = loss.student_memory.clone()
    own = torch.tensor([3, 0, 5, 0])
    twin = copy.deepcopy(loss)
    loss(student, teacher, own)
    twin(student[:3], teacher[:3], own[:3])
    assert torch.equal(loss.student_memory, twin.student_memory)
    assert (loss.student_memory[0] != before[0]).any()


def test_a_batch_of_nan_alone_moves_nothing():
    loss = with_memory()
    student, teacher = make_pair(4, 10, teacher_shape=(4, 7), dtype=torch.float32)
    before = copy.deepcopy(loss.state_dict())
    assert loss(student * math.nan, teacher * math.nan, torch.tensor([3, 0, 5, 2])).isnan()
    for name, value in loss.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_labels_and_memory_may_be_inference_tensors():
    with torch.inference_mode():
        labels = torch.arange(30) % 3
    student, teacher = make_pair(4, 10, teacher_shape=(4, 7), dtype=torch.float32)
    own = torch.tensor([3, 0, 5, 2])
    loss = with_memory(labels=labels)
    twin = copy.deepcopy(loss)
    with torch.inference_mode():
        state = {name: value.clone() for name, value in twin.state_dict().items()}
    for name in ("student_memory", "teacher_memory", "log_means"):
        setattr(twin, name, state[name])
    for _ in range(2):
        assert twin(student, teacher, own) == loss(student, teacher, own)
    assert torch.equal(twin.student_memory, loss.student_memory)
    assert torch.equal(twin.log_means, loss.log_means)


def test_what_a_mask_hides_does_not_move_the_memory():
    loss = with_memory()
    student, teacher = make_pair(4, 10, teacher_shape=(4, 7), dtype=torch.float32)
    before = loss.student_memory.clone()
    own = torch.tensor([3, -1, 3, 10**9])  # the last of two that are the same is kept
    loss(student, teacher, own, mask=torch.tensor([True, False, True, False]))
    moved = (loss.student_memory != before).any(1)
    assert moved.nonzero().flatten().tolist() == [3]
    expected = reference_update(before.numpy(), [3], embed(loss.student_embedding, student.double())[2:3], 0.5)[3]
    torch.testing.assert_close(loss.student_memory[3], torch.tensor(expected, dtype=torch.float32))


def test_rejects_other_widths_and_single_samples():
    with pytest.raises(ValueError, match="same number of values per sample, got 5 and 7"):
        crd_loss(*make_pair(4, 5, teacher_shape=(4, 7)))
    loss = build(10, 7)
    with pytest.raises(ValueError, match="student must have student_dim=10 values per sample, got 9"):
        loss(*make_pair(4, 9, teacher_shape=(4, 7)))
    with pytest.raises(ValueError, match="teacher must have teacher_dim=7 values per sample, got 10"):
        loss(*make_pair(4, 10))
    with pytest.raises(ValueError, match="must have at least 2 samples, got 1"):
        crd_loss(*make_pair(1, 5))


def test_repr_shows_options():
    assert "CRDLoss(\n  num_samples=None, temperature=0.07\n" in repr(build(10, 7))
    assert "num_samples=30, temperature=0.07, num_negatives=4, momentum=0.5" in repr(with_memory())
