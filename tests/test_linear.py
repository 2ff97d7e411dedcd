"""LinearLoss against the same loss on formed logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import distill
from contract import gradient
from distill import CrossEntropyLoss, Distiller, KLLoss, LinearCrossEntropyLoss, LinearLoss, RKDLoss, Term
from distill._engine import linear, products
from distill.losses._base import RowLoss

V, N = 23, 10
LOSSES = {
    name: cls
    for name, cls in ((name, distill.get_loss(name)) for name in distill.list_losses())
    if issubclass(cls, RowLoss) and cls.__module__.startswith("distill.")
}
OPTIONS = {"alpha_beta": (0.4, 0.7)}


def build(name, **options):
    return LOSSES[name](*OPTIONS.get(name, ()), **options)


def heads(bias=True, vocabularies=(V, V), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    made = []
    for width, vocabulary in zip((6, 9), vocabularies, strict=True):
        head = nn.Linear(width, vocabulary, bias=bias, dtype=dtype)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
        made.append(head)
    return made


def hidden(dtype=torch.float64, shape=(N,)):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(*shape, d, generator=generator, dtype=torch.float64).to(dtype) for d in (6, 9))
    labels = torch.randint(V, shape, generator=generator)
    return student.requires_grad_(), teacher, labels


def gradients(loss, states, head):
    for tensor in (states, *head.parameters()):
        tensor.grad = None
    loss.backward()
    return [states.grad, *(parameter.grad for parameter in head.parameters())]


def check(found, expected, **tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 1e-9, "atol": 1e-11}))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_formed_logits(name, reduction, monkeypatch):
    monkeypatch.setattr(linear, "_BLOCK", 2 * V + 1)  # blocks of two rows in chunks of five
    (ours, theirs), (student, teacher, labels) = heads(), hidden()
    loss = build(name, reduction=reduction)
    value = LinearLoss(loss, ours, theirs, rows=5)(student, teacher, labels)
    formed = loss(ours(student), theirs(teacher), labels)
    torch.testing.assert_close(value, formed, rtol=1e-11, atol=1e-12)
    weights = torch.rand(formed.shape, dtype=torch.float64)
    check(gradients((weights * value).sum(), student, ours), gradients((weights * formed).sum(), student, ours))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy_in_the_same_pass(name, masked):
    (ours, theirs), (student, teacher, labels) = heads(), hidden()
    loss = build(name)
    mask = torch.linspace(0, 1, N, dtype=torch.float64) if masked else None
    if not LOSSES[name].rows.labels:
        labels[3] = -100
    value = LinearLoss(loss, ours, theirs, cross_entropy=0.7, rows=3)(student, teacher, labels, mask=mask)
    logits = ours(student)
    formed = loss(logits, theirs(teacher), labels, mask=mask) + 0.7 * CrossEntropyLoss()(logits, labels, mask=mask)
    torch.testing.assert_close(value, formed, rtol=1e-11, atol=1e-12)
    check(gradients(value, student, ours), gradients(formed, student, ours))


def test_scales_vocabularies_and_denominators():
    ours, theirs = heads(vocabularies=(V + 4, V + 9))
    student, teacher, labels = hidden()
    labels[0] = V + 2  # a token that the teacher does not have: only the cross-entropy counts it
    options = {"vocab_size": V, "student_scale": 0.25, "teacher_scale": 2.0}
    value = LinearLoss(KLLoss(2.0), ours, theirs, cross_entropy=1.0, rows=3, **options)(
        student, teacher, labels, denominator=7
    )
    logits = 0.25 * ours(student)
    formed = KLLoss(2.0)(logits[:, :V], 2 * theirs(teacher)[:, :V], denominator=7)
    formed = formed + CrossEntropyLoss()(logits, labels, denominator=7)
    torch.testing.assert_close(value, formed, rtol=1e-11, atol=1e-12)
    check(gradients(value, student, ours), gradients(formed, student, ours))
    value = LinearLoss(KLLoss(2.0), ours, theirs, **options)(student, teacher)
    logits = 0.25 * ours(student)
    formed = KLLoss(2.0)(logits[:, :V], 2 * theirs(teacher)[:, :V])
    check(gradients(value, student, ours), gradients(formed, student, ours))


def test_what_the_mask_hides_counts_nowhere():
    (ours, theirs), (student, teacher, labels) = heads(), hidden(shape=(2, 5))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = False
    loss = LinearLoss(KLLoss(), ours, theirs, cross_entropy=1.0, rows=3)
    value = loss(student, teacher, labels, mask=mask)
    expected = gradients(value, student, ours)
    assert (expected[0][~mask] == 0).all()
    spoilt, constant, target = student.detach().clone(), teacher.clone(), labels.clone()
    spoilt[~mask], constant[~mask], target[~mask] = torch.nan, torch.inf, 255
    spoilt.requires_grad_()
    again = loss(spoilt, constant, target, mask=mask)
    torch.testing.assert_close(again, value, rtol=0, atol=0)
    check(gradients(again, spoilt, ours), expected, rtol=0, atol=0)
    nothing = loss(student, teacher, labels, mask=torch.zeros_like(mask))
    assert nothing == 0
    assert all((grad == 0).all() for grad in gradients(nothing, student, ours))


def test_cross_entropy_alone():
    (ours, _), (student, _, labels) = heads(), hidden(shape=(2, 5))
    labels[0, 0] = -100
    mask = torch.rand(2, 5, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        value = LinearCrossEntropyLoss(ours, reduction=reduction, rows=3)(student, labels, mask=mask)
        formed = CrossEntropyLoss(reduction=reduction)(ours(student), labels, mask=mask)
        torch.testing.assert_close(value, formed, rtol=1e-11, atol=1e-12)
        check(gradients(value.sum(), student, ours), gradients(formed.sum(), student, ours))


def test_a_head_or_hidden_states_that_do_not_train_get_no_gradient():
    (ours, theirs), (student, teacher, _) = heads(), hidden()
    ours.requires_grad_(False)
    LinearLoss(KLLoss(), ours, theirs)(student, teacher).backward()
    torch.testing.assert_close(student.grad, gradient(lambda s: KLLoss()(ours(s), theirs(teacher)), student))
    assert ours.weight.grad is None
    ours.requires_grad_(True)
    LinearLoss(KLLoss(), ours, theirs)(student.detach(), teacher).backward()
    assert ours.weight.grad.abs().max() > 0
    with torch.no_grad():
        assert not LinearLoss(KLLoss(), ours, theirs)(student, teacher).requires_grad


def test_differentiates_twice_and_in_batches():
    (ours, theirs), (student, teacher, _) = heads(), hidden()
    loss = LinearLoss(KLLoss(), ours, theirs, rows=4)
    assert torch.autograd.gradgradcheck(lambda s: loss(s, teacher), student)
    value = loss(student, teacher)
    (batched,) = torch.autograd.grad(value, student, torch.tensor([1.0, 2.0]).double(), is_grads_batched=True)
    torch.testing.assert_close(batched[1], 2 * batched[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_heads(dtype):
    (ours, theirs), (student, teacher, labels) = heads(dtype=dtype), hidden(dtype)
    value = LinearLoss(KLLoss(), ours, theirs, cross_entropy=1.0, rows=1)(student, teacher, labels)
    assert value.dtype == torch.float32
    formed = KLLoss()(ours(student), theirs(teacher)) + CrossEntropyLoss()(ours(student), labels)
    torch.testing.assert_close(value, formed)
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    found = gradients(value, student, ours)
    assert [grad.dtype for grad in found] == [dtype] * 3
    check(found, gradients(formed, student, ours), **tolerance)


@pytest.fixture
def widening(monkeypatch):
    """PyTorch on a GPU, whose products of half precision can give float32."""
    real, asked = torch.mm, []

    def mm(first, second, *, out_dtype=None, out=None):
        asked.append(out_dtype)
        dtype = out_dtype or first.dtype
        return real(first.to(dtype), second.to(dtype), out=out)

    monkeypatch.setattr(torch, "mm", mm)
    products._gives_float32.cache_clear()
    yield asked
    products._gives_float32.cache_clear()


@pytest.mark.parametrize("teachers", [1, 0])
@pytest.mark.parametrize("bias", [True, False])
def test_half_precision_gives_logits_in_float32_where_a_product_can(widening, bias, teachers):
    (ours, theirs), (student, teacher, labels) = heads(bias, dtype=torch.bfloat16), hidden(torch.bfloat16)
    wide = [copy.deepcopy(head).float() for head in (ours, theirs)]
    exact = student.detach().float().requires_grad_()
    if teachers:
        value = LinearLoss(KLLoss(), ours, theirs, cross_entropy=1.0, rows=4)(student, teacher, labels)
        formed = KLLoss()(wide[0](exact), wide[1](teacher.float())) + CrossEntropyLoss()(wide[0](exact), labels)
    else:
        value = LinearCrossEntropyLoss(ours, rows=4)(student, labels)
        formed = CrossEntropyLoss()(wide[0](exact), labels)
    assert torch.float32 in widening
    torch.testing.assert_close(value, formed, rtol=1e-6, atol=0)
    found = gradients(value, student, ours)
    assert {grad.dtype for grad in found} == {torch.bfloat16}
    expected = gradients(formed, exact, wide[0])
    check([grad.float() for grad in found], expected, rtol=1e-2, atol=1e-3)


def test_a_product_that_cannot_is_found_out_once(monkeypatch):
    asked = []

    def mm(*_, **options):
        asked.append(options)
        raise TypeError("mm() got an unexpected keyword argument 'out_dtype'")  # PyTorch 2.5

    monkeypatch.setattr(torch, "mm", mm)
    products._gives_float32.cache_clear()
    cpu = torch.device("cpu")
    assert [products._gives_float32(cpu, dtype) for dtype in (torch.half, torch.half, torch.float32)] == [False] * 3
    products._gives_float32.cache_clear()
    assert len(asked) == 1


def test_under_autocast_and_checkpointing():
    (ours, theirs), (student, teacher, _) = heads(dtype=torch.float32), hidden(torch.float32)
    loss = LinearLoss(KLLoss(), ours, theirs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, formed = loss(student, teacher), KLLoss()(ours(student), theirs(teacher))
    torch.testing.assert_close(value, formed, rtol=1e-3, atol=1e-4)
    assert value.dtype == torch.float32
    expected = gradients(loss(student, teacher), student, ours)
    again = checkpoint(lambda s: loss(s, teacher), student, use_reentrant=False)
    check(gradients(again, student, ours), expected, rtol=0, atol=0)


def test_is_traced_whole():
    (ours, theirs), (student, teacher, labels) = heads(dtype=torch.float32), hidden(torch.float32)
    loss = LinearLoss(KLLoss(), ours, theirs, cross_entropy=1.0)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value, expected = compiled(student, teacher, labels), loss(student, teacher, labels)
    torch.testing.assert_close(value, expected)
    check(gradients(value, student, ours), gradients(expected, student, ours), rtol=1e-4, atol=1e-6)


def test_inference_tensors_and_embeddings():
    (ours, theirs), (student, teacher, _) = heads(bias=False), hidden()
    table = nn.Embedding(V, 6, dtype=torch.float64)
    with torch.no_grad():
        table.weight.copy_(ours.weight)
    with torch.inference_mode():
        constant = teacher.clone()
    value = LinearLoss(KLLoss(), table, theirs)(student, constant)
    check(gradients(value, student, table), gradients(KLLoss()(ours(student), theirs(teacher)), student, ours))


def test_no_temporary_of_the_size_of_the_logits():
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    Watch.largest = max(Watch.largest, leaf.untyped_storage().nbytes())
            return out

    ours, theirs = nn.Linear(8, 2000), nn.Linear(8, 2000)
    student, teacher = torch.randn(512, 8, requires_grad=True), torch.randn(512, 8)
    with Watch():
        LinearLoss(KLLoss(), ours, theirs, rows=32)(student, teacher).backward()
    assert Watch.largest <= 2 * 32 * 2000 * 4  # a chunk, and a block ahead of it


def test_as_a_term_of_models_that_form_no_logits():
    class Model(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.body, self.norm, self.head = nn.Linear(5, width), nn.LayerNorm(width), nn.Linear(width, V)

        def forward(self, x):
            return self.norm(self.body(x))

    student, teacher = Model(6), Model(9)
    soft = LinearLoss(KLLoss(), student.head, teacher.head, cross_entropy=0.5)
    distiller = Distiller(student, teacher, Term(soft, at="norm"), task_loss=None)
    x, labels = torch.randn(4, 7, 5), torch.randint(V, (4, 7))
    out = distiller(x, labels, denominator=20)
    logits = student.head(student(x))
    expected = KLLoss()(logits, teacher.head(teacher(x)), denominator=20)
    expected = expected + 0.5 * CrossEntropyLoss()(logits, labels, denominator=20)
    torch.testing.assert_close(out.loss, expected)
    assert not any("head" in name for name in distiller.losses.state_dict())
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    student.head = nn.Linear(6, V)
    with pytest.raises(ValueError, match="student_head must be the head that the model has"):
        distiller(x, labels)


def test_a_head_inside_an_adapter_or_replaced_is_refused():
    class Wrapped(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.base_layer = head

    class Model(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.body, self.head = nn.Linear(5, width), nn.Linear(width, V)

        def forward(self, x):
            return self.body(x)

    student, teacher = Model(6), Model(9)
    soft = Term(LinearLoss(KLLoss(), student.head, teacher.head), at="body")
    student.head = Wrapped(student.head)
    with pytest.raises(ValueError, match="has it at 'head.base_layer', inside an adapter"):
        Distiller(student, teacher, soft, task_loss=None)
    student = Model(6)
    task = LinearCrossEntropyLoss(student.head)
    distiller = Distiller(student, teacher, {}, task_loss=task)
    distiller(torch.randn(4, 5), torch.tensor([0, 1, 2, 3]))
    student.head = nn.Linear(6, V)
    with pytest.raises(ValueError, match="student_head must be the head that the model has"):
        distiller(torch.randn(4, 5), torch.tensor([0, 1, 2, 3]))


def test_a_denominator_of_0_gives_0():
    (ours, theirs), (student, teacher, labels) = heads(), hidden()
    nothing = torch.zeros(N, dtype=torch.bool)
    for denominator in (0, torch.tensor(0)):
        value = LinearLoss(KLLoss(), ours, theirs)(student, teacher, mask=nothing, denominator=denominator)
        assert value == 0
        assert all((grad == 0).all() for grad in gradients(value, student, ours))
        assert CrossEntropyLoss()(ours(student), labels, mask=nothing, denominator=denominator) == 0


def test_options_are_checked_when_they_are_set_later():
    (ours, theirs), _ = heads(), hidden()
    loss = LinearLoss(KLLoss(), ours, theirs)
    for name, value in {"cross_entropy": -1.0, "student_scale": -2.0, "rows": 0}.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            setattr(loss, name, value)
    for loss in (LinearCrossEntropyLoss(ours), CrossEntropyLoss()):
        with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'avg'"):
            loss.reduction = "avg"


def test_copies_refer_to_their_own_heads():
    (ours, theirs), (student, teacher, _) = heads(), hidden()
    twin = copy.deepcopy(LinearLoss(KLLoss(), ours, theirs))
    assert twin(student, teacher) == LinearLoss(KLLoss(), ours, theirs)(student, teacher)
    assert "student_head=(23, 6)" in repr(twin)


def test_weights_that_learn_and_second_derivatives_take_formed_logits():
    (ours, theirs), (student, teacher, labels) = heads(), hidden(shape=(2, 3))
    mask = torch.rand(2, 3, dtype=torch.float64) + 0.1
    mask[0, 1] = 0
    loss = LinearLoss(KLLoss(2.0), ours, theirs, cross_entropy=0.5)
    assert torch.autograd.gradgradcheck(lambda s: loss(s, teacher, labels, mask=mask), student)
    alone = LinearCrossEntropyLoss(ours)
    assert torch.autograd.gradgradcheck(lambda s: alone(s, labels, mask=mask), student)
    learns = mask.clone().requires_grad_()
    value = loss(student, teacher, labels, mask=learns)
    torch.testing.assert_close(value, loss(student, teacher, labels, mask=mask))
    value.backward()
    assert learns.grad.abs().max() > 0
    assert theirs.weight.grad is None
    assert theirs.bias.grad is None
    assert repr(alone) == (
        "LinearCrossEntropyLoss(scale=1.0, softcap=None, ignore_index=-100, rows=None, reduction='mean', head=(23, 6))"
    )


def test_rejects_what_does_not_fit():
    (ours, theirs), (student, teacher, labels) = heads(), hidden()
    loss = LinearLoss(KLLoss(), ours, theirs, cross_entropy=1.0)
    with pytest.raises(ValueError, match="the student's hidden states must be floating-point, got torch.int64"):
        loss(student.detach().long(), teacher, labels)
    with pytest.raises(ValueError, match="must be on its head's device, cpu, got meta"):
        loss(student.to("meta"), teacher.to("meta"), labels)
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        loss(student, teacher, labels, mask=[1])
    with pytest.raises(ValueError, match=r"target must be one class per sample, of shape \(10,\), got shape \(9,\)"):
        loss(student, teacher, labels[:9])
    with pytest.raises(ValueError, match="ignore_index must be an integer, got 0.5"):
        LinearCrossEntropyLoss(ours, ignore_index=0.5)


def test_rejects():
    (ours, theirs), (student, teacher, labels) = heads(), hidden()
    with pytest.raises(TypeError, match="loss must be a loss of rows of logits, such as KLLoss.., got RKDLoss"):
        LinearLoss(RKDLoss(), ours, theirs)
    with pytest.raises(ValueError, match="must take the last dimension, got dim=1"):
        LinearLoss(KLLoss(dim=1), ours, theirs)
    with pytest.raises(ValueError, match="both heads must have the same vocabulary, got 23 and 7"):
        LinearLoss(KLLoss(), ours, nn.Linear(9, 7).double())
    loss = LinearLoss(KLLoss(), ours, theirs, cross_entropy=1.0)
    with pytest.raises(ValueError, match=r"the student's hidden states must be \(..., 6\), as wide as its head"):
        loss(teacher, teacher, labels)
    with pytest.raises(ValueError, match="same shape but for their width"):
        loss(student, teacher[:3], labels)
    with pytest.raises(ValueError, match="target must be the class of every sample, got None"):
        loss(student, teacher)
    with pytest.raises(ValueError, match="target must be classes from 0 to 22, got 23"):
        loss(student, teacher, labels.fill_(23))
    with pytest.raises(ValueError, match="mask must be shaped like the per-sample values"):
        loss(student, teacher, labels.fill_(1), mask=torch.ones(3))
    with pytest.raises(ValueError, match="cross_entropy must be zero or positive"):
        LinearLoss(KLLoss(), ours, theirs, cross_entropy=-1.0)
    with pytest.raises(TypeError, match="student must be a tensor, got list"):
        loss([1.0], teacher, labels)
    assert F.cross_entropy(ours(student), labels).isfinite()


def test_a_hook_put_on_a_head_later_is_noticed():
    (ours, theirs), (student, teacher, _) = heads(), hidden()
    loss = LinearLoss(KLLoss(), ours, theirs)
    loss(student, teacher)
    harmless = ours.register_forward_hook(lambda module, args, output: output)
    loss(student, teacher)
    harmless.remove()
    ours.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="student_head must compute W h"):
        loss(student, teacher)


def test_a_forward_put_on_a_head_later_is_noticed_where_there_was_one_before():
    (ours, theirs), (student, teacher, _) = heads(), hidden()
    real = ours.forward
    ours.forward = lambda states: real(states)
    loss = LinearLoss(KLLoss(), ours, theirs)
    loss(student, teacher)
    ours.forward = lambda states: 2 * real(states)
    with pytest.raises(ValueError, match="student_head must compute W h"):
        loss(student, teacher)
