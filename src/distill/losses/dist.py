"""Relations of predictions: Huang et al., "Knowledge Distillation from a Stronger Teacher" (NeurIPS 2022)."""

import torch
from torch import Tensor
from typing_extensions import override

from distill._checks import check_classes, check_not_negative, check_pair, check_positive
from distill._reduction import hide
from distill._registry import register_loss
from distill.losses._base import BatchLoss
from distill.losses._batches import centre, check_selection, count
from distill.losses._softened import harden, soften
from distill.losses._vectors import length

FAMILY = "logits and more"

_EPS = 1e-8


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Correlation of the predictions, over the classes and over the samples, one value for the batch.

        p = softmax(t / T),  q = softmax(s / T),  both N x C
        r(a, b) = sum (a - mean a)(b - mean b) / (|a - mean a| |b - mean b| + 1e-8)
        inter = 1 - mean over samples of r(p_n, q_n), along the classes
        intra = 1 - mean over classes of r(p_c, q_c), along the samples
        loss = T^2 * [beta * inter + gamma * intra]

    The student must keep the teacher's order and proportions, not its exact probabilities. Every dimension but `dim`
    counts as samples. The 1e-8 makes a difference: a class that no sample of the batch is likely to be counts as
    uncorrelated, even if student and teacher agree.

    Args:
        student: The student's logits, finite, `(..., C)`, with at least two dimensions. Any floating dtype; half and
            bfloat16 are computed in float32.
        teacher: The teacher's logits, finite, same shape. Gets no gradient.
        beta: Weight of the part over classes, zero or positive.
        gamma: Weight of the part over samples, zero or positive.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.
        mask: Bool or integers, `(...)`, shaped like the samples: which of them count. None: all.

    Returns:
        A scalar, shape `()`, without a unit, times the squared temperature; float32, or float64 if an input is.

    Raises:
        TypeError: If what must be a tensor is none, or `beta`, `gamma` or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, there is only one dimension or
            one class, the mask has another shape than the samples or holds weights, a weight is negative or not finite,
            the temperature is not positive and finite, or `dim` is out of range or not given where there are four
            dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import dist_loss
        >>> student = torch.tensor([[0.2, 0.8], [0.4, 0.6]]).log()
        >>> teacher = torch.tensor([[0.1, 0.9], [0.4, 0.6]]).log()
        >>> dist_loss(student, teacher).abs() < 1e-5  # the same order, and in proportion
        tensor(True)
        >>> dist_loss(student, teacher.flip(0))  # now the samples are the wrong way round
        tensor(2.0000)

    Notes:
        Published with weight 1, `beta` and `gamma` 1 and temperature 1, beside the cross-entropy with weight 1, on the
        pixels of Cityscapes (the authors' code for segmentation); with weight 2 and the same options on ImageNet (the
        configuration of torchdistill).

        Scale: `segmentation/losses/dist_kd.py` of the authors' code (`hunto/DIST_KD`), and the same file for
        classification in `hunto/image_classification_sota`, which fix the 1e-8; both are without a temperature. The
        factor T^2 is that of torchdistill's `DISTLoss`.

        Caveat: The authors' settings for ImageNet and CIFAR-100 could not be seen.

    Reference:
        Tao Huang, Shan You, Fei Wang, Chen Qian and Chang Xu, "Knowledge Distillation from a Stronger Teacher",
        NeurIPS 2022 and arXiv 2205.10536, section 3.
    """
    check_not_negative("beta", beta)
    check_not_negative("gamma", gamma)
    check_positive("temperature", temperature)
    student, teacher = check_pair(student, teacher, dim=-1 if dim is None else dim, columns=dim in (None, -1))
    if student.ndim < 2:
        raise ValueError(f"student and teacher must have samples and classes, got shape {tuple(student.shape)}")
    dim = check_classes(student, dim=dim)
    kept = check_selection(mask, student.movedim(dim, -1).shape[:-1], student.device)
    if kept is not None:
        student, teacher, kept = hide(student, kept, dim=dim), hide(teacher, kept, dim=dim), kept.flatten()
    q = torch.softmax(soften(student, temperature), dim).movedim(dim, -1).flatten(0, -2)
    p = torch.softmax(soften(teacher, temperature), dim).movedim(dim, -1).flatten(0, -2)
    mean = 1 / q.shape[1]  # of probabilities
    rows = _correlation(q - mean, p - mean, dim=1)
    inter = rows.mean() if kept is None else rows.masked_fill(~kept, 0.0).sum() / count(kept)
    intra = _correlation(centre(q, kept), centre(p, kept), dim=0).mean()
    value = (beta + gamma) - torch.add(beta * inter, intra, alpha=gamma)
    if kept is not None:
        value = value.masked_fill(~kept.any(), 0.0)
    return harden(value, temperature)


def _correlation(a: Tensor, b: Tensor, *, dim: int) -> Tensor:
    return (a * b).sum(dim) / (length(a, dim) * length(b, dim) + _EPS)


@register_loss("dist")
class DISTLoss(BatchLoss):
    """Correlation of the predictions over classes and over samples; see `dist_loss` for the formula.

    It exists for a whole batch only, so it has no reduction, and its mask selects samples.

    Args:
        beta: Weight of the part over classes, zero or positive.
        gamma: Weight of the part over samples, zero or positive.
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        dim: The dimension of the `C` classes; None: the last, of at most three.
        gather: Whether processes that train together compare the samples of all of them: the loss is that of the whole
            batch, and so is the mean of the processes' gradients (DDP, FSDP). Not in eval mode. False: each its own.

    Raises:
        TypeError: If `beta`, `gamma` or `temperature` is no number.
        ValueError: If a weight is negative or not finite, or the temperature is not positive and finite.

    Examples:
        >>> import torch
        >>> from distill import DISTLoss
        >>> loss = DISTLoss()
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> loss(logits, logits).abs() < 1e-4
        tensor(True)
    """

    options = {"beta": check_not_negative, "gamma": check_not_negative, "temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        *,
        dim: int | None = None,
        gather: bool = False,
    ) -> None:
        super().__init__(gather=gather)
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature
        self.dim = dim

    @override
    def whole(self, student: Tensor, teacher: Tensor, target: Tensor | None, mask: Tensor | None) -> Tensor:
        return dist_loss(student, teacher, mask=mask, dim=self.dim, **self.given())
