"""TopK: what its rows are, and the divergences of k + 1 classes against NumPy."""

import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import distill
import topk as topk_benchmark
from contract import gradient, make_pair
from distill import Distiller, KLLoss, LinearLoss, ReverseKLLoss, TeacherOutput, Term, TopK
from distill._engine import fused
from distill._engine import linear as engine_linear
from measure import quartiles

INF = math.inf
T = 2.0
V = 13


def kl(p, q):
    return sum(a * math.log(a / b) if b > 0 else INF for a, b in zip(p, q, strict=True) if a > 0)


def mix(share, p, q):
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def js(p, q, beta=0.3):
    m = mix(beta, p, q)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def tvd(p, q):
    return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


def alpha_beta(p, q, alpha=0.4, beta=0.7):
    total = alpha + beta
    terms = [alpha / total * a**total + beta / total * b**total - a**alpha * b**beta for a, b in zip(p, q, strict=True)]
    return sum(terms) / (alpha * beta)


# The loss, and its value for the two distributions, without the factor T^2 where it has one.
DIVERGENCES = {
    "kl": ({}, kl, 2),
    "reverse_kl": ({}, lambda p, q: kl(q, p), 2),
    "js": ({"beta": 0.3}, js, 2),
    "skew_kl": ({"alpha": 0.2}, lambda p, q: kl(p, mix(0.2, p, q)), 2),
    "skew_reverse_kl": ({"alpha": 0.2}, lambda p, q: kl(q, mix(0.8, p, q)), 2),
    "tvd": ({}, tvd, 0),
    "alpha_beta": ({"alpha": 0.4, "beta": 0.7}, alpha_beta, 0),
}
each = pytest.mark.parametrize("name", DIVERGENCES)
both_forms = pytest.mark.usefixtures("form")


def build(name, temperature=T, **options):
    return distill.create_loss(name, **DIVERGENCES[name][0], temperature=temperature, **options)


def merge(logits, indices, temperature=T):
    """The probabilities of the given classes, and of all others together; none if there are no others."""
    e = np.exp(logits / temperature - (logits / temperature).max())
    p = e / e.sum()
    others = [p[c] for c in range(len(p)) if c not in indices]
    return [p[i] for i in indices] + ([math.fsum(others)] if others else [])


def reference(name, student, teacher, indices, temperature=T):
    """Row by row, from the definitions."""
    _, divergence, power = DIVERGENCES[name]
    rows = zip(*(np.asarray(x.detach()) for x in (student, teacher, indices)), strict=True)
    values = [temperature**power * divergence(merge(t, i, temperature), merge(s, i, temperature)) for s, t, i in rows]
    return torch.tensor(values, dtype=torch.float64)


@both_forms
@pytest.mark.parametrize("k", [1, 3, 9, 10])
@each
def test_matches_the_definition(name, k):
    student, teacher = make_pair(5, 10)
    topk = TopK.of(2 * teacher, k, temperature=T)
    values = build(name, reduction="none")(student, topk)
    torch.testing.assert_close(
        values.detach(), reference(name, student, 2 * teacher, topk.indices), rtol=1e-12, atol=1e-12
    )
    function = getattr(distill, f"{name}_loss")
    assert torch.equal(function(student, topk, temperature=T, **DIVERGENCES[name][0]), values)


@both_forms
@each
def test_gradient(name):
    student, teacher = make_pair(2, 5)
    topk = TopK.of(teacher, 2, temperature=T)
    loss = build(name, reduction="none")
    assert torch.autograd.gradcheck(lambda s: loss(s, topk), student)
    assert torch.autograd.gradgradcheck(lambda s: loss(s, topk), student)


@both_forms
@each
def test_all_classes_are_the_dense_loss(name):
    student, teacher = make_pair(5, 10)
    loss = build(name)
    for k in (9, 10):  # a rest of one class is that class
        topk = TopK.of(teacher, k, temperature=T)
        torch.testing.assert_close(loss(student, topk), loss(student, teacher), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            gradient(loss, student, topk), gradient(loss, student, teacher), rtol=1e-12, atol=1e-14
        )


@both_forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@each
def test_no_gradient_where_student_and_teacher_agree(name, dtype):
    student = 3 * make_pair(12, 30, dtype=dtype)[1]
    for k in (1, 4, 30):
        slope = gradient(build(name, reduction="sum"), student.requires_grad_(), TopK.of(student, k, temperature=T))
        # Exactly, but for the mixtures, which round on the way to the logits.
        assert slope.abs().max() <= (0 if name in ("kl", "reverse_kl", "tvd") else 4 * torch.finfo(dtype).eps)


def test_a_renormalised_teacher_has_a_gradient_where_student_and_teacher_agree():
    student = make_pair(5, 10)[0]
    topk = TopK.of(student, 3, temperature=T)
    renormalised = TopK(topk.indices, topk.log_probs.log_softmax(-1), temperature=T)
    assert gradient(KLLoss(T, reduction="sum"), student, renormalised).abs().max() > 0.1


# The alpha-beta divergence is one of Csiszar's, which merging cannot raise, only where the exponents sum to 1.
BOUNDED = {
    **{name: options for name, (options, _, _) in DIVERGENCES.items()},
    "alpha_beta": {"alpha": 0.4, "beta": 0.6},
}


@each
def test_is_a_lower_bound_that_rises_with_k(name):
    @settings(derandomize=True, deadline=None, database=None, max_examples=25)
    @given(st.integers(0, 10**6), st.integers(2, 40), st.floats(0.1, 8), st.floats(0.3, 8))
    def check(seed, classes, size, temperature):
        student, teacher = (size * x.detach() for x in make_pair(4, classes, seed=seed))
        loss = distill.create_loss(name, **BOUNDED[name], temperature=temperature, reduction="none")
        values = [
            loss(student, TopK.of(teacher, k, temperature=temperature)) for k in sorted({1, classes // 2 or 1, classes})
        ]
        values.append(loss(student, teacher))
        for less, more in itertools.pairwise(values):
            assert (less <= more + 1e-12 * (1 + more)).all()

    check()


def test_other_exponents_are_no_lower_bound():
    student, teacher = torch.tensor([[0.4, 0.3, 0.3]]).log(), torch.tensor([[0.8, 0.1, 0.1]]).log()
    loss = distill.AlphaBetaLoss(1.0, 1.0)  # half the squared distance
    assert loss(student, TopK.of(teacher, 1)) > loss(student, teacher)


@both_forms
@each
def test_reductions_masks_and_denominators_are_those_of_the_dense_loss(name):
    student, teacher = make_pair(3, 4, 8)
    topk = TopK.of(teacher, 8, temperature=T)
    mask = torch.arange(12).view(3, 4) % 3 > 0
    for weights in (None, mask, mask * 0.7, torch.zeros(3, 4)):
        for reduction in ("mean", "sum", "none"):
            loss = build(name, reduction=reduction)
            ours, dense = (loss(student, side, mask=weights) for side in (topk, teacher))
            torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
    loss = build(name)
    ours, dense = (loss(student, side, mask=mask, denominator=5) for side in (topk, teacher))
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
    maps = student.movedim(-1, 1)  # rows in another dimension
    torch.testing.assert_close(build(name, dim=1)(maps, topk), loss(student, teacher), rtol=1e-12, atol=1e-12)


@both_forms
@each
def test_what_the_mask_hides_may_be_anything(name):
    student, teacher = make_pair(6, 10)
    topk, kept = TopK.of(teacher, 3, temperature=T), torch.arange(6) % 2 > 0
    spoilt = student.detach().masked_fill(~kept[:, None], math.nan).requires_grad_()
    padded = TopK(
        topk.indices.masked_fill(~kept[:, None], -100), topk.log_probs.masked_fill(~kept[:, None], math.nan),
        topk.log_tail.masked_fill(~kept, INF), temperature=T,
    )  # fmt: skip
    for loss in (build(name), build(name, reduction="none")):
        value = loss(spoilt, padded, mask=kept)
        torch.testing.assert_close(value, loss(student, topk, mask=kept), rtol=1e-14, atol=1e-16)
        (slope,) = torch.autograd.grad(value.sum(), spoilt)
        expected = torch.autograd.grad(loss(student, topk, mask=kept).sum(), student)[0]
        torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-16)
        assert slope[~kept].abs().max() == 0


@both_forms
@each
def test_probabilities_of_0(name):
    student, teacher = make_pair(4, 6)
    teacher = teacher.clone()
    teacher[0, 2:] = -INF  # one bucket with no mass, and it is the rest
    teacher[1, 1:] = -INF  # ties among classes of no mass are given
    teacher[2, 3] = -INF
    topk = TopK.of(teacher, 2, temperature=T)
    assert topk.log_tail[0] == -INF
    values = build(name, reduction="none")(student, topk)
    expected = reference(name, student, teacher, topk.indices)
    assert (expected == INF).tolist() == [name == "reverse_kl"] * 2 + [False] * 2
    torch.testing.assert_close(values.detach(), expected, rtol=1e-12, atol=1e-12)
    kept = expected < INF
    assert gradient(build(name), student, topk, mask=kept).isfinite().all()

    none = student.detach().clone()  # the student's rest, one of its classes, and all but one of them
    none[0, [c for c in range(6) if c not in topk.indices[0]]] = -INF
    none[1, 0] = none[2, [0, 1, 3, 4, 5]] = -INF
    none.requires_grad_()
    values, expected = build(name, reduction="none")(none, topk), reference(name, none, teacher, topk.indices)
    torch.testing.assert_close(values.detach(), expected, rtol=1e-12, atol=1e-12)
    assert gradient(build(name), none, topk, mask=expected < INF).isfinite().all()


@both_forms
@each
def test_extreme_logits(name):
    student, teacher = make_pair(4, 30, dtype=torch.float32)
    for ours, theirs in ((1e4, 1.0), (1.0, 1e4), (1e4, 1e4)):
        rows = (ours * student.detach()).requires_grad_()
        topk = TopK.of(theirs * teacher, 3, temperature=T)
        loss = build(name)
        exact = loss(rows.double(), TopK(topk.indices, topk.log_probs.double(), topk.log_tail.double(), T))
        torch.testing.assert_close(loss(rows, topk), exact.float(), rtol=1e-5, atol=1e-6)
        if exact.isfinite():
            assert gradient(loss, rows, topk).isfinite().all()


@both_forms
def test_the_rest_keeps_its_digits_where_it_is_little():
    # The rest has 1e-9 of the probability: what float32 leaves of one would be 0.
    student, teacher = (torch.tensor([[0.0, -20.0 - d, -21.5, -22.0]]) for d in (0.0, 1.0))
    value = distill.reverse_kl_loss(student, TopK.of(teacher, 1))
    exact = reference("reverse_kl", student.double(), teacher.double(), torch.zeros(1, 1).long(), 1.0)
    torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=0)
    assert value > 0


def test_ties_are_broken_into_different_classes():
    topk = TopK.of(torch.zeros(4, 9), 5).check(9)
    torch.testing.assert_close(topk.log_probs.exp(), torch.full((4, 5), 1 / 9))
    torch.testing.assert_close(topk.log_tail.exp(), torch.full((4,), 4 / 9))


def test_nan_in_the_student_shows_and_in_the_teacher_is_refused():
    student, teacher = make_pair(2, 6)
    topk = TopK.of(teacher, 2, temperature=T)
    assert build("kl")(student.detach().masked_fill(torch.eye(2, 6).bool(), math.nan), topk).isnan()
    broken = TopK.of(teacher.masked_fill(torch.eye(2, 6).bool(), math.nan), 2, temperature=T)
    with pytest.raises(ValueError, match=r"log_probs of a TopK must be logarithms of probabilities.* nan"):
        build("kl")(student, broken)


# --- the rows ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_in_half_precision_sum_to_one(dtype):
    for size in (0.5, 2.0, 8.0, 30.0):
        wide = TopK.of(size * make_pair(500, 300, dtype=torch.float32)[1], 16)
        for half in (wide.to(dtype), TopK(wide.indices, wide.to(dtype).log_probs)):
            assert half.dtype == dtype
            assert half.log_tail.dtype == torch.float32
            total = half.log_probs.double().exp().sum(-1) + half.log_tail.double().exp()
            torch.testing.assert_close(total, torch.ones(500).double(), rtol=0, atol=1e-6)
            half.check(300)
        # As near as it can be, but for rows whose rest would lose its probability.
        near = wide.log_probs.to(dtype)
        moved = (wide.to(dtype).log_probs != near).any(-1)
        assert (wide.to(dtype).log_tail.exp() >= 0.5 * wide.log_tail.exp() * (1 - 1e-6)).all()
        assert moved.float().mean() < 1
        assert (wide.to(dtype).log_probs <= near).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_peaked_row_in_half_precision_keeps_a_rest(dtype):
    wide = TopK.of(torch.tensor([[6.3, 5.5, 5.8, -9.0, -9.5]]), 3)
    assert wide.log_probs.to(dtype).double().exp().sum(-1) > 1  # the nearest would leave nothing
    assert wide.to(dtype).log_tail.exp() >= wide.log_tail.exp()
    assert ReverseKLLoss()(torch.zeros(1, 5), wide.to(dtype)).isfinite()


def test_the_tail_that_is_not_given_is_what_the_rows_leave():
    topk = TopK(torch.tensor([[0, 2], [1, 0]]), torch.tensor([[0.5, 0.25], [0.75, 0.25]]).log())
    torch.testing.assert_close(topk.log_tail, torch.tensor([math.log(0.25), -INF]))


def test_indexing_reshaping_and_moving_keep_the_rows_together():
    topk = TopK.of(make_pair(3, 4, 9)[1], 2, temperature=T)
    assert (topk.shape, topk.k, len(topk), topk.dtype, topk.device.type) == ((3, 4), 2, 3, torch.float64, "cpu")
    mask = torch.arange(12).view(3, 4) % 2 > 0
    for index in (1, slice(1, 3), mask, (slice(None), 2), (..., 0), (1, ...), (mask.nonzero()[:, 0], 1), None):
        part = topk[index]
        assert part.log_tail.shape == torch.empty(3, 4)[index].shape == part.shape
        assert part.indices.shape == part.log_probs.shape == (*part.shape, 2)
        assert part.temperature == T
        places = torch.arange(12).view(3, 4)[index].reshape(-1)
        assert torch.equal(part.indices.reshape(-1, 2), topk.indices.view(12, 2)[places])
        assert torch.equal(part.log_probs.reshape(-1, 2), topk.log_probs.view(12, 2)[places])
    for flat in (topk.reshape(-1), topk.reshape(12), topk.reshape((6, 2)).reshape([12])):
        assert torch.equal(flat.indices, topk.indices.view(12, 2))
    assert topk.to("meta").log_tail.device.type == "meta"
    assert topk.to(torch.device("cpu"), torch.float32).dtype == topk.to(torch.float32).dtype == torch.float32
    assert topk.to("cpu", non_blocking=True).to(dtype=torch.float64).dtype == torch.float64
    assert repr(topk) == "TopK(shape=(3, 4), k=2, temperature=2.0, dtype=torch.float64, device='cpu')"
    with pytest.raises(IndexError):
        topk[0, 0, 0]
    with pytest.raises(ValueError, match="dtype must be floating-point, got torch.int64"):
        topk.to(torch.int64)
    with pytest.raises(AttributeError):
        topk.temperature = 1.0


def test_pickles_by_its_public_name():
    topk = TopK.of(make_pair(3, 9)[1], 2, temperature=T, samples=1)
    twin = pickle.loads(pickle.dumps(topk))
    assert b"distill.topk" not in pickle.dumps(topk)
    file = io.BytesIO()
    torch.save(topk, file)
    file.seek(0)
    for copy in (twin, torch.load(file, weights_only=False)):
        assert repr(copy) == repr(topk)
        assert torch.equal(copy.log_probs, topk.log_probs)


def test_is_detached():
    student, teacher = make_pair(4, 9)
    teacher.requires_grad_()
    of = TopK.of(teacher, 3)
    made = TopK(of.indices, teacher.log_softmax(-1).gather(-1, of.indices), teacher.logsumexp(-1).neg())
    for tensor in (of.log_probs, of.log_tail, made.log_probs, made.log_tail, of.gather(teacher).log_probs):
        assert not tensor.requires_grad
    with torch.inference_mode():
        constant = TopK.of(teacher, 3, temperature=T)
    assert torch.equal(
        gradient(build("kl"), student, constant), gradient(build("kl"), student, TopK.of(teacher, 3, temperature=T))
    )


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7)])
def test_of_many_rows_is_of_each(shape, monkeypatch):
    logits = make_pair(*shape)[1]
    whole = TopK.of(logits, 3, temperature=T)
    monkeypatch.setattr("distill._merged._BLOCK", 10)
    for parts in (TopK.of(logits, 3, temperature=T), whole.gather(logits)):
        assert torch.equal(parts.indices, whole.indices)
        torch.testing.assert_close(parts.log_probs, whole.log_probs)
        torch.testing.assert_close(parts.log_tail, whole.log_tail)
    assert TopK.of(logits.bfloat16(), 3).dtype == torch.float32


def test_of_meta_and_compiled():
    assert TopK.of(torch.empty(5, 9, device="meta"), 3).shape == (5,)
    student, teacher = make_pair(5, 9)
    loss = KLLoss(T)

    @torch.compile(backend="eager", fullgraph=True)
    def step(student, indices, log_probs, log_tail):
        return loss(student, TopK(indices, log_probs, log_tail, T))

    topk = TopK.of(teacher, 3, temperature=T)
    given = topk.indices, topk.log_probs, topk.log_tail
    torch.testing.assert_close(step(student, *given), loss(student, topk))
    whole = torch.compile(lambda s, t: loss(s, t), backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(student, topk), loss(student, topk))
    of_func = torch.func.grad(lambda s: loss(s, topk))(student.detach())
    torch.testing.assert_close(of_func, gradient(loss, student, topk))
    mapped = torch.vmap(lambda s: loss(s, topk))(torch.stack([student, 2 * student]).detach())
    torch.testing.assert_close(mapped, torch.stack([loss(student, topk), loss(2 * student, topk)]).detach())


@both_forms
def test_weights_that_learn():
    student, teacher = make_pair(5, 9)
    topk, loss = TopK.of(teacher, 3, temperature=T), build("kl")
    weights = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, s: loss(s, topk, mask=w), (weights, student))


# --- what is refused ---


def test_rejects_what_is_no_row():
    good = torch.tensor([[0, 1]])
    for match, error, arguments in [
        ("indices must be a tensor, got list", TypeError, ([[0, 1]], torch.zeros(1, 2))),
        ("log_probs must be a tensor, got list", TypeError, (good, [[0.0, 1.0]])),
        ("log_tail must be a tensor, got float", TypeError, (good, torch.zeros(1, 2), 0.1)),
        ("indices must be integers, got torch.float32", ValueError, (torch.zeros(1, 2), torch.zeros(1, 2))),
        ("log_probs must be floating-point, got torch.int64", ValueError, (good, good)),
        (r"same shape .*got \(1, 2\) and \(1, 3\)", ValueError, (good, torch.zeros(1, 3))),
        (r"at least 1, got \(1, 0\) and \(1, 0\)", ValueError, (good[:, :0], torch.zeros(1, 0))),
        (r"at least 1, got \(\) and \(\)", ValueError, (torch.tensor(1), torch.tensor(0.0))),
        (r"log_tail must be .* \(1,\), got .* \(1, 1\)", ValueError, (good, torch.zeros(1, 2), torch.zeros(1, 1))),
        ("on one device, got cpu, cpu and meta", ValueError, (good, torch.zeros(1, 2), torch.zeros(1, device="meta"))),
        ("temperature must be positive and finite, got 0", ValueError, (good, torch.zeros(1, 2), None, 0)),
    ]:
        with pytest.raises(error, match=match):
            TopK(*arguments)
    with pytest.raises(ValueError, match="samples must be fewer than the 2 classes.*, got 2"):
        TopK(good, torch.zeros(1, 2), samples=2)


def test_rejects_what_of_cannot_do():
    logits = torch.randn(2, 5)
    for match, error, arguments in [
        ("logits must be a tensor, got int", TypeError, (3, 1)),
        ("logits must be floating-point", ValueError, (torch.ones(2, 5, dtype=torch.int64), 1)),
        ("not empty, got torch.float32 of shape", ValueError, (torch.ones(0, 5), 1)),
        ("k must be at most the number of classes, 5, got 6", ValueError, (logits, 6)),
        ("k must be a positive integer, got 0", ValueError, (logits, 0)),
    ]:
        with pytest.raises(error, match=match):
            TopK.of(*arguments)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got -1"):
        TopK.of(logits, 2, temperature=-1)
    with pytest.raises(ValueError, match="samples must have classes left to draw from, got k=5 of 5"):
        TopK.of(logits, 5, samples=1)
    with pytest.raises(ValueError, match=r"logits must be \(..., C\) for rows of shape \(2,\) on cpu, got \(3, 5\)"):
        TopK.of(logits, 2).gather(torch.randn(3, 5))
    with pytest.raises(ValueError, match="must not be draws from these, got samples=1"):
        TopK.of(logits, 2, samples=1).gather(logits)
    with pytest.raises(ValueError, match="classes from 0 to 1, got 4"):
        TopK(torch.tensor([[4]]), torch.zeros(1, 1)).gather(torch.randn(1, 2))


ROWS = torch.tensor([[0.5, 0.3], [0.4, 0.1]]).log()
BAD_ROWS = [
    ("classes from 0 to 4, got 5", (torch.tensor([[0, 1], [5, 2]]), ROWS)),
    ("classes from 0 to 4, got -1", (torch.tensor([[0, 1], [-1, 2]]), ROWS)),
    ("must differ within a row, got 3 twice", (torch.tensor([[0, 1], [3, 3]]), ROWS)),
    (r"at most one in a row, got a row that sums to 1.4", (torch.tensor([[0, 1], [2, 3]]), ROWS + math.log(1.75))),
    (r"must sum to one in a row, got .* off by 0.29", (torch.tensor([[0, 1], [2, 3]]), ROWS, torch.full((2,), -1.6))),
    ("got a row that sums to 3.3", (torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.6, 0.4], [0.1, 0.0]]))),
]  # fmt: skip


@pytest.mark.parametrize(("match", "arguments"), BAD_ROWS)
def test_rejects_bad_rows_on_request_and_where_they_are_used(match, arguments):
    topk = TopK(*arguments)  # nothing is looked at, which would wait for a GPU
    with pytest.raises(ValueError, match=match):
        topk.check(5)
    with pytest.raises(ValueError, match=match):
        KLLoss(1.0)(torch.randn(2, 5), topk)
    KLLoss(1.0)(torch.randn(2, 5), topk, mask=torch.tensor([False, False]))  # what is hidden may be anything
    if "classes" in match:
        topk[:1].check(5)


def test_check_allows_for_rounding_in_the_dtype_of_the_rows():
    logits = 2 * make_pair(200, 1000, dtype=torch.float32)[1]
    for dtype in (torch.float16, torch.bfloat16):
        wide = TopK.of(logits, 999)
        rounded = TopK(wide.indices, wide.log_probs.to(dtype))
        assert rounded.log_probs.double().exp().sum(-1).max() > 1
        assert rounded.check(1000) is rounded
    with pytest.raises(ValueError, match="indices of a TopK must be not negative, got -3"):
        TopK(torch.tensor([[-3]]), torch.zeros(1, 1)).check()


def test_rejects_a_student_that_does_not_fit():
    student, teacher = make_pair(4, 6)
    topk = TopK.of(teacher, 3, temperature=T)
    loss = build("kl")
    with pytest.raises(ValueError, match="temperature of a TopK must be the loss's, 4.0, got 2.0"):
        KLLoss()(student, topk)
    with pytest.raises(ValueError, match=r"a row for each of the student's .*\(3,\), got \(4,\)"):
        loss(student[:3], topk)
    with pytest.raises(ValueError, match="at most as many classes as the student, 2, got k=3"):
        loss(student[:, :2], topk)
    with pytest.raises(ValueError, match="same device, got cpu and meta"):
        loss(student, topk.to("meta"))
    with pytest.raises(ValueError, match="student must be floating-point, got torch.int64"):
        loss(student.long(), topk)
    with pytest.raises(TypeError, match="student must be a tensor, got TopK"):
        loss(topk, topk)
    with pytest.raises(ValueError, match="dim must be a dimension of the inputs, got 3"):
        build("kl", dim=3)(student, topk)
    with pytest.raises(ValueError, match="mask must be shaped like the per-sample values"):
        loss(student, topk, mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"dim must be given for .*four dimensions"):
        loss(student.view(2, 2, 2, 3), topk)


def test_other_losses_refuse_it_by_name():
    student, teacher = make_pair(4, 6)
    topk = TopK.of(teacher, 3)
    refused = 0
    for name in distill.list_losses():
        cls = distill.get_loss(name)
        if name in DIVERGENCES or not cls.__module__.startswith("distill."):
            continue
        try:
            loss = cls()
        except TypeError:  # it must have arguments; the check is the same
            continue
        refused += 1
        with pytest.raises(TypeError, match=f"{cls.__name__} takes no TopK, .* such as KLLoss|be a tensor, got TopK"):
            loss(student, topk, torch.zeros(4, dtype=torch.int64))
    assert refused >= 20
    with pytest.raises(TypeError, match="takes no TopK, it needs the teacher's logits of all classes"):
        distill.dkd_loss(student, topk, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="must be a tensor, got TopK"):
        distill.LinearLogitLoss(nn.Linear(6, 9), nn.Linear(6, 9))(student, topk)


# --- the student's own classes, and samples ---


def test_reverse_kl_on_the_students_own_classes():
    student, teacher = make_pair(5, 10)
    own = TopK.of(student, 3, temperature=T).gather(teacher)
    indices = student.detach().topk(3, -1).indices
    assert torch.equal(own.indices, indices)
    loss = ReverseKLLoss(T, reduction="none")
    torch.testing.assert_close(
        loss(student, own).detach(), reference("reverse_kl", student, teacher, indices), rtol=1e-12, atol=1e-12
    )
    assert torch.autograd.gradcheck(lambda s: loss(s, own), student)
    # A class that only the student thinks likely: the teacher's own classes hardly see it.
    student, teacher = torch.zeros(1, 50), torch.zeros(1, 50)
    student[0, 7], teacher[0, 3], teacher[0, 7] = 8.0, 8.0, -8.0
    dense, seen, unseen = (
        distill.reverse_kl_loss(student, side)
        for side in (teacher, TopK.of(student, 1).gather(teacher), TopK.of(teacher, 1))
    )
    assert unseen < 0.5 * dense
    assert seen > 0.99 * dense


@both_forms
def test_drawn_classes_are_unbiased(monkeypatch):
    monkeypatch.setattr(fused, "_block_elements", lambda device: 2**12)
    student, teacher = (x.detach()[:1] for x in make_pair(2, 12))
    student.requires_grad_()
    draws, k, samples = 3000, 3, 2
    topk = TopK.of(
        teacher.expand(draws, 12), k, temperature=T, samples=samples, generator=torch.Generator().manual_seed(0)
    )
    assert repr(topk).startswith("TopK(shape=(3000,), k=3, samples=2,")
    topk.check(12)
    rows = student.detach().expand(draws, 12).clone().requires_grad_()
    values = KLLoss(T, reduction="none")(rows, topk)
    (slopes,) = torch.autograd.grad(values.sum(), rows)
    dense = KLLoss(T)(student, teacher)
    exact = gradient(KLLoss(T), student, teacher)[0]
    for found, expected in ((values.detach(), dense.detach()), (slopes, exact)):
        error = (found.mean(0) - expected) / (found.std(0) / draws**0.5).clamp(min=1e-9)
        assert error.abs().max() < 4  # standard errors
    assert (slopes - exact).abs().max() > 0.01  # it is noisy
    # It is that of all logits with the teacher that was drawn.
    p = torch.zeros(draws, 12).double().scatter_add_(1, topk.indices[:, :k], topk.log_probs[:, :k].exp())
    p.scatter_add_(1, topk.indices[:, k:], (topk.log_tail.exp() / samples)[:, None].expand(-1, samples).contiguous())
    q = (student.detach() / T).softmax(-1)
    torch.testing.assert_close(slopes, T * (q - p), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda s: KLLoss(T, reduction="none")(s, topk[:3]), rows.detach()[:3].requires_grad_()
    )


def test_a_lower_bound_is_biased_where_drawn_classes_are_not():
    student, teacher = make_pair(1, 12)
    exact = gradient(KLLoss(T), student, teacher)
    assert (gradient(KLLoss(T), student, TopK.of(teacher, 3, temperature=T)) - exact).abs().max() > 1e-3


@each
def test_only_kl_takes_drawn_classes(name):
    student, teacher = make_pair(4, 12)
    topk = TopK.of(teacher, 3, temperature=T, samples=2)
    if name == "kl":
        assert build(name)(student, topk).isfinite()
        return
    with pytest.raises(ValueError, match=r"only kl takes a TopK with classes drawn .* samples=2"):
        build(name)(student, topk)


def test_drawn_classes_where_no_other_has_a_chance():
    teacher = torch.full((2, 6), -INF)
    teacher[:, :2] = 0.0
    student = make_pair(2, 6, dtype=torch.float32)[0]
    topk = TopK.of(teacher, 2, temperature=T, samples=3)
    torch.testing.assert_close(KLLoss(T)(student, topk), KLLoss(T)(student, teacher))
    assert gradient(KLLoss(T), student, topk).isfinite().all()
    assert TopK.of(torch.full((2, 6), math.nan), 2, samples=2).log_probs.isnan().all()


# --- through the Distiller ---


def test_a_distiller_takes_it_as_the_teachers_output():
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 9), nn.Linear(4, 9)
    inputs, target = torch.randn(3, 5, 4), torch.randint(9, (3, 5))
    mask = torch.rand(3, 5) > 0.3
    topk = TopK.of(teacher(inputs), 3, temperature=4.0)
    expected = KLLoss()(student(inputs), topk, mask=mask, denominator=20)

    def plain(out):
        return out * 1.0

    for distiller, output in [
        (Distiller(student, None, KLLoss()), topk),
        (Distiller(student, teacher, KLLoss()), topk),
        (Distiller(student, None, KLLoss(), output=plain), topk),  # it finds the tensor in what a model returns
        (Distiller(student, None, KLLoss()), {"logits": topk}),
        (Distiller(student, None, KLLoss()), TeacherOutput(topk)),
        (Distiller(student, None, Term(KLLoss(), at=("", "stored"))), TeacherOutput(features={"stored": topk})),
        (Distiller(student, None, Term(KLLoss(), at=(lambda out: out, lambda out: out["kept"]))), {"kept": topk}),
        (Distiller(student, lambda x: TopK.of(teacher(x), 3, temperature=4.0), KLLoss()), None),
    ]:
        out = distiller(inputs, target, mask=mask, denominator=20, teacher_output=output)
        torch.testing.assert_close(out.terms["distillation"], expected.detach())
        student.zero_grad()
        out.loss.backward()
        assert student.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="term 'distillation': the temperature of a TopK must be the loss's"):
        Distiller(student, None, KLLoss(2.0))(inputs, target, teacher_output=topk)
    with pytest.raises(TypeError, match="term 'distillation': DKDLoss takes no TopK"):
        Distiller(student, None, distill.DKDLoss())(inputs, target, teacher_output=topk)


def test_losses_whose_forward_is_their_own_refuse_it_too():
    student, teacher = make_pair(4, 6)
    topk = TopK.of(teacher, 3)
    for loss in (
        distill.SigmoidKLLoss(),
        distill.SigmoidKLLoss(classes="none"),
        distill.MatryoshkaLoss(distill.CosineLoss(), [2, 6]),
        distill.HintLoss(),
        distill.RKDLoss(),
    ):
        with pytest.raises(TypeError, match="TopK"):
            loss(student, topk)


# --- through LinearLoss ---


def heads(vocabularies=(V, V)):
    generator = torch.Generator().manual_seed(2)
    made = [nn.Linear(width, size, dtype=torch.float64) for width, size in zip((6, 9), vocabularies, strict=True)]
    with torch.no_grad():
        for parameter in (*made[0].parameters(), *made[1].parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def linear_case():
    student, teacher = make_pair(10, 6)[0], make_pair(10, 9)[1]
    return student, teacher, torch.randint(V, (10,), generator=torch.Generator().manual_seed(3))


def gradients(value, *tensors):
    return torch.autograd.grad(value.sum(), tensors, retain_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@each
def test_linear_loss_takes_it_for_the_teachers_hidden_states(name, reduction):
    (ours, theirs), (student, teacher, labels) = heads(), linear_case()
    topk = TopK.of(theirs(teacher), 4, temperature=T)
    loss, wanted = build(name, reduction=reduction), (student, ours.weight, ours.bias)
    mask = torch.arange(10) % 3 * 0.5
    linear = LinearLoss(loss, ours, theirs, rows=4)
    alone = LinearLoss(loss, ours, rows=4)
    both = LinearLoss(loss, ours, cross_entropy=0.5, rows=4)
    assert "teacher_head=None" in repr(alone)
    formed = loss(ours(student), topk, mask=mask)
    for value in (linear(student, topk, mask=mask), alone(student, topk, mask=mask)):
        torch.testing.assert_close(value, formed, rtol=1e-10, atol=1e-12)
        for found, expected in zip(gradients(value, *wanted), gradients(formed, *wanted), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    entropy = nn.functional.cross_entropy(ours(student), labels, reduction="none")
    entropy = mask * entropy if reduction == "none" else (mask * entropy).sum() / mask.sum()
    value, formed = both(student, topk, labels, mask=mask), formed + 0.5 * entropy
    torch.testing.assert_close(value, formed, rtol=1e-10, atol=1e-12)
    for found, expected in zip(gradients(value, *wanted), gradients(formed, *wanted), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_linear_loss_second_derivatives_samples_and_vocabularies():
    (ours, theirs), (student, teacher, labels) = heads((V, V - 3)), linear_case()
    topk = TopK.of(theirs(teacher), 4, temperature=T, samples=3, generator=torch.Generator().manual_seed(0))
    exact = topk.indices[:, :4], topk.log_probs[:, :4], topk.log_tail
    for known in (TopK(*exact, T), topk):
        linear = LinearLoss(KLLoss(T), ours, cross_entropy=0.5, vocab_size=V - 3)
        value = linear(student, known, labels, denominator=7)
        logits = ours(student)
        formed = KLLoss(T)(logits[:, : V - 3], known, denominator=7)
        formed = formed + 0.5 * nn.functional.cross_entropy(logits, labels, reduction="sum") / 7
        torch.testing.assert_close(value, formed, rtol=1e-10, atol=1e-12)
        slopes = [torch.autograd.grad(x, student, create_graph=True)[0] for x in (value, formed)]
        torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            *(torch.autograd.grad(slope.square().sum(), student)[0] for slope in slopes), rtol=1e-9, atol=1e-11
        )
    assert linear(student.detach().view(2, 5, 6), topk.reshape(2, 5), labels.view(2, 5)).isfinite()


def test_linear_loss_multiplies_the_students_head_alone(monkeypatch):
    (ours, theirs), (student, teacher, _) = heads(), linear_case()
    topk, shapes = TopK.of(theirs(teacher), 4, temperature=T), []
    real = engine_linear._multiply

    def multiply(side, piece, buffer):
        shapes.append(tuple(side[1].shape))
        return real(side, piece, buffer)

    monkeypatch.setattr(engine_linear, "_multiply", multiply)
    linear = LinearLoss(build("kl"), ours, theirs)
    linear(student, topk)
    assert shapes == [(V, 6)]
    linear(student, teacher)
    assert shapes == [(V, 6), (V, 6), (V, 9)]


def test_linear_loss_through_a_distiller_without_a_teacher():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, V))
    teacher = nn.Linear(4, V)
    inputs, labels = torch.randn(3, 5, 4), torch.randint(V, (3, 5))
    topk = TopK.of(teacher(inputs), 4, temperature=T)
    soft = LinearLoss(build("kl"), student[1], cross_entropy=1.0)
    for copied in (soft, pickle.loads(pickle.dumps(soft))):
        assert copied(torch.randn(3, 5, 6), topk, labels).isfinite()
    term = Term(soft, at=("1:input", lambda out: out))
    out = Distiller(student, None, term, task_loss=None)(inputs, labels, teacher_output=topk)
    expected = build("kl")(student(inputs), topk) + nn.functional.cross_entropy(
        student(inputs).flatten(0, 1), labels.flatten()
    )
    torch.testing.assert_close(out.loss, expected)


def test_linear_loss_rejects_what_does_not_fit():
    (ours, theirs), (student, teacher, _) = heads(), linear_case()
    topk = TopK.of(theirs(teacher), 4, temperature=T)
    with pytest.raises(ValueError, match="teacher must be a TopK where there is no teacher_head, got a tensor"):
        LinearLoss(build("kl"), ours)(student, teacher)
    with pytest.raises(ValueError, match="temperature of a TopK must be the loss's, 4.0, got 2.0"):
        LinearLoss(KLLoss(), ours)(student, topk)
    with pytest.raises(ValueError, match=r"a row for each of the student's .*\(9,\), got \(10,\)"):
        LinearLoss(build("kl"), ours)(student[:9], topk)
    with pytest.raises(TypeError, match="DKDLoss takes no TopK"):
        LinearLoss(distill.DKDLoss(), ours)(student, topk, torch.zeros(10, dtype=torch.int64))
    with pytest.raises(ValueError, match="vocab_size"):
        LinearLoss(build("kl"), ours, vocab_size=V + 1)


def test_linear_loss_caps_and_scales_the_students_logits():
    (ours, theirs), (student, teacher, _) = heads(), linear_case()
    topk = TopK.of(theirs(teacher), 4, temperature=T)
    linear = LinearLoss(build("kl"), ours, student_scale=0.5, student_softcap=2.0)
    formed = build("kl")(2.0 * torch.tanh(0.5 * ours(student) / 2.0), topk)
    value = linear(student, topk)
    torch.testing.assert_close(value, formed, rtol=1e-10, atol=1e-12)
    for found, expected in zip(gradients(value, student), gradients(formed, student), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


# --- what the page says ---


def test_the_forms_of_the_benchmark_are_as_wrong_as_the_page_says():
    found = {name: topk_benchmark.errors(name, 4.0, 6, 4000) for name in topk_benchmark.FORMS}
    middle = {
        (name, kind): [quartiles(errors[kind, k][0])[0] for k in topk_benchmark.KS]
        for name, errors in found.items()
        for kind in ("agrees", "near")
    }
    assert max(middle["TopK", "agrees"]) == 0
    assert min(middle["teacher renormalised", "agrees"]) > 0.01
    for name in ("teacher renormalised", "both renormalised", "cut off"):
        for ours, other in zip(middle["TopK", "near"], middle[name, "near"], strict=True):
            assert ours < 0.5 * other
    reverse = {name: topk_benchmark.errors(name, 4.0, 6, 4000) for name in topk_benchmark.REVERSE}
    assert reverse["TopK of the student, gathered"]["far", 32][1] > 0.8
    assert reverse["TopK of the teacher"]["far", 32][1] < 0.6
