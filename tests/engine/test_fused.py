"""Fused equals plain, whatever comes; what is fused and what is not; what it may not cost."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import gradient, make_pair
from distill import (
    CosineLoss,
    DKDLoss,
    JSLoss,
    KLLoss,
    LogitLoss,
    ReverseKLLoss,
    SigmoidKLLoss,
    ToDiLoss,
    kl_loss,
    logit_loss,
)
from distill._engine import fused as engine
from distill._engine.rows import Rows
from distill._reduction import REDUCTIONS, reduce, row_weights
from distill.losses import _from_teacher, _mean_squares, dkd, reverse_kl
from divergences import peak_bytes
from rowwise import BY_AUTOGRAD, LOSSES, is_fused

TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},  # two roundings
    torch.half: {"rtol": 2**-10, "atol": 1e-6},
}
repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=80)


class Counted:
    """A block function that counts its calls, in a loss that is otherwise `loss`."""

    def __init__(self, loss, **fields):
        self.calls = 0
        self.of_loss = loss.block
        self.loss = Rows(loss.formula, block=self, **fields)

    def __call__(self, *args, **options):
        self.calls += 1
        return self.of_loss(*args, **options)


@st.composite
def calls(draw, classes):
    """Inputs of any layout with at least so many classes, and everything else that a call depends on."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(1, 40))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] = max(shape[dim], classes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtypes = st.sampled_from(list(TOLERANCE))

    def tensor():
        padding = draw(st.lists(st.integers(0, 1), min_size=len(shape), max_size=len(shape)))
        order = list(draw(st.permutations(range(len(shape)))))
        if draw(st.integers(0, 2)):  # mostly with the rows in one piece
            order.remove(dim % len(shape))
            order.append(dim % len(shape))
        large = [shape[d] + padding[d] for d in order]
        x = torch.randn(large, generator=generator, dtype=torch.float64).to(draw(dtypes))
        x = x.permute([order.index(d) for d in range(len(shape))])
        return x[tuple(slice(size) for size in shape)]

    student, teacher = tensor(), tensor()
    rows = student.movedim(dim, -1).shape[:-1]
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    mask = draw(st.sampled_from([None, weights, weights.float(), weights > 0.4, torch.zeros(rows)]))
    reduction = draw(st.sampled_from(REDUCTIONS))
    upstream = torch.rand(rows if reduction == "none" else (), generator=generator, dtype=torch.float64)
    upstream = draw(st.sampled_from([torch.ones_like(upstream), upstream * 10 - 2]))
    return student, teacher, dim, reduction, mask, upstream


def value_and_gradient(loss, student, upstream, *rest, **options):
    student = student.detach().requires_grad_()
    value = loss(student, *rest, **options)
    (result,) = torch.autograd.grad(value, student, upstream.to(value.dtype))
    return value, result


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_plain_form(name):
    loss = LOSSES[name][0].reduced

    @repeatable
    @given(calls(classes=2 if LOSSES[name][0].softmax else 1), st.sampled_from([0, engine.FEW]))
    def check(call, few):
        student, teacher, dim, reduction, mask, upstream = call
        options = {**LOSSES[name][1], "dim": dim, "reduction": reduction, "mask": mask}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "SMALL", math.inf)
            # The oracle computes in float64; only its gradient comes back in the student's dtype.
            plain, plain_gradient = value_and_gradient(loss, student, upstream, teacher.double(), **options)
            patch.setattr(engine, "SMALL", 0)
            patch.setattr(engine, "SHORT", 1)
            patch.setattr(engine, "FEW", few)
            patch.setattr(engine, "_block_elements", lambda device: 64)
            ours, our_gradient = value_and_gradient(loss, student, upstream, teacher, **options)
            apart = not student.stride(dim) == teacher.stride(dim) == 1
            assert is_fused(ours) is not (apart and LOSSES[name][0].single and reduction == "mean" and mask is None)
            with torch.no_grad():
                assert torch.equal(loss(student, teacher, **options), ours)
        assert not is_fused(plain)
        assert ours.dtype == (torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32)
        assert our_gradient.dtype == student.dtype
        torch.testing.assert_close(ours.double(), plain, **TOLERANCE[ours.dtype])
        wider = max(TOLERANCE[student.dtype], TOLERANCE[ours.dtype], key=lambda tolerance: tolerance["rtol"])
        scale = max(1.0, upstream.abs().max().item())
        torch.testing.assert_close(
            our_gradient.double(), plain_gradient.double(), rtol=wider["rtol"], atol=scale * wider["atol"]
        )

    check()


@repeatable
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 100))
def test_blocks_cover_every_row_once_and_are_no_larger_than_allowed(shape, limit):
    limit = max(limit, shape[-1])
    count = torch.zeros(shape)
    for index in engine._cut(count.shape, limit):
        assert count[index].numel() <= limit
        count[index] += 1
    assert (count == 1).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_row_weights_are_the_derivative_of_reduce(reduction):
    values = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for mask in (None, torch.tensor([0, 1, 0.5, 2, 0, 3]), torch.tensor([True, False] * 3), torch.zeros(6)):
        result = reduce(values, reduction, mask)
        (expected,) = torch.autograd.grad(result.sum(), values) if result is not values else (torch.ones(6).double(),)
        torch.testing.assert_close(row_weights(values, reduction, mask), expected, rtol=1e-15, atol=0)


def test_a_closed_form_is_taken_from_the_first_row_on_and_a_single_operation_while_it_is_faster():
    for rows, logits, by_autograd in [(1, False, False), (1000, False, False), (2048, False, True), (6144, True, True)]:
        student, teacher = make_pair(rows, 512, dtype=torch.float32)
        for loss in (LogitLoss(), KLLoss(), LogitLoss(reduction="sum"), logit_loss, kl_loss):
            value = loss(student, teacher)
            assert is_fused(value) is (loss is kl_loss or isinstance(loss, KLLoss) or logits)
            torch.testing.assert_close(value, loss(student.double(), teacher.double()).float())
        alone = BY_AUTOGRAD.values(student, teacher, temperature=2.0)
        assert is_fused(alone) is by_autograd


def test_a_mean_of_short_rows_is_one_operation():
    short, long = (make_pair(3 * engine.SMALL // n, n, dtype=torch.float32) for n in (32, 64))
    assert [is_fused(LogitLoss()(*pair)) for pair in (short, long)] == [False, True]
    assert is_fused(LogitLoss(reduction="sum")(*short))
    assert is_fused(LogitLoss()(*short, mask=torch.ones(len(short[0]))))
    assert is_fused(KLLoss()(*short))


def test_maps_stay_in_their_layout(fused, monkeypatch):
    student, teacher = make_pair(2, 5, 3, 4)
    value = KLLoss(dim=1)(student, teacher)
    assert is_fused(value)
    assert torch.autograd.grad(value, student)[0].is_contiguous()
    assert not is_fused(LogitLoss(dim=1)(student, teacher))  # a single operation
    with monkeypatch.context() as patch:
        patch.setattr(engine, "run_slabs", None)  # what a block function gains may be worth the copies
        assert is_fused(CosineLoss(dim=1)(student, teacher))
    ours, theirs = (x.to(memory_format=torch.channels_last) for x in (student, teacher))
    value = KLLoss(dim=1)(ours, theirs)
    assert is_fused(value)
    (result,) = torch.autograd.grad(value, ours)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, gradient(KLLoss(dim=1), student, teacher))


def test_a_gradient_has_the_layout_of_the_student(fused):
    student, teacher = make_pair(2, 5, 3, 4)
    expected, last = gradient(JSLoss(dim=1), student, teacher), torch.channels_last
    for layouts in itertools.permutations([torch.contiguous_format, last]):
        ours, theirs = (x.to(memory_format=layout) for x, layout in zip((student, teacher), layouts, strict=True))
        found = gradient(JSLoss(dim=1), ours, theirs)
        assert found.stride() == ours.stride()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    # One value for all classes, in a layout that no tensor of its own can have and be cut.
    few, teacher = (x.detach() for x in make_pair(3, 3, 1, 2, 3))
    few = few[:, 0].permute(2, 3, 1, 0).repeat(1, 1, 2, 1)[:, :, :1].permute(3, 2, 0, 1)
    several = few.unsqueeze(1).expand(-1, 3, -1, -1, -1).requires_grad_()
    found, expected = (torch.autograd.grad(JSLoss(dim=1)(x, teacher), several) for x in (several, several.contiguous()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_rows_too_long_for_a_block_are_plain(fused, monkeypatch):
    monkeypatch.setattr(engine, "LARGEST_ROW", 9)
    assert not is_fused(LogitLoss()(*make_pair(6, 10)))
    assert is_fused(LogitLoss()(*make_pair(6, 9)))


@pytest.mark.parametrize("threads", [1, 2, 64, 1000])
def test_block_size_grows_with_the_threads_within_limits(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert 2**19 <= engine._block_elements(torch.device("cpu")) <= 2**21
    assert engine._block_elements(torch.device("cuda")) == 2**22


@pytest.mark.parametrize(("reduction", "dtype", "passes"), [
    ("mean", torch.float32, 1), ("sum", torch.bfloat16, 1), ("mean", torch.half, 2), ("none", torch.float32, 1),
])  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_rows_are_read_once_where_the_reduction_allows_it(fused, reduction, dtype, passes, masked, factor):
    student, teacher = make_pair(12, 16, dtype=dtype)  # 3 blocks of 4 rows
    mask = torch.arange(12) > 3 if masked else None
    counted = Counted(LogitLoss.rows)
    value = counted.loss.reduced(student, teacher, dim=-1, reduction=reduction, mask=mask)
    assert counted.calls == 3
    (factor * value.sum()).backward()
    assert counted.calls == 3 * passes


@pytest.mark.parametrize(("dtype", "calls"), [(torch.float32, 2), (torch.bfloat16, 12)])
def test_blocks_are_longer_for_a_loss_of_few_passes_where_none_is_copied(fused, dtype, calls):
    counted = Counted(LogitLoss.rows, longer=LogitLoss.rows.longer)
    student, teacher = make_pair(48, 16, dtype=dtype)  # 12 blocks of 4 rows
    counted.loss.reduced(student, teacher, dim=-1, reduction="mean")
    assert counted.calls == calls
    with torch.no_grad():  # the gradient's place is then a buffer, which stays small
        counted.loss.reduced(student, teacher, dim=-1, reduction="mean")
    assert counted.calls == calls + 12


def test_values_alone_take_no_gradient(fused):
    student, teacher = make_pair(12, 16)
    seen = []

    def block(ours, theirs, factors, *buffers):
        seen.append(factors)
        return _mean_squares._block(ours, theirs, factors, *buffers)

    loss = Rows(_mean_squares._formula, block=block)
    with torch.no_grad():
        loss.reduced(student, teacher, dim=-1, reduction="mean")
    with torch.inference_mode():
        loss.reduced(student, teacher, dim=-1, reduction="mean")
    loss.reduced(student.detach(), teacher, dim=-1, reduction="mean")
    loss.values(student.detach(), teacher, dim=-1)
    assert seen == [None] * 12


def test_rows_without_weight_do_not_spoil_the_value(fused):
    student, teacher = make_pair(6, 10)
    kept = torch.arange(6) > 0
    clean = LogitLoss()(student, teacher, mask=kept)
    teacher[0] = torch.inf
    value = LogitLoss()(student, teacher, mask=kept)
    assert value == clean
    assert torch.autograd.grad(value, student)[0][1:].isfinite().all()


@pytest.mark.parametrize(("build", "close"), [
    (KLLoss, 0.0),
    (LogitLoss, 0.0),
    # Rows that are far apart take the form for near ones where one among them is no number.
    (functools.partial(KLLoss, 0.5), 1e-12),
])  # fmt: skip
def test_values_that_nobody_counts_do_not_spoil_the_gradient(fused, build, close):
    student, teacher = make_pair(6, 10)
    factors = torch.arange(6.0, dtype=torch.float64)
    expected = torch.autograd.grad((factors * build(reduction="none")(student, teacher)).sum(), student)[0]
    teacher[0] = torch.nan
    values = build(reduction="none")(student, teacher)
    assert is_fused(values)
    torch.testing.assert_close(
        torch.autograd.grad(values, student, factors)[0], expected, rtol=close, atol=close / 1000
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.half])
def test_what_a_map_hides_shows_nowhere(fused, dtype):
    student, teacher = (x.to(dtype) for x in make_pair(2, 5, 3, 4))
    kept, labels = torch.arange(12).view(3, 4).expand(2, 3, 4) != 5, torch.ones(2, 3, 4, dtype=torch.int64)
    loss, alone = DKDLoss(dim=1), KLLoss(dim=1, reduction="none")
    spoilt = teacher.masked_fill(~kept.unsqueeze(1), math.nan)

    def slope(theirs):
        ours = student.detach().requires_grad_()
        return torch.autograd.grad(alone(ours, theirs), ours, kept.to(alone(ours, theirs).dtype))[0]

    with torch.no_grad():
        assert torch.equal(*(loss(student, theirs, labels, mask=kept) for theirs in (teacher, spoilt)))
    torch.testing.assert_close(slope(spoilt), slope(teacher), rtol=1e-3, atol=1e-5)


def test_shifted_logits_of_a_language_model(fused):
    student, teacher = make_pair(3, 8, 20)
    mask = torch.arange(7).expand(3, 7) < torch.tensor([[7], [4], [2]])
    value = KLLoss()(student[:, :-1], teacher[:, 1:], mask=mask)
    assert is_fused(value)
    expected = _from_teacher._formula(student[:, :-1], teacher[:, 1:], dim=-1, temperature=4.0)[mask].mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, student)[0] for v in (value, expected)))


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 says so to everybody
@pytest.mark.parametrize("loss", [LogitLoss(), KLLoss(), ReverseKLLoss()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_no_memory_but_the_gradient_and_a_few_blocks(loss, dtype):
    student, teacher = make_pair(128, 2**15, dtype=dtype)
    size = student.numel() * student.element_size()
    # Two of the block, one that the divergences take for themselves, and one a side where it is to be widened.
    buffers = (3 if dtype == torch.float32 else 5) * 4 * engine._block_elements(student.device)
    assert buffers <= 40 * 2**20
    # Blocks are longer where none is copied, and `LogitLoss` has one buffer for them, which it seldom touches.
    more = 4 * engine._block_elements(student.device) * (loss.rows.longer - 1) if dtype == torch.float32 else 0

    def step():
        (0.5 * loss(student, teacher)).backward()

    assert size <= peak_bytes(step) <= size + 1.1 * buffers + more
    with torch.no_grad():
        assert peak_bytes(lambda: loss(student, teacher)) <= 1.1 * buffers
    student.grad = None
    value = loss(student, teacher, mask=torch.ones(128))
    assert peak_bytes(value.backward) < 2**20  # the gradient was there


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
@pytest.mark.parametrize(
    "loss", [KLLoss(dim=1), JSLoss(dim=1), ToDiLoss(dim=1), DKDLoss(dim=1), CosineLoss(dim=1), SigmoidKLLoss(dim=1)]
)
def test_maps_take_no_memory_but_the_gradient_and_a_few_slabs(fused, monkeypatch, loss):
    monkeypatch.setattr(engine, "_block_elements", lambda device: 2**10)
    student, teacher = make_pair(2, 32, 48, 48, dtype=torch.float32)
    labels = torch.arange(student[:, 0].numel()).view(2, 48, 48) % 32
    for mask in (None, labels != 3):
        student.grad = None
        size = 4 * student.numel()
        peak = peak_bytes(lambda mask=mask: loss(student, teacher, labels, mask=mask).backward())
        assert size <= peak <= 1.6 * size
        assert is_fused(loss(student, teacher, labels, mask=mask))


def test_kl_of_blocks_is_as_exact_as_the_formula_near_zero():
    student, teacher = make_pair(64, 1000)
    near = teacher + 1e-2 * student.detach()
    exact = _from_teacher._formula(near, teacher, dim=-1, temperature=1.0)
    plain, blocks = (
        function(near.float(), teacher.float())
        for function in (
            lambda s, t: _from_teacher._formula(s, t, dim=-1, temperature=1.0),
            lambda s, t: _from_teacher._block(s, t, None, torch.empty_like(s), torch.empty_like(s), temperature=1.0),
        )
    )
    assert (blocks - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize(
    ("build", "module", "block"),
    [(KLLoss, _from_teacher, "_block"), (ReverseKLLoss, reverse_kl, "_block"), (DKDLoss, dkd, "_BLOCK")],
)
def test_few_rows_of_which_some_need_care_give_what_the_formula_gives(build, module, block, monkeypatch):
    student, teacher = make_pair(7, 10)
    target = torch.arange(7)
    for case in ("ordinary", "equal", "far", "masked"):
        ours, theirs = student.detach().clone(), teacher.clone()
        if case == "equal":
            ours[1] = theirs[1]
        elif case == "far":
            ours[1, 2] = 2000.0
        elif case == "masked":
            ours[1:3, 8:] = theirs[1:3, 8:] = -torch.inf
        ours.requires_grad_()
        results = []
        for small in (0, math.inf):
            with monkeypatch.context() as patch:
                patch.setattr(engine, "SMALL", small)
                if case == "ordinary":
                    patch.setattr(module, block, None)  # which is for those that need care
                values = build(reduction="none")(ours, theirs, target)
                assert is_fused(values) is (small == 0)
                results.append((values, torch.autograd.grad(values, ours, torch.arange(7.0).double())[0]))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", [KLLoss(), ReverseKLLoss()])
def test_few_rows_keep_the_digits_of_the_gradient_near_agreement(loss):
    student, teacher = make_pair(8, 50)
    near, teacher = (teacher + 1e-3 * student.detach()).float(), teacher.float()
    exact = gradient(loss, near.double(), teacher.double())
    assert (gradient(loss, near, teacher) - exact).norm() <= 1e-6 * exact.norm()  # through autograd 3e-5 and more


def test_few_rows_in_half_precision_need_no_buffers(monkeypatch):
    student, teacher = (x.bfloat16() for x in make_pair(6, 10))
    monkeypatch.setattr(engine.Call, "_run_blocks", lambda *_: pytest.fail("in blocks"))
    found = student.detach().clone().requires_grad_()
    KLLoss()(found, teacher).backward()
    wide = student.detach().float().requires_grad_()
    KLLoss()(wide, teacher.float()).backward()
    assert torch.equal(found.grad, wide.grad.bfloat16())


@pytest.mark.parametrize("offset", [100, 10000])
def test_an_offset_between_student_and_teacher_costs_kl_of_blocks_no_more_than_the_formula(offset):
    student, teacher = make_pair(64, 1000)
    teacher = teacher.float()
    near = teacher + (1e-2 * student.detach()).float() + offset
    exact = _from_teacher._formula(near.double(), teacher.double(), dim=-1, temperature=1.0)
    plain = _from_teacher._formula(near, teacher, dim=-1, temperature=1.0)
    blocks = _from_teacher._block(near, teacher, None, torch.empty_like(near), torch.empty_like(near), temperature=1.0)
    assert (blocks - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("columns", [1, 1000, 4099, 128256])
def test_squares_of_a_row_are_as_exact_as_a_sum(columns):
    for row in (make_pair(3, columns, dtype=torch.float32)[1], torch.full((3, columns), 0.1)):
        exact = row.double().square().sum(-1)
        torch.testing.assert_close(
            _mean_squares._squares(row, torch.empty_like(row)).double(), exact, rtol=2e-6, atol=0
        )


def test_equals_torch_on_a_large_input():
    student, teacher = make_pair(1024, 4096, dtype=torch.float32)
    ours, theirs = LogitLoss()(student, teacher), F.mse_loss(student, teacher)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(v, student)[0] for v in (ours, theirs)))
    assert math.isclose(ours.item(), (student - teacher).square().mean().item(), rel_tol=1e-5)
