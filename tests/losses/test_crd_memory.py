"""The memory of CRDLoss: against the formula, what moves it, what does not, and how negatives are drawn."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from contract import make_pair
from crd_embeddings import build, embed, unit, with_memory
from distill.losses import crd


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


def gradient_of(value, student):
    return torch.autograd.grad(value, student)[0]


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


def test_compiles_in_one_graph_with_memory():
    loss = build(10, 7, 30, dim=5, num_negatives=4)  # entries are gathered; all products: test_batches.py
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
