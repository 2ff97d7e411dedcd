"""Soft targets of independent classes: Yang et al., "Multi-Label Knowledge Distillation" (ICCV 2023)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from distill._checks import check_positive, check_tensors, may_look
from distill._engine.blocks import block_by_autograd, redo
from distill._engine.rows import Rows
from distill._reduction import Reduction, divide
from distill._registry import register_loss
from distill.losses._base import RowLoss
from distill.losses._softened import divergence, far_rows, harden, soften

FAMILY = "divergences"

_WAYS = ("sum", "mean", "none")


def _formula(student: Tensor, teacher: Tensor, *, dim: int, temperature: float, classes: str) -> Tensor:
    _check_rows(student.shape[dim], classes)
    s, t = soften(student, temperature), soften(teacher, temperature)
    # Both outcomes of a class together are a distribution, so that the two sums make the one that is never negative.
    yes, no = divergence(F.logsigmoid(t), F.logsigmoid(s), dim), divergence(F.logsigmoid(-t), F.logsigmoid(-s), dim)
    values = yes + no
    return harden(values / student.shape[dim] if classes == "mean" else values, temperature)


def _block(
    student: Tensor,
    teacher: Tensor,
    factors: Tensor | float | None,
    gradient: Tensor,
    spare: Tensor,
    *,
    temperature: float,
    classes: str,
) -> Tensor:
    _check_rows(student.shape[1], classes)
    options = {"temperature": temperature, "classes": classes}
    if not may_look(student):  # on a GPU: to see how far the rows are apart would wait for it
        return block_by_autograd(_formula, student, teacher, factors, gradient, spare, **options)
    # That of -s and -t is the same. With the sign that puts s above t nothing cancels, but exp(s - t) may overflow.
    d = torch.sub(student, teacher, out=gradient)
    sign = d.sign()
    d.abs_().mul_(1 / temperature)
    highest = d.amax(-1)
    far = far_rows(highest, float(highest.amax()))
    t = torch.mul(teacher, sign, out=spare).mul_(1 / temperature)
    p = torch.sigmoid(t)
    rest = torch.sigmoid(t.neg_(), out=spare)  # 1 - p
    yes = torch.expm1(d)
    no = p * yes
    log = torch.log1p(no)  # log((1 - p) / (1 - q))
    whole = no + 1.0
    yes.mul_(rest).div_(whole)  # q / p - 1
    no.div_(whole)  # 1 - (1 - q) / (1 - p)
    terms = torch.sub(yes, torch.log1p(yes, out=whole), out=whole).mul_(p).addcmul_(rest, log.sub_(no))
    share = 1.0 if classes == "sum" else 1 / student.shape[-1]
    values = harden(terms.sum(-1), temperature).mul_(share)
    if factors is not None:  # T (q - p)
        torch.mul(p, yes, out=gradient).mul_(sign).mul_(factors * (temperature * share))
    return redo(far, values, _formula, student, teacher, factors, gradient, **options)


def _check_rows(columns: int, classes: str) -> None:
    """Raise ValueError where a row of several classes should give a value for each."""
    if classes == "none" and columns > 1:
        raise ValueError(
            "classes must be 'sum' or 'mean' where each sample has one value, as in LinearLoss and SDDLoss, got 'none'"
        )


_ROWS = Rows(_formula, block=_block, transposed=True, classes=1)


def sigmoid_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    classes: Literal["sum", "mean", "none"] = "sum",
    dim: int | None = None,
) -> Tensor:
    """Divergence of the probability of each class, for classes that do not exclude each other.

        p_c = sigmoid(t_c / T),  q_c = sigmoid(s_c / T)
        loss = T^2 * sum_c [p_c log(p_c / q_c) + (1 - p_c) log((1 - p_c) / (1 - q_c))]

    It is for several labels a sample and for the heads of detectors, whose classes do not exclude each other.

    Args:
        student: The student's logits, `(..., C)`; -inf is a probability of 0, inf one of 1. Any floating dtype; half
            and bfloat16 are computed in float32.
        teacher: The teacher's logits, same shape, likewise. Gets no gradient.
        temperature: What both logits are divided by, positive and finite.
        classes: `"sum"` over the classes, their `"mean"`, or `"none"`: one value per class.
        dim: The dimension of the `C` classes; None: the last, of at most three. To be left out with `classes="none"`.

    Returns:
        One value per sample, shape `(...)`, or with `classes="none"` one per class, shaped like the logits; in nats
        times the squared temperature, never negative; infinite where the student alone is certain. float32, or float64
        if an input is.

    Raises:
        TypeError: If an input is no tensor, or `temperature` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, the temperature is not
            positive and finite, `classes` is none of the three, or `dim` is out of range, not given where there are
            four dimensions or more, or given with `classes="none"`.

    Examples:
        >>> import torch
        >>> from distill import sigmoid_kl_loss
        >>> student = torch.tensor([[0.0, 0.0]])
        >>> teacher = torch.tensor([[0.25, 0.5]]).logit()
        >>> sigmoid_kl_loss(student, teacher)  # 0.25 log(0.25 / 0.5) + 0.75 log(0.75 / 0.5), and 0
        tensor([0.1308])

    Notes:
        Published with weight 10 at temperature 1 and the classes summed, beside the binary cross-entropy and two losses
        of embeddings, on the labels of MS-COCO.

        Scale: `criterion/distiller_zoo/logits_based/mld.py` of the authors' code (`penghui-yang/L2D`), with the weight
        in its `configs/coco/resnet101_to_resnet34_l2d.py`: the sum over the classes, averaged over the samples.

        Caveat: That code clamps the probabilities to 1e-8 from 0 and 1, which in float32 leaves 1 as it is; here
        nothing is clamped. It has no temperature: the factor T^2 is that of `kl`. Detectors also weight each class by a
        power of the difference p - q (`NovelKDLoss` of `TinyTigerPan/BCKD`), which is another loss.

    Reference:
        Penghui Yang, Ming-Kun Xie, Chen-Chen Zong, Lei Feng, Gang Niu, Masashi Sugiyama and Sheng-Jun Huang,
        "Multi-Label Knowledge Distillation", ICCV 2023 and arXiv 2308.06453.
    """
    check_positive("temperature", temperature)
    _check_classes("classes", classes)
    if classes == "none":
        student, teacher, dim = _apart(student, teacher, dim)
    return _ROWS.values(student, teacher, dim=dim, temperature=temperature, classes=classes)


def _check_classes(name: str, value: str) -> str:
    if value not in _WAYS:
        raise ValueError(f"{name} must be 'sum', 'mean' or 'none', got {value!r}")
    return value


def _apart(student: Tensor, teacher: Tensor, dim: int | None) -> tuple[Tensor, Tensor, int]:
    """Each class as a row of its own."""
    check_tensors(student, teacher)
    _check_no_dim(dim)
    return student.unsqueeze(-1), teacher.unsqueeze(-1), -1


def _check_no_dim(dim: int | None) -> None:
    if dim is not None:
        raise ValueError(f"dim must be None with classes='none', got {dim!r}")


@register_loss("sigmoid_kl")
class SigmoidKLLoss(RowLoss):
    """Divergence of the probabilities of classes that do not exclude each other; see `sigmoid_kl_loss`.

    With `classes="none"` each class of each sample is a value: reductions go over all of them, and the mask is shaped
    like the logits. So labels that are not known, or classes that the teacher does not have, are left out.

    Args:
        temperature: What both logits are divided by, positive and finite. It may be changed between steps.
        classes: `"sum"` over the classes, their `"mean"`, or `"none"`: one value per class.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the `C` classes; None: the last, of at most three. Without a meaning where `classes` is
            `"none"`, and then to be left as it is.

    Raises:
        TypeError: If `temperature` is no number.
        ValueError: If the temperature is not positive and finite, `classes` or the reduction is unknown, or there is a
            `dim` that has no meaning.

    Examples:
        >>> import torch
        >>> from distill import SigmoidKLLoss
        >>> loss = SigmoidKLLoss(classes="none")
        >>> student, teacher = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, -3.0]])
        >>> loss(student, teacher, mask=torch.tensor([[True, False]]))  # the second class is not known
        tensor(0.)
    """

    rows = _ROWS
    options = {"temperature": check_positive, "classes": _check_classes}  # noqa: RUF012 - declared in the base

    def __init__(
        self,
        temperature: float = 1.0,
        classes: Literal["sum", "mean", "none"] = "sum",
        *,
        reduction: Reduction = "mean",
        dim: int | None = None,
    ) -> None:
        super().__init__(reduction=reduction, dim=dim)
        self.temperature = temperature
        self.classes = classes
        if classes == "none":
            _check_no_dim(dim)

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
            student: The student's logits, `(..., C)`, or with the `C` classes along `dim`.
            teacher: The teacher's logits, same shape. A constant.
            target: Not used.
            mask: Bool or weights, shaped like the values: `(...)`, or with `classes="none"` `(..., C)`. What a 0 hides
                counts nowhere.
            denominator: A mean becomes the sum divided by this number.

        Returns:
            A scalar, or with `reduction="none"` the values.

        Raises:
            TypeError: If what must be a tensor is none.
            ValueError: As `sigmoid_kl_loss`, and if the mask has another shape than the values.
        """
        if self.classes != "none":
            return super().forward(student, teacher, target, mask=mask, denominator=denominator)
        reduction = self.reduction_over(denominator)
        student, teacher, dim = _apart(student, teacher, self.dim)
        value = type(self).rows.reduced(student, teacher, dim=dim, reduction=reduction, mask=mask, **self.given())
        return divide(value, denominator)
