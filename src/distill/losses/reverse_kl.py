"""Reverse KL: Gu, Dong, Wei and Huang, "MiniLLM: Knowledge Distillation of Large Language Models" (ICLR 2024)."""

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_pair, check_positive
from distill._reduction import Reduction, check_reduction, reduce
from distill._registry import register_loss
from distill.losses._softened import harden, soften

FAMILY = "logits"


def reverse_kl_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """Divergence of the teacher's distribution from the student's, one value per sample.

        p = softmax(t / T),  q = softmax(s / T)
        loss = T^2 * KL(q || p) = T^2 * sum_c q_c (log q_c - log p_c)

    The expectation is under the student, so a class that the student gives no probability costs nothing: the student
    may leave out modes of the teacher, where `kl_loss` makes it cover them all.

    Published with weight 1 at temperature 1, where the factor T^2 is 1.

    Scale: the single-step term of the authors' code (`minillm/minillm/losses.py` of `microsoft/LMOps`), and
    `reverse_kl` of DistiLLM (Ko et al., 2024; `distillm/losses.py` of `jongwooko/distillm`): the sum over the
    vocabulary, averaged over the tokens.

    Doubt: MiniLLM minimises the divergence of whole sequences that the student samples, by policy gradient; this value
    is one term of its objective, no replacement for it. The factor T^2 is in neither code.

    Args:
        student: The student's logits, finite, `(..., C)`. Any floating dtype; half and bfloat16 are computed in
            float32.
        teacher: The teacher's logits, finite, same shape. A constant: no gradient reaches it.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes.

    Returns:
        One value per sample, shape `(...)`, in nats times the squared temperature, not negative but for rounding;
        float32, or float64 if an input is.

    Raises:
        ValueError: If shapes or devices differ, an input is empty or not floating-point, the temperature is not
            positive and finite, or `dim` is out of range.

    Examples:
        >>> import torch
        >>> from distill import reverse_kl_loss
        >>> student = torch.tensor([[0.25, 0.75]]).log()
        >>> teacher = torch.tensor([[0.0, 0.0]])
        >>> reverse_kl_loss(student, teacher)  # 0.25 log(0.25 / 0.5) + 0.75 log(0.75 / 0.5)
        tensor([0.1308])

    Reference:
        Yuxian Gu, Li Dong, Furu Wei and Minlie Huang, "MiniLLM: Knowledge Distillation of Large Language Models",
        ICLR 2024 and arXiv 2306.08543, section 2.1.
    """
    check_positive("temperature", temperature)
    student, teacher = check_pair(student, teacher, dim=dim)
    log_q = F.log_softmax(soften(student, temperature), dim)
    log_p = F.log_softmax(soften(teacher, temperature), dim)
    return harden((log_q.exp() * (log_q - log_p)).sum(dim), temperature)


@register_loss("reverse_kl")
class ReverseKLLoss(nn.Module):
    """Reverse divergence of the softened distributions, T^2 KL(student || teacher); see `reverse_kl_loss`.

    Args:
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes.

    Raises:
        ValueError: If the temperature is not positive and finite, or the
            reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import ReverseKLLoss
        >>> loss = ReverseKLLoss(temperature=2.0)
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> loss(logits, logits)
        tensor(0.)
    """

    def __init__(self, temperature: float = 1.0, *, reduction: Reduction = "mean", dim: int = -1) -> None:
        super().__init__()
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
            ValueError: As `reverse_kl_loss`, and if the mask has another shape than the per-sample values.
        """
        values = reverse_kl_loss(student, teacher, temperature=self.temperature, dim=self.dim)
        return reduce(values, self.reduction, mask)

    @override
    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        return f"temperature={self.temperature}, reduction={self.reduction!r}, dim={self.dim}"
