"""Regions of the image: Wei, Luo and Luo, "Scaled Decoupled Distillation" (CVPR 2024)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_count, check_inputs, check_labels, check_positive, check_tensor, without_autocast
from distill._reduction import Reduction, check_denominator, check_mask, divide, hide, reduce
from distill._registry import register_loss
from distill.losses._base import Loss, RowLoss
from distill.losses._heads import HeadPair
from distill.losses._maps import check_maps, pool

FAMILY = "logits and more"


def sdd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *,
    loss: RowLoss,
    complementary: float = 2.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Any loss on logits, applied to those of the whole image and of its regions, one value per sample.

        w_r = 2 where the teacher is right about region r and wrong about the image, or the other way round, else 1
        loss = 1/R * sum_r w_r * l(s_r, t_r, y)

    Region 0 is the whole image. A region where the teacher's answer differs from that for the whole image shows what
    the average hides, such as a second object. `SDDLoss` pools the maps over the regions and has the classifiers.

    Args:
        student: The student's logits of the regions, `(N, R, C)`. Any floating dtype; half and bfloat16 are computed in
            float32.
        teacher: The teacher's logits, same shape. Gets no gradient.
        target: The class of every sample, `(N,)`, integers.
        loss: A loss of rows of logits: `KLLoss`, `DKDLoss` and others, with its options; classes last. Its reduction is
            not used.
        complementary: The weight of regions that the teacher gets right and the whole image wrong, or vice versa;
            positive and finite.
        mask: Bool or weights, `(N,)`: where it is 0 the label may be anything. It hides nothing else.

    Returns:
        One value per sample, `(N,)`, in the unit of the loss; float32, or float64 if an input is.

    Raises:
        TypeError: If what must be a tensor is none, the loss is no loss of rows, or `complementary` is no number.
        ValueError: If shapes or devices differ, an input is not of three dimensions, empty or not floating-point, the
            target is not one class per sample, or the weight is not positive and finite.

    Examples:
        >>> import torch
        >>> from distill import KLLoss, sdd_loss
        >>> teacher = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])  # of two regions the second looks like another class
        >>> values = sdd_loss(torch.zeros(1, 2, 2), teacher, torch.tensor([0]), loss=KLLoss(1.0))
        >>> values / KLLoss(1.0)(torch.zeros(1, 2), teacher[:, 0])
        tensor([1.5000])

    Notes:
        Published with weight 1 beside the cross-entropy with weight 1, around `dkd` with the options of that paper, a
        warm-up of 20 epochs and 1, 4 and 16 regions, or 1 and 4, by the pair of networks, on CIFAR-100; and with weight
        0.9 beside 0.1 around `kl` at temperature 4.

        Scale: `mdistiller/distillers/SDD_DKD.py` and `KD.py` of the authors' code (`shicaiwei123/SDD-CVPR2024`): the
        mean over regions and samples together.

        Caveat: That code pools to 4 x 4 first and the other sizes from that, which is the same where 4 divides the
        map's height and width; on the 7 x 7 maps of ImageNet its whole image is not the network's own mean. Here all
        sizes come from the map.

    Reference:
        Shicai Wei, Chunbo Luo and Yang Luo, "Scaled Decoupled Distillation", CVPR 2024 and arXiv 2403.13512.
    """
    _check_loss(loss)
    check_positive("complementary", complementary)
    check_inputs(student, teacher, dim=-1)
    if student.ndim != 3:
        raise ValueError(f"student and teacher must be logits of regions (N, R, C), got shape {tuple(student.shape)}")
    labels = check_labels(target, student[:, 0], dim=1, mask=mask).expand(student.shape[:2])
    values = loss.rows.reduced(
        student, teacher, labels if loss.rows.labels else None, dim=-1, reduction="none", **loss.given()
    )
    right = teacher.detach().argmax(-1) == labels
    same = right == right[:, :1]
    # Not torch.where with two numbers: what is compiled would be compiled anew for each other weight.
    weights = same.to(values.dtype) + complementary * (~same).to(values.dtype)
    return (values * weights).mean(1)


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, RowLoss):
        raise TypeError(f"loss must be a loss of rows of logits, such as KLLoss(), got {type(loss).__name__}")
    if loss.dim not in (None, -1):
        raise ValueError(f"loss must have its classes last (dim=None or -1), got dim={loss.dim}")


def _check_scales(name: str, value: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not value or value[0] != 1:
        raise ValueError(f"{name} must be a tuple of positive integers that begins with 1, got {value!r}")
    return tuple(check_count(f"each of {name}", scale) for scale in value)


@register_loss("sdd")
class SDDLoss(Loss):
    """Any loss on logits, applied to the logits of the whole image and of its regions; see `sdd_loss`.

    It compares the maps before the global pooling, which the mean over the regions and each network's own classifier
    turn into logits: `Term(SDDLoss(DKDLoss(), student.fc, teacher.fc), at="layer4")`. The classifiers are referred to,
    not owned; the student's is trained through all regions. Under FSDP use it with classifiers that are not sharded.

    Args:
        loss: A loss of rows of logits: `KLLoss`, `DKDLoss` and others, with its options and its reduction.
        student_head: The student's classifier: a module that computes `W h + b`.
        teacher_head: The teacher's classifier. A constant.
        scales: Into how many rows and columns of regions the map is cut, one after the other; 1, the whole image,
            comes first.
        complementary: The weight of regions that the teacher gets right and the whole image wrong, or vice versa;
            positive and finite.

    Raises:
        TypeError: If the loss is no loss of rows, or `complementary` is no number.
        ValueError: If the loss has its classes elsewhere than last, a head does more than `W h + b`, or the scales or
            the weight are not as said.

    Examples:
        >>> import torch
        >>> from distill import KLLoss, SDDLoss
        >>> loss = SDDLoss(KLLoss(), torch.nn.Linear(16, 10), torch.nn.Linear(64, 10), scales=(1, 2))
        >>> loss(torch.randn(4, 16, 8, 8), torch.randn(4, 64, 8, 8), torch.tensor([0, 3, 3, 9])).shape
        torch.Size([])
    """

    options = {"scales": _check_scales, "complementary": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(
        self,
        loss: RowLoss,
        student_head: nn.Module,
        teacher_head: nn.Module,
        scales: Sequence[int] = (1, 2, 4),
        complementary: float = 2.0,
    ) -> None:
        _check_loss(loss)
        super().__init__()
        self.loss = loss
        self.scales = scales
        self.complementary = complementary
        self._heads = HeadPair(student_head, teacher_head)
        self._heads.check(1.0, 1.0)

    @property
    def reduction(self) -> Reduction:
        """The reduction of the loss."""
        return self.loss.reduction

    @reduction.setter
    def reduction(self, value: Reduction) -> None:
        self.loss.reduction = value

    @override
    def __getstate__(self) -> dict[str, Any]:
        return self._heads.out_of(self)

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(HeadPair.back_in(state))  # type: ignore[no-untyped-call]

    def check_models(self, student: object, teacher: object) -> None:
        """Raise ValueError if a model had its head at its first check and has another module there now."""
        self._heads.check_models(student, teacher)

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
            student: The student's map before its global pooling, `(N, C, H, W)`, as wide as its classifier.
            teacher: The teacher's map, `(N, C', H', W')`, as wide as its classifier. A constant.
            target: The class of every sample, `(N,)`, integers.
            mask: Bool or weights, `(N,)`. What a 0 hides counts nowhere.
            denominator: A mean becomes the sum divided by this number.

        Returns:
            A scalar, or with `reduction="none"` one value per sample, `(N,)`.

        Raises:
            TypeError: If what must be a tensor is none.
            ValueError: As `sdd_loss`, if the maps do not fit the classifiers, or if the mask is not `(N,)`.
        """
        check_denominator(denominator, self.reduction)
        self._heads.check(1.0, 1.0)
        weight, bias, teacher_weight, teacher_bias = self._heads.tensors()
        student, teacher = check_maps(student, teacher, channels=(weight.shape[1], teacher_weight.shape[1]))
        if mask is not None:
            check_mask(check_tensor("mask", mask), student.shape[:1], student.device)
            student, teacher = hide(student, mask), hide(teacher, mask)
        ours = self._regions(student, weight, bias)
        theirs = self._regions(teacher, teacher_weight, teacher_bias)
        values = sdd_loss(ours, theirs.detach(), target, loss=self.loss, complementary=self.complementary, mask=mask)
        reduction = self.reduction if denominator is None else "sum"
        return divide(reduce(values, reduction, mask), denominator)

    def _regions(self, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What a classifier says of each region, `(N, R, C)`."""
        if weight.device != maps.device:
            raise ValueError(f"the classifiers must be on the device of the maps, {maps.device}, got {weight.device}")
        pooled = torch.cat([pool(maps, (scale, scale)).flatten(2) for scale in self.scales], 2).mT
        with without_autocast(maps):
            return F.linear(pooled, weight.to(maps.dtype), None if bias is None else bias.to(maps.dtype))

    @override
    def extra_repr(self) -> str:
        """Show the options and the heads in `repr`."""
        weight, _, teacher_weight, _ = self._heads.tensors()
        heads = f"student_head={tuple(weight.shape)}, teacher_head={tuple(teacher_weight.shape)}"
        return f"scales={self.scales}, complementary={self.complementary}, {heads}"
