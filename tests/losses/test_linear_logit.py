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
    torch.testing.assert_close(values.double(), expected, rtol=1e-3 if dtype == torch.float32 else 1e-11, atol=tolerance)
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
