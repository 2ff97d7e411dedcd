"""What losses with learned layers on feature maps share: checks, pooling to one size, running the layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def check_channels(name: str, value: int) -> int:
    """Return `value` if it is a positive integer, else raise ValueError that names the option."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def check_maps(student: Tensor, teacher: Tensor, *, channels: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Check the maps that a loss with learned layers compares, and make them ready for it.

    Args:
        student: The student's map, `(N, C_s, H, W)`.
        teacher: The teacher's map, `(N, C_t, H', W')`.
        channels: `C_s` and `C_t`, for which the layers were built.

    Returns:
        The student and the detached teacher, both in the dtype in which the loss is computed: the wider one of the
        two, and at least float32.

    Raises:
        ValueError: If an input is no such map, is not floating-point or is empty, or samples or devices differ.
    """
    if not (student.ndim == teacher.ndim == 4 and student.shape[0] == teacher.shape[0]):
        raise ValueError(
            "student and teacher must be maps (N, C, H, W) of the same N, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    for name, tensor, expected in zip(("student", "teacher"), (student, teacher), channels, strict=True):
        if tensor.shape[1] != expected:
            raise ValueError(f"{name} must have {expected} channels, got shape {tuple(tensor.shape)}")
        if tensor.numel() == 0:
            raise ValueError(f"student and teacher must not be empty, got shape {tuple(tensor.shape)}")
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(f"student and teacher must be floating-point, got {student.dtype} and {teacher.dtype}")
    if student.device != teacher.device:
        raise ValueError(f"student and teacher must be on the same device, got {student.device} and {teacher.device}")
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def pool_to_smaller(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two maps `(N, C, H, W)` to the smaller height and the smaller width of the two."""
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    return _pool(student, size), _pool(teacher, size)


def _pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size)


def run_layers(layers: nn.Module, x: Tensor) -> Tensor:
    """Run the layers of an `nn.Sequential` in the dtype of `x`, whatever their own dtype and whatever autocast says.

    Batch normalisation uses the statistics of the batch: these layers exist in training only.
    """
    with torch.autocast(x.device.type, enabled=False):
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
