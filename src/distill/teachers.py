"""Several teachers: what they give for the same inputs is combined, or each sample has a teacher of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import as_constant, check_count_or_none, check_not_negative, is_function, is_integer
from distill._values import Given


class Teachers(nn.Module):
    """Several teachers as one: the teacher of a `Distiller`.

    Each teacher runs once per batch. A path of a `Term` starts with the teacher's name: `at=("layer3", "big.layer4")`.

    Args:
        combine: What the terms without `at` compare with. `"logits"`: the weighted mean of the teachers' logits.
            `"probabilities"`: the logarithm of the weighted mean of their softmaxes over the last dimension, which are
            logits again. A function: it gets a dict of what each teacher returned, by name. None: that dict itself, for
            terms that pick from it (`at=(lambda out: out.logits, lambda out: out["big"].logits)`).
        weights: A share for each teacher's name, not negative and not all 0; they are divided by their sum. None:
            equal shares. Only for `"logits"` and `"probabilities"`. A teacher without a share is not run.
        by_id: In place of `combine`, the name of a teacher for each id, such as a domain or a language: each sample
            gets the logits of its own teacher. A teacher runs on its samples alone, and not at all where a batch has
            none of them; a path into it sees these only. The call brings one id a sample, as the keyword `teacher_ids`
            or as the last of its positions: a tensor of integers `(N,)`, or a list. Tensors and lists of N entries are
            cut by sample, all else goes to every teacher as it is.
        vocab_size: Take the first so many logits of each teacher only, which must mean the same tokens: for teachers
            whose vocabularies differ at the end. None: all must give the same number.
        **teachers: The teachers by name: modules or other callables.

    Raises:
        ValueError: If there is no teacher, a name cannot be a module's name, `combine` is unknown, or `weights`,
            `by_id` or `vocab_size` do not fit.
        TypeError: If a teacher cannot be called.

    Examples:
        >>> import torch
        >>> from distill import Distiller, KLLoss, Teachers
        >>> big, small, student = (torch.nn.Linear(8, 3) for _ in range(3))
        >>> teachers = Teachers(big=big, small=small, combine="logits", weights={"big": 3.0, "small": 1.0})
        >>> out = Distiller(student, teachers, KLLoss())(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
        >>> out.teacher.shape
        torch.Size([4, 3])
        >>> experts = Teachers(big=big, small=small, by_id={0: "big", 1: "small"})
        >>> inputs, ids = torch.randn(4, 8), torch.tensor([0, 1, 1, 0])
        >>> out = Distiller(student, experts, KLLoss(), task_loss=None)(inputs, teacher_inputs=(inputs, ids))
        >>> torch.allclose(out.teacher[1], small(inputs)[1])
        True
    """

    def __init__(
        self,
        *,
        combine: Literal["logits", "probabilities"] | Callable[[dict[str, Any]], Any] | None = None,
        weights: Mapping[str, float] | None = None,
        by_id: Mapping[Hashable, str] | None = None,
        vocab_size: int | None = None,
        **teachers: Callable[..., Any],
    ) -> None:
        super().__init__()
        if not teachers:
            raise ValueError("Teachers must have at least one teacher, got none")
        if not (combine in (None, "logits", "probabilities") or is_function(combine)):
            raise ValueError(f"combine must be 'logits', 'probabilities', a function or None, got {combine!r}")
        for name, teacher in teachers.items():
            if hasattr(self, name) or "." in name:
                raise ValueError(f"a teacher's name must be no attribute of a module and have no dots, got {name!r}")
            if not is_function(teacher):
                raise TypeError(f"a teacher must be a module or a function, got {type(teacher).__name__} as {name!r}")
        if by_id is not None:
            _check_by_id(by_id, list(teachers), combine)
        if check_count_or_none("vocab_size", vocab_size) and not (by_id or isinstance(combine, str)):
            raise ValueError(f"vocab_size needs by_id, or combine='logits' or 'probabilities', got combine={combine!r}")
        self.combine = combine
        self.shares = _shares(list(teachers), weights, combine)
        self.by_id = None if by_id is None else dict(by_id)
        self.vocab_size = vocab_size
        self._functions: dict[str, Any] = {}
        for name, teacher in teachers.items():
            if isinstance(teacher, nn.Module):
                self.add_module(name, teacher)
            else:
                self._functions[name] = teacher
        self._names = list(teachers)

    @override
    def forward(self, *args: Any, teacher_ids: Tensor | Sequence[Hashable] | None = None, **kwargs: Any) -> Any:
        """Run every teacher once, on the same inputs or with `by_id` on its samples, and combine what they give."""
        if self.by_id is not None:
            if teacher_ids is None and len(args) > 1:
                args, teacher_ids = args[:-1], args[-1]
            return self._by_sample(self.by_id, teacher_ids, args, kwargs)
        if teacher_ids is not None:
            raise ValueError("teacher_ids need by_id, the teacher of each id, got by_id=None")
        used = [name for name in self._names if self.shares[name] > 0]
        outputs = {name: self._run(name, args, kwargs) for name in used}
        if self.combine is None:
            return outputs
        if not isinstance(self.combine, str):
            return self.combine(outputs)
        logits = {name: self._logits(name, output) for name, output in outputs.items()}
        _check_shapes({name: tuple(tensor.shape) for name, tensor in logits.items()})
        parts = []
        for name, tensor in logits.items():
            tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            share = self.shares[name]
            parts.append(share * tensor if self.combine == "logits" else tensor.log_softmax(-1) + math.log(share))
        stacked = torch.stack(parts)
        return stacked.sum(0) if self.combine == "logits" else stacked.logsumexp(0)

    def _by_sample(self, by_id: dict[Hashable, str], ids: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Give each sample the logits of its own teacher, and run each of them once."""
        names = _names_of(ids, by_id)
        parts: dict[str, Tensor] = {}
        order: list[int] = []
        for name in self._names:
            rows = [n for n, of_sample in enumerate(names) if of_sample == name]
            if not rows:
                continue
            inputs = _cut([*args, *kwargs.values()], rows, len(names))
            given = inputs[: len(args)], dict(zip(kwargs, inputs[len(args) :], strict=True))
            logits = self._logits(name, self._run(name, *given))
            if logits.ndim < 2 or len(logits) != len(rows):
                raise ValueError(
                    f"teacher {name!r} must give logits of its {len(rows)} samples, got shape {tuple(logits.shape)}"
                )
            parts[name] = logits
            order += rows
        _check_shapes({name: tuple(part.shape[1:]) for name, part in parts.items()})
        joined = torch.cat(list(parts.values()))
        place = torch.tensor(order, device=joined.device)
        return torch.empty_like(joined).index_copy_(0, place, joined)

    def _run(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a teacher gives; it must not change in place what the next one is given."""
        given = Given((args, kwargs) if len(self._names) > 1 else ())
        output = self._teacher(name)(*args, **kwargs)
        if not given.is_left_alone():
            raise ValueError(
                f"a teacher must leave its inputs as they are, which the others get too, but {name!r} changed them in "
                "place (inplace=True, +=, a cache that it filled)"
            )
        return output

    def _logits(self, name: str, output: Any) -> Tensor:
        logits = _find_logits(name, output)
        if self.vocab_size is None:
            return logits
        if logits.ndim == 0 or logits.shape[-1] < self.vocab_size:
            raise ValueError(
                f"teacher {name!r} must give at least vocab_size={self.vocab_size} logits, got shape "
                f"{tuple(logits.shape)}"
            )
        return logits[..., : self.vocab_size]

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
        how = f"combine={self.combine!r}, shares={self.shares}" if self.by_id is None else f"by_id={self.by_id}"
        return how if self.vocab_size is None else f"{how}, vocab_size={self.vocab_size}"

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
    for name, weight in weights.items():
        check_not_negative(f"the weight of {name!r}", weight)
    weights = {name: as_constant(f"the weight of {name!r}", weight) for name, weight in weights.items()}
    total = sum(weights.values())
    if total == 0:
        raise ValueError(f"a teacher must have a weight above 0, got {dict(weights)}")
    return {name: weights[name] / total for name in names}


def _check_by_id(by_id: Mapping[Hashable, str], names: list[str], combine: Any) -> None:
    if combine is not None:
        raise ValueError(f"by_id leaves nothing to combine, each sample has one teacher, got combine={combine!r}")
    if set(by_id.values()) != set(names):
        raise ValueError(f"by_id must name every teacher and no other, {names}, got {sorted(set(by_id.values()))}")


def _names_of(ids: Any, by_id: dict[Hashable, str]) -> list[str]:
    if isinstance(ids, Tensor):
        if ids.ndim != 1 or not is_integer(ids):
            raise ValueError(f"teacher_ids must be integers (N,), got {ids.dtype} of shape {tuple(ids.shape)}")
        ids = ids.tolist()
    if not isinstance(ids, (list, tuple)) or not ids:
        raise ValueError(f"teacher_ids must be a tensor or a list with the id of each sample, got {ids!r}")
    for one in ids:
        if one not in by_id:
            raise KeyError(f"teacher_ids must be of {list(by_id)}, got {one!r}")
    return [by_id[one] for one in ids]


def _cut(inputs: list[Any], rows: list[int], samples: int) -> list[Any]:
    """Give the samples of one teacher, from tensors and lists of all samples."""
    found = []
    by_sample = False
    for given in inputs:
        if isinstance(given, Tensor) and given.ndim and len(given) == samples:
            given, by_sample = given[torch.tensor(rows, device=given.device)], True
        elif isinstance(given, list) and len(given) == samples:  # a tuple is rather a size (H, W)
            given, by_sample = [given[n] for n in rows], True
        found.append(given)
    if not by_sample:
        raise ValueError(f"by_id needs inputs of as many samples as there are ids, {samples}; none of them has so many")
    return found


def _check_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"teachers must give logits of one shape, got {shapes}; vocab_size= takes the first so many of each"
        )


def _find_logits(name: str, output: Any) -> Tensor:
    tensor = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"teacher {name!r} must give a tensor or something with .logits, got {type(output).__name__}; combine= may "
            "be a function"
        )
    return tensor
