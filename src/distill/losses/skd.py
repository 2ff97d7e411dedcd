"""Instances and directions: Jeong, Lee and Choi, "Streamlined Knowledge Distillation" (CVPR 2026)."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from distill._checks import check_classes, check_not_negative, check_pair, check_positive, without_autocast
from distill._reduction import hide
from distill._registry import register_loss
from distill.losses._base import BatchLoss
from distill.losses._batches import check_selection, count
from distill.losses._softened import divergence_of_logits
from distill.losses._vectors import length, normalize

FAMILY = "logits and more"


def skd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 4.0,
    ridge: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    """Divergence of the predictions, and distance of the directions of the samples' logits, one value for the batch.

        instances = T^2 * mean over samples of KL(softmax(t / T) || softmax(s / T))
        D = (S S' - Z Z') / C,  S and Z the logits of student and teacher, each sample divided by its L2 norm
        V = covariance of the rows of D + ridge * identity,  N x N
        directions = mean over samples of sqrt(D_i' V^-1 D_i)
        loss = alpha * instances + beta * directions

    The second part looks at the angles between the samples of a batch, and counts least the differences in which the
    batch varies most.

    Args:
        student: The student's logits, finite, `(N, C)`. Any floating dtype; half and bfloat16 are computed in float32.
        teacher: The teacher's logits, finite, same shape. Gets no gradient.
        alpha: Weight of the instances, zero or positive.
        beta: Weight of the directions, zero or positive.
        temperature: What both logits are divided by for the instances, positive and finite.
        ridge: What is added to the covariances, positive and finite.
        mask: Bool or integers, `(N,)`: which samples count. None: all.

    Returns:
        A scalar, never negative, 0 if no sample counts; float32, or float64 if an input is.

    Raises:
        TypeError: If what must be a tensor is none, or `alpha`, `beta`, `temperature` or `ridge` is no number.
        ValueError: If shapes or devices differ, an input is not of two dimensions, empty or not floating-point, there
            is only one class, the mask is not `(N,)` or holds weights, or an option is not as said.

    Examples:
        >>> import torch
        >>> from distill import skd_loss
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> skd_loss(teacher, teacher)
        tensor(0.)
        >>> skd_loss(torch.ones(2, 2), teacher, alpha=0.0)  # two samples alike, where the teacher sees a right angle
        tensor(1.2677)

    Notes:
        Published with weight 0.9 beside the cross-entropy with weight 0.1, and with 0.5 and 0.5 from ResNet-32x4 to
        ResNet-8x4, at temperature 4 and a ridge of 0.1, on CIFAR-100.

        Scale: `Distiller/SKD.py` of the authors' code (`HyunJunSik/StreamLined`), with both parts at the published
        weight.

        Caveat: That code also multiplies the parts by the share of samples and of classes of which the teacher is not
        surer than of the median, which is about a half; that is left out, and the weight that goes with these values is
        about half the published one. torchdistill (`SKDInstanceLoss` and `SKDDirectionLoss`) has neither the T^2 nor
        the division by C in its default mode "paper", and the ridge means something else there. In both the gradient is
        no number where student and teacher agree; here it is 0. The paper's text could not be seen.

    Reference:
        Hyeon-Jin Jeong, Han-Jin Lee and Seok-Hwan Choi, "Streamlined Knowledge Distillation", CVPR 2026.
    """
    for name, weight in (("alpha", alpha), ("beta", beta)):
        check_not_negative(name, weight)
    check_positive("temperature", temperature)
    check_positive("ridge", ridge)
    student, teacher = check_pair(student, teacher, dim=-1, columns=True)
    if student.ndim != 2:
        raise ValueError(f"student and teacher must be logits (N, C), got shape {tuple(student.shape)}")
    check_classes(student, dim=-1)
    kept = check_selection(mask, student.shape[:1], student.device)
    if kept is not None:
        student, teacher = hide(student, kept), hide(teacher, kept)
    number = len(student) if kept is None else count(kept)
    instances = divergence_of_logits(teacher, student, dim=-1, temperature=temperature).sum() / number
    return alpha * instances + beta * _distances(student, teacher, kept, ridge).sum() / number


def _distances(student: Tensor, teacher: Tensor, kept: Tensor | None, ridge: float) -> Tensor:
    """The distance of each sample, 0 for those that do not count, whose logits are 0."""
    ours, theirs = normalize(student, dim=1), normalize(teacher, dim=1)
    with without_autocast(student):
        difference = (ours @ ours.mT - theirs @ theirs.mT) / student.shape[1]
        if kept is None:
            centred = difference - difference.mean(0)
            covariance = centred.mT @ centred / max(len(student) - 1, 1)
        else:
            centred = (difference - difference.sum(0) / count(kept)).masked_fill(~kept[:, None], 0.0)
            covariance = centred.mT @ centred / count(kept, 2).sub(1)
        covariance = covariance + ridge * torch.eye(len(student), dtype=student.dtype, device=student.device)
        # The usual form looks whether it went well, which waits for a GPU: here what did not shows as NaN.
        factor, failed = torch.linalg.cholesky_ex(covariance)
        factor = factor.masked_fill(failed != 0, math.nan)
        return length(torch.linalg.solve_triangular(factor, difference.mT, upper=False), 0)


@register_loss("skd")
class SKDLoss(BatchLoss):
    """Divergence of the predictions, and distance of the directions of logits; see `skd_loss` for the formula.

    It exists for a whole batch only, so it has no reduction, and its mask selects samples.

    Args:
        alpha: Weight of the instances, zero or positive.
        beta: Weight of the directions, zero or positive.
        temperature: What both logits are divided by for the instances, positive and finite.
        ridge: What is added to the covariances, positive and finite.
        gather: Whether processes that train together compare the samples of all of them: the loss is that of the whole
            batch, and so is the mean of the processes' gradients (DDP, FSDP). Not in eval mode. False: each its own.

    Raises:
        TypeError: If `alpha`, `beta`, `temperature` or `ridge` is no number.
        ValueError: If a weight is negative or not finite, or the temperature or the ridge is not positive and finite.

    Examples:
        >>> import torch
        >>> from distill import SKDLoss
        >>> loss = SKDLoss()
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> loss(logits, logits)
        tensor(0.)
    """

    options = {  # noqa: RUF012 - declared in the base
        "alpha": check_not_negative,
        "beta": check_not_negative,
        "temperature": check_positive,
        "ridge": check_positive,
    }

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        temperature: float = 4.0,
        ridge: float = 0.1,
        *,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.ridge = ridge

    @override
    def whole(self, student: Tensor, teacher: Tensor, target: Tensor | None, mask: Tensor | None) -> Tensor:
        return skd_loss(student, teacher, mask=mask, **self.given())
