"""Knowledge review: Chen et al., "Distilling Knowledge via Knowledge Review" (CVPR 2021)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distill._checks import check_count, check_pair
from distill._reduction import Reduction
from distill._registry import register_loss
from distill.losses._base import SampleLoss
from distill.losses._layers import run_layers
from distill.losses._maps import check_maps, check_tuples, pool
from distill.losses._sizes import FEATURES

FAMILY = "learned maps"


def review_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Hierarchical context loss of tuples of maps, one value per sample.

        d = s - t,  d_k = d average-pooled to k x k, for the k in (4, 2, 1) that are smaller than the map's height
        h(s, t) = [mean(d^2) + 1/2 mean(d_4^2) + 1/4 mean(d_2^2) + 1/8 mean(d_1^2)] / (1 + 1/2 + 1/4 + 1/8)
        loss = sum over levels of h(s, t),                              means over channels and positions

    Where a k is left out, the weights move up and the divisor is the sum of those that are used: a map of 4 x 4 has
    `[mean(d^2) + 1/2 mean(d_2^2) + 1/4 mean(d_1^2)] / (7/4)`. Only the height leaves one out, as in the authors' code;
    where the width is smaller than k the bins overlap. The student's maps are those that `ReviewLoss` fuses.

    Args:
        student: The student's fused maps, each `(N, C, H, W)`, or `(N, C)` for pooled features. Any floating dtype;
            half and bfloat16 are computed in float32.
        teacher: The teacher's maps, as many, each of the same shape as the student's. Get no gradient.

    Returns:
        One value per sample, shape `(N,)`, in squared units of the maps; float32, or float64 if an input is.

    Raises:
        TypeError: If an input is no tuple, or holds what is no tensor.
        ValueError: If numbers of maps, shapes, samples or devices differ, there is none, or one is no map, empty or not
            floating-point.

    Examples:
        >>> import torch
        >>> from distill import review_loss
        >>> teacher = torch.tensor([[[[1.0, -1.0], [1.0, 1.0]]]])
        >>> review_loss((torch.zeros(1, 1, 2, 2),), (teacher,))  # (1 + 1/2 * 0.5^2) / (1 + 1/2)
        tensor([0.7500])

    Notes:
        Published with weight 0.6 to 8 on CIFAR-100, reached in a linear warm-up over 20 epochs, beside 1 times the
        cross-entropy: 0.6 for ResNet-56 to ResNet-20, 1 for ResNet-110 to ResNet-32, 8 for ResNet-32x4 to ShuffleNetV2,
        else 5 (the authors' code).

        Scale: `hcl` in `CIFAR-100/model/reviewkd.py` of the authors' code (`dvlab-research/ReviewKD`), with the weights
        in its `script/reviewKD.sh`: means over all elements, summed over the levels.

    Reference:
        Pengguang Chen, Shu Liu, Hengshuang Zhao and Jiaya Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021,
        section 3.
    """
    check_tuples(student, teacher)
    return torch.stack([_context(*pair) for pair in zip(student, teacher, strict=True)]).sum(0)


def _check_channels(name: str, value: Sequence[int]) -> tuple[int, ...]:
    return tuple(check_count(f"each of {name}", channels) for channels in value)


@register_loss("review")
class ReviewLoss(SampleLoss):
    """Deep maps are fused into shallow ones before they are compared; see `review_loss` for the formula.

    From the deepest level to the shallowest: the student's map goes through a 1x1 convolution to `mid_channels` and is
    fused with what came from the level below it in the network, resized to it (nearest), each weighted by a learned
    attention per position (a 1x1 convolution over both, sigmoid). The result, resized to the teacher's map (nearest),
    goes on to the next level, and through a 3x3 convolution to the teacher's channels into the loss. Both
    convolutions are without bias and followed by a batch norm, which always uses the statistics of the batch, without
    the samples that a mask hides: it serves the loss only, and has no running state to keep. The parameters must be in
    the optimizer.

    It is called with two tuples of maps from shallow to deep, each `(N, C, H, W)`, or `(N, C)` for pooled features.

    Args:
        student_channels: Channels of the student's maps, from shallow to deep.
        teacher_channels: Channels of the teacher's maps, from shallow to deep, as many.
        mid_channels: Channels in which the maps are fused. None, as published: the deepest student map's, at most 512.
        reduction: Over samples: `"mean"`, `"sum"` or `"none"` (one value per sample).

    Raises:
        ValueError: If channels or the reduction are not as said.

    Examples:
        >>> import torch
        >>> from distill import ReviewLoss
        >>> loss = ReviewLoss(student_channels=(16, 32, 32), teacher_channels=(32, 64, 64))
        >>> student = torch.randn(4, 16, 8, 8), torch.randn(4, 32, 4, 4), torch.randn(4, 32)
        >>> teacher = torch.randn(4, 32, 8, 8), torch.randn(4, 64, 4, 4), torch.randn(4, 64)
        >>> loss(student, teacher).shape
        torch.Size([])

    Notes:
        `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes the batch norms take the statistics of all processes while
        the loss is in training mode, on a CPU too.

        As published the maps are the outputs of the stages, the student's after the ReLU and the teacher's before it,
        and the pooled features as the deepest level.
    """

    options = {  # noqa: RUF012 - declared in the base
        "student_channels": _check_channels,
        "teacher_channels": _check_channels,
        "mid_channels": check_count,
    }
    built = ("student_channels", "teacher_channels", "mid_channels")
    size = FEATURES
    several = True

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        mid_channels: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        levels = len(self.student_channels)
        if levels == 0 or levels != len(self.teacher_channels):
            raise ValueError(
                "student_channels and teacher_channels must be as many, and at least one, "
                f"got {self.student_channels} and {self.teacher_channels}"
            )
        widest = min(512, self.student_channels[-1])
        self.mid_channels = widest if mid_channels is None else mid_channels
        self.inputs = nn.ModuleList(_convolution(c, self.mid_channels, 1) for c in self.student_channels)
        self.attention = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * self.mid_channels, 2, 1), nn.Sigmoid()) for _ in range(levels - 1)
        )
        self.outputs = nn.ModuleList(_convolution(self.mid_channels, c, 3) for c in self.teacher_channels)

    @override
    def values(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], target: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        check_tuples(student, teacher, number=len(self.student_channels))
        channels = zip(self.student_channels, self.teacher_channels, strict=True)
        pairs = [
            check_maps(_as_map(s), _as_map(t), channels=wanted)
            for s, t, wanted in zip(student, teacher, channels, strict=True)
        ]
        return review_loss(self._fuse(pairs, mask), [t for _, t in pairs])

    def _fuse(self, pairs: Sequence[tuple[Tensor, Tensor]], mask: Tensor | None) -> list[Tensor]:
        """What the student has for each of the teacher's maps, from shallow to deep."""
        fused: list[Tensor] = []
        deeper: Tensor | None = None
        for level in reversed(range(len(pairs))):
            student, teacher = pairs[level]
            here = run_layers(self.inputs[level], student, mask)
            if deeper is not None:
                deeper = _resize(deeper, here)
                weights = run_layers(self.attention[level], torch.cat([here, deeper], 1))
                here = weights[:, :1] * here + weights[:, 1:] * deeper
            deeper = _resize(here, teacher)
            fused.append(run_layers(self.outputs[level], deeper, mask))
        return fused[::-1]


def _context(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = (_as_map(maps) for maps in check_pair(student, teacher, dim=1))
    if student.ndim != 4:
        raise ValueError(f"student and teacher must be tuples of maps (N, C, H, W), got {tuple(student.shape)}")
    # Pooling is linear: the difference of the pooled maps is the pooled difference.
    difference = student - teacher
    value, weight, total = difference.square().flatten(1).mean(1), 1.0, 1.0
    for size in (4, 2, 1):
        if size < difference.shape[2]:
            weight /= 2
            total += weight
            value = value + weight * pool(difference, (size, size)).square().flatten(1).mean(1)
    return value / total


def _as_map(x: Tensor) -> Tensor:
    return x[:, :, None, None] if x.ndim == 2 else x


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return x if x.shape[2:] == like.shape[2:] else F.interpolate(x, like.shape[2:], mode="nearest")


def _convolution(channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels, track_running_stats=False))
