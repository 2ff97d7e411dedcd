"""QueueKLLoss against the formula of LightlyTrain, and the queue against a list."""

import copy
import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair, with_weights
from distill import QueueKLLoss, queue_kl_loss
from learned import assert_gradients, weights


def unit(x):
    return x / math.sqrt(x @ x)


def reference(student, teacher, queue, temperature):
    """KL of the softmax of the teacher's cosines to the queue from that of the student's, sample by sample."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        q = np.array([math.exp(unit(s) @ unit(z) / temperature) for z in queue])
        p = np.array([math.exp(unit(t) @ unit(z) / temperature) for z in queue])
        q, p = q / q.sum(), p / p.sum()
        values.append(sum(p * np.log(p / q)))
    return np.array(values)


def make_loss(student_dim=3, teacher_dim=4, queue_size=6, filled=6, **options):
    """With seeded weights and a queue in which some are filled."""
    loss = with_weights(QueueKLLoss(student_dim, teacher_dim, queue_size, **options))
    entries = torch.nn.functional.normalize(make_pair(queue_size, teacher_dim, seed=5)[1], dim=1)
    loss.queue[:filled] = entries[:filled].float()
    loss.entered += filled
    return loss


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_matches_reference(temperature):
    student, teacher = make_pair(5, 4)
    queue = make_pair(7, 4, seed=1)[1]
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), queue.numpy(), temperature))
    values = queue_kl_loss(student, teacher, queue=queue, temperature=temperature).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("filled", [2, 6])
def test_matches_reference_through_the_learned_layer(filled):
    student, teacher = make_pair(5, 3, teacher_shape=(5, 4))
    loss = make_loss(filled=filled, reduction="none").eval().double()
    weight, bias = weights(loss.projector)
    projected = np.array([weight @ s + bias for s in student.detach().numpy()])
    queue = loss.queue[:filled].numpy()
    queue = queue / np.linalg.norm(queue, axis=1, keepdims=True)
    loss.queue[:filled] = torch.from_numpy(queue)
    expected = torch.from_numpy(reference(projected, teacher.numpy(), queue, 0.07))
    torch.testing.assert_close(loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)


def test_the_batch_enters_first_and_the_oldest_leave():
    loss, embeddings = QueueKLLoss(3, 4, 6), []
    for seed in range(5):
        student, teacher = make_pair(4, 3, teacher_shape=(4, 4), seed=seed, dtype=torch.float32)
        embeddings = [*embeddings, *(torch.from_numpy(unit(t.numpy())) for t in teacher)][-6:]
        value = loss(student, teacher)
        expected = queue_kl_loss(loss.projector(student), teacher, queue=torch.stack(embeddings)).mean()
        torch.testing.assert_close(value, expected)
        assert loss.entered == 4 * (seed + 1)
    assert {tuple(e.tolist()) for e in loss.queue.round(decimals=4)} == {
        tuple(e.tolist()) for e in torch.stack(embeddings).round(decimals=4)
    }


def test_of_a_batch_larger_than_the_queue_the_last_ones_enter():
    loss = QueueKLLoss(3, 4, 6)
    student, teacher = make_pair(9, 3, teacher_shape=(9, 4), dtype=torch.float32)
    loss(student, teacher)
    expected = torch.nn.functional.normalize(teacher[3:], dim=1)
    order = [(3 + i) % 6 for i in range(6)]  # place 0 is that of number 0, 6, ...
    torch.testing.assert_close(loss.queue[order], expected)


def test_what_is_hidden_or_no_number_does_not_enter():
    loss = QueueKLLoss(3, 4, 6)
    student, teacher = make_pair(5, 3, teacher_shape=(5, 4), dtype=torch.float32)
    teacher[1, 0], teacher[3] = math.nan, math.inf
    value = loss(student, teacher, mask=torch.tensor([True, False, False, True, True]))
    assert value.isnan()  # of the fourth sample, which counts
    assert loss.entered == 2
    torch.testing.assert_close(loss.queue[:2], torch.nn.functional.normalize(teacher[[0, 4]], dim=1))
    assert (loss.queue[2:] == 0).all()
    assert loss(student, make_pair(5, 3, teacher_shape=(5, 4))[1]).isfinite()
    before = copy.deepcopy(loss.state_dict())
    loss(student, torch.full((5, 4), math.nan))
    assert all(torch.equal(tensor, before[name]) for name, tensor in loss.state_dict().items())


def test_the_queue_stays_in_eval_mode_and_is_saved():
    loss, twin = make_loss(), QueueKLLoss(3, 4, 6)
    student, teacher = make_pair(5, 3, teacher_shape=(5, 4))
    loss(student, teacher)
    assert sorted(loss.state_dict()) == ["entered", "projector.bias", "projector.weight", "queue"]
    twin.load_state_dict(loss.state_dict())
    for _ in range(2):
        assert torch.equal(twin.eval()(student, teacher), loss.eval()(student, teacher))
    assert loss.entered == 11
    assert torch.equal(twin.train()(student, teacher), loss.train()(student, teacher))
    assert torch.equal(twin.queue, loss.queue)


def test_an_empty_queue_gives_0():
    loss = QueueKLLoss(3, 4, 6).eval()
    student, teacher = make_pair(5, 3, teacher_shape=(5, 4))
    assert loss(student, teacher) == 0
    assert gradient(loss, student, teacher).abs().max() == 0
    assert loss.train()(student, teacher, mask=torch.zeros(5)) == 0
    assert loss.entered == 0


def test_backward_twice_while_the_queue_moves_on():
    loss = make_loss().double()
    pairs = [make_pair(5, 3, teacher_shape=(5, 4), seed=seed) for seed in (0, 1)]
    alone = copy.deepcopy(loss)
    expected = torch.autograd.grad(alone(*pairs[0]), pairs[0][0])[0]
    values = [loss(*pair) for pair in pairs]
    assert torch.equal(torch.autograd.grad(values[0], pairs[0][0])[0], expected)


def test_a_loss_of_inference_mode_trains_outside_of_it():
    with torch.inference_mode():
        loss = make_loss()
    student, teacher = make_pair(5, 3, teacher_shape=(5, 4))
    loss(student, teacher)
    assert loss.entered == 11


def test_gradient():
    student, teacher = make_pair(4, 3, teacher_shape=(4, 4))
    assert_gradients(make_loss(temperature=0.5).eval(), student, teacher)
    queue = make_pair(7, 4, seed=1)[1]
    student = make_pair(4, 4)[0]
    assert torch.autograd.gradcheck(lambda s: queue_kl_loss(s, teacher, queue=queue, temperature=0.5), student)


@pytest.mark.parametrize("filled", [4, 6])
def test_contract(filled):
    def build(**options):
        return make_loss(filled=filled, temperature=0.5, **options).eval()

    assert_loss_contract(build, shape=(6, 3), teacher_shape=(6, 4), widths=True)


def test_zero_when_equal_whatever_the_lengths():
    student, _ = make_pair(5, 4)
    queue = make_pair(7, 4, seed=1)[1]
    assert queue_kl_loss(3 * student, student.detach(), queue=queue).abs().max() < 1e-14
    torch.testing.assert_close(
        queue_kl_loss(student, -student.detach(), queue=queue),
        queue_kl_loss(student, -student.detach(), queue=5 * queue),
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        QueueKLLoss(3, 4, temperature=temperature)
    with pytest.raises(ValueError, match=match):
        queue_kl_loss(*make_pair(5, 4), queue=torch.ones(2, 4), temperature=temperature)


def test_rejects_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="queue_size must be a positive integer, got 0"):
        QueueKLLoss(3, 4, 0)
    with pytest.raises(ValueError, match="queue_size made the layers and must stay 6, got 7"):
        make_loss().queue_size = 7
    with pytest.raises(ValueError, match=r"student must have 3 values per sample, got shape \(5, 4\)"):
        make_loss()(*make_pair(5, 4))
    with pytest.raises(ValueError, match=r"teacher must have 4 values per sample, got shape \(5, 3\)"):
        make_loss()(*make_pair(5, 3))
    for queue in (torch.ones(2, 3), torch.ones(4), torch.ones(0, 4)):
        with pytest.raises(ValueError, match=r"and the queue \(K, D\) of the same D, got \(5, 4\) and"):
            queue_kl_loss(*make_pair(5, 4), queue=queue)
    with pytest.raises(TypeError, match="queue must be a tensor, got list"):
        queue_kl_loss(*make_pair(5, 4), queue=[[1.0] * 4])
    with pytest.raises(ValueError, match="the queue must be on the device of the embeddings, cpu, got meta"):
        queue_kl_loss(*make_pair(5, 4), queue=torch.ones(2, 4, device="meta"))


def test_repr_shows_options():
    assert "student_dim=3, teacher_dim=4, queue_size=6, temperature=0.07, reduction='mean'" in repr(make_loss())
