"""Balances the terms of a Distiller: weights by what each adds to the gradient."""

import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill._distiller.distiller import Distiller
from distill._distiller.terms import TASK, DistillerOutput
from distill._merged import wide
from distill.diagnostics import as_it_was
from distill.gradients import check_output, gradients_of, norms_of, shared_by_all, tensors_of

__all__ = ["calibrate"]


def calibrate(
    distiller: nn.Module,
    batches: Iterable[Any],
    shares: Mapping[str, float],
    *,
    by: Literal["gradient", "value"] = "gradient",
    parameters: nn.Module | Iterable[Tensor] | None = None,
    keep: str | None = None,
    call: Callable[[Distiller, Any], DistillerOutput] | None = None,
) -> dict[str, float]:
    """Set the weights so that each term has its share of the gradient, measured on a few batches.

        g_k = mean over the batches of |gradient of term k|,  at the student's parameters that every term reaches
        weight_k = weight_keep * (share_k / g_k) / (share_keep / g_keep)

    Published weights belong to other networks: the value and the gradient of most losses on features change with the
    width, the depth and the scale of the layers. Shares do not. The task loss keeps its weight, so that the learning
    rate keeps its meaning; the other weights follow from it. The gradients change as training goes on: call it again
    where the shares should hold later too, such as after a warm-up. A weight also multiplies the gradients of the
    loss's own parameters: a loss with parameters may have a small published share for that reason.

    Nothing else changes: not the parameters and their `.grad`, not a buffer (a batch norm's statistics, a queue), nor
    the random numbers that follow, nor train or eval mode. The modules run in the modes they are in, so call it in
    training mode, as a step would be. In several processes each must call it, with batches of its own: the gradients
    are averaged over the processes, as in a step, and all get the same weights.

    Args:
        distiller: The Distiller, or what wraps it (DistributedDataParallel, `torch.compile`); with FSDP, before it is
            sharded.
        batches: What to measure on: some ten batches of the training data, such as `itertools.islice(loader, 10)`. A
            tuple or list is called as `distiller(*batch)`, anything else as `distiller(batch)`.
        shares: The share of each term by name, `"task"` among them; they must add up to 1. Every term that is on must
            be named, and one that is off may be. A share of 0 switches a term off.
        by: `"gradient"`, or `"value"`: the mean value of the term in place of the norm. That needs no backward, but a
            value says little of how much a term trains.
        parameters: At which parameters of the student to measure; of these count the ones that every term reaches.
            None: all of the student's. Not with `by="value"`.
        keep: The term that keeps its weight. None: the task loss, or the term that `shares` names first where that has
            no share.
        call: How a batch goes in, if not as above: `lambda distiller, batch: distiller(batch, target, mask=mask)`.

    Returns:
        The weights by name, which the Distiller now has. A weight below 0 stays below 0.

    Raises:
        TypeError: If an argument is of the wrong kind.
        KeyError: If `shares` or `keep` names no term.
        ValueError: If shares are negative, not finite, leave out a term that is on or do not add up to 1, there is no
            batch, a term reaches no parameter, no parameter is reached by all terms, or a gradient is 0 or not finite;
            with `by="value"` if a value is not positive and finite. The weights are then as they were.

    Examples:
        >>> import torch
        >>> from distill import Distiller, HintLoss, KLLoss, Term, calibrate, gradient_report
        >>> student = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3))
        >>> distiller = Distiller(student, teacher, {"kl": KLLoss(), "hint": Term(HintLoss(4, 9), at="1")})
        >>> batch = torch.randn(16, 8), torch.arange(16) % 3
        >>> weights = calibrate(distiller, [batch], {"task": 0.5, "kl": 0.3, "hint": 0.2})
        >>> report = gradient_report(distiller(*batch), student)
        >>> {name: round(entry.share, 3) for name, entry in report.items()}
        {'task': 0.5, 'kl': 0.3, 'hint': 0.2}
    """
    inner = _unwrapped(distiller)
    _check_shares(shares, inner)
    keep = _kept(keep, shares, inner)
    if by not in ("gradient", "value"):
        raise ValueError(f"by must be 'gradient' or 'value', got {by!r}")
    if by == "value" and parameters is not None:
        raise ValueError("parameters must be left out with by='value', which looks at no gradient")
    if isinstance(batches, Tensor):
        raise TypeError("batches must be an iterable of batches, got a tensor: one batch goes in as [(inputs, target)]")
    wanted = tensors_of(inner.student if parameters is None else parameters) if by == "gradient" else []
    _check_whole(inner, wanted)

    weights, on = dict(inner.weights), [name for name, share in shares.items() if share > 0]
    sums, number = dict.fromkeys(on, 0.0), 0
    device = next((tensor.device for tensor in (*inner.parameters(), *inner.buffers())), torch.device("cpu"))
    with as_it_was(inner), torch.set_grad_enabled(by == "gradient"):
        try:
            inner.weights.update({name: float(name in on) for name in weights})
            for number, batch in enumerate(_in_step(batches, device), 1):
                out = check_output("call", (call or _call)(inner, batch))
                sizes = _sizes(out, wanted) if by == "gradient" else _values(out, device)
                for name in on:
                    if not math.isfinite(sizes[name]):
                        raise ValueError(
                            f"the {by} of term {name!r} must be finite, got {sizes[name]} in batch {number}"
                        )
                    sums[name] += sizes[name]
        finally:
            inner.weights.update(weights)
    if number == 0:
        raise ValueError("there must be at least one batch, got none")
    for name, size in sums.items():
        if size <= 0:
            why = "" if by == "value" else ": it has nothing to teach there, or its mask hides all"
            raise ValueError(f"the {by} of term {name!r} must be above 0, got {size / number} on average{why}")
    unit = weights[keep] * sums[keep] / shares[keep]
    for name, share in shares.items():
        if name != keep:
            size = abs(unit) * share / sums[name] if share > 0 else 0.0
            weights[name] = -size if size and weights[name] < 0 else size
    inner.weights.update(weights)
    return weights


def _unwrapped(distiller: nn.Module) -> Distiller:
    """The Distiller in what wraps it, which is not called: DDP and compilers expect a backward, or hide the terms."""
    while not isinstance(distiller, Distiller):
        inner = getattr(distiller, "_orig_mod", getattr(distiller, "module", None))
        if not isinstance(inner, nn.Module):
            raise TypeError(f"distiller must be a Distiller, wrapped or not, got {type(distiller).__name__}")
        distiller = inner
    return distiller


def _call(distiller: Distiller, batch: Any) -> DistillerOutput:
    plain = isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields")
    return distiller(*batch) if plain else distiller(batch)


def _check_shares(shares: Mapping[str, float], distiller: Distiller) -> None:
    if not isinstance(shares, Mapping):
        raise TypeError(f"shares must be a mapping from names of terms to numbers, got {type(shares).__name__}")
    for name, share in shares.items():
        if name not in distiller.weights:
            raise KeyError(f"shares must name terms of the Distiller, {[*distiller.weights]}, got {name!r}")
        if not isinstance(share, numbers.Real) or isinstance(share, bool):
            raise TypeError(f"the share of {name!r} must be a number, got {type(share).__name__}")
        if not 0 <= share < math.inf:
            raise ValueError(f"the share of {name!r} must be finite and not negative, got {share!r}")
    missing = [name for name, weight in distiller.weights.items() if weight != 0 and name not in shares]
    if missing:
        raise ValueError(f"shares must name every term that is on, got none for {missing}; 0 switches a term off")
    if not math.isclose(math.fsum(shares.values()), 1.0, abs_tol=1e-6):
        raise ValueError(f"shares must add up to 1, got {math.fsum(shares.values())!r}")


def _kept(keep: str | None, shares: Mapping[str, float], distiller: Distiller) -> str:
    if keep is None:
        keep = TASK if shares.get(TASK, 0) > 0 else next(name for name, share in shares.items() if share > 0)
    elif keep not in shares:
        raise KeyError(f"keep must be one of shares, {[*shares]}, got {keep!r}")
    if shares[keep] == 0 or distiller.weights[keep] == 0:
        got = f"a share of {shares[keep]} and a weight of {distiller.weights[keep]}"
        raise ValueError(f"the term that keeps its weight, {keep!r}, must have a share and a weight, got {got}")
    return keep


def _check_whole(distiller: Distiller, parameters: Sequence[Tensor]) -> None:
    """Raise ValueError for sharded parameters, whose gradients autograd gives in parts or not at all."""
    wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in distiller.modules())
    if parameters and (wrapped or any(hasattr(parameter, "device_mesh") for parameter in parameters)):
        raise ValueError(
            "parameters must be whole in each process, got sharded ones: calibrate before they are, or by='value'"
        )


def _sizes(out: DistillerOutput, parameters: Sequence[Tensor]) -> dict[str, float]:
    """The norm of each term's gradient, one term at a time, since a gradient is as large as the student."""
    norms: dict[str, dict[int, float]] = {}
    for name, loss in out.losses.items():
        gradients = _averaged(gradients_of(name, loss, parameters), parameters)
        kept = {i: g for i, g in enumerate(gradients) if g is not None}
        norms[name] = dict(zip(kept, norms_of([*kept.values()]), strict=True))
    shared = shared_by_all({name: [i in found for i in range(len(parameters))] for name, found in norms.items()})
    return {name: math.hypot(*(found[i] for i in shared)) for name, found in norms.items()}


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _averaged(gradients: list[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The mean over the processes: a gradient of 0 where a process has none and another one has."""
    if _processes() == 1:
        return gradients
    reached = torch.tensor([g is not None for g in gradients], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(reached, dist.ReduceOp.MAX)
    averaged: list[Tensor | None] = []
    for gradient, parameter, reaches in zip(gradients, parameters, reached.tolist(), strict=True):
        if reaches:
            dtype = torch.promote_types(parameter.dtype, torch.float32)  # that of a gradient elsewhere
            total = torch.zeros_like(parameter, dtype=dtype) if gradient is None else gradient.contiguous()
            dist.all_reduce(total)
            averaged.append(total / _processes())
        else:
            averaged.append(None)
    return averaged


def _values(out: DistillerOutput, device: torch.device) -> dict[str, float]:
    values = torch.stack([wide(value).to(device) for value in out.terms.values()])
    if _processes() > 1:
        dist.all_reduce(values)
    return dict(zip(out.terms, (values / _processes()).tolist(), strict=True))


def _in_step(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches; in several processes as many as the one with the fewest has, so that none waits for another."""
    if _processes() == 1:
        yield from batches
        return
    end = object()
    for batch in itertools.chain(batches, [end]):
        more = torch.tensor(int(batch is not end), device=device)
        dist.all_reduce(more, dist.ReduceOp.MIN)
        if not more:
            return
        yield batch
