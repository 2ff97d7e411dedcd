"""Hints: Romero et al., "FitNets: Hints for Thin Deep Nets" (2015)."""

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_count, check_pair, make_ready, without_autocast
from distill._reduction import Reduction, check_reduction, reduce
from distill._registry import register_loss
from distill.losses._maps import check_maps, pool_to_smaller

FAMILY = "maps"


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two hidden layers, one value per sample.

        loss = 1/(CHW) * sum_chw (s - t)^2  for maps,  1/C * sum_c (s_c - t_c)^2  for vectors

    Maps of unequal size are average-pooled to the smaller height and width. Where the channels differ, `HintLoss`
    learns a map from the student's to the teacher's.

    Published with weight 100 (the CIFAR-100 benchmark of Tian, Krishnan and Isola, "Contrastive Representation
    Distillation", ICLR 2020).

    Scale: `distiller_zoo/FitNet.py` of that benchmark (`HobbitLong/RepDistiller`): the mean over all elements. The
    paper has half the sum.

    Doubt: the benchmark puts a convolution, a batch norm and a ReLU before the loss, also where the channels agree
    (`ConvReg` in its `models/util.py`), and its weight goes with them; `HintLoss` has one linear layer, and none where
    the channels agree.

    Args:
        student: The student's layer: a map `(N, C, H, W)`, or vectors `(..., C)` of another number of dimensions. Any
            floating dtype; half and bfloat16 are computed in float32.
        teacher: The teacher's layer: a map `(N, C, H', W')`, or vectors of the student's shape. A constant: no
            gradient reaches it.

    Returns:
        One value per sample, `(N,)` for maps and `(...)` for vectors, in squared units of the inputs; float32, or
        float64 if an input is.

    Raises:
        ValueError: If the shapes differ in more than the size of the maps, the devices differ, or an input is empty or
            not floating-point.

    Examples:
        >>> import torch
        >>> from distill import hint_loss
        >>> student = torch.ones(1, 2, 2, 2)
        >>> teacher = torch.tensor([[[[3.0]], [[1.0]]]])
        >>> hint_loss(student, teacher)  # ((1 - 3)^2 + (1 - 1)^2) / 2
        tensor([2.])

    Reference:
        Adriana Romero, Nicolas Ballas, Samira Ebrahimi Kahou, Antoine Chassang, Carlo Gatta and Yoshua Bengio,
        "FitNets: Hints for Thin Deep Nets", ICLR 2015 and arXiv 1412.6550, section 2.2.
    """
    if 4 in (student.ndim, teacher.ndim):
        student, teacher = pool_to_smaller(*check_maps(student, teacher, same_channels=True))
        # Not mean(): its gradient would be a tensor of the size of the map, that of sum() is a view.
        return F.mse_loss(student, teacher, reduction="none").flatten(1).sum(1) / student[0].numel()
    student, teacher = check_pair(student, teacher, dim=-1)
    return F.mse_loss(student, teacher, reduction="none").sum(-1) / student.shape[-1]


@register_loss("hint")
class HintLoss(nn.Module):
    """Mean squared difference of two hidden layers, through a learned map where their channels differ.

    See `hint_loss` for the formula. The map is linear over the channels with a bias: a 1x1 convolution of maps
    `(N, C, H, W)`, a linear layer on vectors `(..., C)`. The benchmark of `hint_loss` has a convolution whose kernel
    depends on the sizes, a batch norm and a ReLU instead.

    Args:
        student_channels: The student's channels, where they differ from the teacher's.
        teacher_channels: The teacher's channels, where they differ from the student's.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).

    Attributes:
        regressor: The learned map, an `nn.Linear`; None where the channels are the same or not given.

    Raises:
        ValueError: If only one number of channels is given or one is no positive integer, or the reduction is
            unknown.

    Examples:
        >>> import torch
        >>> from distill import HintLoss
        >>> loss = HintLoss(16, 64)
        >>> student = torch.rand(2, 16, 8, 8, requires_grad=True)
        >>> loss(student, torch.rand(2, 64, 8, 8)).backward()
        >>> loss.regressor.weight.grad.shape
        torch.Size([64, 16])
    """

    def __init__(
        self,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        *,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        channels = (student_channels, teacher_channels)
        if (student_channels is None) != (teacher_channels is None):
            raise ValueError(f"student_channels and teacher_channels must both be given or both None, got {channels}")
        if student_channels is not None and teacher_channels is not None:
            check_count("student_channels", student_channels)
            check_count("teacher_channels", teacher_channels)
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.reduction = check_reduction(reduction)
        self.regressor: nn.Linear | None = None
        if student_channels is not None and teacher_channels is not None and student_channels != teacher_channels:
            self.regressor = nn.Linear(student_channels, teacher_channels)

    @override
    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the loss.

        Args:
            student: Map, `(N, student_channels, H, W)`, or vectors, `(..., student_channels)`.
            teacher: Map, `(N, teacher_channels, H', W')`, or vectors, `(..., teacher_channels)`.
            target: Not used; every loss is called alike.
            mask: Bool or weights, shaped like the per-sample values: `(N,)` for maps, `(...)` for vectors.

        Returns:
            A scalar, or with `reduction="none"` one value per sample.

        Raises:
            ValueError: As `hint_loss`, if the channels are not the ones given, and if the mask has another shape than
                the per-sample values.
        """
        if self.student_channels is not None:
            student, teacher = self._align(student, teacher)
        return reduce(hint_loss(student, teacher), self.reduction, mask)

    @override
    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        channels = f"{self.student_channels}, {self.teacher_channels}, " if self.student_channels is not None else ""
        return f"{channels}reduction={self.reduction!r}"

    def _align(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Check both sides, and bring the student to the teacher's channels."""
        maps = 4 in (student.ndim, teacher.ndim)
        if maps:
            # Pooling commutes with a map over the channels, and is cheaper before it.
            student, teacher = pool_to_smaller(*check_maps(student, teacher, same_channels=False))
        elif student.shape[:-1] == teacher.shape[:-1]:
            student, teacher = make_ready(student, teacher)
        else:
            raise ValueError(
                "student and teacher must have the same shape but for the channels (nothing is broadcast), "
                f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        for side, layer, channels in (
            ("student", student, self.student_channels),
            ("teacher", teacher, self.teacher_channels),
        ):
            if layer.ndim == 0 or layer.shape[1 if maps else -1] != channels:
                raise ValueError(f"the {side} must have {channels} channels, got shape {tuple(layer.shape)}")
        if self.regressor is None:
            return student, teacher
        weight, bias = self.regressor.weight.to(student.dtype), self.regressor.bias.to(student.dtype)
        with without_autocast(student):
            student = F.conv2d(student, weight[:, :, None, None], bias) if maps else F.linear(student, weight, bias)
        return student, teacher
