"""LinearLoss at its edges: dtypes that are mixed, narrow or autocast; weights and options that learn; few classes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill import (
    CrossEntropyLoss,
    KLLoss,
    LinearCrossEntropyLoss,
    LinearLogitLoss,
    LinearLoss,
    LogitLoss,
    TopK,
    linear_logit_loss,
)

HALF = torch.half


def heads(vocabulary=7, widths=(4, 6), dtype=torch.float64):
    torch.manual_seed(0)
    return [nn.Linear(width, vocabulary).to(dtype) for width in widths]


def states(samples=5, dtype=torch.float64):
    torch.manual_seed(1)
    return [torch.randn(samples, width).to(dtype).requires_grad_() for width in (4, 6)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_that_learn_get_the_gradient_of_a_cross_entropy_over_some_labels(reduction):
    (ours, theirs), (student, teacher) = heads(), states()
    labels = torch.tensor([1, -100, 3, -100, 6])
    weights = torch.tensor([0.3, 0.9, 0.0, 0.5, 0.7]).double().requires_grad_()
    loss = LinearLoss(KLLoss(2.0, reduction=reduction), ours, theirs, cross_entropy=0.7)
    found = loss(student, teacher, labels, mask=weights).sum()
    soft = KLLoss(2.0, reduction="none")(ours(student), theirs(teacher))
    hard = F.cross_entropy(ours(student), labels, reduction="none")
    expected = (weights * (soft + 0.7 * hard)).sum()
    if reduction == "mean":
        labelled = weights * (labels >= 0)
        expected = (weights * soft).sum() / weights.sum() + 0.7 * (weights * hard).sum() / labelled.sum()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    counted = weights.detach() != 0  # a weight of 0 hides its sample
    gradients = [torch.autograd.grad(value, weights)[0][counted] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_an_option_that_learns_gets_its_gradient():
    class Learned(KLLoss):
        def __init__(self):
            super().__init__()
            self.log_temperature = nn.Parameter(torch.tensor(0.5).double())

        def given(self):
            return {"temperature": self.log_temperature.exp()}

    (ours, theirs), (student, teacher), loss = heads(), states(), Learned()
    (found,) = torch.autograd.grad(LinearLoss(loss, ours, theirs)(student, teacher), loss.log_temperature)
    (expected,) = torch.autograd.grad(loss(ours(student), theirs(teacher)), loss.log_temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [True, False])
def test_gradients_in_half_survive_until_the_scaler(autocast):
    ours, theirs = heads(512, (4, 4), torch.float32)
    if not autocast:
        ours.to(HALF)  # a head in half behind states in float32
    wide = nn.Linear(4, 512)
    wide.load_state_dict(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():  # nearly agree: each number of the gradient is small
        theirs.weight += (0.05 if autocast else 1e-5) * torch.randn(512, 4)
    student = states(512, torch.float32)[0]
    expected = torch.autograd.grad(KLLoss(1.0)(wide(student), theirs(student)), [student, wide.weight])
    with torch.autocast("cpu", dtype=HALF, enabled=autocast):
        value = LinearLoss(KLLoss(1.0), ours, theirs)(student, student)
    factor = 2.0**14 if autocast else 2.0**20
    for found, exact in zip(torch.autograd.grad(value * factor, [student, ours.weight]), expected, strict=True):
        assert (found.double() / factor - exact).norm() < 0.01 * exact.norm()


def test_autocast_leaves_float64_alone():
    (ours, theirs), (student, teacher) = heads(), states()
    loss = LinearLoss(KLLoss(), ours, theirs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
    torch.testing.assert_close(value, loss(student, teacher), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
def test_states_and_heads_of_two_dtypes_serve_what_takes_formed_logits_too(dtype):
    (ours, theirs), (student, teacher) = heads(dtype=torch.float32), states(dtype=dtype)
    loss = LinearLoss(KLLoss(), ours, theirs)
    weights = torch.ones(5, requires_grad=True)
    formed = KLLoss()(ours(student.float()), theirs(teacher.float()))
    torch.testing.assert_close(loss(student, teacher, mask=weights), formed)
    (gradient,) = torch.autograd.grad(loss(student, teacher), student, create_graph=True)
    gradient.float().square().sum().backward()
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()


def test_labels_in_unsigned_bytes_are_not_taken_for_ignored():
    (head, _), (student, _) = heads(200), states(3)
    labels = torch.tensor([156, 3, 100])  # as a byte, -100 is 156
    expected = F.cross_entropy(head(student), labels)
    for found in (
        LinearCrossEntropyLoss(head)(student, labels.byte()),
        LinearLoss(KLLoss(), head, head, cross_entropy=1.0)(student, student, labels.byte()),
        CrossEntropyLoss()(head(student), labels.byte()),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_softmax_over_one_class_is_refused():
    ours, theirs = heads(1)
    student, teacher = states(3)
    for build in (
        lambda: LinearLoss(KLLoss(), ours, theirs),
        lambda: LinearLoss(KLLoss(), *heads(7), vocab_size=1),
    ):
        with pytest.raises(ValueError, match="at least 2 classes to compare, got 1"):
            build()
    labels = torch.zeros(3, dtype=torch.int64)
    for loss, given in (
        (LinearCrossEntropyLoss(ours), (student, labels)),
        (LinearLoss(LogitLoss(), ours, theirs, cross_entropy=1.0), (student, teacher, labels)),
    ):
        with pytest.raises(ValueError, match="cross-entropy must have at least 2 classes, got a head of 1"):
            loss(*given)
    one = LinearLoss(LogitLoss(), ours, theirs)(student, teacher)  # needs no softmax
    torch.testing.assert_close(one, LogitLoss()(ours(student), theirs(teacher)))


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    ("bias", "match"),
    [
        (torch.zeros(1), r"_head must have a bias of one number a row, 7, got shape \(1,\)"),
        (torch.zeros(7, 1), r"_head must have a bias of one number a row, 7, got shape \(7, 1\)"),
        (torch.zeros(()), r"_head must have a bias of one number a row, 7, got shape \(\)"),
        (torch.arange(7), "_head must have a floating-point bias, got torch.int64 in Linear"),
        (torch.zeros(7).to(torch.float8_e5m2), "the bias of .*_head must have 16 bits or more a number"),
    ],
)
def test_rejects_biases_that_are_none(side, bias, match):
    pair = heads()
    head = pair[side == "teacher"]
    del head.bias
    head.bias = bias
    for cls in (LinearLoss, LinearLogitLoss):
        with pytest.raises(ValueError, match=match):
            cls(KLLoss(), *pair) if cls is LinearLoss else cls(*pair)


def test_rejects_numbers_of_8_bits():
    narrow = torch.ones(5, 4).to(torch.float8_e4m3fn)
    ours, theirs = heads(dtype=torch.float32)
    (student, teacher), labels = states(dtype=torch.float32), torch.zeros(5, dtype=torch.int64)
    topk = TopK.of(theirs(teacher), 2)
    frozen = nn.Linear(4, 7)
    frozen.weight = nn.Parameter(frozen.weight.detach().to(narrow.dtype), requires_grad=False)
    for who, call in {
        "the student's hidden states": lambda: LinearLoss(KLLoss(), ours, theirs)(narrow, teacher),
        "the teacher's hidden states": lambda: LinearLoss(KLLoss(), theirs, ours)(teacher, narrow),
        "the weight of student_head": lambda: LinearLoss(KLLoss(), frozen, theirs),
        "the weight of teacher_head": lambda: LinearLogitLoss(ours, frozen),
        "hidden states and heads": lambda: linear_logit_loss(narrow, ours.weight, teacher, theirs.weight),
        "log_probs": lambda: topk.to(narrow.dtype),
        "student": lambda: KLLoss(1.0)(narrow, TopK.of(student, 2)),
        "logits": lambda: TopK.of(narrow, 2),
    }.items():
        with pytest.raises(ValueError, match=f"^{who} must have 16 bits or more a number, got torch.float8_e4m3fn"):
            call()
    with pytest.raises(ValueError, match="^log_probs must have 16 bits or more"):
        TopK(topk.indices, topk.log_probs.to(narrow.dtype))
    with pytest.raises(ValueError, match="^logits must have 16 bits or more"):
        CrossEntropyLoss()(narrow, labels)


def test_rejects_what_is_not_dense():
    ours, theirs = heads(dtype=torch.float32)
    student, teacher = (tensor.detach() for tensor in states(dtype=torch.float32))
    sparse, other = student.to_sparse(), teacher.to_sparse()
    topk = TopK.of(student, 2)
    for who, call in {
        "the student's hidden states": lambda: LinearLoss(KLLoss(), ours, theirs)(sparse, teacher),
        "the teacher's hidden states": lambda: LinearLoss(KLLoss(), ours, theirs)(student, other),
        "student": lambda: KLLoss(1.0)(sparse, topk),
        "logits": lambda: TopK.of(sparse, 2),
        "log_probs": lambda: TopK(topk.indices, topk.log_probs.to_sparse()),
    }.items():
        with pytest.raises(ValueError, match=f"^{who} must be dense .torch.strided., got torch.sparse_coo"):
            call()
