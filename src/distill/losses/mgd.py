"""Masked generative distillation: Yang et al., "Masked Generative Distillation" (ECCV 2022)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_count, check_fraction, check_pair, check_positive
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._layers import run_layers
from distill.losses._maps import check_maps, pool_to_smaller
from distill.losses._random import drawing
from distill.losses._sizes import MAPS

FAMILY = "learned maps"


def mgd_loss(student: Tensor, teacher: Tensor, *, alpha: float = 7e-5) -> Tensor:
    """Scaled squared distance of the generated map from the teacher's, one value per sample.

        s = G(f(student) * M),  M = 0 at a random share of the positions, else 1
        loss = alpha * sum_i (s_i - t_i)^2                              over channels and positions

    f brings the student's map to the teacher's channels and the generation block G fills in what M left out; both are
    learned with the student (`MGDLoss` owns them), and this function takes what they give.

    Args:
        student: The map generated from the student's masked map, `(N, C, ...)`. Any floating dtype; half and bfloat16
            are computed in float32.
        teacher: The teacher's map, same shape. Gets no gradient.
        alpha: What the sum is multiplied by, positive and finite.

    Returns:
        One value per sample, shape `(N,)`, in squared units of the maps times alpha; float32, or float64 if an input
        is.

    Raises:
        TypeError: If an input is no tensor, or `alpha` is no number.
        ValueError: If shapes or devices differ, an input is empty or not floating-point, or alpha is not positive and
            finite.

    Examples:
        >>> import torch
        >>> from distill import mgd_loss
        >>> mgd_loss(torch.zeros(1, 2, 3, 3), torch.full((1, 2, 3, 3), 10.0), alpha=1e-3)  # 18 elements, 100 each
        tensor([1.8000])

    Notes:
        Published with weight 1, since `alpha` is the weight: the authors' code has 7e-5 for classification, 2e-5 for
        RetinaNet (mask ratio 0.65) and segmentation (0.75), and 5e-7 for Faster R-CNN (0.45); their later code
        (`yzd-v/cls_KD`) 1.2e-3 for CIFAR-100. A mean over the elements would need the weight `alpha * C * H * W`.

        Scale: `get_dis_loss` in the `mgd.py` of the authors' code for classification, detection and segmentation
        (`yzd-v/MGD`): the sum over channels and positions, averaged over the samples.

        Caveat: The defaults of `MGDLoss`, mask ratio 0.5 over positions with `alpha` 7e-5, are no configuration of that
        code. Its classification masks whole channels, with a ratio of 0.15.

    Reference:
        Zhendong Yang, Zhe Li, Mingqi Shao, Dachuan Shi, Zehuan Yuan and Chun Yuan, "Masked Generative Distillation",
        ECCV 2022.
    """
    check_positive("alpha", alpha)
    student, teacher = check_pair(student, teacher, dim=1)
    return F.mse_loss(student, teacher, reduction="none").flatten(1).sum(1) * alpha


def _check_ratio(name: str, value: float) -> float:
    return check_fraction(name, value, zero=True)


@register_loss("mgd")
class MGDLoss(SampleLoss):
    """The student's map, masked at random, must generate the teacher's; see `mgd_loss` for the formula.

    A learned 1x1 convolution where the channels differ, random positions set to zero in all channels, then a
    generation block of two 3x3 convolutions with a ReLU (slope 0 at 0) between them. Its parameters must be in the
    optimizer. The masks are drawn anew at every call, in eval mode as well. The maps are `(N, student_channels, H, W)`
    and `(N, teacher_channels, H', W')`; of unequal size they are average-pooled to the smaller height and width first.

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map.
        mask_ratio: The probability that a position is masked, at least 0 and less than 1.
        alpha: What the squared distance is multiplied by, positive and finite.
        generator: Where the masks are drawn from, on any device; by default the global generator of the maps' device.
            A copy of the module, by `deepcopy` or `pickle`, gets a generator of its own in the same state.
            `torch.compile` cannot trace a call that uses it.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).

    Raises:
        TypeError: If `mask_ratio` or `alpha` is no number.
        ValueError: If channels, mask ratio, alpha or the reduction are not as said.

    Examples:
        >>> import torch
        >>> from distill import MGDLoss
        >>> loss = MGDLoss(16, 32, generator=torch.Generator().manual_seed(0))
        >>> loss(torch.randn(4, 16, 8, 8), torch.randn(4, 32, 8, 8)).shape
        torch.Size([])

    Notes:
        The `mask` of a call selects samples. It has nothing to do with the random masks.

        The paper masks positions, and this class does; the authors' code for detection and segmentation does so too,
        but their code for classification masks whole channels, with a ratio of 0.15.
    """

    options = {  # noqa: RUF012 - declared in the base
        "student_channels": check_count,
        "teacher_channels": check_count,
        "mask_ratio": _check_ratio,
        "alpha": check_positive,
    }
    built = ("student_channels", "teacher_channels")
    size = MAPS

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        mask_ratio: float = 0.5,
        alpha: float = 7e-5,
        *,
        generator: torch.Generator | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        self.mask_ratio, self.alpha = mask_ratio, alpha
        self.generator = generator
        # Empty where the channels agree, so that there is no layer that the loss does not need.
        same = student_channels == teacher_channels
        self.align = nn.Sequential(*() if same else (nn.Conv2d(student_channels, teacher_channels, 1),))
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    @override
    def per_sample(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        student, teacher = check_maps(student, teacher, channels=(self.student_channels, self.teacher_channels))
        student, teacher = pool_to_smaller(student, teacher)
        generated = run_layers(self.generation, self._masked(run_layers(self.align, student)))
        return mgd_loss(generated, teacher, alpha=self.alpha)

    def _masked(self, x: Tensor) -> Tensor:
        if self.mask_ratio == 0:
            return x
        drawn = torch.rand((x.shape[0], 1, *x.shape[2:]), **drawing(self.generator, x.device))
        return x * (drawn >= self.mask_ratio).to(x)
