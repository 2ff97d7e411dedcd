"""What the divergences share: values and derivatives where a probability is 0, and digits near agreement."""

import math

import pytest
import torch

from compilers import needs_compiler
from contract import gradient, make_pair
from distill import KLLoss, LogitLoss, ReverseKLLoss
from distill.losses import kl, reverse_kl
from distill.losses._mixture import Mixture, _of_one
from distill.losses._softened import divergence, expectation, expm1, not_negative

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


def divergence_of(module, student, teacher):
    """The textbook's sum and its gradient in float64, over the classes that have a probability."""
    p, q = ((x.double() / module.temperature).softmax(-1) for x in (teacher, student))
    a, b = (p, q) if isinstance(module, KLLoss) else (q, p)
    ratio = torch.where(a > 0, a.log() - b.log(), 0.0)
    value = (a * ratio).sum(-1, keepdim=True)
    slope = q - p if isinstance(module, KLLoss) else q * (ratio - value)
    return module.temperature**2 * value.squeeze(-1), module.temperature * slope


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", [KLLoss, ReverseKLLoss])
def test_classes_without_probability(form, build, dtype):
    student, teacher = make_pair(6, 10, dtype=dtype)
    student = student.detach()
    teacher[0, 3] = teacher[2, :9] = teacher[3, [0, 9]] = teacher[4, 5] = -INF
    student[1, 3] = student[2, :9] = student[3, [0, 9]] = student[4, [1, 5]] = -INF
    module = build(2.5, reduction="none")
    values = module(student, teacher)
    expected, slope = divergence_of(module, student, teacher)
    # The student's alone: nothing under kl to expect there, all under reverse_kl; the teacher's alone the other way.
    infinite = [1, 4] if build is KLLoss else [0]
    assert values.isinf().nonzero().flatten().tolist() == infinite
    assert not values.isnan().any()
    tolerance = {"rtol": 1e-12 if dtype == torch.float64 else 1e-5, "atol": 1e-12 if dtype == torch.float64 else 1e-6}
    torch.testing.assert_close(values.double(), expected, **tolerance)
    finite = [i for i in range(6) if i not in infinite]
    mask = torch.ones(6)
    mask[infinite] = 0
    for reduction in ("none", "sum"):
        ours = gradient(lambda s, r=reduction: build(2.5, reduction=r)(s, teacher, mask=mask).sum(), student)
        torch.testing.assert_close(ours[finite].double(), slope[finite], **tolerance)
        assert (ours[infinite] == 0).all()
    if build is KLLoss:  # also where the value is infinite the gradient is T (q - p)
        torch.testing.assert_close(gradient(build(2.5, reduction="sum"), student, teacher).double(), slope, **tolerance)
    first, second = hessian_rows(build(2.5), student[finite], teacher[finite])
    assert first.isfinite().all()
    assert second.isfinite().all()


def hessian_rows(module, student, teacher):
    student = student.detach().requires_grad_()
    (first,) = torch.autograd.grad(module(student, teacher), student, create_graph=True)
    return first, torch.autograd.grad((first**2).sum(), student)[0]


def test_logit_says_that_an_infinite_difference_is_none(form):
    student, teacher = (x.detach() for x in make_pair(3, 10))
    student[0, 1] = teacher[1, 1] = student[2, 1] = teacher[2, 1] = -INF
    values = LogitLoss(reduction="none")(student, teacher)
    assert values[:2].tolist() == [INF, INF]
    assert values[2].isnan()


@pytest.mark.parametrize(
    ("temperature", "columns", "share"), [(4.0, 50257, 0.01), (1000.0, 50257, 1.0), (1.0, 1000, 0.01)]
)
@pytest.mark.parametrize("build", [KLLoss, ReverseKLLoss])
def test_close_logits_keep_their_digits(form, build, temperature, columns, share):
    student, teacher = make_pair(4, columns, dtype=torch.float32)
    near = ((1 - share) * teacher + share * student.detach()).detach()
    module = build(temperature, reduction="none")
    values = module(near, teacher)
    expected, slope = divergence_of(module, near, teacher)
    assert (values > 0).all()
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=0)
    ours = gradient(build(temperature, reduction="sum"), near, teacher).double()
    assert (ours - slope).norm() <= (1e-5 if form == "blocks" else 1e-4) * slope.norm()
    # A row far apart in the same block changes nothing.
    far = near.clone()
    far[0] += 100 * temperature * student.detach()[0].abs()
    torch.testing.assert_close(module(far, teacher)[1:].double(), expected[1:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("step", [0.0, 1e-8, 1e-7, 1e-6, 1e-5])
@pytest.mark.parametrize("build", [KLLoss, ReverseKLLoss])
def test_values_are_never_negative(form, build, step):
    student, teacher = make_pair(200, 10, dtype=torch.float32)
    for temperature in (1.0, 4.0, 1000.0):
        values = build(temperature, reduction="none")(teacher + step * student.detach(), teacher)
        assert (values >= 0).all()
        assert step > 0 or (values == 0).all()


@pytest.mark.parametrize("build", [KLLoss, ReverseKLLoss])
def test_derivatives_where_student_and_teacher_agree(form, build):
    """No derivative rests on what PyTorch takes it for where a maximum or an absolute value turns: it is 0, then F."""
    _, teacher = make_pair(2, 5)
    p = (teacher[0] / 2).softmax(-1)
    expected = torch.diag(p) - torch.outer(p, p)  # Fisher's information, T^2 times 1 / T^2 of it
    module = build(2.0, reduction="sum")
    assert gradient(module, teacher, teacher).abs().max() < 1e-15
    ours = torch.autograd.functional.hessian(lambda s: module(s, teacher[:1]), teacher[:1])
    torch.testing.assert_close(ours.view(5, 5), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("module", "build"), [(kl, KLLoss), (reverse_kl, ReverseKLLoss)])
def test_the_two_forms_of_the_formula_agree_to_the_second_derivative(module, build, monkeypatch):
    student, teacher = make_pair(4, 5)
    ours = torch.autograd.functional.hessian(lambda s: build()(s, teacher), student.detach())
    monkeypatch.setattr("distill.losses._softened.may_look", lambda x: False)  # as in a compiled graph, and on a GPU
    theirs = torch.autograd.functional.hessian(lambda s: build()(s, teacher), student.detach())
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    assert module._ROWS is build.rows


@needs_compiler
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own imports, and what it calls
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_compiled_keeps_its_digits_near_agreement():
    # With vector instructions, where inductor writes torch.expm1 as exp(x) - 1.
    x = torch.cat([-torch.logspace(-6, 1.5, 256), torch.logspace(-6, 1.5, 256), torch.tensor([-math.inf, 0.0, 80.0])])

    x.requires_grad_()
    value, expected = torch.compile(expm1, fullgraph=True)(x), expm1(x)
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=0.0)
    (slope,), (wanted,) = (torch.autograd.grad(y.sum(), x) for y in (value, expected))
    torch.testing.assert_close(slope, wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("mixture", [Mixture(0.1, 1, 0), Mixture(0.9, 0, 1)])
def test_the_quick_form_of_a_skew_takes_classes_without_a_probability(mixture):
    q, p = torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.tensor([[0.0, 0.9, 0.1, 0.0]])
    x = q if mixture.of_student else p
    expected = (x * (x / (mixture.share * p + (1 - mixture.share) * q)).log()).nansum(-1)
    values = _of_one(q.clone(), p.clone(), 1.0, mixture=mixture, temperature=1.0)
    torch.testing.assert_close(values, expected)
