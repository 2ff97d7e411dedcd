"""The Triton kernels in Triton's interpreter, on the CPU: a process of its own, since Triton is told at import."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import copy
import itertools

import torch

from contract import gradient, make_pair
from distill import (
    AlphaBetaLoss,
    JSLoss,
    KLLoss,
    LinearLoss,
    LogitLoss,
    ReverseKLLoss,
    SkewKLLoss,
    SkewReverseKLLoss,
    TopK,
    TVDLoss,
)
from distill._engine import fused as engine
from distill._engine import kernels as choice
from distill._engine import triton as kernels
from distill._engine import triton_topk as kernels_of_topk
from distill._engine.rows import Rows
from distill._reduction import reduce

LOSSES = [
    (LogitLoss.rows, LogitLoss(), {}),
    (KLLoss.rows, KLLoss(2.5), {"temperature": 2.5}),
    (ReverseKLLoss.rows, ReverseKLLoss(2.5), {"temperature": 2.5}),
]
# As if these tensors were on a GPU.
engine.SMALL, engine.FEW, engine.SHORT = 0, 0, 1
choice._kernels = lambda x, dtype: kernels if dtype == torch.float32 else None


def no_blocks(*args, **options):
    raise RuntimeError("the kernel was to do this")


def pairs():
    for dtype in (torch.float32, torch.bfloat16, torch.half):
        for shape in ((5, 10), (3, 2), (7,), (2, 3, 4100)):  # the last takes two rounds of the loop over the columns
            yield make_pair(*shape, dtype=dtype)
    student, teacher = make_pair(3, 6, 20, dtype=torch.float32)
    yield student.detach()[:, :-1], teacher[:, 1:]
    yield student.detach().transpose(0, 1), teacher.transpose(0, 1)
    yield student.detach()[:, 0], teacher.bfloat16()[0, :1].expand(3, 20)


def check_values_and_gradients():
    for (plain, _, options), (student, teacher) in itertools.product(LOSSES, pairs()):
        weights = torch.rand(student.shape[:-1], generator=torch.Generator().manual_seed(0))
        ways = [("mean", weights, 0.3), ("none", weights, 1.0), ("mean", None, 1.0), ("sum", weights > 0.3, 1.0)]
        for reduction, mask, factor in ways if student.numel() == 50 else ways[:1]:
            full = {**options, "dim": -1, "reduction": reduction, "mask": mask}
            check(plain, student, teacher, full, factor)


def check(plain, student, teacher, options, factor):
    loss = Rows(plain.formula, block=no_blocks, kernel=plain.kernel, softmax=plain.softmax).reduced
    student = student.detach().requires_grad_()
    exact = plain.formula(student.detach().double(), teacher.double(), **without_reduction(options))
    value = loss(student, teacher, **options)
    torch.testing.assert_close(
        value.double(), reduce(exact, options["reduction"], options["mask"]), rtol=1e-5, atol=1e-6
    )
    with torch.no_grad():
        assert torch.equal(loss(student, teacher, **options), value)

    def exact_loss(s):
        values = plain.formula(s, teacher.double(), **without_reduction(options))
        return factor * reduce(values, options["reduction"], options["mask"]).sum()

    (ours,) = torch.autograd.grad(factor * value.sum(), student)
    assert ours.dtype == student.dtype
    # The interpreter cuts off where a GPU rounds to bfloat16, here up to twice.
    rtol = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.half: 2**-9}[ours.dtype]
    torch.testing.assert_close(ours.double(), gradient(exact_loss, student.double()), rtol=rtol, atol=1e-7)


def without_reduction(options):
    return {name: value for name, value in options.items() if name not in ("reduction", "mask")}


def check_extremes():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    for module, temperature in itertools.product((KLLoss, ReverseKLLoss), (1.0, 4.0)):
        value = module(temperature)(student, -student.detach())
        (of_student,) = torch.autograd.grad(value, student)
        torch.testing.assert_close(value.item(), temperature * 2e4)
        assert of_student.isfinite().all()
    # The largest logits come last, so that what was summed before must shrink.
    rising = torch.linspace(-9, 9, 9000).view(1, -1) + make_pair(1, 9000, dtype=torch.float32)[1]
    for module, pair in itertools.product(
        (KLLoss, ReverseKLLoss), ((rising, rising.flip(-1)), (rising.flip(-1), rising))
    ):
        exact = module(2.5)(*(x.double() for x in pair))
        torch.testing.assert_close(module(2.5)(*pair).double(), exact, rtol=1e-5, atol=0)
    same = make_pair(6, 10, dtype=torch.float32)[1]
    for _, module, _ in LOSSES:
        assert module(same, same) == 0
        assert gradient(module, same, same).abs().max() == 0


def check_close_rows_keep_their_digits():
    student, teacher = make_pair(8, 5000, dtype=torch.float32)
    for module in (KLLoss, ReverseKLLoss):
        for share, offset, temperature in [(0.01, 0, 4.0), (1, 0, 1000.0), (0.01, 0, 1.0), (0.05, 1000, 4.0)]:
            near = (1 - share) * teacher + share * student.detach() + offset
            values = module(temperature, reduction="none")(near, teacher)
            assert (values >= 0).all()
            exact = module(temperature)(near.double(), teacher.double())
            torch.testing.assert_close(values.mean().double(), exact, rtol=1e-5 if offset == 0 else 1e-4, atol=0)
            ours = gradient(module(temperature), near, teacher).double()
            theirs = gradient(module(temperature), near.double(), teacher.double())
            assert (ours - theirs).norm() <= (1e-3 if offset == 0 else 1e-2) * theirs.norm()


def check_classes_without_probability():
    inf = torch.inf
    for columns, module in itertools.product((6, 5000), (KLLoss, ReverseKLLoss)):
        places = ([], [0, 3], [1], [0, columns - 1])
        for of_student, of_teacher in (
            itertools.product(places, repeat=2) if columns == 6 else zip(places, places, strict=True)
        ):
            student, teacher = make_pair(2, columns, dtype=torch.float32)
            student = student.detach()
            student[0, of_student] = -inf
            teacher[0, of_teacher] = -inf
            student[1, : columns - 2] = teacher[
                1, : columns - 2
            ] = -inf  # the whole first round of the loop over columns
            loss = module(2.0, reduction="none")
            values, exact = loss(student, teacher), loss(student.double(), teacher.double())
            torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=0)
            assert not values.isnan().any()
            finite = values.isfinite()
            of_row = gradient(lambda s: loss(s, teacher)[finite].sum(), student)  # noqa: B023 - called at once
            expected = gradient(lambda s: loss(s, teacher.double())[finite].sum(), student.double())  # noqa: B023
            torch.testing.assert_close(of_row[finite].double(), expected[finite], rtol=1e-4, atol=1e-7)
    for side in (0, 1):
        pair = [x.detach() for x in make_pair(2, 6, dtype=torch.float32)]
        pair[side][0, 2] = torch.nan
        for module in (KLLoss, ReverseKLLoss, LogitLoss):
            values = module(reduction="none")(*pair)
            assert values.isnan().tolist() == [True, False]
            kept = gradient(module(), *pair, mask=torch.tensor([False, True]))
            assert kept[0].abs().max() == 0
            assert kept.isfinite().all()


def check_layouts_without_a_kernel_take_blocks():
    student, teacher = make_pair(4, 5, 6, 7, dtype=torch.float32)
    for module in (LogitLoss(dim=1), KLLoss(dim=1), ReverseKLLoss(dim=1)):
        torch.testing.assert_close(
            gradient(module, student, teacher), gradient(module, student.double(), teacher.double()).float()
        )
    inner = student.detach()[:3, :4, :5]  # no two strides reach every row
    assert kernels.find_layout(inner, inner) is None
    torch.testing.assert_close(LogitLoss()(inner, inner + 2), torch.tensor(4.0))
    assert kernels.find_layout(student, teacher) == (4 * 5 * 6, [0, 7, 0, 7])
    assert kernels.find_layout(student[:, :4], teacher[:, 1:]) == (4 * 6, [210, 7, 210, 7])


def check_scale():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.arange(5000).to(dtype)
        expected = (x.float() * 0.1).to(dtype)
        kernels.scale(x, torch.tensor(1.0))
        assert torch.equal(x, torch.arange(5000).to(dtype))
        kernels.scale(x, torch.tensor(0.1))
        torch.testing.assert_close(x, expected, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=0)


def check_chunks_of_two_heads():
    """The kernels write the gradient over the student's logits of a chunk, alone or with another loss in the pass."""
    generator = torch.Generator().manual_seed(0)
    heads = [torch.nn.Linear(width, 4100) for width in (3, 5)]
    student, teacher = (torch.randn(5, width, generator=generator) for width in (3, 5))
    labels, mask = torch.tensor([1, 4099, -100, 7, 0]), torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0])
    ways = [(0.0, None, None), (0.5, None, None), (0.5, 4000, None), (0.0, None, 3.0), (0.5, 4000, 3.0)]
    for module, (share, size, cap) in itertools.product((KLLoss, ReverseKLLoss), ways):
        options = {"cross_entropy": share, "vocab_size": size, "student_softcap": cap, "rows": 2}
        found = []
        for dtype in (torch.float32, torch.float64):
            ours, theirs = (copy.deepcopy(head).to(dtype) for head in heads)
            hidden = student.to(dtype).requires_grad_()
            loss = LinearLoss(module(2.5), ours, theirs, **options)
            value = loss(hidden, teacher.to(dtype), labels, mask=mask.to(dtype))
            found.append((value, *torch.autograd.grad(value, (hidden, ours.weight, ours.bias))))
        for got, exact in zip(*found, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-6)


TOPK = [
    (KLLoss, {}),
    (ReverseKLLoss, {}),
    (JSLoss, {}),
    (SkewKLLoss, {}),
    (SkewReverseKLLoss, {}),
    (TVDLoss, {}),
    (AlphaBetaLoss, {"alpha": 0.3, "beta": 0.5}),
]


def check_topk(calls):
    """Of a `TopK` the divergences take two kernels, over several rounds of the loop over the columns."""
    run, kernels_of_topk.run = kernels_of_topk.run, lambda *args, **options: calls.append(1) or run(*args, **options)
    for (kind, options), (student, teacher) in itertools.product(TOPK, pairs()):
        if student.shape[-1] > 2 and (student.shape[-1] < 4000 or kind is KLLoss):
            weights = torch.rand(student.shape[:-1], generator=torch.Generator().manual_seed(0))
            check_topk_rows(kind(temperature=2.5, **options), student, TopK.of(teacher, 2, temperature=2.5), weights)
    assert len(calls) > 7 * 20
    check_topk_extremes()
    check_topk_chunks(calls)
    kernels_of_topk.run = run


def check_topk_rows(loss, student, topk, weights):
    student = student.detach().requires_grad_()
    mask = weights * (weights > 0.3)
    exact = loss(student.detach().double(), topk, mask=mask)  # in float64 there is no kernel
    value = loss(student, topk, mask=mask)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(loss(student, topk, mask=mask), value)
    (ours,) = torch.autograd.grad(value, student)
    assert ours.dtype == student.dtype
    rtol = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.half: 2**-9}[ours.dtype]
    wanted = gradient(lambda s: loss(s, topk, mask=mask), student.double())
    torch.testing.assert_close(ours.double(), wanted, rtol=rtol, atol=1e-6)


def check_topk_extremes():
    student, teacher = make_pair(9, 9000, dtype=torch.float32)
    topk = TopK.of(teacher, 5, temperature=2.0)
    rows = student.detach().clone()
    rows[0].scatter_(0, topk.indices[0], 300.0)  # nothing is left for the rest
    rows[1].scatter_(0, topk.indices[1], -300.0)  # nor for what is given
    rows[2] += 3e4
    rows[3, : 4096 * 2] = -torch.inf  # whole rounds without a probability
    rows[4] = torch.linspace(-9, 9, 9000)  # the largest come last
    rows[5] = -torch.inf
    rows[5, topk.indices[5]] = student.detach()[5, topk.indices[5]]  # only what is given has a probability
    rows[6] = teacher[6]
    rows[7] = torch.nan
    rows[8, 17] = torch.nan
    for kind in (KLLoss, ReverseKLLoss, JSLoss):
        loss, shown = kind(temperature=2.0, reduction="none"), torch.arange(9) != 7
        values, exact = (loss(s, topk, mask=shown) for s in (rows, rows.double()))
        assert values.isnan().tolist() == [False] * 8 + [True]
        torch.testing.assert_close(values.double(), exact, rtol=1e-4, atol=1e-5, equal_nan=True)
        finite = values.isfinite()
        ours, theirs = (gradient_of_some(loss, s, topk, shown, finite) for s in (rows, rows.double()))
        assert ours[7].abs().max() == 0
        torch.testing.assert_close(ours[finite].double(), theirs[finite], rtol=1e-3, atol=1e-6)
        assert ours[6].abs().max() < 1e-6  # where they agree
    assert loss(rows, TopK.of(teacher, 9000, temperature=2.0)).shape == (9,)  # all classes are given: blocks


def gradient_of_some(loss, student, topk, mask, some):
    return gradient(lambda s: loss(s, topk, mask=mask)[some].sum(), student)


def check_topk_chunks(calls):
    """Over the logits of a chunk, alone and beside the cross-entropy, of some columns and under a soft cap."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(3, 4100)
    student = torch.randn(5, 3, generator=generator)
    labels, mask = torch.tensor([1, 4099, -100, 7, 0]), torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0])
    for share, size, cap in [(0.0, None, None), (0.5, None, None), (0.5, 4000, None), (0.5, 4000, 3.0)]:
        topk = TopK.of(3 * torch.randn(5, size or 4100, generator=generator), 4, temperature=2.5)
        found, before = [], len(calls)
        for dtype in (torch.float32, torch.float64):
            ours, hidden = copy.deepcopy(head).to(dtype), student.to(dtype).requires_grad_()
            options = {"cross_entropy": share, "vocab_size": size, "student_softcap": cap, "rows": 2}
            loss = LinearLoss(ReverseKLLoss(2.5), ours, **options)
            value = loss(hidden, topk, labels, mask=mask.to(dtype))
            found.append((value, *torch.autograd.grad(value, (hidden, ours.weight, ours.bias))))
        assert len(calls) >= before + 2
        for got, exact in zip(*found, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-6)


def check_that_chunks_take_the_kernels(calls):
    run = kernels.run
    kernels.run = lambda *args, **options: calls.append(args[0]) or run(*args, **options)
    check_chunks_of_two_heads()
    kernels.run = run
    # In float32 five ways of two losses, with four counted samples two at a time.
    assert len(calls) >= 5 * 2 * 2
    assert {*calls} == {kernels.kl, kernels.reverse_kl}


if __name__ == "__main__":
    check_that_chunks_take_the_kernels([])
    check_values_and_gradients()
    check_extremes()
    check_close_rows_keep_their_digits()
    check_classes_without_probability()
    check_layouts_without_a_kernel_take_blocks()
    check_scale()
    check_topk([])
