"""What LinearLogitLoss keeps between calls, and when it must not."""

import copy

import pytest
import torch

import distill.losses.linear_logit
from contract import gradient
from distill import LinearLogitLoss
from linear_heads import by_logits, heads, hidden


class Counter:
    """Counts how often a function of the loss runs."""

    def __init__(self, monkeypatch, name):
        self.calls = 0
        self.function = getattr(distill.losses.linear_logit, name)
        monkeypatch.setattr(distill.losses.linear_logit, name, self)

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def change_by_optimizer(head):
    head.requires_grad_(True)
    head(torch.ones(head.in_features)).sum().backward()
    torch.optim.SGD(head.parameters(), lr=0.1).step()
    head.requires_grad_(False)


def change_by_loading(head):
    head.load_state_dict({name: 2 * tensor for name, tensor in head.state_dict().items()})


def change_by_assigning(head):
    head.load_state_dict({name: 2 * tensor for name, tensor in head.state_dict().items()}, assign=True)


def change_in_place(head):
    with torch.no_grad():
        head.weight.copy_(head.weight + 1)


def change_bias(head):
    with torch.no_grad():
        head.bias.add_(1)


def drop_bias(head):
    head.bias = None


def change_data(head):
    head.weight.data = head.weight.data + 1


def change_dtype(head):
    head.to(torch.bfloat16)


CHANGES = [
    change_by_optimizer,
    change_by_loading,
    change_by_assigning,
    change_in_place,
    change_bias,
    drop_bias,
    change_data,
    change_dtype,
]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_factor_is_kept_until_a_head_changes(change, side, monkeypatch):
    counter = Counter(monkeypatch, "factorise")
    pair, states = heads(trains=False), hidden(5)
    loss = LinearLogitLoss(*pair, method="factor")
    loss(*states)
    loss(*states)
    assert counter.calls == 1
    before = loss(*states).item()
    change(pair[side])
    value = loss(*states)
    assert counter.calls == 2
    assert abs(value.item() - before) > 1e-4
    exact = [copy.deepcopy(head).float() for head in pair]
    torch.testing.assert_close(value, by_logits(exact, states))
    loss(*states)
    assert counter.calls == 2


@pytest.mark.parametrize("change", [change for change in CHANGES if "bias" not in change.__name__])
def test_teachers_gram_matrix_is_kept_until_its_weight_changes(change, monkeypatch):
    counter = Counter(monkeypatch, "teacher_gram")
    pair, states = heads(), hidden(5)
    loss = LinearLogitLoss(*pair, method="gram")
    for _ in range(2):
        loss(*states).backward()
        torch.optim.SGD(pair[0].parameters(), lr=0.1).step()
    assert counter.calls == 1
    change(pair[1])
    torch.testing.assert_close(loss(*states), by_logits([copy.deepcopy(head).float() for head in pair], states))
    assert counter.calls == 2


def test_forget_drops_what_a_hidden_write_has_spoilt():
    pair, states = heads(trains=False), hidden(5)
    loss = LinearLogitLoss(*pair, method="factor")
    before = loss(*states)
    pair[0].weight.data.mul_(2)  # PyTorch does not count it
    assert torch.equal(loss(*states), before)
    loss.forget()
    torch.testing.assert_close(loss(*states), by_logits(pair, states))


def test_what_is_kept_in_inference_mode_serves_training_too():
    pair, states = heads(trains=False, dtype=torch.float64), hidden(5, dtype=torch.float64)
    for method in ("factor", "gram"):
        loss = LinearLogitLoss(*pair, method=method)
        with torch.inference_mode():
            loss(*states)
        torch.testing.assert_close(gradient(loss, *states), gradient(lambda *s: by_logits(pair, s), *states))


def test_nothing_is_kept_for_weights_that_count_no_changes(monkeypatch):
    counter = Counter(monkeypatch, "factorise")
    with torch.inference_mode():
        pair, states = heads(trains=False), hidden(5)
        loss = LinearLogitLoss(*pair, method="factor")
        loss(*states)
        pair[0].weight.mul_(2)
        torch.testing.assert_close(loss(*states), by_logits(pair, states))
    assert counter.calls == 2


def test_heads_are_no_parameters_of_the_loss():
    pair = heads()
    loss = LinearLogitLoss(*pair)
    assert (loss.student_head, loss.teacher_head) == tuple(pair)
    assert not list(loss.parameters())
    assert not list(loss.modules())[1:]
    assert not loss.state_dict()
    loss.double()
    assert pair[0].weight.dtype == torch.float32
