"""Hints: Romero et al., "FitNets: Hints for Thin Deep Nets" (2015)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import (
    check_count,
    check_pair,
    check_tensor,
    check_tensors,
    make_ready,
    may_look,
    ordinary,
    without_autocast,
)
from distill._reduction import Reduction, check_mask, divide, hide, reduce
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._layers import check_device
from distill.losses._maps import ANY, check_maps, pool_to_smaller
from distill.losses._sizes import LAYERS

FAMILY = "maps"

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def hint_loss(student: Tensor, teacher: Tensor, *, dim: int | None = None, positions: bool = False) -> Tensor:
    """Mean squared difference of two hidden layers, one value per sample or per position.

        loss = 1/(CHW) * sum_chw (s - t)^2  for maps,  1/C * sum_c (s_c - t_c)^2  for vectors and positions

    Maps of unequal size are average-pooled to the smaller height and width, and likewise in one or three dimensions.
    Where the channels differ, `HintLoss` learns a map from the student's to the teacher's.

    Args:
        student: The student's layer: a map `(N, C, H, W)`, or vectors `(..., C)`, as `dim` says. Any floating dtype;
            half and bfloat16 are computed in float32.
        teacher: The teacher's layer: a map `(N, C, H', W')`, or vectors of the student's shape. Gets no gradient.
        dim: The dimension of the channels: 1 for maps, also `(N, C, L)` and `(N, C, D, H, W)`, -1 for vectors of any
            number of dimensions. None: 1 where there are four dimensions, else -1.
        positions: Whether each position of a map is a sample of its own, as each vector is.

    Returns:
        One value per sample, `(N,)` for maps, with `positions` `(N, H, W)`, and `(...)` for vectors, in squared units
        of the inputs; float32, or float64 if an input is.

    Raises:
        TypeError: If an input is no tensor.
        ValueError: If the shapes differ in more than the size of the maps, a map seems to have its channels last, the
            devices differ, an input is empty or not floating-point, or `dim` is neither 1 nor -1.

    Examples:
        >>> import torch
        >>> from distill import hint_loss
        >>> student = torch.ones(1, 2, 2, 2)
        >>> teacher = torch.tensor([[[[3.0]], [[1.0]]]])
        >>> hint_loss(student, teacher)  # ((1 - 3)^2 + (1 - 1)^2) / 2
        tensor([2.])

    Notes:
        Published with weight 100 (the CIFAR-100 benchmark of Tian, Krishnan and Isola, "Contrastive Representation
        Distillation", ICLR 2020).

        Scale: `distiller_zoo/FitNet.py` of that benchmark (`HobbitLong/RepDistiller`): the mean over all elements. The
        paper has half the sum.

        Caveat: The benchmark puts a convolution, a batch norm and a ReLU before the loss, also where the channels agree
        (`ConvReg` in its `models/util.py`), and its weight goes with them; `HintLoss` has one linear layer, and none
        where the channels agree.

    Reference:
        Adriana Romero, Nicolas Ballas, Samira Ebrahimi Kahou, Antoine Chassang, Carlo Gatta and Yoshua Bengio,
        "FitNets: Hints for Thin Deep Nets", ICLR 2015 and arXiv 1412.6550, section 2.2.
    """
    if _are_maps(student, teacher, _check_dim("dim", dim)):
        student, teacher = check_maps(student, teacher, same_channels=True, positions=ANY)
        student, teacher = pool_to_smaller(student, teacher)
        if positions:
            return F.mse_loss(student, teacher, reduction="none").sum(1) / student.shape[1]
        # Not mean(): its gradient would be a tensor of the size of the map, that of sum() is a view.
        return F.mse_loss(student, teacher, reduction="none").flatten(1).sum(1) / student[0].numel()
    student, teacher = check_pair(student, teacher, dim=-1)
    return F.mse_loss(student, teacher, reduction="none").sum(-1) / student.shape[-1]


def _check_dim(name: str, value: int | None) -> int | None:
    if value not in (None, 1, -1) or (value is not None and type(value) is not int):
        raise ValueError(f"{name} must be 1 for maps, -1 for vectors, or None, got {value!r}")
    return value


def _check_channels(name: str, value: int | None) -> int | None:
    return None if value is None else check_count(name, value)


def _are_maps(
    student: Tensor, teacher: Tensor, dim: int | None, channels: tuple[int | None, int | None] = (None, None)
) -> bool:
    """Whether the channels are the second dimension; where `dim` does not say it, the channels of a layer may."""
    check_tensors(student, teacher)
    if dim is not None or 4 in (student.ndim, teacher.ndim):
        return dim != -1
    shapes = (student.shape, teacher.shape)
    first, last = (tuple(shape[d] for shape in shapes if len(shape) > 2) == channels for d in (1, -1))
    return first and not last


@register_loss("hint")
class HintLoss(SampleLoss):
    """Mean squared difference of two hidden layers, through a learned map where their channels differ.

    See `hint_loss` for the formula. The map is linear over the channels with a bias: a 1x1 convolution of maps
    `(N, C, H, W)`, a linear layer on vectors `(..., C)`. The benchmark of `hint_loss` has a convolution whose kernel
    depends on the sizes, a batch norm and a ReLU instead.

    With the channels given, layers of other than four dimensions are maps also where only the second dimension has
    those channels: `HintLoss(16, 64)` takes `(N, 16, L)` and `(N, 64, L')`. Where both readings fit they are vectors,
    unless `dim` is 1.

    Positions of a map may count differently: with a mask `(N, H, W)` each position is a sample of its own, and a mean
    is `sum w (s - t)^2 / (C sum w)` over the batch. Weights that follow from the teacher, such as its certainty that
    there is an object, come with its map: the teacher's side is then `(map, weights)`. For a detector whose `head`
    gives the logits of the classes at each position of the level `neck`:

        def with_scores(sides):
            level, logits = sides
            return level, logits.sigmoid().amax(1)

        Term(HintLoss(64, 128), at=("neck", ("neck", "head")), teacher=with_scores, weight=6.0)

    That weight is the one of ultralytics (`dis`, for each of three levels, times the images of a batch), whose scores
    are the mean of two heads and whose map from the student has two layers with a ReLU between them.

    Args:
        student_channels: The student's channels, where they differ from the teacher's.
        teacher_channels: The teacher's channels, where they differ from the student's.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).
        dim: The dimension of the channels, as in `hint_loss`; None: as said above.

    Attributes:
        regressor: The learned map, an `nn.Linear`; None where the channels are the same or not given.

    Raises:
        ValueError: If only one number of channels is given or one is no positive integer, `dim` is neither 1 nor -1, or
            the reduction is unknown.

    Examples:
        >>> import torch
        >>> from distill import HintLoss
        >>> loss = HintLoss(16, 64)
        >>> student = torch.rand(2, 16, 8, 8, requires_grad=True)
        >>> loss(student, torch.rand(2, 64, 8, 8)).backward()
        >>> loss.regressor.weight.grad.shape
        torch.Size([64, 16])
        >>> HintLoss.between(student, (2, 64, 8, 8)).regressor  # the channels from the shapes
        Linear(in_features=16, out_features=64, bias=True)
    """

    options = {  # noqa: RUF012 - declared in the base
        "student_channels": _check_channels,
        "teacher_channels": _check_channels,
        "dim": _check_dim,
    }
    built = ("student_channels", "teacher_channels")
    size = LAYERS

    def __init__(
        self,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        *,
        reduction: Reduction = "mean",
        dim: int | None = None,
    ) -> None:
        super().__init__(reduction=reduction)
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        self.dim = dim
        if (student_channels is None) != (teacher_channels is None):
            raise ValueError(
                "student_channels and teacher_channels must both be given or both None, "
                f"got {(student_channels, teacher_channels)}"
            )
        self.regressor: nn.Linear | None = None
        if student_channels is not None and teacher_channels is not None and student_channels != teacher_channels:
            self.regressor = nn.Linear(student_channels, teacher_channels)

    @override
    def forward(
        self,
        student: Tensor,
        teacher: Tensor | tuple[Tensor, Tensor],
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            student: The student's map `(N, C, H, W)` or vectors `(..., C)`, as in `hint_loss`.
            teacher: The teacher's, or a tuple of it and weights, zero or positive: one for each position `(N, H, W)` or
                vector `(...)`. A constant.
            target: Not used.
            mask: Bool or weights: one per sample `(N,)`, or for each position, of the smaller map, `(N, H, W)`; for
                vectors `(...)`. What a 0 hides counts nowhere. It multiplies weights that come with the teacher.
            denominator: A mean becomes the sum divided by this number.

        Returns:
            A scalar, or with `reduction="none"` one value per sample, each times its weight, `(N,)`, `(N, H, W)` where
            positions have weights, or `(...)`.

        Raises:
            TypeError: If what must be a tensor is none.
            ValueError: As `hint_loss`, if the channels are not those given, if the mask or the weights have another
                shape, or on a CPU if a weight is negative.
        """
        weights = None
        if isinstance(teacher, tuple) and len(teacher) == 2:
            teacher, weights = teacher
            check_tensor("the teacher's weights", weights)
        each = mask if isinstance(mask, Tensor) and mask.ndim > 1 and self._are_maps(student, teacher) else None
        if weights is None and each is None:
            return super().forward(student, teacher, target, mask=mask, denominator=denominator)
        student, teacher, dim = self._compared(student, teacher)
        shape = student.movedim(dim, -1).shape[:-1]
        if weights is not None:
            check_mask(weights, shape, student.device, name="the teacher's weights")
            weights = ordinary(weights.detach()).to(student.dtype)
            each = weights if mask is None else _both(weights, mask)
            counted = weights.masked_fill(each == 0, 0.0)
            if may_look(counted) and bool((counted < 0).any()):
                raise ValueError(
                    f"the teacher's weights must be zero or positive, got {float(counted.amin())}: those of logits are "
                    "their sigmoid"
                )
        if each is not None:
            check_mask(each, shape, student.device)
            student, teacher = hide(student, each, dim=dim), hide(teacher, each, dim=dim)
        values = hint_loss(self._regress(student, dim=dim), teacher, dim=dim, positions=True)
        return divide(reduce(values, self.reduction_over(denominator), each), denominator)

    @override
    def per_sample(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        student, teacher, dim = self._compared(student, teacher)
        return hint_loss(self._regress(student, dim=dim), teacher, dim=dim)

    def _channels(self) -> tuple[int, int] | None:
        if self.student_channels is None or self.teacher_channels is None:
            return None
        return self.student_channels, self.teacher_channels

    def _are_maps(self, student: Tensor, teacher: Tensor) -> bool:
        return _are_maps(student, teacher, self.dim, self._channels() or (None, None))

    def _compared(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, int]:
        """Both sides checked and of one size, and the dimension of their channels."""
        channels = self._channels()
        if self._are_maps(student, teacher):
            student, teacher = check_maps(
                student, teacher, same_channels=channels is None, channels=channels, positions=ANY
            )
            # Pooling commutes with a map over the channels, and is cheaper before it.
            return *pool_to_smaller(student, teacher), 1
        if channels is None:
            return *check_pair(student, teacher, dim=-1), -1
        return *_check_vectors(student, teacher, channels), -1

    def _regress(self, student: Tensor, *, dim: int) -> Tensor:
        """Bring the student to the teacher's channels."""
        if self.regressor is None:
            return student
        check_device(self.regressor, student)
        weight, bias = self.regressor.weight.to(student.dtype), self.regressor.bias.to(student.dtype)
        with without_autocast(student):
            if dim == -1:
                return F.linear(student, weight, bias)
            positions = student.ndim - 2
            return _CONVOLUTIONS[positions](student, weight.reshape(*weight.shape, *(1,) * positions), bias)


def _both(weights: Tensor, mask: Tensor) -> Tensor:
    """A weight for each position times a mask for each sample or position; a mask of 0 hides any weight."""
    if check_tensor("mask", mask).ndim == 1 and mask.shape == weights.shape[:1] and mask.device == weights.device:
        mask = mask.reshape(-1, *(1,) * (weights.ndim - 1)).expand_as(weights)
    check_mask(mask, weights.shape, weights.device)
    return torch.where(mask == 0, 0.0, weights * ordinary(mask).to(weights.dtype))


def _check_vectors(student: Tensor, teacher: Tensor, channels: tuple[int, int]) -> tuple[Tensor, Tensor]:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student and teacher must have the same shape but for the channels (nothing is broadcast), "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}; for maps of other than two dimensions give dim=1"
        )
    for name, tensor, expected in (("student", student, channels[0]), ("teacher", teacher, channels[1])):
        if tensor.shape[-1:] != (expected,):
            raise ValueError(f"{name} must have {expected} channels, got shape {tuple(tensor.shape)}")
    return make_ready(student, teacher)
