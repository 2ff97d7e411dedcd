"""Corrected teachers: Belcak, Heinrich, Kautz and Molchanov, "Minifinetuning" (2025)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill._checks import check_fraction, check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._softened import divergence, harden, soften

FAMILY = "logits and more"


def _formula(
    student: Tensor, teacher: Tensor, labels: Tensor, *, dim: int, threshold: float, temperature: float
) -> Tensor:
    log_q = F.log_softmax(soften(student, temperature), dim)
    log_r = _correct(F.log_softmax(soften(teacher, temperature), dim), labels, dim=dim, threshold=threshold)
    return harden(divergence(log_r, log_q, dim), temperature)


def _correct(log_p: Tensor, labels: Tensor, *, dim: int, threshold: float) -> Tensor:
    """Mix the teacher's distribution with the label's class; the logarithms."""
    at_label = log_p.gather(dim, labels).exp()
    largest = log_p.amax(dim, keepdim=True).exp()
    right = at_label == largest
    sure = right & (at_label >= 1 - threshold)
    # What is left of the others, 1 - a, and the label's new probability.
    left = (1 - at_label - threshold).clamp(min=0) / (1 - at_label).masked_fill(sure, 1.0)
    left = torch.where(right, left, (1 - threshold) / (1 + largest - at_label))
    label = torch.where(
        right,
        (at_label + threshold).clamp(max=1),
        (largest + threshold * (1 - at_label)) / (1 + largest - at_label),
    )
    nothing = left == 0
    others = torch.where(nothing, -math.inf, log_p + left.masked_fill(nothing, 1.0).log())
    return others.scatter(dim, labels, label.log())


_ROWS = Rows(_formula, labels=True)


def mft_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *,
    threshold: float = 0.2,
    temperature: float = 1.0,
    dim: int | None = None,
) -> Tensor:
    """Divergence from the teacher's distribution, corrected towards the label, one value per sample.

        p = softmax(t / T),  q = softmax(s / T),  y the target,  m the likeliest class
        r_c = (1 - a) p_c + a [c = y]
        a = (p_m - p_y + threshold) / (1 + p_m - p_y)  where the teacher is wrong, so that r_y = r_m + threshold
        a = min(threshold, 1 - p_y) / (1 - p_y)        where it is right, so that r_y = min(1, p_y + threshold)
        loss = T^2 * KL(r || q)

    Made for a network that is its own teacher, as it was before it was tuned to few samples of a new domain: the
    correction is as small as makes the label the likeliest class by a margin, and all else stays as it was.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape; -inf is a probability of 0. Gets no gradient.
        target: The class of every sample, integers from 0 to `C - 1`, `(...)`. The loss class takes any other label
            where its mask is 0.
        threshold: How much likelier the label is made, above 0 and below 1.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, in nats times the squared temperature, never negative; infinite where a
        class has a probability of 0 for the student alone. float32, or float64 if an input is.

    Raises:
        TypeError: If student, teacher or target is no tensor, or `threshold` or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, there are fewer than two
            classes, the target is missing, no integer per sample or no class, the threshold is not above 0 and below 1,
            the temperature is not positive and finite, or `dim` is out of range or not given where there are four
            dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import mft_loss
        >>> teacher = torch.tensor([[0.6, 0.3, 0.1]]).log()
        >>> target = torch.tensor([1])  # a = (0.6 - 0.3 + 0.2) / 1.3: the label rises to 0.2 above the other
        >>> right = torch.tensor([[0.6, 0.3, 0.1]]) * 0.8 / 1.3 + torch.tensor([[0.0, 1.0, 0.0]]) * 0.5 / 1.3
        >>> right
        tensor([[0.3692, 0.5692, 0.0615]])
        >>> mft_loss(right.log(), teacher, target) < 1e-6
        tensor([True])

    Notes:
        Published with weight 1, threshold 0.2 and temperature 1, as the only term.

        Scale: `MFTLoss` of the authors' company (`modelopt/torch/distill/losses.py` of
        `NVIDIA/TensorRT-Model-Optimizer`): T^2 times the sum over the vocabulary, averaged over the tokens.

        Caveat: The formula is that of the code, at its defaults and without the 1e-7 that it adds to denominators; the
        paper's own text was not seen. Where label and likeliest class have the same probability the teacher counts as
        right here; the code takes the class of the lower number as the likeliest.

    Reference:
        Peter Belcak, Greg Heinrich, Jan Kautz and Pavlo Molchanov, "Minifinetuning: Low-Data Generation Domain
        Adaptation through Corrective Self-Distillation", arXiv 2506.15702 (2025).
    """
    check_fraction("threshold", threshold)
    check_positive("temperature", temperature)
    return _ROWS.values(student, teacher, target, dim=dim, threshold=threshold, temperature=temperature)


@register_loss("mft")
class MFTLoss(RowLoss):
    """Divergence from the teacher's distribution, corrected towards the label; see `mft_loss` for the formula.

    Args:
        threshold: How much likelier the label is made, above 0 and below 1. It may be changed between steps.
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `threshold` or `temperature` is no number.
        ValueError: If the threshold is not above 0 and below 1, the temperature is not positive and finite, or the
            reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import MFTLoss
        >>> logits = torch.zeros(2, 4)  # the label has 1/4 and gets 0.45
        >>> MFTLoss()(logits, logits, torch.tensor([2, 0]))
        tensor(0.0939)
    """

    rows = _ROWS
    options = {"threshold": check_fraction, "temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(
        self, threshold: float = 0.2, temperature: float = 1.0, *, reduction: Reduction = "mean", dim: int | None = None
    ) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.threshold = threshold
        self.temperature = temperature
