"""What LinearLogitLoss keeps between calls, and when it must not."""

import copy

import pytest
import torch

import distill.losses.linear_logit
from contract import gradient
from distill import LinearLogitLoss, LogitLoss
from distill._engine.squared.kept import Kept, fingerprint
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


def change_through_data(head):
    head.weight.data.mul_(1.5)


def change_one_number_through_numpy(head):
    head.weight.detach().numpy()[17, 3] = 9.0


def change_bias_through_data(head):
    head.bias.data[-1] += 9.0


def swap_rows_through_data(head):
    head.weight.data[[3, 4]] = head.weight.data[[4, 3]]


def shuffle_columns_through_data(head):
    head.weight.data.copy_(head.weight.data.roll(2, 1))


def change_as_another_process_does(head):
    other = torch.empty(0).set_(head.weight.untyped_storage(), 0, head.weight.shape)
    other.add_(1.0)


def change_by_fused(name):
    def change(head):
        head.requires_grad_(True)
        optimizer = getattr(torch.optim, name)(head.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            head(torch.ones(head.in_features)).sum().backward()
            optimizer.step()
        head.requires_grad_(False)

    change.__name__ = f"change_by_fused_{name}"
    return change


def change_by_foreach(head):
    torch._foreach_mul_([head.weight.data], 2.0)


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
    change_through_data,
    change_one_number_through_numpy,
    change_bias_through_data,
    swap_rows_through_data,
    shuffle_columns_through_data,
    change_as_another_process_does,
    change_by_foreach,
    *(change_by_fused(name) for name in ("SGD", "Adam", "AdamW")),
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


def test_what_is_kept_is_what_was_computed():
    kept, results, weight = Kept(), iter("ab"), torch.ones(2)
    assert [kept.get("name", [weight], lambda: next(results)) for _ in range(2)] == ["a", "a"]
    assert kept.get("name", [weight + 1], lambda: next(results)) == "b"


def test_forget_frees_what_is_kept(monkeypatch):
    counter = Counter(monkeypatch, "factorise")
    pair, states = heads(trains=False), hidden(5)
    loss = LinearLogitLoss(*pair, method="factor")
    before = loss(*states)
    loss.forget()
    assert not loss._kept._results
    assert torch.equal(loss(*states), before)
    assert counter.calls == 2


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_teacher_that_learns_beside_the_student_is_seen(optimizer):
    """Mutual learning: a fused optimizer writes the teacher's weight, and PyTorch does not count it."""
    pair, states = heads(dtype=torch.float64), hidden(5, dtype=torch.float64)
    pair[1].requires_grad_(True)
    loss = LinearLogitLoss(*pair, method="gram")
    loss(*states)
    optimizer = getattr(torch.optim, optimizer)(pair[1].parameters(), lr=0.05, fused=True)
    for _ in range(20):
        pair[1](states[1]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(loss(*states), by_logits(pair, states))
    torch.testing.assert_close(gradient(loss, *states), gradient(lambda *s: by_logits(pair, s), *states))


@pytest.mark.parametrize("width", [1, 3, 6, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.half])
@pytest.mark.parametrize("layout", ["whole", "slice", "transposed"])
def test_every_single_number_is_looked_at(width, dtype, layout):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(513, width + 1, generator=generator).to(dtype)
    tensor = {"whole": weight, "slice": weight[3:, 1:], "transposed": weight.T[:, 5:]}[layout]
    before = fingerprint([tensor])
    assert before.equals(fingerprint([tensor]))
    places = torch.randint(tensor.numel(), (200,), generator=generator).tolist()
    for place in {0, tensor.numel() - 1, *places}:
        number = tensor.view(-1)[place] if tensor.is_contiguous() else tensor[divmod(place, tensor.shape[1])]
        kept = number.clone()
        number.data.copy_(torch.nextafter(kept.float(), torch.tensor(torch.inf)) if dtype == torch.float32 else -kept)
        assert not before.equals(fingerprint([tensor])), place
        number.data.copy_(kept)
    assert before.numbers[0].equal(fingerprint([tensor]).numbers[0])


def test_columns_that_change_places_are_noticed():
    """Moved by whole words they leave the sum of each row as it is: the words that are looked at themselves tell."""
    weight = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0))
    before, after = fingerprint([weight]), fingerprint([weight.roll(2, 1)])
    assert torch.equal(before.numbers[0], after.numbers[0])
    assert not before.equals(after)


def test_fingerprint_tells_options_kinds_and_devices_apart():
    tensor = torch.ones(40, 6)
    before = fingerprint([tensor, None], 1.0)
    for tensors, option in (([tensor, None], 2.0), ([tensor, tensor], 1.0), ([None, tensor], 1.0), ([tensor], 1.0)):
        assert not fingerprint(tensors, option).equals(before)
    for other in (tensor.view(6, 40), tensor.double(), tensor[:39]):
        assert not fingerprint([other, None], 1.0).equals(before)
    assert fingerprint([tensor.clone(), None], 1.0).equals(before)


def test_weights_with_nan_do_not_compute_the_factor_at_each_call(monkeypatch):
    counter = Counter(monkeypatch, "factorise")
    pair, states = heads(trains=False), hidden(5)
    pair[0].weight.data[0, 0] = torch.nan
    loss = LinearLogitLoss(*pair, method="factor")
    assert loss(*states).isnan()
    assert loss(*states).isnan()
    assert counter.calls == 1


def test_scales_are_part_of_the_factor(monkeypatch):
    pair, states = heads(trains=False, dtype=torch.float64), hidden(5, dtype=torch.float64)
    loss = LinearLogitLoss(*pair, method="factor")
    loss(*states)
    loss.student_scale, loss.teacher_scale = 0.5, 2.0
    torch.testing.assert_close(loss(*states), LogitLoss()(0.5 * pair[0](states[0]), 2.0 * pair[1](states[1])))


def test_nothing_is_kept_inside_a_transform(monkeypatch):
    counter = Counter(monkeypatch, "factorise")
    pair, states = heads(trains=False), hidden(5)
    loss = LinearLogitLoss(*pair, method="factor")
    expected = gradient(lambda *s: by_logits(pair, s), *states)
    torch.testing.assert_close(torch.func.grad(lambda s: loss(s, states[1]))(states[0].detach()), expected)
    assert not loss._kept._results
    torch.testing.assert_close(gradient(loss, *states), expected)
    assert counter.calls == 2


def test_what_is_kept_in_inference_mode_serves_training_too():
    pair, states = heads(trains=False, dtype=torch.float64), hidden(5, dtype=torch.float64)
    for method in ("factor", "gram"):
        loss = LinearLogitLoss(*pair, method=method)
        with torch.inference_mode():
            loss(*states)
        torch.testing.assert_close(gradient(loss, *states), gradient(lambda *s: by_logits(pair, s), *states))


def test_weights_that_count_no_changes_are_read(monkeypatch):
    counter = Counter(monkeypatch, "factorise")
    with torch.inference_mode():
        pair, states = heads(trains=False), hidden(5)
        loss = LinearLogitLoss(*pair, method="factor")
        loss(*states)
        loss(*states)
        assert counter.calls == 1
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
