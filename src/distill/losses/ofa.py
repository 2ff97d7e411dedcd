"""Targets sharpened at the label: Hao et al., "One-for-All" (NeurIPS 2023)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill._checks import check_positive
from distill._engine.rows import Rows
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._softened import expectation, expm1, soften

FAMILY = "logits and more"


def _formula(student: Tensor, teacher: Tensor, labels: Tensor, *, dim: int, eps: float, temperature: float) -> Tensor:
    log_q = F.log_softmax(soften(student, temperature), dim)
    log_p = F.log_softmax(soften(teacher, temperature), dim)
    at_label = expm1(eps * torch.log1p(log_p.gather(dim, labels).exp()))  # (p_y + 1)^eps - 1
    weights = (eps * log_p).exp().scatter(dim, labels, at_label)
    return -expectation(weights, log_q, dim)


_ROWS = Rows(_formula, labels=True)


def ofa_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *,
    eps: float = 1.0,
    temperature: float = 1.0,
    dim: int | None = None,
) -> Tensor:
    """Cross-entropy with the teacher's probabilities, with a larger one for the label, one value per sample.

        p = softmax(t / T),  q = softmax(s / T),  y the target,  m_c = 1 for c = y, else 0
        loss = -sum_c [(p_c + m_c)^eps - m_c] * log q_c

    With `eps` 1 it is the cross-entropy with p. A larger one gives the label more than p_y and the other classes less
    than p_c: where teacher and student are of different kinds, what the teacher finds likely beside the label is less
    of a guide. It is also published for branches of the student, each stage of which goes through layers of its own to
    logits: one term for each, with those layers as the student's adapter.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape; -inf is a probability of 0. Gets no gradient.
        target: The class of every sample, `(...)`, integers.
        eps: The exponent, positive and finite.
        temperature: What both logits are divided by, positive and finite.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, in nats, never negative, and not 0 where the two agree; infinite where a
        class has a probability of 0 for the student alone. float32, or float64 if an input is.

    Raises:
        TypeError: If what must be a tensor is none, or `eps` or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, the target is not one class
            per sample, an option is not positive and finite, there is only one class, or `dim` is out of range or not
            given where there are four dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import ofa_loss
        >>> student = torch.tensor([[0.0, 0.0]])
        >>> teacher = torch.tensor([[0.0, 0.0]])
        >>> ofa_loss(student, teacher, torch.tensor([1]), eps=2.0)  # (0.5^2 + 1.5^2 - 1) log 2
        tensor([1.0397])

    Notes:
        Published with weight 1 beside the cross-entropy with weight 1, on the logits and on each of four branches, at
        temperature 1, with `eps` 1 on CIFAR-100 and 1.5 from DeiT-T to ResNet-18 on ImageNet.

        Scale: `distillers/ofa.py` of the authors' code (`Hao840/OFAKD`), with the options in its README and `train.py`:
        the sum over the classes, averaged over the samples, without a factor T^2.

        Caveat: That code takes the logarithm of a softmax, which is infinite for logits 0 and -200 in float32; here it
        is 200 times the weight. The values of `eps` for other pairs of networks could not be seen.

    Reference:
        Zhiwei Hao, Jianyuan Guo, Kai Han, Yehui Tang, Han Hu, Yunhe Wang and Chang Xu, "One-for-All: Bridge the Gap
        Between Heterogeneous Architectures in Knowledge Distillation", NeurIPS 2023 and arXiv 2310.19444.
    """
    check_positive("eps", eps)
    check_positive("temperature", temperature)
    return _ROWS.values(student, teacher, target, dim=dim, eps=eps, temperature=temperature)


@register_loss("ofa")
class OFALoss(RowLoss):
    """Cross-entropy with the teacher's probabilities, with a larger one for the label; see `ofa_loss` for the formula.

    Args:
        eps: The exponent, positive and finite. It may be changed between steps.
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Raises:
        TypeError: If `eps` or `temperature` is no number.
        ValueError: If an option is not positive and finite, or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import OFALoss
        >>> loss = OFALoss(1.5)
        >>> student, teacher = torch.zeros(3, 10), torch.zeros(3, 10)
        >>> loss(student, teacher, torch.tensor([0, 4, 9])).shape
        torch.Size([])
    """

    rows = _ROWS
    options = {"eps": check_positive, "temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(
        self, eps: float = 1.0, temperature: float = 1.0, *, reduction: Reduction = "mean", dim: int | None = None
    ) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.eps = eps
        self.temperature = temperature
