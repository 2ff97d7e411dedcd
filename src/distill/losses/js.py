"""Generalised Jensen-Shannon: Agarwal et al., "On-Policy Distillation of Language Models" (ICLR 2024)."""

from typing import Any

from torch import Tensor

from distill._checks import check_fraction, check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._mixture import Mixture, block_from_mixture, from_mixture
from distill.topk import TopK

FAMILY = "divergences"


def _formula(student: Tensor, teacher: Tensor, *, dim: int, beta: float, temperature: float) -> Tensor:
    return from_mixture(student, teacher, _mixture(beta), dim=dim, temperature=temperature)


def _block(*rows: Any, beta: float, temperature: float) -> Tensor:
    return block_from_mixture(*rows, mixture=_mixture(beta), temperature=temperature)


def _mixture(beta: float) -> Mixture:
    return Mixture(share=beta, of_teacher=beta, of_student=1 - beta)


_ROWS = Rows(_formula, block=_block, topk=True)


def js_loss(
    student: Tensor, teacher: Tensor | TopK, *, beta: float = 0.5, temperature: float = 1.0, dim: int | None = None
) -> Tensor:
    """Generalised Jensen-Shannon divergence of teacher and student, one value per sample.

        p = softmax(t / T),  q = softmax(s / T),  m = beta p + (1 - beta) q
        loss = T^2 * [beta KL(p || m) + (1 - beta) KL(q || m)]

    With `beta` 0.5 it is the Jensen-Shannon divergence, which is symmetric and at most log 2 (times T^2). It vanishes
    at both ends: divided by `beta` it tends to KL(p || q) as `beta` tends to 0, and divided by `1 - beta` to
    KL(q || p) as `beta` tends to 1. For these use `kl_loss` and `reverse_kl_loss`.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape; -inf is a probability of 0. Or a `TopK`. Gets no gradient.
        beta: The teacher's share of the mixture, above 0 and below 1.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, in nats times the squared temperature, not negative; float32, or
        float64 if an input is.

    Raises:
        TypeError: If an input is no tensor, or `beta` or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, `beta` is not above 0 and
            below 1, the temperature is not positive and finite, there is only one class, or `dim` is out of range or
            not given where there are four dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import js_loss
        >>> student = torch.tensor([[1e4, 0.0]])
        >>> teacher = torch.tensor([[0.0, 1e4]])
        >>> js_loss(student, teacher)  # log 2 where nothing is shared
        tensor([0.6931])

    Notes:
        Published with weight 1 at temperature 1, where the factor T^2 is 1, and `beta` 0.1, 0.5 or 0.9.

        Scale: `js_distance` of DistiLLM (Ko et al., 2024; `distillm/losses.py` of `jongwooko/distillm`), which gives
        the student the share 0.9: that is `beta` 0.1 here. The sum over the vocabulary is averaged over the tokens.

        Caveat: No code of the authors was found. The GKD trainer of Hugging Face TRL mixes and weighs as here, but its
        first version mixed the logarithms and swapped the weights; it has no factor T^2, and at `beta` 0 and 1 it is
        `kl` and `reverse_kl`.

    Reference:
        Rishabh Agarwal, Nino Vieillard, Yongchao Zhou, Piotr Stanczyk, Sabela Ramos, Matthieu Geist and Olivier
        Bachem, "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", ICLR 2024 and
        arXiv 2306.13649.
    """
    check_fraction("beta", beta)
    check_positive("temperature", temperature)
    return _ROWS.values(student, teacher, dim=dim, beta=beta, temperature=temperature)


@register_loss("js")
class JSLoss(RowLoss):
    """Generalised Jensen-Shannon divergence of the softened distributions, times T^2; see `js_loss` for the formula.

    Args:
        beta: The teacher's share of the mixture, above 0 and below 1.
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `beta` or `temperature` is no number.
        ValueError: If `beta` is not above 0 and below 1, the temperature is not positive and finite, or the
            reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import JSLoss
        >>> loss = JSLoss(beta=0.1)
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> loss(logits, logits).abs() < 1e-6
        tensor(True)
    """

    rows = _ROWS
    options = {"beta": check_fraction, "temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(
        self, beta: float = 0.5, temperature: float = 1.0, *, reduction: Reduction = "mean", dim: int | None = None
    ) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.beta = beta
        self.temperature = temperature
