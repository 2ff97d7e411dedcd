"""What the divergences share: values and derivatives where a probability is 0, and digits near agreement."""

import math

import pytest
import torch

from contract import make_pair
from distill.losses._softened import divergence, expectation, not_negative

INF = math.inf


def plain(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def log_softmax_pair(*shape):
    student, teacher = make_pair(*shape)
    return student.log_softmax(-1), teacher.log_softmax(-1)


def test_divergence_is_the_formula():
    a, b = log_softmax_pair(6, 10)
    torch.testing.assert_close(divergence(a, b, -1), plain(a, b), rtol=1e-13, atol=0)
    torch.testing.assert_close(divergence(b.mT, a.mT, 0), plain(b, a), rtol=1e-13, atol=0)


def test_divergence_has_the_derivatives_of_the_formula_for_either_side():
    student, teacher = make_pair(4, 5)

    def pair(logits, swap):
        return (teacher, logits.log_softmax(-1))[:: -1 if swap else 1]

    teacher = teacher.log_softmax(-1)
    for swap in (False, True):
        ours, theirs = (
            torch.autograd.functional.hessian(lambda s, f=f, swap=swap: f(*pair(s, swap)).sum(), student.detach())
            for f in (lambda a, b: divergence(a, b, -1), plain)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("a", "b", "expected"), [
    ([0.0, 0.0, -INF], [0.0, 0.0, -INF], 0.0),
    ([0.0, 0.0, -INF], [0.0, 0.0, 0.0], math.log(1.5)),
    ([0.0, 0.0, 0.0], [0.0, 0.0, -INF], INF),
    ([0.0, -1e4, -INF], [0.0, 0.0, 0.0], math.log(3)),
    ([0.0, -90.0, -95.0], [0.0, 0.0, 0.0], math.log(3)),
    ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], 2e4),
])  # fmt: skip
def test_divergence_where_a_probability_is_0(a, b, expected):
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor(a, dtype=dtype).requires_grad_(), torch.tensor(b, dtype=dtype).requires_grad_()
        value = divergence(*(x.log_softmax(-1) for x in logits), -1)
        torch.testing.assert_close(value.item(), expected, rtol=1e-6, atol=0)
        if expected == INF:
            (of_b,) = torch.autograd.grad(value, logits[1])
            torch.testing.assert_close(of_b, (logits[1].softmax(-1) - logits[0].softmax(-1)).detach())
            continue
        first = torch.autograd.grad(value, logits, create_graph=True)
        torch.testing.assert_close(first[1], logits[1].softmax(-1) - logits[0].softmax(-1))
        second = torch.autograd.grad(sum((x * torch.arange(1, 4)).sum() for x in first), logits)
        assert all(x.isfinite().all() for x in (*first, *second))


@pytest.mark.parametrize("columns", [1000, 50257])
def test_divergence_keeps_its_digits_near_agreement(columns):
    student, teacher = make_pair(4, columns, dtype=torch.float32)
    near = (teacher + 0.05 * student.detach()).log_softmax(-1)
    teacher = teacher.log_softmax(-1)
    for a, b in ((near, teacher), (teacher, near)):
        value, exact = divergence(a, b, -1), plain(*(x.double().log_softmax(-1) for x in (a, b)))
        assert (value >= 0).all()
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    assert (divergence(teacher, teacher, -1) == 0).all()


def test_expectation_ignores_what_has_no_probability():
    p = torch.tensor([[0.25, 0.75, 0.0, 0.0]], requires_grad=True)
    x = torch.tensor([[2.0, 4.0, -INF, torch.nan]], requires_grad=True)
    value = expectation(p, x, -1)
    assert value == 3.5
    of_p, of_x = torch.autograd.grad(value, (p, x))
    assert of_p.tolist() == [[2, 4, 0, 0]]
    assert of_x.tolist() == [[0.25, 0.75, 0, 0]]


def test_what_rounding_leaves_below_0_is_0_with_the_derivatives_it_had():
    x = torch.tensor([-1e-9, 0.0, 0.5, INF, torch.nan], dtype=torch.float64, requires_grad=True)
    value = not_negative(x)
    torch.testing.assert_close(value, x.detach().clamp(min=0), equal_nan=True, rtol=0, atol=0)
    assert torch.autograd.grad(value.sum(), x)[0].tolist() == [1, 1, 1, 1, 1]
