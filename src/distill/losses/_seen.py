"""Whether a model does more to its logits than its head: seen where it returned them beside what the head saw."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from distill._checks import is_integer
from distill._engine.products import Side

# A factor that dropout between what is compared and the head cannot explain.
_FAR = 1.5
_FEW = 16  # classes, or fewer, that may look like anything by chance


class SeenLogits:
    """Compares one row of the logits that a model returned with what a loss forms; counts the calls of one side."""

    def __init__(self) -> None:
        self._calls = 0

    def check(self, name: str, form: Side, hidden: Any, logits: Any) -> None:
        """Raise ValueError if a model's logits are others than those of its head, by a factor or a soft cap.

        Logits that differ in another way pass: dropout before the head, or another order of positions, may explain
        them. It looks at calls 1, 2, 4, 8 and so on, since small logits do not show a soft cap.

        Args:
            name: `"student"` or `"teacher"`.
            form: What the loss forms logits with; its hidden states do not matter.
            hidden: What the loss compares, `(..., d)`.
            logits: What the model returned: `(..., V)`, possibly of its last position alone; anything else passes.
        """
        rows = _last_rows(form, hidden, logits)
        if rows is None:
            return
        self._calls += 1
        if self._calls & (self._calls - 1):
            return
        with torch.no_grad():
            state, given = rows
            formed = form._replace(hidden=state.to(form.weight.dtype)).logits().float()[0]
            difference = _difference(given.float()[0], formed, max(1e-3, 8 * _precision(hidden, logits, form.weight)))
        if difference is not None:
            raise ValueError(
                f"the loss must form the logits that the {name} gives, but those of the {name} are {difference}: give "
                f"{name}_scale= for what it multiplies its logits by after the head, {name}_softcap= for a soft cap "
                "(LinearLoss; for LinearLogitLoss there is none), or compare formed logits"
            )


def check_all_positions(inputs: Any, hidden: Any, *, marked: bool) -> None:
    """Raise ValueError if the heads saw one position of many, and neither mask nor labels say that this is meant.

    Args:
        inputs: What the student was called with: integers `(B, T)` in it are tokens.
        hidden: What is compared of the student, `(B, T, d)`.
        marked: Whether there is a mask or labels, whose shape is checked elsewhere.
    """
    if marked or not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[1] != 1:
        return
    tokens = [
        leaf.shape[1]
        for leaf in tree_leaves(inputs)
        if isinstance(leaf, Tensor) and is_integer(leaf) and leaf.ndim == 2 and len(leaf) == len(hidden)
    ]
    if tokens and min(tokens) > 1:
        raise ValueError(
            f"hidden states must be those of all {max(tokens)} positions, got 1: a model that forms the logits of its "
            "last position only (logits_to_keep=1) shows its head no other. Tap the module before the head, such as "
            'at="model.norm"; where the last position is meant, say so with mask= or labels of its shape, '
            f"{tuple(hidden.shape[:-1])}"
        )


def _last_rows(form: Side, hidden: Any, logits: Any) -> tuple[Tensor, Tensor] | None:
    """The hidden state `(1, d)` and the logits `(1, V)` of the last position of the first sample, if both are there."""
    for tensor, width in (hidden, form.weight.shape[1]), (logits, form.weight.shape[0]):
        fits = type(tensor) is Tensor and tensor.ndim > 1 and tensor.shape[-1] == width and tensor.numel() > 0
        if not (fits and tensor.is_floating_point() and tensor.device == form.weight.device and not tensor.is_meta):
            return None
    if hidden.shape[:-2] != logits.shape[:-2] or logits.shape[-2] not in (1, hidden.shape[-2]):
        return None
    state, given = (tensor.detach().reshape(-1, *tensor.shape[-2:])[0, -1:] for tensor in (hidden, logits))
    return state, given


def _precision(*tensors: Tensor) -> float:
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors)


def _difference(given: Tensor, formed: Tensor, tolerance: float) -> str | None:
    """In words, how logits of a model differ from those of its head; None if they do not, or not in a known way."""
    size, apart = given.norm(), (given - formed).norm()
    if not bool(size.isfinite() & (size > 0) & (formed.norm() > 0) & (apart > tolerance * size)):
        return None
    factor = float((given * formed).sum() / formed.square().sum())
    rest = float((given - factor * formed).norm() / size)
    if len(given) > _FEW and _is_curve(given, formed, tolerance):
        return "a curved function of those of its head, as after a soft cap"
    if rest <= tolerance:
        return f"{factor:.4g} times those of its head"
    return f"about {factor:.2g} times those of its head" if rest < 0.5 and not 1 / _FAR < factor < _FAR else None


def _is_curve(given: Tensor, formed: Tensor, tolerance: float) -> bool:
    """Whether logits are a curved function of others, such as c tanh(x / c), rather than noise or a factor."""
    line, cube = formed / formed.norm(), (formed / formed.abs().max()) ** 3
    cube = cube - (cube * line).sum() * line
    cube = cube / cube.norm()
    rest = given - (given * line).sum() * line
    left, apart = (rest - (rest * cube).sum() * cube).norm(), (given - formed).norm()
    if bool((left < 0.3 * apart) & (left < 0.5 * rest.norm())):  # as long as the curve is slight
        return True
    steps = given[formed.argsort()].diff()
    strong = (apart > 0.2 * given.norm()) & (rest.norm() > tolerance * given.norm())
    return bool(strong & (steps.min() >= -tolerance * given.abs().max()))
