"""LinearLogitLoss against the logits it never forms, formed here in NumPy."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distill._gram
import distill._heads
import distill.losses.linear_logit
from contract import assert_loss_contract, gradient
from distill import Distiller, LinearLogitLoss, LogitLoss, Term, linear_logit_loss, logit_loss

METHODS = ("gram", "blocks", "factor")

# torch.compile itself instantiates the Functions that it traces.
traces_functions = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def reference(student, student_weight, teacher, teacher_weight, student_bias=0.0, teacher_bias=0.0):
    """The mean over the vocabulary of the squared difference of both heads' logits, sample by sample."""
    values = np.zeros(student.shape[:-1])
    for sample in np.ndindex(values.shape):
        s = student_weight @ student[sample] + student_bias
        t = teacher_weight @ teacher[sample] + teacher_bias
        values[sample] = ((s - t) ** 2).sum() / len(student_weight)
    return values


def make(shape=(6,), vocabulary=11, sizes=(4, 7), *, biases="", seed=0, dtype=torch.float64, trains=True):
    """Hidden states, weights and the options with the biases; the student's side wants gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    student, teacher = normal(*shape, sizes[0]).requires_grad_(), normal(*shape, sizes[1])
    student_weight, teacher_weight = normal(vocabulary, sizes[0]).requires_grad_(trains), normal(vocabulary, sizes[1])
    options = {}
    if "s" in biases:
        options["student_bias"] = normal(vocabulary).requires_grad_(trains)
    if "t" in biases:
        options["teacher_bias"] = normal(vocabulary)
    return [student, student_weight, teacher, teacher_weight], options


def formed(student, student_weight, teacher, teacher_weight, student_bias=None, teacher_bias=None):
    functional = nn.functional.linear
    return logit_loss(
        functional(student, student_weight, student_bias), functional(teacher, teacher_weight, teacher_bias)
    )


def heads(sizes=(6, 9), vocabulary=40, *, bias=True, seed=0, dtype=torch.float32, trains=True):
    generator = torch.Generator().manual_seed(seed)
    pair = [nn.Linear(size, vocabulary, bias=bias) for size in sizes]
    with torch.no_grad():
        for parameter in (*pair[0].parameters(), *pair[1].parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    pair[0].requires_grad_(trains)
    pair[1].requires_grad_(False)
    return [head.to(dtype) for head in pair]


def hidden(*shape, sizes=(6, 9), seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    pair = [torch.randn(*shape, size, generator=generator, dtype=dtype) for size in sizes]
    return pair[0].requires_grad_(), pair[1]


def by_logits(pair, states):
    return LogitLoss()(pair[0](states[0]), pair[1](states[1]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("biases", ["", "s", "t", "st"])
@pytest.mark.parametrize(
    ("shape", "vocabulary", "sizes"),
    [((5,), 11, (4, 7)), ((3, 4), 11, (7, 4)), ((2, 1, 3), 1200, (3, 3)), ((), 5, (2, 3)), ((4,), 3, (5, 6))],
)
def test_matches_reference(shape, vocabulary, sizes, biases, method):
    inputs, options = make(shape, vocabulary, sizes, biases=biases, trains=method != "factor")
    expected = reference(
        *(x.detach().numpy() for x in inputs), **{name: x.detach().numpy() for name, x in options.items()}
    )
    value = linear_logit_loss(*inputs, **options, method=method)
    torch.testing.assert_close(value.detach(), torch.as_tensor(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_gradient(method):
    trains = method != "factor"
    (student, weight, teacher, teacher_weight), options = make((3,), biases="st", trains=trains)
    wanted = (student, weight, options["student_bias"]) if trains else (student,)

    def loss(student, weight=weight, bias=options["student_bias"]):
        return linear_logit_loss(
            student,
            weight,
            teacher,
            teacher_weight,
            student_bias=bias,
            teacher_bias=options["teacher_bias"],
            method=method,
        )

    assert torch.autograd.gradcheck(loss, wanted)
    assert torch.autograd.gradgradcheck(loss, wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("biases", ["", "st"])
def test_gradients_are_those_of_formed_logits_over_many_blocks(method, biases, monkeypatch):
    monkeypatch.setattr(distill._gram, "_LOGITS", 1000)
    inputs, options = make((37,), 3001, (8, 200), biases=biases, dtype=torch.float32, trains=method != "factor")
    wanted = [x for x in (*inputs, *options.values()) if x.requires_grad]
    weights = torch.rand(37, generator=torch.Generator().manual_seed(5))
    expected = torch.autograd.grad((weights * formed(*inputs, *options.values())).sum(), wanted)
    for kept in (2**25, 0):  # differences kept for backward, and formed again
        monkeypatch.setattr(distill._gram, "_KEPT", kept)
        value = (weights * linear_logit_loss(*inputs, **options, method=method)).sum()
        for ours, theirs in zip(torch.autograd.grad(value, wanted), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("method", ["gram", "blocks"])
@pytest.mark.parametrize("part", ["hidden", "weight", "bias"])
def test_one_part_can_be_trained_alone(method, part):
    inputs, options = make(biases="s", trains=False)
    inputs[0] = inputs[0].detach()
    tensor = {"hidden": inputs[0], "weight": inputs[1], "bias": options["student_bias"]}[part].requires_grad_()
    (ours,) = torch.autograd.grad(linear_logit_loss(*inputs, **options, method=method).sum(), tensor)
    (theirs,) = torch.autograd.grad(formed(*inputs, **options).sum(), tensor)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_reaches_the_teacher(method):
    inputs, options = make(biases="st", trains=method != "factor")
    constants = [inputs[2], inputs[3], options["teacher_bias"]]
    for tensor in constants:
        tensor.requires_grad_()
    value = linear_logit_loss(*inputs, **options, method=method).sum()
    assert torch.autograd.grad(value, constants, allow_unused=True) == (None, None, None)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    samples=st.integers(1, 40),
    vocabulary=st.integers(1, 1500),
    sizes=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    biases=st.sampled_from(["", "s", "t", "st"]),
    method=st.sampled_from(["auto", *METHODS]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 9),
)
def test_equals_formed_logits_over_random_shapes(samples, vocabulary, sizes, biases, method, dtype, seed):
    inputs, options = make((samples,), vocabulary, sizes, biases=biases, seed=seed, dtype=dtype, trains=False)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    expected = formed(*exact, **{name: x.double() for name, x in options.items()})
    values = linear_logit_loss(*inputs, **options, method=method)
    # A single value may be small against its logits: those of one sample scale the error that is let pass.
    size = sum(x.detach().double().square().mean(-1) @ torch.ones(samples).double() for x in inputs[::2]).item()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(
        values.double(), expected, rtol=1e-3 if dtype == torch.float32 else 1e-11, atol=tolerance
    )
    (ours,) = torch.autograd.grad(values.sum(), inputs[0])
    (theirs,) = torch.autograd.grad(expected.sum(), exact[0])
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=tolerance * max(size, 1))


@traces_functions
@pytest.mark.parametrize("method", ["auto", "blocks", "gram", "factor"])
def test_contract(method):
    def build(**options):
        return LinearLogitLoss(*heads((10, 10), trains=method != "factor"), method=method, **options)

    assert_loss_contract(build, shape=(6, 10))
    assert_loss_contract(build, shape=(4, 3, 10))


@pytest.mark.parametrize("method", ["gram", "blocks"])
def test_torch_func_reaches_the_weight(method):
    (student, weight, teacher, teacher_weight), _ = make((5,))
    student, weight = student.detach(), weight.detach()

    def ours(weight, student, teacher):
        return linear_logit_loss(student, weight, teacher, teacher_weight, method=method)

    def theirs(weight, student, teacher):
        return formed(student, weight, teacher, teacher_weight)

    for transform in (torch.func.jacrev, lambda f: torch.func.vmap(torch.func.grad(f), (None, 0, 0))):
        got, expected = transform(ours)(weight, student, teacher), transform(theirs)(weight, student, teacher)
        torch.testing.assert_close(got, expected)
    batch = torch.stack([weight, 2 * weight])
    mapped = torch.func.vmap(ours, (0, None, None))(batch, student, teacher)
    torch.testing.assert_close(mapped[1], ours(2 * weight, student, teacher))


@pytest.mark.parametrize("method", METHODS)
def test_zero_and_not_negative_where_both_models_agree(method):
    for dtype in (torch.float32, torch.float64):
        pair = heads((64, 64), 500, bias=False, dtype=dtype, trains=method != "factor")
        pair[1].load_state_dict(pair[0].state_dict())
        student, _ = hidden(300, sizes=(64, 64), dtype=dtype)
        values = LinearLogitLoss(*pair, method=method, reduction="none")(student, student.detach())
        size = pair[0](student).square().mean()
        assert (values >= 0).all()
        assert values.max() < 10 * torch.finfo(torch.float64).eps ** 2 * 500 * size
        assert gradient(LinearLogitLoss(*pair, method=method), student, student.detach()).norm() < 1e-6


@pytest.mark.parametrize("method", ["gram", "factor"])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("difference", [10.0**-power for power in range(7)] + [0.04, 0.03, 4e-3, 3e-3, 1.5e-5, 1e-5])
def test_keeps_its_digits_as_student_and_teacher_agree(difference, equal, method):
    """Beside whole powers the differences at which the precision changes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    states, weight, other = normal(64, 16), normal(3000, 16), normal(64, 16)
    if equal:
        inputs = states + difference * other, weight + difference * normal(3000, 16), states, weight
    else:  # the teacher's logits come from twice as many dimensions, and nearly all of them from those of the student
        basis = torch.linalg.qr(normal(32, 16)).Q
        wide = weight @ basis.T + normal(3000, 32) @ (torch.eye(32).double() - basis @ basis.T)
        inputs = states, wide @ basis, (states + difference * other) @ basis.T, wide
    inputs = [x.float() for x in inputs]
    wanted = [inputs[0].requires_grad_()] if method == "factor" else [x.requires_grad_() for x in inputs[:2]]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    values, expected = linear_logit_loss(*inputs, method=method), formed(*exact)
    assert ((values.double() - expected).abs() / expected).max() < 1e-3
    ours = torch.autograd.grad(values.mean(), wanted)
    theirs = torch.autograd.grad(expected.mean(), exact[: len(wanted)])
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() < 1e-4 * b.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_low_precision_is_accumulated_in_float32(method, dtype):
    pair = heads((32, 64), 3000, dtype=dtype, trains=method != "factor")
    states = hidden(20, sizes=(32, 64), dtype=dtype)
    values = LinearLogitLoss(*pair, method=method, reduction="none")(*states)
    assert values.dtype == torch.float32
    exact = [copy.deepcopy(head).double() for head in pair]
    inputs = states[0].detach().double().requires_grad_(), states[1].double()
    expected = LogitLoss(reduction="none")(exact[0](inputs[0]), exact[1](inputs[1]))
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=0)
    values.mean().backward()
    expected.mean().backward()
    assert states[0].grad.dtype == dtype
    torch.testing.assert_close(states[0].grad.double(), inputs[0].grad, rtol=torch.finfo(dtype).eps, atol=1e-6)
    if method != "factor":
        for ours, theirs in zip(pair[0].parameters(), exact[0].parameters(), strict=True):
            assert ours.grad.dtype == dtype
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_nothing(method):
    pair, states = heads(trains=method != "factor"), hidden(7)
    loss = LinearLogitLoss(*pair, method=method)
    expected = gradient(loss, *states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(*states)
    assert torch.equal(value, loss(*states))
    assert torch.equal(torch.autograd.grad(value, states[0])[0], expected)


@pytest.mark.parametrize("method", METHODS)
def test_prefix_compares_the_first_rows_only(method):
    student, teacher = heads(vocabulary=40, trains=method != "factor")[0], heads(vocabulary=50)[1]
    states = hidden(5)
    loss = LinearLogitLoss(student, teacher, vocab_size=30, method=method)
    expected = LogitLoss()(student(states[0])[..., :30], teacher(states[1])[..., :30])
    torch.testing.assert_close(loss(*states), expected)
    if method != "factor":
        (ours,) = torch.autograd.grad(loss(*states), student.weight)
        (theirs,) = torch.autograd.grad(expected, student.weight)
        torch.testing.assert_close(ours, theirs)
        assert ours[30:].abs().max() == 0
    loss.vocab_size = 20
    expected = LogitLoss()(student(states[0])[..., :20], teacher(states[1])[..., :20])
    torch.testing.assert_close(loss(*states), expected)


def test_head_may_be_tied_to_an_embedding():
    embedding, teacher = nn.Embedding(40, 6), heads()[1]
    head = nn.Linear(6, 40, bias=False)
    head.weight = embedding.weight
    states = hidden(5)
    for student in (embedding, head):
        value = LinearLogitLoss(student, teacher)(*states)
        torch.testing.assert_close(value, by_logits((head, teacher), states))
        (ours,) = torch.autograd.grad(value, embedding.weight)
        (theirs,) = torch.autograd.grad(by_logits((head, teacher), states), embedding.weight)
        torch.testing.assert_close(ours, theirs)


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
    pair, states = heads(trains=False), hidden(5)
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


class LanguageModel(nn.Module):
    """A causal transformer whose forward gives hidden states, or logits if it is asked."""

    def __init__(self, width, vocabulary=512, *, seed=0, logits=False, tied=False):
        super().__init__()
        self.logits = logits
        self.embedding = nn.Embedding(vocabulary, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        states = self.norm(self.block(self.embedding(tokens), src_mask=causal, is_causal=True))
        return self.head(states) if self.logits else states


class Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that any operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.update(tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result

    def has_logits(self, samples, vocabulary):
        return any(vocabulary in shape and np.prod(shape) >= samples * vocabulary for shape in self.seen)


TOKENS = torch.randint(512, (4, 32), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_language_models_in_a_distiller_never_form_logits(frozen, tied):
    student, teacher = LanguageModel(16, tied=tied), LanguageModel(24, seed=1)
    student.head.requires_grad_(not frozen)
    loss = LinearLogitLoss(student.head, teacher.head)
    assert loss.plan(TOKENS.numel()).method == ("factor" if frozen else "gram")
    distiller = Distiller(student, teacher, loss, task_loss=None)
    mask = TOKENS > 100
    with Shapes() as shapes:
        out = distiller(TOKENS, mask=mask)
        out.loss.backward()
    assert not shapes.has_logits(TOKENS.numel(), 512)

    twin, giant = LanguageModel(16, logits=True, tied=tied), LanguageModel(24, seed=1, logits=True)
    twin.head.requires_grad_(not frozen)
    with Shapes() as shapes:
        expected = Distiller(twin, giant, LogitLoss(), task_loss=None)(TOKENS, mask=mask)
        expected.loss.backward()
    assert shapes.has_logits(TOKENS.numel(), 512)
    torch.testing.assert_close(out.loss, expected.loss)
    for ours, theirs in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_term_taps_the_heads_inputs():
    student, teacher = LanguageModel(16, logits=True), LanguageModel(24, seed=1, logits=True)
    loss = LinearLogitLoss(student.head, teacher.head)
    for at in ("head:input", "norm"):
        out = Distiller(student, teacher, Term(loss, at=at), task_loss=None)(TOKENS)
        torch.testing.assert_close(out.loss, LogitLoss()(student(TOKENS), teacher(TOKENS)))


def test_distiller_trains_the_students_head_once_and_never_the_teachers():
    student, teacher = LanguageModel(16), LanguageModel(24, seed=1)
    distiller = Distiller(student, teacher, LinearLogitLoss(student.head, teacher.head), task_loss=None)
    assert list(distiller.state_dict()) == [f"student.{name}" for name in student.state_dict()]
    assert len(list(distiller.parameters())) == len(list(student.parameters()))
    before = [tensor.clone() for tensor in teacher.parameters()]
    optimizer = torch.optim.Adam(distiller.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = distiller(TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(map(torch.equal, before, teacher.parameters()))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copy_of_a_distiller_refers_to_the_heads_of_its_own_models(clone):
    student, teacher = LanguageModel(16), LanguageModel(24, seed=1)
    student.head.requires_grad_(False)
    loss = LinearLogitLoss(student.head, teacher.head, method="factor")
    distiller = Distiller(student, teacher, loss, task_loss=None)
    expected = distiller(TOKENS).loss
    twin = clone(distiller)
    copied = twin.losses["distillation"]
    assert copied.student_head is twin.student.head
    assert copied.student_head is not student.head
    assert copied.teacher_head is twin.teacher.head
    assert torch.equal(twin(TOKENS).loss, expected)
    with torch.no_grad():
        twin.student.head.weight.zero_()
    assert not torch.equal(twin(TOKENS).loss, expected)
    assert torch.equal(distiller(TOKENS).loss, expected)


def test_follows_the_models_to_another_dtype():
    student, teacher = LanguageModel(16), LanguageModel(24, seed=1)
    student.head.requires_grad_(False)
    distiller = Distiller(student, teacher, LinearLogitLoss(student.head, teacher.head), task_loss=None)
    before = distiller(TOKENS).loss
    after = distiller.double()(TOKENS).loss
    assert after.dtype == torch.float64
    torch.testing.assert_close(after.float(), before)


@traces_functions
@pytest.mark.parametrize("frozen", [False, True])
def test_distiller_with_linear_heads_is_traced_whole(frozen):
    student, teacher = LanguageModel(16), LanguageModel(24, seed=1)
    student.head.requires_grad_(not frozen)
    distiller = Distiller(student, teacher, LinearLogitLoss(student.head, teacher.head), task_loss=None)
    torch.compiler.reset()
    compiled = torch.compile(distiller, fullgraph=True, backend="aot_eager")
    expected, ours = distiller(TOKENS).loss, compiled(TOKENS).loss
    torch.testing.assert_close(ours, expected)
    wanted = [parameter for parameter in student.parameters() if parameter.requires_grad]
    for a, b in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_plan_takes_the_cheapest_and_says_why():
    loss = LinearLogitLoss(*heads((64, 128), 8000))
    plan = loss.plan(4096)
    assert plan.method == "gram"
    assert set(plan.costs) == {"gram", "blocks"}
    assert plan.costs["gram"] == min(plan.costs.values())
    assert plan.reason.startswith("gram: N=4096, V=8000, 65 and 128 columns on cpu, the student's head trains; in 10^9")
    assert loss.plan(8).method == "blocks"
    loss.student_head.requires_grad_(False)
    assert loss.plan(4096).method == "factor"
    assert loss.plan(1).method == "blocks"  # too little for the factor to pay
    with torch.no_grad():
        loss.student_head.requires_grad_(True)
        assert set(loss.plan(64).costs) == {"gram", "blocks"}
    asked = LinearLogitLoss(*loss._heads, method="blocks").plan(4096)
    assert asked.method == "blocks"
    assert asked.reason.startswith("as asked for; by cost it would be gram")


@pytest.mark.parametrize("samples", [1, 40, 4000])
@pytest.mark.parametrize("trains", [False, True])
def test_plan_is_what_is_done(samples, trains, monkeypatch):
    taken = []
    for name in METHODS:
        function = getattr(distill._heads, f"by_{name}")
        monkeypatch.setattr(distill._heads, f"by_{name}", lambda *a, n=name, f=function: taken.append(n) or f(*a))
    loss = LinearLogitLoss(*heads((6, 9), 3000, trains=trains))
    loss(*hidden(samples))
    assert taken == [loss.plan(samples).method]


def test_differences_that_are_not_kept_count_twice():
    options = {"device": torch.device("cpu"), "trains": True, "may_factor": False, "keeps_teacher": True}
    fits, exceeds = (distill._gram.make_plan(n, 2**15, 512, 512, **options).costs["blocks"] for n in (2**10, 2**10 + 1))
    assert exceeds > 1.3 * fits


def test_float64_costs_more_on_most_gpus(monkeypatch):
    costs = {}
    for capability in ((9, 0), (8, 9)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        plan = distill._gram.make_plan(
            2048, 32000, 256, 512, device=torch.device("cuda"), trains=True, may_factor=False, keeps_teacher=True
        )
        costs[capability] = plan.costs["gram"]
    assert costs[8, 9] == pytest.approx(32 * costs[9, 0])


def test_devices_without_float64_take_blocks(monkeypatch):
    plan = distill._gram.make_plan(
        2048, 32000, 256, 512, device=torch.device("mps"), trains=False, may_factor=True, keeps_teacher=True
    )
    assert plan.method == "blocks"
    monkeypatch.setattr(distill._gram, "has_float64", lambda device: False)
    monkeypatch.setattr(distill._heads, "has_float64", lambda device: False)
    pair, states = heads(), hidden(5000)
    torch.testing.assert_close(LinearLogitLoss(*pair)(*states), by_logits(pair, states))
    with pytest.raises(ValueError, match="method 'gram' must have a device with float64, got cpu"):
        LinearLogitLoss(*pair, method="gram")(*states)


def test_rejects_unknown_methods():
    match = "method must be 'auto', 'factor', 'gram' or 'blocks', got 'fast'"
    with pytest.raises(ValueError, match=match):
        LinearLogitLoss(*heads(), method="fast")
    with pytest.raises(ValueError, match=match):
        linear_logit_loss(*make()[0], method="fast")


def test_rejects_a_factor_of_a_head_that_trains():
    with pytest.raises(ValueError, match="'factor' must have a student's head that needs no gradient, got one that"):
        linear_logit_loss(*make()[0], method="factor")
    with pytest.raises(ValueError, match="'factor' must have a student's head that needs no gradient, got one that"):
        LinearLogitLoss(*heads(), method="factor")(*hidden(5))


def test_rejects_different_vocabularies():
    student, teacher = heads(vocabulary=40)[0], heads(vocabulary=50)[1]
    with pytest.raises(ValueError, match="the same vocabulary, got 40 and 50 rows; vocab_size= compares the first"):
        LinearLogitLoss(student, teacher)
    with pytest.raises(ValueError, match="the same vocabulary, got 40 and 50 rows"):
        linear_logit_loss(hidden(3)[0], student.weight, hidden(3)[1], teacher.weight)
    for size in (0, 41, -1):
        with pytest.raises(ValueError, match=f"between 1 and the rows of both heads, 40 and 50, got {size}"):
            LinearLogitLoss(student, teacher, vocab_size=size)


@pytest.mark.parametrize("head", [nn.LayerNorm(6), nn.Conv2d(1, 1, 1), nn.ReLU()])
def test_rejects_modules_that_are_no_heads(head):
    with pytest.raises(ValueError, match="student_head must be a module with a matrix as weight, .*got "):
        LinearLogitLoss(head, heads()[1])
    with pytest.raises(ValueError, match="teacher_head must be a module with a matrix as weight, .*got "):
        LinearLogitLoss(heads()[0], head)


def test_rejects_a_bias_that_is_no_tensor():
    head = heads()[0]
    head.bias = None
    head.__dict__["bias"] = 1.0
    del head._parameters["bias"]
    with pytest.raises(ValueError, match="student_head must have a tensor or None as bias, got float"):
        LinearLogitLoss(head, heads()[1])


def test_rejects_hidden_states_of_another_size():
    loss = LinearLogitLoss(*heads())
    student, teacher = hidden(5)
    for bad in ((teacher, student), (student, teacher[:4]), (student[0], teacher), (torch.tensor(1.0), teacher)):
        with pytest.raises(ValueError, match=r"hidden states must have their heads' sizes, 6 and 9, .*same shape"):
            loss(*bad)


def test_rejects_bad_weights_and_biases():
    (student, weight, teacher, teacher_weight), _ = make()
    with pytest.raises(ValueError, match=r"student_weight must be a matrix \(V, d\) and not empty, got shape \(11,\)"):
        linear_logit_loss(student, weight[:, 0], teacher, teacher_weight)
    with pytest.raises(ValueError, match=r"teacher_weight must be a matrix \(V, d\) and not empty, got shape \(0, 7\)"):
        linear_logit_loss(student, weight, teacher, teacher_weight[:0])
    with pytest.raises(ValueError, match=r"heads must be floating-point, got torch.float64 and torch.int64"):
        linear_logit_loss(student, weight, teacher, teacher_weight.long())
    with pytest.raises(ValueError, match=r"student_bias must have one value per row of its weight, 11, got shape \(1,"):
        linear_logit_loss(student, weight, teacher, teacher_weight, student_bias=torch.zeros(1))
    with pytest.raises(ValueError, match=r"teacher_bias must have one value per row of its weight, 11, got shape \(\)"):
        linear_logit_loss(student, weight, teacher, teacher_weight, teacher_bias=torch.tensor(0.0))
    with pytest.raises(ValueError, match="hidden states and heads must be on the same device, got cpu and meta"):
        linear_logit_loss(student, weight, teacher, teacher_weight.to("meta"))


@pytest.mark.parametrize("samples", [0, -3])
def test_plan_rejects_no_samples(samples):
    with pytest.raises(ValueError, match=f"samples must be positive, got {samples}"):
        LinearLogitLoss(*heads()).plan(samples)


def test_repr_shows_options_and_sizes():
    assert repr(LinearLogitLoss(*heads(), reduction="sum", vocab_size=30)) == (
        "LinearLogitLoss(reduction='sum', vocab_size=30, method='auto', student_head=(40, 6), teacher_head=(40, 9))"
    )
