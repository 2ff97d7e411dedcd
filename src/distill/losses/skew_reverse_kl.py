"""Skew reverse KL: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (ICML 2024)."""

from typing import Any

from torch import Tensor

from distill._checks import check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._mixture import Mixture, block_from_mixture, check_skew, from_mixture
from distill.topk import TopK

FAMILY = "divergences"


def _formula(student: Tensor, teacher: Tensor, *, dim: int, alpha: float, temperature: float) -> Tensor:
    return from_mixture(student, teacher, _mixture(alpha), dim=dim, temperature=temperature)


def _block(*rows: Any, alpha: float, temperature: float) -> Tensor:
    return block_from_mixture(*rows, mixture=_mixture(alpha), temperature=temperature)


def _mixture(alpha: float) -> Mixture:
    return Mixture(share=1 - alpha, of_teacher=0, of_student=1)


_ROWS = Rows(_formula, block=_block, topk=True)


def skew_reverse_kl_loss(
    student: Tensor, teacher: Tensor | TopK, *, alpha: float = 0.1, temperature: float = 1.0, dim: int | None = None
) -> Tensor:
    """Divergence of a mixture of both distributions from the student's, one value per sample.

        p = softmax(t / T),  q = softmax(s / T)
        loss = T^2 * KL(q || (1 - alpha) p + alpha q)

    With `alpha` 0 it is `reverse_kl_loss`. With more it is at most T^2 log(1 / alpha), since the mixture gives every
    class at least `alpha` times what the student gives it.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape; -inf is a probability of 0. Or a `TopK`. Gets no gradient.
        alpha: The student's share of the mixture, at least 0 and below 1.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, in nats times the squared temperature, not negative; float32, or
        float64 if an input is.

    Raises:
        TypeError: If an input is no tensor, or `alpha` or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, `alpha` is not at least 0 and
            below 1, the temperature is not positive and finite, there is only one class, or `dim` is out of range or
            not given where there are four dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import skew_reverse_kl_loss
        >>> student, teacher = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
        >>> skew_reverse_kl_loss(student, teacher, alpha=0.5)  # log 2, where reverse_kl_loss is 10000
        tensor([0.6931])

    Notes:
        Published with weight 1 and `alpha` 0.1 at temperature 1, where the factor T^2 is 1, beside the language model's
        loss on a corpus of plain text with weight 1, and without cross-entropy on the answers.

        Scale: `skewed_reverse_kl` of the authors' code (`distillm/losses.py` of `jongwooko/distillm`): the sum over the
        vocabulary, averaged over the tokens.

        Caveat: The script read, for GPT-2 of 0.1 billion parameters, runs the other direction, `skew_kl`; the weight is
        that of the same command with this one. The factor T^2 is the library's: that code divides no logits.

    Reference:
        Jongwoo Ko, Sungnyun Kim, Tianyi Chen and Se-Young Yun, "DistiLLM: Towards Streamlined Distillation for Large
        Language Models", ICML 2024 and arXiv 2402.03898.
    """
    check_skew("alpha", alpha)
    check_positive("temperature", temperature)
    return _ROWS.values(student, teacher, dim=dim, alpha=alpha, temperature=temperature)


@register_loss("skew_reverse_kl")
class SkewReverseKLLoss(RowLoss):
    """Divergence T^2 KL(student || mixture of teacher and student); see `skew_reverse_kl_loss` for the formula.

    Args:
        alpha: The student's share of the mixture, at least 0 and below 1.
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `alpha` or `temperature` is no number.
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

    rows = _ROWS
    options = {"alpha": check_skew, "temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(
        self, alpha: float = 0.1, temperature: float = 1.0, *, reduction: Reduction = "mean", dim: int | None = None
    ) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.alpha = alpha
        self.temperature = temperature
