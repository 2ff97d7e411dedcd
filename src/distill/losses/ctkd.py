"""A temperature that is learned against the student: Li et al., "Curriculum Temperature" (AAAI 2023)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_classes, check_not_negative, check_pair, check_positive, may_look
from distill._reduction import Reduction, check_mask, divide, hide, reduce
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._softened import divergence

FAMILY = "logits"


def ctkd_loss(student: Tensor, teacher: Tensor, *, temperature: Tensor, dim: int | None = None) -> Tensor:
    """Divergence of the softened distributions at a temperature that has a gradient, one value per sample.

        p = softmax(t / T),  q = softmax(s / T)
        loss = T^2 * KL(p || q)

    This is `kl` with a temperature that has a gradient. `CTKDLoss` owns the temperature and trains it to make the
    loss larger, while the student makes it smaller: at first a little, later in full.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0. Any floating dtype; half and bfloat16 are
            computed in float32.
        teacher: The teacher's logits, same shape; -inf is a probability of 0. Gets no gradient.
        temperature: What both logits are divided by, one positive number in a tensor.
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Returns:
        One value per sample, shape `(...)`, in nats times the squared temperature, never negative; float32, or float64
        if an input is.

    Raises:
        TypeError: If an input or the temperature is no tensor.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, the temperature is not one
            number, or on a CPU not positive, there is only one class, or `dim` is out of range or not given where there
            are four dimensions or more.

    Examples:
        >>> import torch
        >>> from distill import ctkd_loss
        >>> student = torch.tensor([[0.0, 0.0]])
        >>> teacher = torch.tensor([[0.25, 0.75]]).log()
        >>> ctkd_loss(student, teacher, temperature=torch.tensor(1.0))
        tensor([0.1308])

    Notes:
        Published with weight 0.9, beside 0.1 times the cross-entropy, with temperatures from 1 to 21 and a strength
        that rises over 10 epochs on CIFAR-100, and over 5 on ImageNet.

        Scale: `distiller_zoo/KD.py` of the authors' code (`zhengli97/CTKD`), with the options in its
        `scripts/run_cifar_distill.sh`: T^2 times the sum over the classes, averaged over the samples.

        Caveat: This is the temperature that all samples share. The paper also has one per sample, which that code
        leaves out.

    Reference:
        Zheng Li, Xiang Li, Lingfeng Yang, Borui Zhao, Renjie Song, Lei Luo, Jun Li and Jian Yang, "Curriculum
        Temperature for Knowledge Distillation", AAAI 2023 and arXiv 2211.16231.
    """
    if not isinstance(temperature, Tensor):
        raise TypeError(f"temperature must be a tensor, got {type(temperature).__name__}")
    if temperature.numel() != 1:
        raise ValueError(f"temperature must be one number, got shape {tuple(temperature.shape)}")
    if may_look(temperature) and bool(temperature <= 0):
        raise ValueError(f"temperature must be positive, got {temperature.item()!r}")
    student, teacher = check_pair(student, teacher, dim=-1 if dim is None else dim)
    if temperature.device != student.device:
        raise ValueError(
            f"the loss must be on the device of what it compares, {student.device}, got {temperature.device}: move it "
            "with .to(device)"
        )
    dim = check_classes(student, dim=dim)
    temperature = temperature.to(student.dtype).reshape(())
    log_q, log_p = F.log_softmax(student / temperature, dim), F.log_softmax(teacher / temperature, dim)
    return divergence(log_p, log_q, dim) * temperature**2


def ctkd_strength(epoch: float, epochs: float = 10.0) -> float:
    """How strongly the temperature of `CTKDLoss` is learned in an epoch: from 0 up to 1, as half a cosine.

        strength = (1 - cos(pi * min(epoch, epochs) / epochs)) / 2

    Args:
        epoch: The epoch, from 0; parts of epochs will do. The authors' code counts from 1.
        epochs: In how many it rises to 1.

    Returns:
        What `CTKDLoss.strength` is to be set to.

    Raises:
        TypeError: If one is no number.
        ValueError: If the epoch is negative or not finite, or `epochs` is not positive and finite.

    Examples:
        >>> from distill import ctkd_strength
        >>> [round(ctkd_strength(epoch), 2) for epoch in (0, 5, 10, 100)]
        [0.0, 0.5, 1.0, 1.0]
    """
    check_not_negative("epoch", epoch)
    check_positive("epochs", epochs)
    return (1 - math.cos(math.pi * min(epoch, epochs) / epochs)) / 2


@register_loss("ctkd")
class CTKDLoss(SampleLoss):
    """Divergence of the softened distributions, at a temperature trained to make it larger; see `ctkd_loss`.

    The temperature is `low + span * sigmoid(raw)`. Put the parameter `raw` into the student's optimizer, without weight
    decay. Its gradient is reversed and multiplied by `strength`, so that the same step decreases the loss for the
    student and increases it for the temperature. Set the strength in each epoch:

        loss.strength = ctkd_strength(epoch)

    Args:
        low: The least temperature, positive and finite.
        span: How far above it the temperature may go, positive and finite.
        strength: What the turned gradient is multiplied by, zero or positive. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three.

    Attributes:
        raw: The parameter, 1 at first.

    Raises:
        TypeError: If `low`, `span` or `strength` is no number.
        ValueError: If an option is out of its range, or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import CTKDLoss
        >>> loss = CTKDLoss()
        >>> round(loss.temperature.item(), 2)
        15.62
        >>> loss(torch.randn(4, 10), torch.randn(4, 10)).shape
        torch.Size([])
    """

    options = {"low": check_positive, "span": check_positive, "strength": check_not_negative}  # noqa: RUF012 - declared in the base

    def __init__(
        self,
        low: float = 1.0,
        span: float = 20.0,
        strength: float = 1.0,
        *,
        reduction: Reduction = "mean",
        dim: int | None = None,
    ) -> None:
        super().__init__(reduction=reduction)
        self.low = low
        self.span = span
        self.strength = strength
        self.dim = dim
        self.raw = nn.Parameter(torch.ones(()))

    @property
    def temperature(self) -> Tensor:
        """The temperature as it is now, without a graph."""
        return self._temperature(self.raw.detach())

    @override
    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            student: `(..., C)`, or with the `C` values along `dim`.
            teacher: Same shape. A constant.
            target: Not used.
            mask: Bool or weights, `(...)`, shaped like the per-sample values. What a 0 hides counts nowhere.
            denominator: A mean becomes the sum divided by this number.

        Returns:
            A scalar, or with `reduction="none"` one value per sample, `(...)`.

        Raises:
            TypeError: If what must be a tensor is none.
            ValueError: As `ctkd_loss`, and if the mask has another shape than the per-sample values.
        """
        self.refuse_topk(teacher)
        reduction = self.reduction_over(denominator)
        if mask is not None:
            student, teacher = self._hidden(student, teacher, mask)
        return divide(reduce(self.per_sample(student, teacher, target), reduction, mask), denominator)

    @override
    def per_sample(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        raw = self.raw.to(torch.promote_types(self.raw.dtype, torch.float32))
        # The value is that of raw, the gradient that of -strength * raw.
        turned = (1 + self.strength) * raw.detach() - self.strength * raw
        return ctkd_loss(student, teacher, temperature=self._temperature(turned), dim=self.dim)

    def _temperature(self, raw: Tensor) -> Tensor:
        return self.low + self.span * torch.sigmoid(raw)

    def _hidden(self, student: Any, teacher: Any, mask: Any) -> tuple[Tensor, Tensor]:
        check_pair(student, teacher, dim=-1 if self.dim is None else self.dim)
        dim = check_classes(student, dim=self.dim)
        check_mask(mask, student.movedim(dim, -1).shape[:-1], student.device)
        return hide(student, mask, dim=dim), hide(teacher, mask, dim=dim)
