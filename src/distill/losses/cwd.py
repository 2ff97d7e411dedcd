"""Channel-wise distillation: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction" (2021)."""

import torch
from torch import Tensor
from typing_extensions import override

from distill._checks import check_positive, ordinary
from distill._reduction import Reduction, check_mask
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._from_teacher import ROWS
from distill.losses._maps import ANY, check_maps, pool_to_smaller

FAMILY = "maps"


def cwd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Divergence of each channel's distribution over the positions, averaged over channels, one value per sample.

        p_c = softmax over the HW positions of t_c / T,  q_c = softmax over the HW positions of s_c / T
        loss = T^2 * 1/C * sum_c KL(p_c || q_c)

    Maps of unequal size are average-pooled to the smaller height and width. What is added to a whole channel does not
    count. A position of minus infinity has no probability. Maps may have one to three dimensions of positions.

    Channels come first. Maps (N, H, W, C) on one side alone are refused where they can be recognised (see
    `distill.adapt.NHWC`); on both sides they cannot be, nor can tokens (B, T, C), which have the dimensions of a map
    (N, C, L): `distill.adapt.TokensToMap` makes maps of them.

    Args:
        student: The student's map, `(N, C, H, W)`, also `(N, C, L)` or `(N, C, D, H, W)`. Any floating dtype; half and
            bfloat16 are computed in float32.
        teacher: The teacher's map, `(N, C, H', W')`, or likewise. Gets no gradient.
        temperature: What both maps are divided by, positive and finite.

    Returns:
        One value per sample, `(N,)`, in nats times the squared temperature, not negative; float32, or float64 if an
        input is.

    Raises:
        TypeError: If an input is no tensor, or `temperature` is no number.
        ValueError: If an input is no map, N, C or the devices differ, there is only one position, an input is empty or
            not floating-point, or the temperature is not positive and finite.

    Examples:
        >>> import torch
        >>> from distill import cwd_loss
        >>> student = torch.tensor([[[[0.0, 0.0]]]])
        >>> teacher = torch.tensor([[[[0.25, 0.75]]]]).log()
        >>> cwd_loss(student, teacher, temperature=1.0)  # 0.25 log(0.25 / 0.5) + 0.75 log(0.75 / 0.5)
        tensor([0.1308])

    Notes:
        Published with weight 3 on the logit maps of a segmentation network, at temperature 4, on Cityscapes.

        Scale: `CriterionCWD` in `SemSeg-distill/utils/criterion.py` of the authors' code (`irfanICMLL/TorchDistiller`),
        with the weight in the command of its README: T^2 times the sum over the positions, averaged over channels and
        samples.

        Caveat: The MMRazor configuration for the same pair of networks has weight 5 at temperature 1.

    Reference:
        Changyong Shu, Yifan Liu, Jianfei Gao, Zheng Yan and Chunhua Shen, "Channel-wise Knowledge Distillation for
        Dense Prediction", ICCV 2021 and arXiv 2011.13256.
    """
    check_positive("temperature", temperature)
    student, teacher = check_maps(student, teacher, same_channels=True, positions=ANY)
    student, teacher = (maps.flatten(2) for maps in pool_to_smaller(student, teacher))
    if student.shape[2] < 2:
        raise ValueError(f"there must be at least 2 positions to compare, got {student.shape[2]} of each channel")
    return ROWS.values(student, teacher, dim=2, temperature=temperature).mean(1)


@register_loss("cwd")
class CWDLoss(SampleLoss):
    """Divergence of each channel's distribution over the positions; see `cwd_loss` for the formula.

    With a mask for each position, such as the pixels that have a label, the distributions are over the positions that
    count. The others get a gradient of exactly 0, and a sample without any counts nowhere.

    Args:
        temperature: What both maps are divided by, positive and finite. It may be changed between steps.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).

    Raises:
        TypeError: If `temperature` is no number.
        ValueError: If the temperature is not positive and finite, or the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import CWDLoss
        >>> loss = CWDLoss(temperature=1.0)
        >>> maps = torch.arange(32.0).reshape(2, 4, 2, 2)
        >>> loss(maps, maps)
        tensor(0.)
    """

    options = {"temperature": check_positive}  # noqa: RUF012 - declared in the base

    def __init__(self, temperature: float = 4.0, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        self.temperature = temperature

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
            student: The student's map, as in `cwd_loss`.
            teacher: The teacher's map, as in `cwd_loss`. Gets no gradient.
            target: Not used.
            mask: Bool or weights, one per sample `(N,)`. Or bool for each position, of the smaller map: `(N, H, W)`.
                What a 0 hides counts nowhere.
            denominator: A mean becomes the sum over samples divided by this number.

        Returns:
            A scalar, or with `reduction="none"` one value per sample, `(N,)`.

        Raises:
            TypeError: If what must be a tensor is none.
            ValueError: As `cwd_loss`, if the mask has another shape, or one for positions is not bool.
        """
        if isinstance(mask, Tensor) and mask.ndim > 1:
            student, teacher = pool_to_smaller(*check_maps(student, teacher, same_channels=True, positions=ANY))
            check_mask(mask, student[:, 0].shape, student.device)
            if mask.dtype != torch.bool:
                raise ValueError(f"a mask of positions must be bool (a position counts or does not), got {mask.dtype}")
            known = ordinary(mask)
            student, teacher = (maps.masked_fill(~known.unsqueeze(1), -torch.inf) for maps in (student, teacher))
            mask = known.flatten(1).any(1)
        return super().forward(student, teacher, target, mask=mask, denominator=denominator)

    @override
    def per_sample(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return cwd_loss(student, teacher, **self.given())
