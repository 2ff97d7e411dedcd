"""Alpha-beta divergence: Wang et al., "ABKD: Pursuing a Proper Allocation of the Probability Mass" (ICML 2025)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_not_negative, check_pair, check_positive
from distill._reduction import Reduction, check_reduction, reduce
from distill._registry import register_loss
from distill.losses._softened import soften

FAMILY = "logits"

_SMALL = 0.05


def alpha_beta_loss(
    student: Tensor, teacher: Tensor, *, alpha: float, beta: float, temperature: float = 1.0, dim: int = -1
) -> Tensor:
    """Alpha-beta divergence of teacher and student, one value per sample.

        p = softmax(t / T),  q = softmax(s / T),  both exponents not negative
        loss = 1 / (alpha beta) * sum_c [alpha / (alpha + beta) * p_c^(alpha + beta)
               + beta / (alpha + beta) * q_c^(alpha + beta) - p_c^alpha q_c^beta]

    The limits are part of it, and reached continuously: (1, 0) is KL(p || q), (0, 1) is KL(q || p). (1, 1) is half the
    squared distance of p and q, (0.5, 0.5) four times the squared Hellinger distance.

    There is no factor T^2, as in the authors' code: `KLLoss(T)` is T^2 times `AlphaBetaLoss(1, 0, T)`.

    Published with weight 32 for `alpha` 0.8 and `beta` 0.3 on CIFAR-100 (ResNet-56 to ResNet-20, the authors' README),
    at the temperature 4 that is the default of the code it builds on.

    Scale: `standard_classification/distiller_zoo/abkl.py` of the authors' code (`ghwang-s/abkd`), averaged over the
    samples; its form for language models, `ab_div` in `distillation_llm/distillm/losses.py`, has no temperature.

    Doubt: where one exponent is 0 and the other is not 1, that code has the other exponent times this value, which is
    the limit of its own formula and that of Cichocki et al. The script with the temperature was not to be seen, only
    the code it builds on (`zkxufo/TTM`), nor were the exponents for language models.

    Args:
        student: The student's logits, finite, `(..., C)`. Any floating dtype; half and bfloat16 are computed in
            float32.
        teacher: The teacher's logits, finite, same shape. A constant: no gradient reaches it.
        alpha: Exponent of the teacher, zero or positive.
        beta: Exponent of the student, zero or positive, not zero together with `alpha`.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes.

    Returns:
        One value per sample, shape `(...)`, without a unit, not negative but for rounding; float32, or float64 if an
        input is.

    Raises:
        ValueError: If shapes or devices differ, an input is empty or not floating-point, an exponent is negative or
            not finite, both are zero, the temperature is not positive and finite, or `dim` is out of range.

    Examples:
        >>> import torch
        >>> from distill import alpha_beta_loss
        >>> student = torch.tensor([[0.25, 0.75]]).log()
        >>> teacher = torch.tensor([[0.0, 0.0]])
        >>> alpha_beta_loss(student, teacher, alpha=1.0, beta=1.0)  # (0.25^2 + 0.25^2) / 2
        tensor([0.0625])

    Reference:
        Guanghui Wang, Zhiyong Yang, Zitai Wang, Shi Wang, Qianqian Xu and Qingming Huang, "ABKD: Pursuing a Proper
        Allocation of the Probability Mass in Knowledge Distillation via alpha-beta-Divergence", ICML 2025 and
        arXiv 2505.04560. The divergence is that of Cichocki, Cruces and Amari, "Generalized Alpha-Beta
        Divergences and Their Application to Robust Nonnegative Matrix Factorization", Entropy 2011.
    """
    _check_exponents(alpha, beta)
    check_positive("temperature", temperature)
    student, teacher = check_pair(student, teacher, dim=dim)
    log_q = F.log_softmax(soften(student, temperature), dim)
    log_p = F.log_softmax(soften(teacher, temperature), dim)
    if min(alpha, beta) < _SMALL:
        # Swapping both the roles and the exponents changes nothing, and leaves the larger exponent to divide by.
        terms = _near_limit(log_p, log_q, alpha, beta) if alpha >= beta else _near_limit(log_q, log_p, beta, alpha)
        return terms.sum(dim)
    total = alpha + beta
    of_teacher = (total * log_p).exp().sum(dim) * (alpha / total)
    of_student = (total * log_q).exp().sum(dim) * (beta / total)
    return (of_teacher + of_student - (alpha * log_p + beta * log_q).exp().sum(dim)) / (alpha * beta)


def _check_exponents(alpha: float, beta: float) -> None:
    check_not_negative("alpha", alpha)
    check_not_negative("beta", beta)
    if alpha == beta == 0:
        raise ValueError(f"alpha and beta must not both be zero, got {alpha!r} and {beta!r}")


def _near_limit(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """Divergence class by class, for alpha > 0 and any beta, which dividing by alpha beta would drown in rounding.

    With d = log q - log p and s = alpha + beta a term is p^s [expm1(s d) / s - expm1(beta d) / beta] / alpha. Written
    so, nothing cancels as beta tends to 0; and with the larger of p and q in front, no power exceeds 1.
    """
    total = alpha + beta
    difference = log_q - log_p
    up = difference.clamp(min=0)
    size = 2 * up - difference
    first = -torch.expm1(-total * size) / total
    second = size if beta == 0 else -torch.expm1(-beta * size) / beta
    larger = torch.exp(total * (log_p + up))
    terms = larger * (first - torch.exp(-alpha * up) * second) / alpha
    return torch.where(difference < 0, -terms, terms)


@register_loss("alpha_beta")
class AlphaBetaLoss(nn.Module):
    """Alpha-beta divergence of the softened distributions; see `alpha_beta_loss` for the formula.

    Args:
        alpha: Exponent of the teacher, zero or positive.
        beta: Exponent of the student, zero or positive, not zero together with `alpha`.
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes.

    Raises:
        ValueError: If an exponent is negative or not finite, both are zero, the temperature is not positive and finite,
            or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import AlphaBetaLoss
        >>> loss = AlphaBetaLoss(0.2, 0.7)
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> loss(logits, logits).abs() < 1e-5
        tensor(True)
    """

    def __init__(
        self, alpha: float, beta: float, temperature: float = 1.0, *, reduction: Reduction = "mean", dim: int = -1
    ) -> None:
        super().__init__()
        _check_exponents(alpha, beta)
        self.alpha = alpha
        self.beta = beta
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
            ValueError: As `alpha_beta_loss`, and if the mask has another shape than the per-sample values.
        """
        values = alpha_beta_loss(
            student, teacher, alpha=self.alpha, beta=self.beta, temperature=self.temperature, dim=self.dim
        )
        return reduce(values, self.reduction, mask)

    @override
    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        options = f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}"
        return f"{options}, reduction={self.reduction!r}, dim={self.dim}"
