"""How losses run the layers that they learn: in the dtype of the maps, on the statistics of the samples that count."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distill._checks import without_autocast
from distill._reduction import check_mask


def run_layers(layers: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Run the layers of an `nn.Sequential` in the dtype of `x`, whatever their own dtype and whatever autocast says.

    Batch normalisation uses the statistics of the batch: these layers exist in training only. What
    `SyncBatchNorm.convert_sync_batchnorm` made of one uses, in training mode, those of all processes of its group, on
    any device.

    Args:
        layers: The layers, run one after the other.
        x: Maps, `(N, C, H, W)`.
        mask: Bool or weights, `(N,)`: where it is 0 a sample is not in the statistics.

    Returns:
        What the last layer gives.

    Raises:
        ValueError: If the layers are on another device, a batch norm has one value per channel only, or the mask is
            not as said.
    """
    if mask is not None:
        check_mask(mask, x.shape[:1], x.device)
    with without_autocast(x):
        for layer in layers.children():
            if isinstance(layer, nn.Conv2d):
                check_device(layer, x)
                bias = None if layer.bias is None else layer.bias.to(x.dtype)
                x = F.conv2d(x, layer.weight.to(x.dtype), bias, layer.stride, layer.padding)
            elif isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                x = _batch_norm(layer, x, mask)
            elif isinstance(layer, nn.LayerNorm):
                x = F.layer_norm(x, layer.normalized_shape, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)
            elif isinstance(layer, nn.ReLU):
                # The slope at 0 is 0 because this says so, and an input of minus infinity or NaN shows.
                x = x * (x > 0)
            else:
                x = layer(x)
    return x


def check_device(layer: nn.Conv2d | nn.Linear, x: Tensor) -> None:
    """Raise ValueError if a layer of a loss is not where the maps are."""
    if layer.weight.device != x.device:
        raise ValueError(
            f"the loss must be on the device of what it compares, {x.device}, got {layer.weight.device}: move it with "
            ".to(device)"
        )


def _batch_norm(layer: nn.BatchNorm2d | nn.SyncBatchNorm, x: Tensor, mask: Tensor | None) -> Tensor:
    weight, bias = layer.weight.to(x.dtype), layer.bias.to(x.dtype)
    group = _processes(layer)
    if mask is None and group is None:
        if x.numel() == x.shape[1]:
            raise ValueError(
                "a batch norm of this loss must have more than 1 value per channel (samples times positions), "
                f"got maps {tuple(x.shape)} (DataLoader: drop_last=True)"
            )
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=layer.eps)
    kept = torch.ones_like(x[:, 0, 0, 0]) if mask is None else (mask.detach() != 0).to(x.dtype)
    count = kept.sum() * (x.shape[2] * x.shape[3])
    kept = kept[:, None, None, None]
    total = _over_processes(torch.cat([(x * kept).sum((0, 2, 3)), count[None]]), group)
    count = torch.where(total[-1] == 0, 1.0, total[-1])
    centred = x - (total[:-1] / count)[:, None, None]
    variance = _over_processes((centred.square() * kept).sum((0, 2, 3)), group) / count
    return centred * (weight * (variance + layer.eps).rsqrt())[:, None, None] + bias[:, None, None]


def _processes(layer: nn.Module) -> "dist.ProcessGroup | None":
    """The processes over which a layer takes its statistics, if it is more than this one."""
    if not (isinstance(layer, nn.SyncBatchNorm) and layer.training and dist.is_available() and dist.is_initialized()):
        return None
    group = layer.process_group or dist.group.WORLD  # pragma: no cover - in processes of the test's own
    return group if dist.get_world_size(group) > 1 else None  # pragma: no cover


def _over_processes(values: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """The sum over the processes, whose gradient is summed over them too."""
    if group is None:
        return values
    from torch.distributed.nn.functional import all_reduce  # imports what few need  # pragma: no cover

    summed: Tensor = all_reduce(values, group=group)  # type: ignore[no-untyped-call]  # pragma: no cover
    return summed  # pragma: no cover
