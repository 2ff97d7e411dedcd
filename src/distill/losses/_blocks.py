"""For losses of rows that have a quick form: the rows that it cannot do go to the careful formula."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from distill._checks import may_look
from distill._engine.blocks import block_by_autograd, redo


def ordinary_rows(formula: Callable[..., Tensor], block: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give a block function for `Rows` that leaves to the formula the rows of which `block` makes no finite value.

    So `block` need not know of probabilities of 0, nor of what its exponentials overflow on: it only has to let them
    show. To look for such rows would make a GPU wait, so that there the formula does all of them.

    Args:
        formula: As in `Rows`.
        block: As in `Rows`.
    """

    def run(student: Tensor, teacher: Tensor, *rest: Any, **options: Any) -> Tensor:
        if not may_look(student):
            return block_by_autograd(formula, student, teacher, *rest, **options)  # pragma: no cover - on a GPU
        values = block(student, teacher, *rest, **options)
        left = (~values.isfinite()).nonzero().squeeze(-1)
        *labels, factors, gradient, _ = rest
        return redo(left, values, formula, student, teacher, *labels, factors, gradient, **options)

    return run


def quick_first(quick: Callable[..., Tensor], careful: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give a formula for `Rows` that is `quick` where all its values are finite, and else, or unseen, `careful`.

    `quick` takes `mean`, and so does the formula then.
    """

    def formula(*tensors: Tensor, mean: bool = False, **options: Any) -> Tensor:
        if may_look(tensors[0]):
            values = quick(*tensors, mean=mean, **options)
            if math.isfinite(float((values if mean else values.sum()).detach())):
                return values
        values = careful(*tensors, **options)
        return values.mean() if mean else values

    return formula


def without_rows(logits: Tensor, labels: Tensor, temperature: float, *, out: Tensor) -> tuple[Tensor, Tensor]:
    """Take the target out of rows of logits, in a buffer.

    Args:
        logits: `(R, C)`.
        labels: `(R, 1)`.
        temperature: What the logits will be divided by.
        out: `(R, C)`; here come the logits less the largest of the other classes; the target's is so low that nothing
            is left of it in an exponential.

    Returns:
        The target's logit less the largest other one, and that one, `(R, 1)` each.
    """
    out.copy_(logits).scatter_(-1, labels, -math.inf)
    largest = out.amax(-1, keepdim=True)
    out.sub_(largest).scatter_(-1, labels, -1000.0 * max(temperature, 1.0))
    return logits.gather(-1, labels) - largest, largest
