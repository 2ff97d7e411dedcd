"""LogitStdLoss against the formula of Sun, Ren, Li, Wang and Cao (2024)."""

import math

import numpy as np
import pytest
import torch

from contract import assert_loss_contract, gradient, make_pair
from distill import LogitStdLoss, kl_loss, logit_std_loss

pytestmark = pytest.mark.usefixtures("form")


def standardise(logits):
    return (logits - logits.mean()) / (logits.std(ddof=1) + 1e-7)


def reference(student, teacher, temperature, axis=-1):
    """T^2 times the sum of p log(p / q), p and q softmaxes of standardised logits, sample by sample."""
    s, t = np.moveaxis(student, axis, -1), np.moveaxis(teacher, axis, -1)
    values = np.zeros(s.shape[:-1])
    for sample in np.ndindex(values.shape):
        q = np.exp(standardise(s[sample]) / temperature)
        p = np.exp(standardise(t[sample]) / temperature)
        q, p = q / q.sum(), p / p.sum()
        values[sample] = temperature**2 * sum(p[c] * math.log(p[c] / q[c]) for c in range(len(p)))
    return values


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("shape", "dim"), [((5, 10), -1), ((5, 2), 1), ((3, 4, 7), -1), ((2, 5, 3, 4), 1)])
def test_matches_reference(shape, dim, temperature):
    student, teacher = make_pair(*shape)
    expected = torch.as_tensor(reference(student.detach().numpy(), teacher.numpy(), temperature, dim))
    values = logit_std_loss(student, teacher, temperature=temperature, dim=dim).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    value = LogitStdLoss(temperature, dim=dim)(student, teacher).detach()
    torch.testing.assert_close(value, expected.mean(), rtol=1e-12, atol=1e-12)


def test_temperature_is_2_by_default():
    student, teacher = make_pair(5, 10)
    expected = torch.from_numpy(reference(student.detach().numpy(), teacher.numpy(), 2.0))
    torch.testing.assert_close(logit_std_loss(student, teacher).detach(), expected, rtol=1e-12, atol=1e-12)
    values = LogitStdLoss(reduction="none")(student, teacher).detach()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


def test_gradient():
    student, teacher = make_pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: logit_std_loss(s, teacher), student)
    assert torch.autograd.gradgradcheck(lambda s: logit_std_loss(s, teacher), student)


def test_contract():
    assert_loss_contract(LogitStdLoss, shape=(6, 10))
    assert_loss_contract(lambda **options: LogitStdLoss(3.0, dim=1, **options), shape=(4, 5, 3, 2))


def test_is_kl_of_the_standardised_logits():
    pair = make_pair(6, 10)
    standardised = [torch.tensor(np.stack([standardise(row) for row in x.detach().numpy()])) for x in pair]
    torch.testing.assert_close(logit_std_loss(*pair).detach(), kl_loss(*standardised, temperature=2.0))


def test_does_not_count_shifts_and_scales():
    student, teacher = make_pair(6, 10)
    moved = logit_std_loss(3 * student + 5, teacher / 7 - 3)
    torch.testing.assert_close(moved, logit_std_loss(student, teacher), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(logit_std_loss(-student, teacher), logit_std_loss(student, teacher))


def test_zero_when_equal_and_positive_otherwise():
    student, teacher = make_pair(6, 10)
    assert LogitStdLoss()(student, student.detach()) == 0
    assert (logit_std_loss(student, teacher) > 0).all()


@pytest.mark.parametrize("level", [0.0, 0.1, 1e4])
def test_finite_where_all_logits_are_equal(level):
    student = torch.full((2, 3), level, requires_grad=True)
    value = LogitStdLoss()(student, torch.tensor([[1.0, 2.0, 3.0], [level, level, level]]))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_finite_on_extreme_logits():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = LogitStdLoss()(student, -student.detach())
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


EXTREME = [
    [-1.0, 1.0, 2.0],  # times the smallest number there is
    [-1.0, -1.0, -1.0],
    [-1.0, -1.0, 0.0],
    [1.0, 1.0, 0.5],
    [1.0, -1.0, 0.0],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", EXTREME)
def test_logits_as_large_as_there_are(shape, dtype):
    """As the same at 1e6, since stretching changes nothing."""
    other = torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype)
    scale = torch.finfo(dtype).max / 2
    logits = torch.tensor([shape], dtype=dtype)
    for factor in (scale, scale / 1e6, 1e25):
        for side in (0, 1):
            pair = [factor * logits, other] if side == 0 else [other, factor * logits]
            expected = [1e6 * logits, other] if side == 0 else [other, 1e6 * logits]
            student = pair[0].requires_grad_()
            value = LogitStdLoss()(student, pair[1])
            torch.testing.assert_close(value, LogitStdLoss()(*expected), rtol=1e-5, atol=0)
            value.backward()
            assert student.grad.isfinite().all()
            pair[0].requires_grad_(False)


def test_smallest_number_among_ordinary_ones():
    lowest = torch.finfo(torch.float32).min
    other = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    for row in ([lowest, 1.0, 2.0, 3.0], [lowest, lowest, 0.0, 1.0], [lowest] * 4, [lowest, -lowest, 0.0, 1.0]):
        student = torch.tensor([row], requires_grad=True)
        value = LogitStdLoss()(student, other)
        expected = LogitStdLoss()(1e-30 * student.detach().double(), other.double())
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
        value.backward()
        assert student.grad.isfinite().all()
        assert LogitStdLoss()(other, student.detach()).isfinite()


@pytest.mark.parametrize("level", [0.0, 0.1, 1e-42, 1e4])
def test_gradient_where_all_logits_are_equal(level):
    """There the standard deviation has no derivative, but the formula has: T (q - p) / 1e-7, and q is even."""
    student = torch.full((2, 4), level, requires_grad=True)
    teacher = torch.tensor([[1.0, 2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 5.0]])
    LogitStdLoss(reduction="sum")(student, teacher).backward()
    p = torch.tensor(np.stack([standardise(row) for row in teacher.double().numpy()])).div(2).softmax(-1)
    torch.testing.assert_close(student.grad.double(), 2 * (0.25 - p) / 1e-7, rtol=1e-4, atol=1.0)


def test_gradient_of_numbers_too_small_to_square():
    student = (torch.tensor([[1.0, 2.0, 3.0]]) * 1e-30).requires_grad_()
    teacher = torch.tensor([[3.0, 1.0, 2.0]])
    LogitStdLoss()(student, teacher).backward()
    exact = student.detach().double().requires_grad_()
    LogitStdLoss()(exact, teacher.double()).backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-5, atol=0)


def test_a_class_at_minus_infinity_is_none_of_those_that_are_standardised():
    student, teacher = (x.detach() for x in make_pair(4, 6))
    masked = [torch.nn.functional.pad(x, (1, 2), value=-math.inf) for x in (student, teacher)]
    loss = LogitStdLoss(reduction="none")
    masked[0].requires_grad_()
    values = loss(*masked)
    torch.testing.assert_close(values.detach(), loss(student, teacher), rtol=1e-12, atol=1e-14)
    (result,) = torch.autograd.grad(values.sum(), masked[0])
    torch.testing.assert_close(result[:, 1:-2], gradient(lambda s: loss(s, teacher).sum(), student))
    assert (result[:, [0, -2, -1]] == 0).all()


def test_a_class_that_one_side_alone_has_at_minus_infinity():
    # The teacher's z are -+ 0.7071 and p is softmax of half of that; the student has a third class.
    student = torch.tensor([[-1.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[3.0, -3.0, -math.inf]], dtype=torch.float64)
    p = torch.tensor([0.5**0.5, -(0.5**0.5)], dtype=torch.float64).div(2).softmax(0)
    q = torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64).div(2).softmax(0)
    value = logit_std_loss(student, teacher)
    torch.testing.assert_close(value, 4 * (p * (p / q[:2]).log()).sum()[None], rtol=1e-6, atol=0)
    value.sum().backward()
    assert student.grad.isfinite().all()
    swapped = teacher.clone().requires_grad_()
    value = logit_std_loss(swapped, student.detach())
    assert value.item() == math.inf  # the student gives no probability where the teacher does
    value.sum().backward()
    assert swapped.grad.isfinite().all()


def test_one_class_left_takes_all():
    alone = torch.tensor([[5.0, -math.inf, -math.inf]], requires_grad=True)
    value = logit_std_loss(alone, alone.detach())
    assert value.item() == 0
    value.sum().backward()
    assert (alone.grad == 0).all()


def test_what_the_mask_hides_counts_nowhere():
    student, teacher = (x.detach() for x in make_pair(6, 10))
    mask = torch.tensor([True, False, True, True, False, True])
    expected = gradient(LogitStdLoss(), student, teacher, mask=mask)
    value = LogitStdLoss()(student, teacher, mask=mask)
    for bad in (math.nan, math.inf, -math.inf):
        spoilt = [x.masked_fill(~mask[:, None], bad) for x in (student, teacher)]
        assert torch.equal(LogitStdLoss()(*spoilt, mask=mask), value)
        assert torch.equal(gradient(LogitStdLoss(), *spoilt, mask=mask), expected)


def test_keeps_its_digits_where_student_and_teacher_are_close():
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(4, 5000, generator=generator)
    student = teacher + 1e-3 * torch.randn(4, 5000, generator=generator)
    exact = logit_std_loss(student.double(), teacher.double())
    torch.testing.assert_close(logit_std_loss(student, teacher).double(), exact, rtol=1e-3, atol=0)


def test_rejects_what_is_no_tensor_and_a_dimension_that_is_not_clear():
    student, teacher = make_pair(6, 10)
    with pytest.raises(TypeError, match="teacher must be a tensor, got ndarray"):
        logit_std_loss(student, teacher.numpy())
    with pytest.raises(ValueError, match="dim must be given for logits of four dimensions or more"):
        logit_std_loss(*make_pair(2, 5, 3, 4))


def test_rejects_a_single_class():
    with pytest.raises(ValueError, match=r"at least 2 classes along dim -1, got shape \(6, 1\)"):
        logit_std_loss(*make_pair(6, 1))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bad_temperatures(temperature):
    match = f"temperature must be positive and finite, got {temperature}"
    with pytest.raises(ValueError, match=match):
        LogitStdLoss(temperature=temperature)
    with pytest.raises(ValueError, match=match):
        logit_std_loss(*make_pair(6, 10), temperature=temperature)


def test_repr_shows_options():
    assert repr(LogitStdLoss(3.0, reduction="none")) == "LogitStdLoss(temperature=3.0, reduction='none', dim=None)"
