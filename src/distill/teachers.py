"""Several teachers at once: each runs on the same inputs, and what they give is combined."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_not_negative


class Teachers(nn.Module):
    """Several teachers as one: the teacher of a `Distiller`.

    A path of a `Term` starts with the teacher's name: `at=("layer3", "big.layer4")`.

    Args:
        combine: What the terms without `at` compare with. `"logits"`: the weighted mean of the teachers' logits.
            `"probabilities"`: the logarithm of the weighted mean of their softmaxes over the last dimension, which are
            logits again. A function: it gets a dict of what each teacher returned, by name. None: that dict itself, for
            terms that pick from it (`at=(lambda out: out.logits, lambda out: out["big"].logits)`).
        weights: A share for each teacher's name, not negative and not all 0; they are divided by their sum. None:
            equal shares. Only for `"logits"` and `"probabilities"`.
        **teachers: The teachers by name: modules or other callables.

    Raises:
        ValueError: If there is no teacher, a name cannot be a module's name, `combine` is unknown, or the weights do
            not fit.
        TypeError: If a teacher cannot be called.

    Examples:
        >>> import torch
        >>> from distill import Distiller, KLLoss, Teachers
        >>> big, small, student = (torch.nn.Linear(8, 3) for _ in range(3))
        >>> teachers = Teachers(big=big, small=small, combine="logits", weights={"big": 3.0, "small": 1.0})
        >>> out = Distiller(student, teachers, KLLoss())(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
        >>> out.teacher.shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        *,
        combine: Literal["logits", "probabilities"] | Callable[[dict[str, Any]], Any] | None = None,
        weights: Mapping[str, float] | None = None,
        **teachers: Callable[..., Any],
    ) -> None:
        super().__init__()
        if not teachers:
            raise ValueError("Teachers must have at least one teacher, got none")
        if not (combine in (None, "logits", "probabilities") or (callable(combine) and not isinstance(combine, type))):
            raise ValueError(f"combine must be 'logits', 'probabilities', a function or None, got {combine!r}")
        for name, teacher in teachers.items():
            if hasattr(self, name) or "." in name:
                raise ValueError(f"a teacher's name must be no attribute of a module and have no dots, got {name!r}")
            if not callable(teacher) or isinstance(teacher, type):
                raise TypeError(f"a teacher must be a module or a function, got {teacher!r} as {name!r}")
        self.combine = combine
        self.shares = _shares(list(teachers), weights, combine)
        self._functions: dict[str, Any] = {}
        for name, teacher in teachers.items():
            if isinstance(teacher, nn.Module):
                self.add_module(name, teacher)
            else:
                self._functions[name] = teacher
        self._names = list(teachers)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run every teacher once on the same inputs, and combine what they give."""
        used = [name for name in self._names if self.shares[name] > 0]
        outputs = {name: self._teacher(name)(*args, **kwargs) for name in used}
        if self.combine is None:
            return outputs
        if not isinstance(self.combine, str):
            return self.combine(outputs)
        logits = {name: _logits(name, output) for name, output in outputs.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in logits.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"teachers whose outputs are averaged must give logits of one shape, got {shapes}")
        parts = []
        for name, tensor in logits.items():
            tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            share = self.shares[name]
            parts.append(share * tensor if self.combine == "logits" else tensor.log_softmax(-1) + math.log(share))
        stacked = torch.stack(parts)
        return stacked.sum(0) if self.combine == "logits" else stacked.logsumexp(0)

    @override
    def train(self, mode: bool = True) -> Teachers:
        """Set the mode of every teacher that has one; an exported program has none."""
        self.training = mode
        for child in self.children():
            try:
                child.train(mode)
            except NotImplementedError:
                child.training = mode
        return self

    @override
    def extra_repr(self) -> str:
        """Show how the outputs are combined, and the shares."""
        return f"combine={self.combine!r}, shares={self.shares}"

    def _teacher(self, name: str) -> Callable[..., Any]:
        teacher: Callable[..., Any] = self._functions[name] if name in self._functions else self.get_submodule(name)
        return teacher


Teachers.__module__ = "distill"


def _shares(names: list[str], weights: Mapping[str, float] | None, combine: Any) -> dict[str, float]:
    if weights is None:
        return {name: 1 / len(names) for name in names}
    if not isinstance(combine, str):
        raise ValueError(f"weights need combine='logits' or 'probabilities', got weights and combine={combine!r}")
    if set(weights) != set(names):
        raise ValueError(f"weights must have every teacher's name, {names}, got {list(weights)}")
    total = sum(check_not_negative(f"the weight of {name!r}", weight) for name, weight in weights.items())
    if total == 0:
        raise ValueError(f"a teacher must have a weight above 0, got {dict(weights)}")
    return {name: weights[name] / total for name in names}


def _logits(name: str, output: Any) -> Tensor:
    tensor = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"teacher {name!r} must give a tensor or something with .logits, got {type(output).__name__}; combine= may "
            "be a function"
        )
    return tensor
