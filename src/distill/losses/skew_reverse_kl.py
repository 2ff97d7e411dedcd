"""Skew reverse KL: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (ICML 2024)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_fraction, check_pair, check_positive
from distill._reduction import Reduction, check_reduction, reduce
from distill._registry import register_loss
from distill.losses._softened import harden, log_mixture, soften

FAMILY = "logits"


def skew_reverse_kl_loss(
    student: Tensor, teacher: Tensor, *, alpha: float = 0.1, temperature: float = 1.0, dim: int = -1
) -> Tensor:
    """Divergence of a mixture of both distributions from the student's, one value per sample.

        p = softmax(t / T),  q = softmax(s / T)
        loss = T^2 * KL(q || (1 - alpha) p + alpha q)

    With `alpha` 0 it is `reverse_kl_loss`. With more it is at most T^2 log(1 / alpha), since the mixture gives every
    class at least `alpha` times what the student gives it.

    Published with weight 1 and `alpha` 0.1 at temperature 1, where the factor T^2 is 1, beside the language model's
    loss on a corpus of plain text with weight 1, and without cross-entropy on the answers.

    Scale: `skewed_reverse_kl` of the authors' code (`distillm/losses.py` of `jongwooko/distillm`): the sum over the
    vocabulary, averaged over the tokens.

    Doubt: the script read, for GPT-2 of 0.1 billion parameters, runs the other direction, `skew_kl`; the weight is that
    of the same command with this one. The factor T^2 is the library's: that code divides no logits.

    Args:
        student: The student's logits, finite, `(..., C)`. Any floating dtype; half and bfloat16 are computed in
            float32.
        teacher: The teacher's logits, finite, same shape. A constant: no gradient reaches it.
        alpha: The student's share of the mixture, at least 0 and below 1.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes.

    Returns:
        One value per sample, shape `(...)`, in nats times the squared temperature, not negative but for rounding;
        float32, or float64 if an input is.

    Raises:
        ValueError: If shapes or devices differ, an input is empty or not floating-point, `alpha` is not at least 0 and
            below 1, the temperature is not positive and finite, or `dim` is out of range.

    Examples:
        >>> import torch
        >>> from distill import skew_reverse_kl_loss
        >>> student, teacher = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
        >>> skew_reverse_kl_loss(student, teacher, alpha=0.5)  # log 2, where reverse_kl_loss is 10000
        tensor([0.6931])

    Reference:
        Jongwoo Ko, Sungnyun Kim, Tianyi Chen and Se-Young Yun, "DistiLLM: Towards Streamlined Distillation for Large
        Language Models", ICML 2024 and arXiv 2402.03898.
    """
    check_fraction("alpha", alpha, zero=True)
    check_positive("temperature", temperature)
    student, teacher = check_pair(student, teacher, dim=dim)
    log_q = F.log_softmax(soften(student, temperature), dim)
    teacher = soften(teacher, temperature)
    q = log_q.exp()
    log_m = log_mixture(q, torch.softmax(teacher, dim), alpha) if alpha > 0 else F.log_softmax(teacher, dim)
    return harden((q * (log_q - log_m)).sum(dim), temperature)


@register_loss("skew_reverse_kl")
class SkewReverseKLLoss(nn.Module):
    """Divergence T^2 KL(student || mixture of teacher and student); see `skew_reverse_kl_loss` for the formula.

    Args:
        alpha: The student's share of the mixture, at least 0 and below 1.
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes.

    Raises:
        ValueError: If `alpha` is not at least 0 and below 1, the temperature is not positive and finite, or the
            reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import SkewReverseKLLoss
        >>> loss = SkewReverseKLLoss(alpha=0.2)
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> loss(logits, logits).abs() < 1e-6
        tensor(True)
    """

    def __init__(
        self, alpha: float = 0.1, temperature: float = 1.0, *, reduction: Reduction = "mean", dim: int = -1
    ) -> None:
        super().__init__()
        self.alpha = check_fraction("alpha", alpha, zero=True)
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
            ValueError: As `skew_reverse_kl_loss`, and if the mask has another shape than the per-sample values.
        """
        values = skew_reverse_kl_loss(student, teacher, alpha=self.alpha, temperature=self.temperature, dim=self.dim)
        return reduce(values, self.reduction, mask)

    @override
    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        return f"alpha={self.alpha}, temperature={self.temperature}, reduction={self.reduction!r}, dim={self.dim}"
