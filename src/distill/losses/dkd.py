"""Decoupled distillation: Zhao, Cui, Song, Qiu and Liang, "Decoupled Knowledge Distillation" (CVPR 2022)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_classes, check_labels, check_not_negative, check_pair, check_positive
from distill._reduction import Reduction, check_reduction, reduce
from distill._registry import register_loss
from distill.losses._softened import soften

FAMILY = "refined logits"


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    dim: int = -1,
) -> Tensor:
    """Divergence of the target's probability and divergence among the other classes, one value per sample.

        p = softmax(t / T),  q = softmax(s / T),  y the target
        target part = KL((p_y, 1 - p_y) || (q_y, 1 - q_y))
        others' part = KL(p' || q'),  p' and q' being p and q without the target, normalised again
        loss = T^2 * [alpha * target part + beta * others' part]

    The plain divergence, `kl_loss`, is this with `alpha` 1 and `beta` 1 - p_y: where the teacher is sure, it hardly
    teaches how the other classes compare. With two classes there is nothing to compare, and their part is 0.

    Published with weight 1 beside the cross-entropy with weight 1, with `alpha` 1 and temperature 4 on CIFAR-100, and
    with `beta` 8 for five of eleven pairs of networks, 6 for four and 2 for two (ResNet-56 to ResNet-20, ResNet-110 to
    ResNet-32); the weight rises from 0 during the first 20 epochs.

    Scale: `mdistiller/distillers/DKD.py` of the authors' code (`megvii-research/mdistiller`), with the options in its
    `configs/cifar100/dkd`: T^2 times the sums over the classes, averaged over the samples.

    Doubt: none known.

    Args:
        student: The student's logits, finite, `(..., C)`. Any floating dtype; half and bfloat16 are computed in
            float32.
        teacher: The teacher's logits, finite, same shape. A constant: no gradient reaches it.
        target: The class of every sample, integers from 0 to `C - 1`, `(...)`.
        alpha: Weight of the target-class part, zero or positive.
        beta: Weight of the part of the other classes, zero or positive.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes.

    Returns:
        One value per sample, shape `(...)`, in nats times the squared temperature, not negative but for rounding;
        float32, or float64 if an input is.

    Raises:
        ValueError: If shapes or devices differ, an input is empty or not floating-point, there are fewer than two
            classes, the target is missing or no integer per sample, a weight is negative or not finite, the
            temperature is not positive and finite, or `dim` is out of range.

    Examples:
        >>> import torch
        >>> from distill import dkd_loss
        >>> student = torch.tensor([[0.5, 0.125, 0.375]]).log()
        >>> teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> dkd_loss(student, teacher, torch.tensor([0]), beta=2.0, temperature=1.0)  # 2 * log(4 / 3) / 2
        tensor([0.2877])

    Reference:
        Borui Zhao, Quan Cui, Renjie Song, Yiyu Qiu and Jiajun Liang, "Decoupled Knowledge Distillation", CVPR 2022 and
        arXiv 2203.08679, section 3.
    """
    check_not_negative("alpha", alpha)
    check_not_negative("beta", beta)
    check_positive("temperature", temperature)
    student, teacher = check_pair(student, teacher, dim=dim)
    check_classes(student, dim=dim)
    index = check_labels(target, student, dim=dim)
    student, teacher = _relative(student, index, temperature, dim), _relative(teacher, index, temperature, dim)
    others = teacher.scatter(dim, index, -math.inf).exp()  # 0 at the target
    sum_others = others.sum(dim, keepdim=True)
    log_others_p = sum_others.log()
    log_others_q = student.scatter(dim, index, -math.inf).exp().sum(dim, keepdim=True).log()

    log_p_target = F.log_softmax(torch.cat([teacher.gather(dim, index), log_others_p], dim), dim)
    log_q_target = F.log_softmax(torch.cat([student.gather(dim, index), log_others_q], dim), dim)
    of_target = (log_p_target.exp() * (log_p_target - log_q_target)).sum(dim)  # over the target and all others together

    # The difference inside the sum: p sums to 1 only as far as the logits are exact, and large logits are not.
    of_others = (others / sum_others * ((teacher - log_others_p) - (student - log_others_q))).sum(dim)
    return alpha * temperature**2 * of_target + beta * temperature**2 * of_others


def _relative(logits: Tensor, index: Tensor, temperature: float, dim: int) -> Tensor:
    """Logits over the temperature, from the largest of the other classes, so that their exponentials sum to 1 or more.

    What all logits of a sample have in common would only cost digits.
    """
    largest = logits.detach().scatter(dim, index, -math.inf).amax(dim, keepdim=True)
    return soften(logits - largest, temperature)


@register_loss("dkd")
class DKDLoss(nn.Module):
    """Decoupled divergence: target class and the others with a weight each; see `dkd_loss` for the formula.

    Args:
        alpha: Weight of the target-class part, zero or positive.
        beta: Weight of the part of the other classes, zero or positive.
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes.

    Raises:
        ValueError: If a weight is negative or not finite, the temperature is not positive and finite, or the
            reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import DKDLoss
        >>> loss = DKDLoss(beta=2.0)
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> loss(logits, logits, torch.tensor([2, 0]))
        tensor(0.)
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        *,
        reduction: Reduction = "mean",
        dim: int = -1,
    ) -> None:
        super().__init__()
        self.alpha = check_not_negative("alpha", alpha)
        self.beta = check_not_negative("beta", beta)
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
            target: The class of every sample, `(...)`, integers.
            mask: Bool or weights, `(...)`, shaped like the per-sample values.

        Returns:
            A scalar, or with `reduction="none"` one value per sample, `(...)`.

        Raises:
            ValueError: As `dkd_loss`, and if the mask has another shape than the per-sample values.
        """
        values = dkd_loss(
            student, teacher, target, alpha=self.alpha, beta=self.beta, temperature=self.temperature, dim=self.dim
        )
        return reduce(values, self.reduction, mask)

    @override
    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        options = f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}"
        return f"{options}, reduction={self.reduction!r}, dim={self.dim}"
