"""What losses on feature maps share: checks, pooling to one size, running learned layers."""

import torch.nn.functional as F
from torch import Tensor, nn

from distill._checks import make_ready, without_autocast


def check_maps(
    student: Tensor, teacher: Tensor, *, same_channels: bool = False, channels: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Check two feature maps, whose heights and widths may differ, and make them ready for a comparison.

    Args:
        student: The student's map, `(N, C, H, W)`.
        teacher: The teacher's map, `(N, C, H, W)` of the same N.
        same_channels: Whether C must be the same too.
        channels: The student's and the teacher's C, where a loss has layers built for them.

    Returns:
        The student and the detached teacher as they are in size, both in the dtype in which the loss is computed: the
        wider one of the two, and at least float32.

    Raises:
        ValueError: If an input is no map, N or C are not as they must be, an input is not floating-point, the
            devices differ, or an input is empty.
    """
    same = 2 if same_channels else 1
    if not (student.ndim == teacher.ndim == 4 and student.shape[:same] == teacher.shape[:same]):
        raise ValueError(
            f"student and teacher must be maps (N, C, H, W) of the same {'N and C' if same_channels else 'N'}, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if channels is not None:
        for name, tensor, expected in (("student", student, channels[0]), ("teacher", teacher, channels[1])):
            if tensor.shape[1] != expected:
                raise ValueError(f"{name} must have {expected} channels, got shape {tuple(tensor.shape)}")
    return make_ready(student, teacher)


def pool_to_smaller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two maps `(N, C, H, W)` to the smaller of the two heights and of the two widths."""
    height, width = (min(sizes) for sizes in zip(first.shape[2:], second.shape[2:], strict=True))
    return _pool(first, height, width), _pool(second, height, width)


def _pool(maps: Tensor, height: int, width: int) -> Tensor:
    if maps.shape[2:] == (height, width):
        return maps
    # Windows that do not overlap: the same, and faster on a CPU, but for a single one, which is mean().
    if height * width > 1 and maps.shape[2] % height == maps.shape[3] % width == 0:
        return F.avg_pool2d(maps, (maps.shape[2] // height, maps.shape[3] // width))
    return F.adaptive_avg_pool2d(maps, (height, width))


def run_layers(layers: nn.Module, x: Tensor) -> Tensor:
    """Run the layers of an `nn.Sequential` in the dtype of `x`, whatever their own dtype and whatever autocast says.

    Batch normalisation uses the statistics of the batch: these layers exist in training only.
    """
    with without_autocast(x):
        for layer in layers.children():
            if isinstance(layer, nn.Conv2d):
                bias = None if layer.bias is None else layer.bias.to(x.dtype)
                x = F.conv2d(x, layer.weight.to(x.dtype), bias, layer.stride, layer.padding)
            elif isinstance(layer, nn.BatchNorm2d):
                weight, bias = layer.weight.to(x.dtype), layer.bias.to(x.dtype)
                x = F.batch_norm(x, None, None, weight, bias, training=True, eps=layer.eps)
            else:
                x = layer(x)
    return x
