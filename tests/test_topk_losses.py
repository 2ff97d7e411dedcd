"""The divergences of k + 1 classes against NumPy, of given classes and of drawn ones."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distill
import topk as topk_benchmark
from contract import gradient, make_pair
from distill import KLLoss, ReverseKLLoss, TopK
from distill._engine import fused
from measure import quartiles
from topk_cases import DIVERGENCES, INF, T, both_forms, build, each


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


def test_a_student_that_gives_the_rest_nothing_is_infinitely_far_from_a_teacher_that_does():
    student, teacher = torch.tensor([[0.0, 1.0, -INF, -INF]]), torch.tensor([[0.0, 0.0, -10.0, -10.0]])
    assert KLLoss(temperature=1.0)(student, TopK.of(teacher, 2)) == INF


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
