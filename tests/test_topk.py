"""TopK: what its rows are, how they move, and what is refused."""

import io
import math
import pickle

import pytest
import torch
from torch import nn

import distill
from contract import gradient, make_pair
from distill import KLLoss, ReverseKLLoss, TopK
from topk_cases import DIVERGENCES, INF, T, both_forms, build

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
    given = teacher.log_softmax(-1).gather(-1, of.indices)
    made, rest = TopK(of.indices, given, teacher.logsumexp(-1).neg()), TopK(of.indices, given).log_tail
    for tensor in (of.log_probs, of.log_tail, made.log_probs, made.log_tail, rest, of.gather(teacher).log_probs):
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
    with pytest.raises(ValueError, match=r"student must not be empty, got shape \(0, 6\)"):
        loss(student[:0], topk[:0])


def test_a_data_loader_can_pin_it(monkeypatch):
    # Without a GPU there is nothing to pin for: what the loader calls is what counts.
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    topk = TopK.of(make_pair(4, 6)[1], 3, temperature=T)
    twin = topk.pin_memory()
    for name in ("indices", "log_probs", "log_tail"):
        assert any(tensor is getattr(topk, name) for tensor in pinned)
        assert torch.equal(getattr(twin, name), getattr(topk, name))
    assert twin.temperature == T


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
