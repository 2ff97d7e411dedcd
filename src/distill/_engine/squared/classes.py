"""The squared difference of two linear heads' logits, formed for some classes at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from typing_extensions import override

from distill._checks import without_autocast
from distill._engine.kernels import scale
from distill._engine.squared.gram import Heads, function_of, must_stay_differentiable
from distill._engine.squared.plan import KEPT
from distill._reduction import Reduction, reduce, row_weights

# Logits that are formed at a time: 4 MB in float32, which stay in a CPU's cache; a GPU wants larger products.
_LOGITS = 2**20
_LOGITS_ON_GPU = 2**25


def by_blocks(hidden: Tensor, teacher_hidden: Tensor, heads: Heads) -> Tensor:
    """Means over the vocabulary of the squared differences, (N,).

    Args:
        hidden: `h_s`, (N, d_s), in the dtype to compute in.
        teacher_hidden: `h_t`, (N, d_t), in that dtype.
        heads: The heads.
    """
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    keeps = (
        heads.trains() and not torch._C._are_functorch_transforms_active() and len(hidden) * len(heads.weight) <= KEPT
    )
    function = function_of(_Blocks, heads, hidden)
    weights = heads.weight, heads.teacher_weight, heads.column
    outputs = function(hidden, teacher_hidden, *weights, wants_gradient, keeps)
    values: Tensor = outputs[0] / len(heads.weight)
    return values


def forms_early(weight: Tensor, reduction: Reduction, mask: Tensor | None) -> bool:
    """Whether the gradients can be formed together with the values, while the differences are at hand."""
    return (
        reduction != "none"
        and torch.is_grad_enabled()
        and not (mask is not None and mask.requires_grad)
        # In half a gradient divided by the number of samples can underflow before a gradient scaler gets to it.
        and weight.dtype != torch.half
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def reduce_by_blocks(
    hidden: Tensor, teacher_hidden: Tensor, heads: Heads, reduction: Reduction, mask: Tensor | None
) -> Tensor:
    """What `reduce(by_blocks(...), reduction, mask)` gives, where `forms_early` says so.

    Args:
        hidden: As in `by_blocks`; what the mask hides is 0.
        teacher_hidden: As in `by_blocks`; what the mask hides is 0.
        heads: The heads.
        reduction: As in `reduce`, and not `"none"`.
        mask: As in `reduce`, (N,).
    """
    weights = heads.weight, heads.teacher_weight, heads.column
    value: Tensor = _Reduced.apply(hidden, teacher_hidden, *weights, mask, reduction)  # type: ignore[no-untyped-call]
    return value


class _Reduced(Function):
    """The reduced loss; its gradients are formed in the forward, and backward returns them."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        hidden: Tensor,
        teacher_hidden: Tensor,
        weight: Tensor,
        teacher_weight: Tensor,
        column: Tensor | None,
        mask: Tensor | None,
        reduction: Reduction,
    ) -> Tensor:
        heads = Heads(weight, teacher_weight, column)
        values, ctx.gradients = _run(hidden, teacher_hidden, heads, reduction, mask, _needs(ctx))
        ctx.reduction = reduction
        ctx.save_for_backward(hidden, teacher_hidden, weight, teacher_weight, column, mask)
        return reduce(values, reduction, mask)

    @staticmethod
    @override
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Raises if one was changed in place.
        hidden, teacher_hidden, weight, teacher_weight, column, mask = ctx.saved_tensors
        heads, needs = Heads(weight, teacher_weight, column), _needs(ctx)
        gradients, ctx.gradients = ctx.gradients, None  # returned once: the receivers may write into them
        with without_autocast(hidden):
            if torch.is_grad_enabled():  # the gradients are to be differentiated again
                value = reduce(by_blocks(hidden, teacher_hidden, heads), ctx.reduction, mask)
                inputs = hidden, weight, column
                wanted = [x for x, needed in zip(inputs, needs, strict=True) if needed and x is not None]
                found = iter(torch.autograd.grad(value, wanted, upstream, create_graph=True))
                gradients = [next(found) if needed else None for needed in needs]
            else:
                if gradients is None:
                    gradients = _run(hidden, teacher_hidden, heads, ctx.reduction, mask, needs)[1]
                for gradient in gradients:
                    if gradient is not None:
                        scale(gradient, upstream[0])
        ours, weights, biases = gradients
        return ours, None, weights, None, biases, None, None


def _needs(ctx: Any) -> tuple[bool, bool, bool]:
    """Whether hidden states, weight and column need a gradient."""
    return ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[4]


def _run(
    hidden: Tensor,
    teacher_hidden: Tensor,
    heads: Heads,
    reduction: Reduction,
    mask: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Per-sample values, and the gradients of their reduction that are needed: for hidden states, weight and column."""
    size = len(heads.weight)
    values = hidden.new_zeros(len(hidden))
    factors = row_weights(values, reduction, mask).unsqueeze(-1) * (2 / size)
    scaled = factors * hidden if needs[1] else hidden
    gradients = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed and x is not None else None
        for x, needed in zip((hidden, heads.weight, heads.column), needs, strict=True)
    ]
    ours, weights, biases = gradients
    for start, stop in _classes(heads, len(hidden)):
        difference, weight = _difference(hidden, teacher_hidden, heads, start, stop)
        values += difference.square().sum(-1)
        if ours is not None:
            ours.addmm_(difference, weight, beta=1 if start else 0)
        if weights is not None:
            if weights.dtype == hidden.dtype:
                torch.mm(difference.T, scaled, out=weights[start:stop])
            else:
                weights[start:stop] = difference.T @ scaled
        if biases is not None:
            biases[start:stop] = difference.T @ factors
    if ours is not None:
        ours *= factors
    return values / size, gradients


class _Blocks(Function):
    """Sums of squared differences, (N,); for backward half their gradient, (N, d_s), and the differences, (N, V)."""

    generate_vmap_rule = True

    @staticmethod
    @override
    def forward(
        hidden: Tensor,
        teacher_hidden: Tensor,
        weight: Tensor,
        teacher_weight: Tensor,
        column: Tensor | None,
        wants_gradient: bool,
        keeps_differences: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = Heads(weight, teacher_weight, column)
        values, gradient = hidden.new_zeros(len(hidden)), hidden.new_zeros(0)
        kept = hidden.new_empty(len(hidden), len(weight) if keeps_differences else 0)
        for start, stop in _classes(heads, len(hidden)):
            difference, rows = _difference(hidden, teacher_hidden, heads, start, stop)
            values = values + difference.square().sum(-1)
            if wants_gradient:
                gradient = torch.addmm(gradient, difference, rows) if start else difference @ rows
            if keeps_differences:
                kept[:, start:stop] = difference
        return values, gradient, kept

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:5], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros for the differences, which want no gradient, would be large

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:  # which PyTorch passes where nothing reached the values
            return (None,) * 7
        hidden, teacher_hidden, weight, teacher_weight, column, gradient, kept = ctx.saved_tensors
        heads = Heads(weight, teacher_weight, column)
        scale = 2 * grad.unsqueeze(-1)
        ours = weights = biases = None
        with without_autocast(hidden):
            scaled = scale * hidden
            if must_stay_differentiable():
                difference, rows = _difference(hidden, teacher_hidden, heads, 0, len(weight))
                ours, weights = scale * (difference @ rows), (difference.T @ scaled).to(weight.dtype)
                biases = None if column is None else (difference.T @ scale).to(column.dtype)
                return ours, None, weights, None, biases, None, None
            if ctx.needs_input_grad[0]:
                ours = scale * gradient
            if ctx.needs_input_grad[2] or ctx.needs_input_grad[4]:
                weights, biases = torch.empty_like(weight), None if column is None else torch.empty_like(column)
                for start, stop in _classes(heads, len(hidden)):
                    if kept.numel():
                        difference = kept[:, start:stop]
                    else:
                        difference = _difference(hidden, teacher_hidden, heads, start, stop)[0]
                    weights[start:stop] = difference.T @ scaled
                    if biases is not None:
                        biases[start:stop] = difference.T @ scale
            return ours, None, weights, None, biases, None, None


def _classes(heads: Heads, samples: int) -> list[tuple[int, int]]:
    """The classes of each block."""
    vocabulary = len(heads.weight)
    step = max((_LOGITS_ON_GPU if heads.weight.is_cuda else _LOGITS) // samples, 16)
    return [(start, min(start + step, vocabulary)) for start in range(0, vocabulary, step)]


def _difference(hidden: Tensor, teacher_hidden: Tensor, heads: Heads, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The difference of the logits of some classes, (N, classes), and the student's rows for them."""
    rows, theirs = (weight[start:stop].to(hidden.dtype) for weight in (heads.weight, heads.teacher_weight))
    ours = hidden @ rows.T
    if heads.column is not None:
        ours = ours + heads.column[start:stop, 0].to(hidden.dtype)
    return torch.addmm(ours, teacher_hidden, theirs.T, alpha=-1), rows
