"""Looks at the gradients of a Distiller's terms: how large each is, how much it counts, and whether they agree."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import widen
from distill._distiller.terms import DistillerOutput
from distill._merged import wide
from distill._table import Entries, table

__all__ = ["GradientReport", "TermGradient", "gradient_report"]


@dataclass(frozen=True)
class TermGradient:
    """What one term's gradient is like; an entry of `gradient_report`.

    Attributes:
        weight: The term's weight in the total.
        norm: The norm of its gradient, without the weight.
        share: `|weight| * norm`, divided by the sum of that over all terms; NaN if that sum is 0.
        cosines: The cosine of its gradient with each term's, without the weights; NaN where a gradient is 0.
    """

    weight: float
    norm: float
    share: float
    cosines: Mapping[str, float]


class GradientReport(Entries[TermGradient]):
    """What `gradient_report` gives: a `TermGradient` by the name of the term; prints as a table.

    Attributes:
        norm: The norm of the total's gradient: smaller than the sum of the weighted norms, as far as terms disagree.
        reached: At how many tensors the gradients were taken: those that every term reaches.
        given: How many were given.
    """

    def __init__(self, entries: Mapping[str, TermGradient], *, norm: float, reached: int, given: int) -> None:
        super().__init__(entries)
        self.norm, self.reached, self.given = norm, reached, given

    @override
    def __repr__(self) -> str:
        rows = [["term", "weight", "norm", "share", *(f"cos {name}" for name in self)]]
        for name, entry in self.items():
            cells = [f"{entry.weight:.4g}", f"{entry.norm:.4g}", f"{entry.share:.3f}"]
            rows.append([name, *cells, *(f"{entry.cosines[other]:.3f}" for other in self)])
        last = f"norm of the total {self.norm:.4g}, at {self.reached} of {self.given} tensors: those all terms reach"
        return f"{table(rows)}\n{last}"


def gradient_report(out: DistillerOutput, parameters: nn.Module | Tensor | Iterable[Tensor]) -> GradientReport:
    """Measure how large the terms' gradients are, how much each counts, and whether they agree.

    A term with a share near 0 hardly trains the student; one with a share near 1 leaves the others without effect. A
    cosine below 0 means that the gradients of two terms oppose each other. Call it before `out.loss.backward()`, which
    frees the graph.

    Args:
        out: What the Distiller's call gave, with its graph.
        parameters: Where to look: the student, its parameters or those of a layer, or other tensors of the graph. Of
            these count the ones that every term reaches, so that the norms compare. In several processes the gradients
            are those of this one.

    Returns:
        A mapping from the name of each term that was computed to its `TermGradient`; printed, a table.

    Raises:
        TypeError: If `out` is no output of a Distiller, or a parameter is no tensor.
        ValueError: If a term has no graph or reaches none of the parameters, or no parameter is reached by all terms.

    Examples:
        >>> import torch
        >>> from distill import Distiller, LogitLoss, Term, gradient_report
        >>> student, teacher = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(student.weight), torch.nn.init.ones_(teacher.weight)
        >>> terms = {"logit": Term(LogitLoss(), weight=0.5)}
        >>> distiller = Distiller(student, teacher, terms, task_loss=torch.nn.MSELoss())
        >>> out = distiller(torch.eye(2), torch.tensor([[1.0], [0.0]]))
        >>> gradient_report(out, student)
        term   weight  norm   share  cos task  cos logit
        task   1       1      0.586  1.000     0.707
        logit  0.5     1.414  0.414  0.707     1.000
        norm of the total 1.581, at 1 of 1 tensors: those all terms reach
    """
    check_output("out", out)
    wanted = tensors_of(parameters)
    found = {name: gradients_of(name, loss, wanted) for name, loss in out.losses.items()}
    names = [*found]
    shared = shared_by_all({name: [g is not None for g in gradients] for name, gradients in found.items()})
    norms, units = {}, {}
    for name, gradients in found.items():
        kept = [g for i in shared if (g := gradients[i]) is not None]
        norms[name] = math.hypot(*norms_of(kept))
        units[name] = [g / norms[name] for g in kept]  # of unit norm together, so that no product overflows
    cosines: dict[str, dict[str, float]] = {name: {} for name in names}
    for one, other in itertools.combinations_with_replacement(names, 2):
        pairs = zip(units[one], units[other], strict=True)
        cosine = math.nan
        if norms[one] and norms[other]:
            cosine = float(torch.stack([(a * b).sum() for a, b in pairs]).sum())
        cosines[one][other] = cosines[other][one] = cosine
    weights = _weights_of(out)
    weighted = {name: weights[name] * norms[name] for name in names}
    whole = sum(map(abs, weighted.values()))
    squares = [weighted[a] * weighted[b] * cosines[a][b] for a in names for b in names if weighted[a] and weighted[b]]
    entries = {
        name: TermGradient(
            weights[name], norms[name], abs(weighted[name]) / whole if whole else math.nan, cosines[name]
        )
        for name in names
    }
    norm = math.sqrt(max(math.fsum(squares), 0.0)) if all(map(math.isfinite, squares)) else math.nan
    return GradientReport(entries, norm=norm, reached=len(shared), given=len(wanted))


def check_output(name: str, out: Any) -> DistillerOutput:
    if not isinstance(out, DistillerOutput):
        raise TypeError(f"{name} must give what a Distiller's call gives, got {type(out).__name__}")
    return out


def tensors_of(parameters: Any) -> list[Tensor]:
    """The tensors to look at, each once, without those that are not trained."""
    given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    given = [given] if isinstance(given, Tensor) else list(given)
    for tensor in given:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"parameters must be tensors, got {type(tensor).__name__}")
    found = [*{id(tensor): tensor for tensor in given if tensor.requires_grad}.values()]
    if not found:
        raise ValueError(f"parameters must have one that requires a gradient, got {len(given)} without")
    return found


def gradients_of(name: str, loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of a term at each parameter, dense and in float32 or wider; None where it does not reach."""
    if not loss.requires_grad:
        raise ValueError(f"term {name!r} must have a graph, but it ran under no_grad, or nothing in it is trained")
    try:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "second time" in str(error):
            raise ValueError("gradients must be looked at before out.loss.backward(), which frees the graph") from error
        raise
    if any(g is None for g in found) and _hides_a_part(loss):
        raise ValueError("activation checkpointing must be that of use_reentrant=False to look inside, got the other")
    dense = (None if g is None else g if g.layout is torch.strided else g.to_dense() for g in found)
    return [None if g is None else widen(g, torch.promote_types(g.dtype, torch.float32)) for g in dense]


def _hides_a_part(loss: Tensor) -> bool:
    """Whether the graph has reentrant checkpoints, whose parameters only a whole backward finds."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if node.name().startswith("CheckpointFunction"):
                return True
            stack.extend(function for function, _ in node.next_functions)
    return False


def norms_of(gradients: Sequence[Tensor]) -> list[float]:
    """The norm of each, with one wait for a GPU."""
    if not gradients:
        return []
    device = gradients[0].device
    return torch.stack([wide(torch.linalg.vector_norm(g)).to(device) for g in gradients]).tolist()


def shared_by_all(reached: Mapping[str, Sequence[bool]]) -> list[int]:
    """Which parameters every term reaches."""
    for name, reaches in reached.items():
        if not any(reaches):
            raise ValueError(f"every term must reach some of the parameters, but {name!r} reaches none of them")
    shared = [i for i, each in enumerate(zip(*reached.values(), strict=True)) if all(each)]
    if not shared:
        counts = {name: sum(reaches) for name, reaches in reached.items()}
        raise ValueError(f"there must be parameters that every term reaches, got none in common of {counts}")
    return shared


def _weights_of(out: DistillerOutput) -> dict[str, float]:
    """The weights as the call had them: the derivative of the total for each term."""
    slopes = torch.autograd.grad(out.loss, [*out.losses.values()], retain_graph=True, allow_unused=True)
    if any(slope is None for slope in slopes):
        raise ValueError("out must be what the Distiller itself gave, not what wraps it (DDP, torch.compile)")
    return {name: float(slope) for name, slope in zip(out.losses, slopes, strict=True)}
