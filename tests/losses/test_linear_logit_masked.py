"""LinearLogitLoss: what a mask hides, constants from inference mode, and several sizes under torch.compile."""

import pytest
import torch

from contract import gradient
from distill import LinearLogitLoss
from linear_heads import METHODS, by_logits, heads, hidden, traces_functions


def as_inference(tensor):
    with torch.inference_mode():
        return tensor.detach().clone()


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_constants_may_be_inference_tensors(method, reduction, dtype):
    states = hidden(5, dtype=dtype)
    mask = torch.tensor([True, False, True, True, False])
    for trains in (False,) if method == "factor" else (False, True):
        pair, usual = heads(dtype=dtype, trains=trains), heads(dtype=dtype, trains=trains)
        with torch.inference_mode():
            pair[1] = heads(dtype=dtype)[1]
            if not trains:
                pair[0] = heads(dtype=dtype, trains=False)[0]
        assert pair[1].weight.is_inference()
        ours, theirs = (states[0].detach().clone().requires_grad_() for _ in range(2))
        value = LinearLogitLoss(*pair, method=method, reduction=reduction)(
            ours, as_inference(states[1]), mask=as_inference(mask)
        )
        expected = LinearLogitLoss(*usual, method=method, reduction=reduction)(theirs, states[1], mask=mask)
        torch.testing.assert_close(value, expected)
        value.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        if trains:
            for a, b in zip(pair[0].parameters(), usual[0].parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("method", ["gram", "blocks", "logits"])
def test_student_states_may_be_inference_tensors_where_the_head_learns_alone(method):
    pair, states = heads(), hidden(5)
    value = LinearLogitLoss(*pair, method=method)(as_inference(states[0]), as_inference(states[1]))
    expected = by_logits(pair, (states[0].detach(), states[1]))
    wanted = list(pair[0].parameters())
    torch.testing.assert_close(torch.autograd.grad(value, wanted), torch.autograd.grad(expected, wanted))


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, 1e30])
def test_what_a_mask_hides_counts_nowhere(method, reduction, spoilt):
    pair, states = heads(trains=method != "factor"), hidden(3, 4)
    loss = LinearLogitLoss(*pair, method=method, reduction=reduction)
    wanted = [x for x in pair[0].parameters() if x.requires_grad]
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) > 0.4
    clean = [x.detach().masked_fill(~mask[..., None], 0.0) for x in states]
    dirty = [x.detach().masked_fill(~mask[..., None], spoilt) for x in states]
    for weights in (mask, mask * 0.7, (mask * 0.7).requires_grad_()):
        results = []
        for student, teacher in (clean, dirty):
            student = student.clone().requires_grad_()
            value = loss(student, teacher, mask=weights)
            found = torch.autograd.grad(value.sum(), [student, *wanted])
            assert all(x.isfinite().all() for x in (value, *found))
            assert found[0][~mask].abs().max() == 0
            results.append([value, *found])
        torch.testing.assert_close(*results, rtol=0, atol=0)
    if reduction == "mean":
        kept = gradient(loss, clean[0], clean[1], mask=mask)[mask]
        torch.testing.assert_close(kept, gradient(loss, *(x[mask] for x in clean)))


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_denominator_stands_for_the_number_of_samples(method):
    pair, states = heads(trains=method != "factor", dtype=torch.float64), hidden(7, dtype=torch.float64)
    loss, total = (LinearLogitLoss(*pair, method=method, reduction=x) for x in ("mean", "sum"))
    mask = torch.arange(7) > 2
    for given in ({}, {"mask": mask}):
        for denominator in (11, torch.tensor(11)):
            value = loss(*states, denominator=denominator, **given)
            torch.testing.assert_close(value, total(*states, **given) / 11)
            ours = gradient(loss, *states, denominator=denominator, **given)
            torch.testing.assert_close(ours, gradient(total, *states, **given) / 11)
    with pytest.raises(ValueError, match="denominator must come with reduction='mean', got reduction='sum'"):
        total(*states, denominator=3)


@traces_functions
@pytest.mark.parametrize("method", METHODS)
def test_compiled_calls_of_several_sizes_and_options(method):
    pair = heads(trains=method != "factor")
    loss = LinearLogitLoss(*pair, method=method)
    wanted = [x for x in pair[0].parameters() if x.requires_grad]
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for samples, scale, reduction in ((5, 1.0, "mean"), (7, 1.0, "mean"), (7, 0.5, "none")):
        loss.student_scale, loss.reduction = scale, reduction
        states = hidden(samples)
        mask = torch.arange(samples) > 1 if reduction == "mean" else None
        for tensor in (*states, mask):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)  # or each size would be compiled anew (one form is)
        ours, theirs = compiled(*states, mask=mask), loss(*states, mask=mask)
        torch.testing.assert_close(ours, theirs)
        inputs = [states[0], *wanted]
        slopes = [torch.autograd.grad(value.sum(), inputs) for value in (ours, theirs)]
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)
