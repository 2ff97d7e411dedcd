"""LinearLogitLoss against the logits it never forms, formed here in NumPy."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import distill._engine.squared.classes
from contract import assert_loss_contract, gradient
from distill import LinearLogitLoss, LogitLoss, linear_logit_loss
from linear_heads import METHODS, by_logits, formed, heads, hidden, make, traces_functions


def reference(student, student_weight, teacher, teacher_weight, student_bias=0.0, teacher_bias=0.0):
    """The mean over the vocabulary of the squared difference of both heads' logits, sample by sample."""
    values = np.zeros(student.shape[:-1])
    for sample in np.ndindex(values.shape):
        s = student_weight @ student[sample] + student_bias
        t = teacher_weight @ teacher[sample] + teacher_bias
        values[sample] = ((s - t) ** 2).sum() / len(student_weight)
    return values


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
def test_equals_formed_logits_over_many_blocks(method, biases, monkeypatch):
    monkeypatch.setattr(distill._engine.squared.classes, "_LOGITS", 1000)
    inputs, options = make((37,), 3001, (8, 200), biases=biases, dtype=torch.float32, trains=method != "factor")
    wanted = [x for x in (*inputs, *options.values()) if x.requires_grad]
    weights = torch.rand(37, generator=torch.Generator().manual_seed(5))
    values = (weights * formed(*inputs, *options.values())).sum()
    expected = torch.autograd.grad(values, wanted)
    for kept in (2**25, 0):  # differences kept for backward, and formed again
        monkeypatch.setattr(distill._engine.squared.classes, "KEPT", kept)
        value = (weights * linear_logit_loss(*inputs, **options, method=method)).sum()
        torch.testing.assert_close(value, values, rtol=2e-5, atol=0)
        for ours, theirs in zip(torch.autograd.grad(value, wanted), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("method", ["gram", "blocks", "logits"])
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
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_contract(method):
    def build(**options):
        return LinearLogitLoss(*heads((10, 10), trains=method != "factor"), method=method, **options)

    assert_loss_contract(build, shape=(6, 10), moves=False)
    assert_loss_contract(build, shape=(4, 3, 10), moves=False)


@pytest.mark.parametrize("method", ["gram", "blocks", "logits"])
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
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_inside_autocast_rounds_the_products_of_all_forms_but_blocks(method, reduction):
    pair, states = heads((64, 96), 300, trains=method != "factor"), hidden(40, sizes=(64, 96))
    loss = LinearLogitLoss(*pair, method=method, reduction=reduction)
    wanted = [states[0]] if method == "factor" else [states[0], *pair[0].parameters()]
    expected = torch.autograd.grad(loss(*states).mean(), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = torch.autograd.grad(loss(*states).mean(), wanted)
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(rounded, expected, strict=True)]
    assert max(errors) < 0.02
    assert (max(errors) < 1e-6) is (method == "blocks")


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


def test_small_problems_read_no_value():
    student, teacher = (head.to("meta") for head in heads())
    states = (state.detach().to("meta") for state in hidden(5))
    LinearLogitLoss(student, teacher)(*states).backward()  # on the meta device every read of a value raises
    assert student.weight.grad.shape == student.weight.shape


def test_rejects_unknown_methods():
    match = "method must be 'auto', 'factor', 'gram', 'blocks' or 'logits', got 'fast'"
    with pytest.raises(ValueError, match=match):
        LinearLogitLoss(*heads(), method="fast")
    with pytest.raises(ValueError, match=match):
        linear_logit_loss(*make()[0], method="fast")


def test_rejects_a_factor_of_a_head_that_trains():
    with pytest.raises(ValueError, match="'factor' must have a student's head that needs no gradient, got one that"):
        linear_logit_loss(*make()[0], method="factor")
    with pytest.raises(ValueError, match="'factor' must have a student's head that needs no gradient, got one that"):
        LinearLogitLoss(*heads(), method="factor")(*hidden(5))
    with pytest.raises(ValueError, match="'factor' must have a student's head that needs no gradient, got one that"):
        LinearLogitLoss(*heads(), method="factor").plan(5)


def test_rejects_different_vocabularies():
    student, teacher = heads(vocabulary=40)[0], heads(vocabulary=50)[1]
    with pytest.raises(ValueError, match="the same vocabulary, got 40 and 50 rows; vocab_size= compares the first"):
        LinearLogitLoss(student, teacher)
    with pytest.raises(ValueError, match="the same vocabulary, got 40 and 50 rows"):
        linear_logit_loss(hidden(3)[0], student.weight, hidden(3)[1], teacher.weight)
    for size in (0, 41, -1, 2.5, True):
        with pytest.raises(ValueError, match=f"an integer between 1 and the rows of both heads, 40 and 50, got {size}"):
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
        "LinearLogitLoss(method='auto', student_scale=1.0, teacher_scale=1.0, reduction='sum', vocab_size=30, "
        "student_head=(40, 6), teacher_head=(40, 9))"
    )
