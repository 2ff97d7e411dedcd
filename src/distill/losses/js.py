"""Generalised Jensen-Shannon: Agarwal et al., "On-Policy Distillation of Language Models" (ICLR 2024)."""

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_fraction, check_pair, check_positive
from distill._reduction import Reduction, check_reduction, reduce
from distill._registry import register_loss
from distill.losses._softened import harden, log_mixture, soften

FAMILY = "logits"


def js_loss(student: Tensor, teacher: Tensor, *, beta: float = 0.5, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """Generalised Jensen-Shannon divergence of teacher and student, one value per sample.

        p = softmax(t / T),  q = softmax(s / T),  m = beta p + (1 - beta) q
        loss = T^2 * [beta KL(p || m) + (1 - beta) KL(q || m)]

    With `beta` 0.5 it is the Jensen-Shannon divergence, which is symmetric and at most log 2 (times T^2). It vanishes
    at both ends: divided by `beta` it tends to KL(p || q) as `beta` tends to 0, and divided by `1 - beta` to
    KL(q || p) as `beta` tends to 1. For these use `kl_loss` and `reverse_kl_loss`.

    Published with weight 1 at temperature 1, where the factor T^2 is 1, and `beta` 0.1, 0.5 or 0.9.

    Scale: `js_distance` of DistiLLM (Ko et al., 2024; `distillm/losses.py` of `jongwooko/distillm`), which gives the
    student the share 0.9: that is `beta` 0.1 here. The sum over the vocabulary is averaged over the tokens.

    Doubt: no code of the authors was found. The GKD trainer of Hugging Face TRL mixes and weighs as here, but its first
    version mixed the logarithms and swapped the weights; it has no factor T^2, and at `beta` 0 and 1 it is `kl` and
    `reverse_kl`.

    Args:
        student: The student's logits, finite, `(..., C)`. Any floating dtype; half and bfloat16 are computed in
            float32.
        teacher: The teacher's logits, finite, same shape. A constant: no gradient reaches it.
        beta: The teacher's share of the mixture, above 0 and below 1.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes.

    Returns:
        One value per sample, shape `(...)`, in nats times the squared temperature, not negative but for rounding;
        float32, or float64 if an input is.

    Raises:
        ValueError: If shapes or devices differ, an input is empty or not floating-point, `beta` is not above 0 and
            below 1, the temperature is not positive and finite, or `dim` is out of range.

    Examples:
        >>> import torch
        >>> from distill import js_loss
        >>> student = torch.tensor([[1e4, 0.0]])
        >>> teacher = torch.tensor([[0.0, 1e4]])
        >>> js_loss(student, teacher)  # log 2 where nothing is shared
        tensor([0.6931])

    Reference:
        Rishabh Agarwal, Nino Vieillard, Yongchao Zhou, Piotr Stanczyk, Sabela Ramos, Matthieu Geist and Olivier
        Bachem, "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", ICLR 2024 and
        arXiv 2306.13649.
    """
    check_fraction("beta", beta)
    check_positive("temperature", temperature)
    student, teacher = check_pair(student, teacher, dim=dim)
    log_q = F.log_softmax(soften(student, temperature), dim)
    log_p = F.log_softmax(soften(teacher, temperature), dim)
    p, q = log_p.exp(), log_q.exp()
    log_m = log_mixture(p, q, beta)
    of_teacher = (p * (log_p - log_m)).sum(dim)
    of_student = (q * (log_q - log_m)).sum(dim)
    return harden(beta * of_teacher + (1 - beta) * of_student, temperature)


@register_loss("js")
class JSLoss(nn.Module):
    """Generalised Jensen-Shannon divergence of the softened distributions, times T^2; see `js_loss` for the formula.

    Args:
        beta: The teacher's share of the mixture, above 0 and below 1.
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes.

    Raises:
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

    def __init__(
        self, beta: float = 0.5, temperature: float = 1.0, *, reduction: Reduction = "mean", dim: int = -1
    ) -> None:
        super().__init__()
        self.beta = check_fraction("beta", beta)
        self.temperature = check_positive("temperature", temperature)
        self.reduction = check_reduction(reduction)
        self.dim = dim

    @override
    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the loss.

        Args:
            student: Logits, `(..., C)`.
            teacher: Logits, same shape.
            target: Not used; every loss is called alike.
            mask: Bool or weights, `(...)`, shaped like the per-sample values.

        Returns:
            A scalar, or with `reduction="none"` one value per sample, `(...)`.

        Raises:
            ValueError: As `js_loss`, and if the mask has another shape than the per-sample values.
        """
        values = js_loss(student, teacher, beta=self.beta, temperature=self.temperature, dim=self.dim)
        return reduce(values, self.reduction, mask)

    @override
    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        return f"beta={self.beta}, temperature={self.temperature}, reduction={self.reduction!r}, dim={self.dim}"
