"""What LinearLogitLoss asks of heads: scales and errors instead of silently other numbers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from distill import KLLoss, LinearLogitLoss, LinearLoss, LogitLoss, linear_logit_loss
from linear_heads import METHODS, LoRA, by_logits, heads, hidden, make


class ScaledHead(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 16


class CappedHead(nn.Linear):
    def forward(self, x):
        return 30 * torch.tanh(super().forward(x) / 30)


class SquaringHead(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 0.01 * x.square().sum(-1, keepdim=True)


class DropoutHead(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class PairHead(nn.Linear):
    """Gives logits and a bias apart, as tensor-parallel layers do."""

    def forward(self, x):
        return super().forward(x), self.bias


class ShortHead(nn.Linear):
    def forward(self, x):
        return super().forward(x)[..., :3]


class Wrapped(nn.Module):
    """A wrapper that changes nothing, as for activation checkpointing."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x)


class Holder(nn.Module):
    """A module with a weight and no forward."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


class ScaledEmbedding(nn.Embedding):
    """Scales what it looks up; its weight is a head all the same."""

    def forward(self, tokens):
        return super().forward(tokens) * 8


def as_class(cls, head):
    other = cls(head.in_features, head.out_features)
    other.load_state_dict(head.state_dict())
    return other


def build(side, head, **options):
    pair = heads()
    pair[side] = head
    return LinearLogitLoss(*pair, **options)


# --- scales ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("biases", ["", "s", "t", "st"])
def test_scales_multiply_the_logits(method, biases):
    inputs, options = make((5,), biases=biases, trains=method != "factor")
    scales = {"student_scale": 1 / 16, "teacher_scale": 3.0}
    values = linear_logit_loss(*inputs, **options, **scales, method=method)
    student = nn.functional.linear(inputs[0], inputs[1], options.get("student_bias")) / 16
    teacher = 3 * nn.functional.linear(inputs[2], inputs[3], options.get("teacher_bias"))
    expected = (student - teacher).square().mean(-1)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    wanted = [x for x in (*inputs, *options.values()) if x.requires_grad]
    ours, theirs = torch.autograd.grad(values.sum(), wanted), torch.autograd.grad(expected.sum(), wanted)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_scales_of_the_class(method):
    pair, states = heads(trains=method != "factor", dtype=torch.float64), hidden(5, dtype=torch.float64)
    loss = LinearLogitLoss(*pair, student_scale=0.25, teacher_scale=2.0, method=method)
    torch.testing.assert_close(loss(*states), LogitLoss()(pair[0](states[0]) / 4, 2 * pair[1](states[1])))
    loss.student_scale = 1.0
    torch.testing.assert_close(loss(*states), LogitLoss()(pair[0](states[0]), 2 * pair[1](states[1])))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan"), True, "2", torch.tensor(2.0), None])
def test_rejects_scales_that_are_no_positive_numbers(bad):
    for name in ("student_scale", "teacher_scale"):
        match = f"{name} must be a positive and finite number, got "
        with pytest.raises(ValueError, match=match):
            LinearLogitLoss(*heads(), **{name: bad})
        with pytest.raises(ValueError, match=match):
            setattr(LinearLogitLoss(*heads()), name, bad)
        with pytest.raises(ValueError, match=match):
            linear_logit_loss(*make()[0], **{name: bad})


# --- heads that do more than W h + b --------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("cls", [ScaledHead, CappedHead, SquaringHead, DropoutHead])
def test_rejects_a_head_that_gives_other_numbers(cls, side):
    name = ("student", "teacher")[side]
    pair = heads()
    pair[side] = as_class(cls, pair[side])
    state = torch.random.get_rng_state()
    match = rf"{name}_head must compute W h \+ b, got {cls.__name__}, which gives other numbers.*{name}_scale= for"
    with pytest.raises(ValueError, match=match):
        LinearLogitLoss(*pair)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.half])
def test_a_head_that_scales_is_named_with_its_factor_and_accepted_with_it(dtype):
    head = as_class(ScaledHead, heads()[0]).to(dtype)
    with pytest.raises(
        ValueError, match=r"ScaledHead, which gives other numbers, 0\.06\d* times that: .*student_scale="
    ):
        build(0, head)
    loss = build(0, head, student_scale=1 / 16)
    states = hidden(5)
    exact = [copy.deepcopy(x).double() for x in (head, loss.teacher_head)]
    expected = by_logits(exact, [x.double() for x in states])
    torch.testing.assert_close(loss(*states).double(), expected, rtol=1e-5, atol=0)
    loss.student_scale = 1 / 8
    with pytest.raises(ValueError, match="which gives other numbers"):
        loss(*states)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.half])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_a_cap_shows_whatever_the_size_of_the_weights(size, dtype):
    head = CappedHead(6, 40, bias=False)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(size)
    with pytest.raises(ValueError, match=r"student_head must compute W h \+ b, got CappedHead"):
        build(0, head.to(dtype))


@pytest.mark.parametrize("side", [0, 1])
def test_rejects_an_adapter_also_before_it_has_learned(side):
    name = ("student_head", "teacher_head")[side]
    match = rf"{name} must compute W h \+ b with its weight and bias alone, got LoRA with lora_A.weight, lora_B.weight"
    with pytest.raises(ValueError, match=match):
        build(side, LoRA(heads()[side]))
    with pytest.raises(ValueError, match="merge an adapter or give its base layer"):
        build(side, LoRA(heads()[side]))


@pytest.mark.parametrize("cls", [PairHead, ShortHead])
def test_rejects_a_head_that_gives_no_logits_of_its_weight(cls):
    with pytest.raises(ValueError, match=r"student_head must give logits \(2, 40\), got .* from (PairHead|ShortHead)"):
        build(0, as_class(cls, heads()[0]))


def test_rejects_a_head_that_cannot_be_called():
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(40, 6))

        def forward(self, tokens):
            return self.weight[tokens]

    with pytest.raises(ValueError, match="student_head must be callable as nn.Linear is, got Lookup, which raised"):
        build(0, Lookup())


def test_rejects_hooks_that_change_the_output():
    head = heads()[0]
    handle = head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="which gives other numbers, 2 times that"):
        build(0, head)
    handle.remove()
    head.register_forward_hook(lambda module, inputs, output: None)
    build(0, head)
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    with pytest.raises(ValueError, match="which gives other numbers"):
        build(0, head)


def test_rejects_a_forward_put_on_the_module_itself_also_later():
    pair, states = heads(), hidden(5)
    loss = LinearLogitLoss(*pair)
    loss(*states)
    pair[1].forward = lambda x: nn.Linear.forward(pair[1], x).tanh()
    with pytest.raises(ValueError, match=r"teacher_head must compute W h \+ b, got Linear, which gives other numbers"):
        loss(*states)


def test_rejects_a_class_put_on_the_module_later():
    pair, states = heads(), hidden(5)
    loss = LinearLogitLoss(*pair)
    loss(*states)
    pair[0].__class__ = ScaledHead
    with pytest.raises(ValueError, match="got ScaledHead, which gives other numbers, 0.0625 times that"):
        loss(*states)


def test_rejects_a_head_that_gives_other_numbers_in_the_other_mode():
    pair, states = [head.eval() for head in heads()], hidden(5)
    pair[0] = as_class(DropoutHead, pair[0]).eval()
    for loss in (LinearLogitLoss(*pair), LinearLoss(KLLoss(), *pair)):
        loss(*states)
        pair[0].train()
        with pytest.raises(ValueError, match="student_head must compute W h . b, got DropoutHead, which gives other"):
            loss(*states)
        pair[0].eval()
        loss(*states)


def test_a_head_is_looked_at_without_autocast():
    class Thirds(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 3

    head, teacher = Thirds(6, 9).eval(), nn.Linear(6, 9)
    states = torch.randn(2, 5, 6)
    for loss in (
        LinearLogitLoss(head, teacher, student_scale=1 / 3),
        LinearLoss(KLLoss(), head, teacher, student_scale=1 / 3),
    ):
        loss(*states)
        head.train()  # which is another mode, so that it is looked at once more
        with torch.autocast("cpu", torch.bfloat16):
            loss(*states)
            LinearLoss(KLLoss(), head, teacher, student_scale=1 / 3)
        head.eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_rejects_weights_made_by_a_hook_before_each_forward():
    match = "student_head must have a weight of its own, got one that is made anew before each forward"
    for change in (nn.utils.weight_norm, nn.utils.spectral_norm):
        with pytest.raises(ValueError, match=match):
            build(0, change(heads()[0]))
    pruned = prune.l1_unstructured(heads()[0], "weight", 0.5)
    with pytest.raises(ValueError, match=match):
        build(0, pruned)
    build(0, prune.remove(pruned, "weight"))


@pytest.mark.parametrize("method", ["gram", "blocks", "logits", "factor"])
def test_parametrised_heads_are_used_as_they_are(method):
    pair, states = heads(dtype=torch.float64), hidden(5, dtype=torch.float64)
    nn.utils.parametrizations.weight_norm(pair[0])
    pair[0].requires_grad_(method != "factor")
    loss = LinearLogitLoss(*pair, method=method)
    for _ in range(2):
        torch.testing.assert_close(loss(*states), by_logits(pair, states))
        wanted = [states[0], *(x for x in pair[0].parameters() if x.requires_grad)]
        ours, theirs = (torch.autograd.grad(f(*states), wanted) for f in (loss, lambda *s: by_logits(pair, s)))
        torch.testing.assert_close(ours, theirs)
        with torch.no_grad():
            pair[0].parametrizations.weight.original0.mul_(1.5)


@pytest.mark.filterwarnings("ignore")  # PyTorch has moved its quantised layers elsewhere
def test_rejects_fake_quantisation_that_is_still_off_and_shows_its_observers_nothing():
    quantisation, layers = pytest.importorskip("torch.ao.quantization"), pytest.importorskip("torch.ao.nn.qat")
    student, teacher = heads()
    student.qconfig = quantisation.get_default_qat_qconfig("fbgemm")
    student = layers.Linear.from_float(student)
    student.add_module("activation_post_process", student.qconfig.activation())
    observe = lambda head, _, output: head.activation_post_process(output)  # noqa: E731 - as prepare_qat adds it
    student.register_forward_hook(observe)
    student.apply(quantisation.disable_fake_quant)
    seen = student.activation_post_process.activation_post_process.max_val.clone()
    with pytest.raises(ValueError, match=r"got Linear with fake quantisation or an observer: leave the head out"):
        LinearLogitLoss(student, teacher)
    assert torch.equal(student.activation_post_process.activation_post_process.max_val, seen)


@pytest.mark.filterwarnings("ignore")  # PyTorch has moved its quantised layers elsewhere
@pytest.mark.parametrize("kind", ["quantised", "integers", "lazy"])
def test_rejects_weights_that_are_not_there(kind):
    if kind == "integers":
        head = Holder(torch.ones(40, 6))
        head.weight = nn.Parameter(torch.ones(40, 6, dtype=torch.int8), requires_grad=False)
        match = "student_head must have a floating-point weight, got torch.int8 in Holder: dequantise it"
    elif kind == "lazy":
        head, match = nn.LazyLinear(40), "the weight of student_head must be an ordinary tensor, got a Uninitialized"
    else:
        head = torch.ao.nn.quantized.dynamic.Linear(6, 40)
        match = "student_head must be a module with a matrix as weight"
    with pytest.raises(ValueError, match=match):
        build(0, head)


def test_rejects_what_is_no_tensor():
    (student, weight, teacher, teacher_weight), _ = make()
    given = {"student_hidden": student, "student_weight": weight, "teacher_hidden": teacher}
    given["teacher_weight"] = teacher_weight
    for name in given:
        for bad in (None, [1.0], 3.0):
            with pytest.raises(TypeError, match=f"{name} must be a tensor, got {type(bad).__name__}"):
                linear_logit_loss(**{**given, name: bad})
    with pytest.raises(TypeError, match="student_bias must be a tensor, got float"):
        linear_logit_loss(**given, student_bias=1.0)
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        LinearLogitLoss(*heads())(*hidden(2), mask=[1, 0])
    with pytest.raises(TypeError, match="student_hidden must be a tensor, got NoneType"):
        LinearLogitLoss(*heads())(None, hidden(5)[1])


@pytest.mark.parametrize("head", [Wrapped, lambda base: Holder(base.weight.detach().clone()), "scaled embedding"])
def test_heads_that_compute_the_same_are_accepted(head):
    pair, states = heads(bias=False), hidden(5)
    if head == "scaled embedding":
        student = ScaledEmbedding(40, 6)
        student.weight = pair[0].weight
    else:
        student = head(pair[0])
    torch.testing.assert_close(LinearLogitLoss(student, pair[1])(*states), by_logits(pair, states))


def test_ordinary_heads_are_not_run():
    pair = heads()
    for head in pair:
        head.register_full_backward_hook(lambda *_: None)
    calls = []
    linear, nn.functional.linear = nn.functional.linear, lambda *a: calls.append(a)
    try:
        LinearLogitLoss(*pair)
    finally:
        nn.functional.linear = linear
    assert calls == []


def test_heads_on_the_meta_device_are_told_by_their_class():
    LinearLogitLoss(as_class(ScaledHead, heads()[0]).to("meta"), heads()[1].to("meta"))
