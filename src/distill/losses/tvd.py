"""Total variation: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation" (ACL 2023)."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_pair, check_positive
from distill._reduction import Reduction, check_reduction, reduce
from distill._registry import register_loss
from distill.losses._softened import soften

FAMILY = "logits"


def tvd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """Total variation distance of teacher and student, one value per sample.

        p = softmax(t / T),  q = softmax(s / T)
        loss = 1/2 * sum_c |p_c - q_c|

    It lies between 0 and 1, and has no factor T^2. Where both are sure of different classes it is 1 and its gradient
    vanishes.

    Published with weight 1 at temperature 1, as the only term.

    Scale: `calc_tvd_loss` of the authors' code (`summa/kd.py` of `MANGA-UOFA/fdistill`): half the sum over the
    vocabulary, averaged over the tokens.

    Doubt: the authors average the values on given sequences and on sequences that the student samples, which is left to
    the caller. At other temperatures than 1 their code for summaries has a factor T^2, that for translation
    (`t5mt/kd.py`) has neither factor nor temperature.

    Args:
        student: The student's logits, finite, `(..., C)`. Any floating dtype; half and bfloat16 are computed in
            float32.
        teacher: The teacher's logits, finite, same shape. A constant: no gradient reaches it.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes.

    Returns:
        One value per sample, shape `(...)`, a probability, from 0 to 1 but for rounding; float32, or float64 if
        an input is.

    Raises:
        ValueError: If shapes or devices differ, an input is empty or not floating-point, the temperature is not
            positive and finite, or `dim` is out of range.

    Examples:
        >>> import torch
        >>> from distill import tvd_loss
        >>> student = torch.tensor([[0.25, 0.75]]).log()
        >>> teacher = torch.tensor([[0.0, 0.0]])
        >>> tvd_loss(student, teacher)
        tensor([0.2500])

    Reference:
        Yuqiao Wen, Zichao Li, Wenyu Du and Lili Mou, "f-Divergence Minimization for Sequence-Level Knowledge
        Distillation", ACL 2023 and arXiv 2307.15190.
    """
    check_positive("temperature", temperature)
    student, teacher = check_pair(student, teacher, dim=dim)
    q = torch.softmax(soften(student, temperature), dim)
    p = torch.softmax(soften(teacher, temperature), dim)
    # Both sum to 1, so p exceeds q by as much as q exceeds p: by half of the sum over all classes.
    return (p - q).relu().sum(dim)


@register_loss("tvd")
class TVDLoss(nn.Module):
    """Total variation distance of the softened distributions; see `tvd_loss` for the formula.

    Args:
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes.

    Raises:
        ValueError: If the temperature is not positive and finite, or the
            reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import TVDLoss
        >>> loss = TVDLoss(temperature=2.0)
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
            ValueError: As `tvd_loss`, and if the mask has another shape than the per-sample values.
        """
        values = tvd_loss(student, teacher, temperature=self.temperature, dim=self.dim)
        return reduce(values, self.reduction, mask)

    @override
    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        return f"temperature={self.temperature}, reduction={self.reduction!r}, dim={self.dim}"
