"""Fused equals plain, whatever comes; what is fused and what is not; what it may not cost and what it must notice."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from contract import gradient, make_pair
from distill import KLLoss, LogitLoss, _rowwise, kl_loss, logit_loss
from distill._rowwise import RowLoss
from distill._tensors import REDUCTIONS, reduce, row_weights
from distill.losses import kl, logit

TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},  # two roundings
    torch.half: {"rtol": 2**-10, "atol": 1e-6},
}
# What a loss with nothing but a formula gets; the options say that they reach it.
BY_AUTOGRAD = RowLoss(kl._formula)
LOSSES = {
    "logit": (logit._ROWS, {}),
    "kl": (kl._ROWS, {"temperature": 2.5}),
    "by_autograd": (BY_AUTOGRAD, {"temperature": 2.5}),
}
repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=80)


@pytest.fixture
def fused(monkeypatch):
    """As if every input were large, in blocks of at most 64 elements or one row."""
    monkeypatch.setattr(_rowwise, "SMALL", 0)
    monkeypatch.setattr(_rowwise, "SHORT", 1)
    monkeypatch.setattr(_rowwise, "_block_elements", lambda device: 64)


def is_fused(value):
    return "Fused" in type(value.grad_fn).__name__


class Counted:
    """A block function that counts its calls, in a loss that is otherwise `loss`."""

    def __init__(self, loss):
        self.calls = 0
        self.of_loss = loss.block
        self.loss = RowLoss(loss.formula, block=self)

    def __call__(self, *args, **options):
        self.calls += 1
        return self.of_loss(*args, **options)


@st.composite
def calls(draw):
    """Inputs of any layout, and everything else that a call depends on."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(1, 40))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtypes = st.sampled_from(list(TOLERANCE))

    def tensor():
        padding = draw(st.lists(st.integers(0, 1), min_size=len(shape), max_size=len(shape)))
        order = list(draw(st.permutations(range(len(shape)))))
        if draw(st.integers(0, 5)):  # mostly with the rows in one piece, as only those are fused
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
    loss = LOSSES[name][0]

    @repeatable
    @given(calls())
    def check(call):
        student, teacher, dim, reduction, mask, upstream = call
        options = {**LOSSES[name][1], "dim": dim, "reduction": reduction, "mask": mask}
        # The oracle computes in float64; only its gradient comes back in the student's dtype.
        plain, plain_gradient = value_and_gradient(loss, student, upstream, teacher.double(), **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_rowwise, "SMALL", 0)
            patch.setattr(_rowwise, "SHORT", 1)
            patch.setattr(_rowwise, "_block_elements", lambda device: 64)
            ours, our_gradient = value_and_gradient(loss, student, upstream, teacher, **options)
            assert is_fused(ours) is (student.stride(dim) == teacher.stride(dim) == 1)
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
    for index in _rowwise._cut(count.shape, limit):
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


def test_small_inputs_are_plain_and_large_ones_are_not():
    for rows, logits, divergence in [(1, False, False), (2047, False, False), (2048, False, True), (6144, True, True)]:
        student, teacher = make_pair(rows, 512, dtype=torch.float32)
        for loss in (LogitLoss(), KLLoss(), LogitLoss(reduction="sum"), logit_loss, kl_loss):
            value = loss(student, teacher)
            assert is_fused(value) is (divergence if loss is kl_loss or isinstance(loss, KLLoss) else logits)
            torch.testing.assert_close(value, loss(student.double(), teacher.double()).float())


def test_a_mean_of_short_rows_is_one_operation():
    short, long = (make_pair(3 * _rowwise.SMALL // n, n, dtype=torch.float32) for n in (32, 64))
    assert [is_fused(LogitLoss()(*pair)) for pair in (short, long)] == [False, True]
    assert is_fused(LogitLoss(reduction="sum")(*short))
    assert is_fused(LogitLoss()(*short, mask=torch.ones(len(short[0]))))
    assert is_fused(KLLoss()(*short))


def test_rows_in_pieces_are_plain_and_channels_last_are_not(fused):
    student, teacher = make_pair(2, 5, 3, 4)
    assert not is_fused(KLLoss(dim=1)(student, teacher))
    ours, theirs = (x.to(memory_format=torch.channels_last) for x in (student, teacher))
    value = KLLoss(dim=1)(ours, theirs)
    assert is_fused(value)
    (result,) = torch.autograd.grad(value, ours)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, gradient(KLLoss(dim=1), student, teacher))


def test_rows_too_long_for_a_block_are_plain(fused, monkeypatch):
    monkeypatch.setattr(_rowwise, "LARGEST_ROW", 9)
    assert not is_fused(LogitLoss()(*make_pair(6, 10)))
    assert is_fused(LogitLoss()(*make_pair(6, 9)))


@pytest.mark.parametrize("threads", [1, 2, 64, 1000])
def test_block_size_grows_with_the_threads_within_limits(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert 2**19 <= _rowwise._block_elements(torch.device("cpu")) <= 2**21
    assert _rowwise._block_elements(torch.device("cuda")) == 2**22


@pytest.mark.parametrize(("reduction", "dtype", "passes"), [
    ("mean", torch.float32, 1), ("sum", torch.bfloat16, 1), ("mean", torch.half, 2), ("none", torch.float32, 2),
])  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_rows_are_read_once_where_the_reduction_allows_it(fused, reduction, dtype, passes, masked, factor):
    student, teacher = make_pair(12, 16, dtype=dtype)  # 3 blocks of 4 rows
    mask = torch.arange(12) > 3 if masked else None
    counted = Counted(logit._ROWS)
    value = counted.loss(student, teacher, dim=-1, reduction=reduction, mask=mask)
    assert counted.calls == 3
    (factor * value.sum()).backward()
    assert counted.calls == 3 * passes


def test_values_alone_take_no_gradient(fused):
    student, teacher = make_pair(12, 16)
    seen = []

    def block(ours, theirs, factors, *buffers):
        seen.append(factors)
        return logit._block(ours, theirs, factors, *buffers)

    loss = RowLoss(logit._formula, block=block)
    with torch.no_grad():
        loss(student, teacher, dim=-1, reduction="mean")
    with torch.inference_mode():
        loss(student, teacher, dim=-1, reduction="mean")
    loss(student.detach(), teacher, dim=-1, reduction="mean")
    loss(student, teacher, dim=-1)
    assert seen == [None] * 12


@pytest.mark.parametrize("factor", [0.1, 1 / 3, -700.0, 2.0**16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.half])
def test_factor_from_above_is_not_rounded_to_the_students_dtype(fused, dtype, factor):
    student, teacher = make_pair(64, 1024, dtype=dtype)
    ours = gradient(lambda s: factor * LogitLoss()(s, teacher), student).double()
    exact = factor * 2 * (student.detach().double() - teacher.double()) / (64 * 1024)
    # 0.1 in bfloat16 is 0.10010: every element would be 0.1 % too large. Roundings of the elements cancel in the sum.
    assert abs((ours * exact).sum() / (exact * exact).sum() - 1) < (1e-6 if dtype == torch.float32 else 1e-4)


def test_gradient_in_half_survives_until_the_scaler(fused):
    student = torch.full((2, 2**15), 1e-3, dtype=torch.half, requires_grad=True)
    (LogitLoss()(student, torch.zeros_like(student)) * 2**16).backward()  # 2^16 * 2 * 1e-3 / 2^16; unscaled: 3e-8
    torch.testing.assert_close(student.grad, torch.full_like(student, 2e-3))


@pytest.mark.parametrize("loss", [LogitLoss(), KLLoss()])
def test_backward_twice_gives_the_same_and_leaves_the_first_alone(fused, loss):
    student, teacher = make_pair(6, 10)
    value = loss(student, teacher)
    (first,) = torch.autograd.grad(value, student, torch.tensor(3.0).double(), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(value, student, torch.tensor(3.0).double(), retain_graph=True)
    first.zero_()
    (third,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(second, kept)
    torch.testing.assert_close(3 * third, kept)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_double_backward(fused, loss, reduction):
    rows, options = LOSSES[loss]
    student, teacher = make_pair(4, 5)
    for mask in (None, torch.tensor([1.0, 0.0, 2.0, 0.5]).double()):
        full = {**options, "dim": -1, "reduction": reduction, "mask": mask}

        def call(s, options=full):
            return rows(s, teacher, **options)

        assert is_fused(call(student))
        assert torch.autograd.gradcheck(call, student)
        assert torch.autograd.gradgradcheck(call, student)


@pytest.mark.parametrize("which", ["student", "teacher", "mask"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_change_in_place_before_backward_is_noticed(fused, which, reduction):
    student, teacher = make_pair(6, 10)
    tensors = {"student": student * 1, "teacher": teacher, "mask": torch.ones(6, dtype=torch.float64)}
    value = LogitLoss(reduction=reduction)(tensors["student"], tensors["teacher"], mask=tensors["mask"])
    with torch.no_grad():
        tensors[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_weights_that_learn_get_their_gradient(fused):
    student, teacher = make_pair(6, 10)
    weights = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    ours = torch.autograd.grad(KLLoss()(student, teacher, mask=weights), (student, weights))
    values = kl._formula(student, teacher, dim=-1, temperature=4.0)
    theirs = torch.autograd.grad((weights * values).sum() / weights.sum(), (student, weights))
    torch.testing.assert_close(ours, theirs)


def test_rows_without_weight_do_not_spoil_the_value(fused):
    student, teacher = make_pair(6, 10)
    kept = torch.arange(6) > 0
    clean = LogitLoss()(student, teacher, mask=kept)
    teacher[0] = torch.inf
    value = LogitLoss()(student, teacher, mask=kept)
    assert value == clean
    assert torch.autograd.grad(value, student)[0][1:].isfinite().all()


def test_shifted_logits_of_a_language_model(fused):
    student, teacher = make_pair(3, 8, 20)
    mask = torch.arange(7).expand(3, 7) < torch.tensor([[7], [4], [2]])
    value = KLLoss()(student[:, :-1], teacher[:, 1:], mask=mask)
    assert is_fused(value)
    expected = kl._formula(student[:, :-1], teacher[:, 1:], dim=-1, temperature=4.0)[mask].mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, student)[0] for v in (value, expected)))


@pytest.mark.parametrize("loss", LOSSES)
def test_activation_checkpointing(fused, loss):
    rows, options = LOSSES[loss]
    student, teacher = make_pair(6, 10)
    options = {**options, "dim": -1, "reduction": "mean", "mask": torch.arange(6) % 2}

    def call(s):
        return rows(s * 2, teacher, **options)

    expected = gradient(call, student)
    for reentrant in (False, True):
        student.grad = None
        checkpoint(call, student, use_reentrant=reentrant).backward()
        torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_hooks_on_saved_tensors_see_the_inputs_and_nothing_of_the_blocks(fused, loss):
    rows, options = LOSSES[loss]
    student, teacher = make_pair(6, 10)
    mask = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    packed, unpacked = [], []

    def unpack(x):
        unpacked.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x.detach(), unpack):
        value = rows(student, teacher, dim=-1, reduction="sum", mask=mask, **options)
    assert [x.data_ptr() for x in packed] == [x.data_ptr() for x in (student, teacher, mask)]
    assert unpacked == []
    value.backward()
    assert len(unpacked) == 3


def test_a_gradient_times_one_is_not_written_again():
    gradient = torch.ones(3)
    _rowwise.scale(gradient, torch.tensor(1.0))
    assert gradient._version == 0
    _rowwise.scale(gradient, torch.tensor(2.0))
    assert gradient.tolist() == [2, 2, 2]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # forward-mode's own imports
def test_transforms_and_tracing_get_the_plain_form(fused):
    student, teacher = make_pair(6, 10)
    expected = gradient(LogitLoss(), student, teacher)
    hessian = torch.func.hessian(lambda s: LogitLoss()(s, teacher))(student.detach())
    torch.testing.assert_close(hessian.view(60, 60), torch.eye(60).double() * 2 / 60)
    jacobian = torch.func.jacrev(lambda s: logit_loss(s, teacher))(student.detach())
    torch.testing.assert_close(jacobian.sum(0) / 6, expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(student.detach(), torch.ones_like(teacher))
        tangent = forward_ad.unpack_dual(LogitLoss()(dual, teacher)).tangent
    torch.testing.assert_close(tangent, expected.sum())
    exported = torch.export.export(LogitLoss(), (student, teacher)).module()
    torch.testing.assert_close(exported(student, teacher), LogitLoss()(student, teacher))
    assert LogitLoss()(student.to("meta"), teacher.to("meta")).shape == ()


def test_subclasses_of_tensor_stay_what_they_are(fused):
    class Sub(torch.Tensor):
        pass

    student, teacher = make_pair(6, 10)
    assert type(LogitLoss()(student.as_subclass(Sub), teacher)) is Sub
    assert type(LogitLoss()(student, teacher.as_subclass(Sub))) is Sub
    assert is_fused(LogitLoss()(torch.nn.Parameter(student.detach()), teacher))


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # PyTorch 2.11 says so to everybody
@pytest.mark.parametrize("loss", [LogitLoss(), KLLoss()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_no_memory_but_the_gradient_and_a_few_blocks(loss, dtype):
    student, teacher = make_pair(256, 2**15, dtype=dtype)
    size = student.numel() * student.element_size()
    buffers = 4 * 4 * _rowwise._block_elements(student.device)
    assert buffers <= 32 * 2**20

    def step():
        (0.5 * loss(student, teacher)).backward()

    assert size <= peak_memory(step) <= size + 1.1 * buffers
    with torch.no_grad():
        assert peak_memory(lambda: loss(student, teacher)) <= 1.1 * buffers
    student.grad = None
    value = loss(student, teacher, mask=torch.ones(256))
    assert peak_memory(value.backward) < 2**20  # the gradient was there


def peak_memory(function):
    """The most bytes that a function's tensors took at a time."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_kl_of_blocks_is_as_exact_as_the_formula_near_zero():
    student, teacher = make_pair(64, 1000)
    near = teacher + 1e-2 * student.detach()
    exact = kl._formula(near, teacher, dim=-1, temperature=1.0)
    plain, blocks = (
        function(near.float(), teacher.float())
        for function in (
            lambda s, t: kl._formula(s, t, dim=-1, temperature=1.0),
            lambda s, t: kl._block(s, t, None, torch.empty_like(s), torch.empty_like(s), temperature=1.0),
        )
    )
    assert (blocks - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("columns", [1, 1000, 4099, 128256])
def test_squares_of_a_row_are_as_exact_as_a_sum(columns):
    for row in (make_pair(3, columns, dtype=torch.float32)[1], torch.full((3, columns), 0.1)):
        exact = row.double().square().sum(-1)
        torch.testing.assert_close(logit._squares(row, torch.empty_like(row)).double(), exact, rtol=2e-6, atol=0)


def test_equals_torch_on_a_large_input():
    student, teacher = make_pair(1024, 4096, dtype=torch.float32)
    ours, theirs = LogitLoss()(student, teacher), F.mse_loss(student, teacher)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(v, student)[0] for v in (ours, theirs)))
    assert math.isclose(ours.item(), (student - teacher).square().mean().item(), rel_tol=1e-5)


def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="comes with PyTorch for CUDA")
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), *sys.path])
    result = subprocess.run(
        [sys.executable, here / "triton_worker.py"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_triton_is_asked_for_float32_on_a_gpu_only_and_may_be_missing(monkeypatch):
    assert _rowwise._kernels(torch.ones(2), torch.float32) is None
    monkeypatch.setitem(sys.modules, "distill._triton", sys)
    assert _rowwise._import_triton.__wrapped__() is sys
    monkeypatch.setitem(sys.modules, "distill._triton", None)  # makes its import fail
    assert _rowwise._import_triton.__wrapped__() is None


def test_kernels_may_decline_and_scale_where_they_are(fused, monkeypatch):
    class Kernels:
        scaled = 0

        @staticmethod
        def run(name, *tensors, temperature):
            assert (name, temperature) == ("kl", 4.0)
            return False

        @classmethod
        def scale(cls, gradient, factor):
            cls.scaled += 1
            gradient.mul_(factor)

    student, teacher = make_pair(6, 10)
    expected = gradient(lambda s: 2 * KLLoss()(s, teacher), student)
    monkeypatch.setattr(_rowwise, "_kernels", lambda x, dtype: Kernels)
    torch.testing.assert_close(gradient(lambda s: 2 * KLLoss()(s, teacher), student), expected)
    assert Kernels.scaled == 1
