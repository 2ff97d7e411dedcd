"""Soft targets: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill._checks import check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss

FAMILY = "logits"


def _formula(student: Tensor, teacher: Tensor, *, dim: int, temperature: float) -> Tensor:
    log_q = F.log_softmax(student / temperature, dim)
    log_p = F.log_softmax(teacher / temperature, dim)
    return (log_p.exp() * (log_p - log_q)).sum(dim) * temperature**2


def _block(
    student: Tensor, teacher: Tensor, factors: Tensor | None, gradient: Tensor, spare: Tensor, *, temperature: float
) -> Tensor:
    s_max, t_max = student.amax(-1, keepdim=True), teacher.amax(-1, keepdim=True)
    below = torch.sub(teacher, t_max, out=spare)
    # Each from its own maximum: an offset between student and teacher would cost digits.
    difference = torch.sub(student, s_max, out=gradient)
    difference = torch.sub(below, difference, out=difference)
    # With e_s = exp((s - max s) / T) and Z_s its sum, q is e_s / Z_s, and p likewise.
    e_t = below.div_(temperature).exp_()
    z_t = e_t.sum(-1, keepdim=True)
    mean_difference = difference.mul_(e_t).sum(-1, keepdim=True) / z_t
    e_s = torch.sub(student, s_max, out=gradient).div_(temperature).exp_()
    z_s = e_s.sum(-1, keepdim=True)
    values = temperature * mean_difference + temperature**2 * (z_s.log() - z_t.log())
    if factors is not None:  # the gradient is T (q - p)
        e_s.mul_(factors * temperature / z_s).sub_(e_t.mul_(factors * temperature / z_t))
    return values.squeeze(-1)


_ROWS = Rows(_formula, block=_block, kernel="kl")


def kl_loss(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, dim: int | None = None) -> Tensor:
    """Divergence of the student's softened distribution from the teacher's, one value per sample.

        p = softmax(t / T),  q = softmax(s / T)
        loss = T^2 * KL(p || q) = T^2 * sum_c p_c (log p_c - log q_c)

    The factor T^2 keeps the size of the gradient when the temperature changes. As the temperature grows the loss
    tends to half the mean squared difference of the logits, each centred over the classes.

    Published with weight 0.9 at temperature 4, beside 0.1 times the cross-entropy (the CIFAR-100 benchmark of Tian,
    Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020).

    Scale: `distiller_zoo/KD.py` of that benchmark (`HobbitLong/RepDistiller`): T^2 times the sum over the classes,
    averaged over the samples.

    Doubt: none known.

    Args:
        student: The student's logits, finite, `(..., C)`. Any floating dtype; half and bfloat16 are computed in
            float32.
        teacher: The teacher's logits, finite, same shape. A constant: no gradient reaches it.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, in nats times the squared temperature, not negative but for rounding;
        float32, or float64 if an input is.

    Raises:
        ValueError: If shapes or devices differ, an input is empty or not floating-point, the temperature is not
            positive and finite, there is only one class, or `dim` is out of range or not given where there are four
            dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import kl_loss
        >>> student = torch.tensor([[0.0, 0.0]])
        >>> teacher = torch.tensor([[0.25, 0.75]]).log()
        >>> kl_loss(student, teacher, temperature=1.0)  # 0.25 log(0.25 / 0.5) + 0.75 log(0.75 / 0.5)
        tensor([0.1308])

    Reference:
        Geoffrey Hinton, Oriol Vinyals and Jeff Dean, "Distilling the Knowledge in a Neural Network", NIPS deep
        learning workshop 2014 and arXiv 1503.02531 (2015).
    """
    check_positive("temperature", temperature)
    return _ROWS.values(student, teacher, dim=dim, temperature=temperature)


@register_loss("kl")
class KLLoss(RowLoss):
    """Divergence of the softened distributions, T^2 KL(teacher || student); see `kl_loss` for the formula.

    With large inputs a mean or sum forms the gradient already in the forward, which costs one tensor of the student's
    size: evaluate under `torch.no_grad()`.

    Args:
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        ValueError: If the temperature is not positive and finite, or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import KLLoss
        >>> loss = KLLoss(temperature=2.0)
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
        >>> loss(logits, logits)
        tensor(0.)
    """

    rows = _ROWS
    options = {"temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(self, temperature: float = 4.0, *, reduction: Reduction = "mean", dim: int | None = None) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.temperature = temperature
