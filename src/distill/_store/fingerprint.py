"""Short hashes that say which teacher and which inputs a stored answer belongs to."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor, nn

from distill._checks import is_integer


def fingerprint(model: nn.Module) -> str:
    """Hash a model's weights: names, dtypes, shapes and numbers of its `state_dict()`.

    Args:
        model: The model. What its `state_dict()` does not have (buffers that are not saved, code) counts nowhere.

    Returns:
        32 hexadecimal digits, equal for equal weights, wherever they are.

    Raises:
        TypeError: If the model is no module.
        ValueError: If a weight has no plain numbers to read (on the meta device, or of a tensor subclass).

    Examples:
        >>> import torch
        >>> from distill import fingerprint
        >>> model = torch.nn.Linear(2, 2)
        >>> len(fingerprint(model))
        32
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be an nn.Module, got {type(model).__name__}")
    found = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):  # what a module saves beside its tensors
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
            raise ValueError(
                f"a model whose weights are hashed must have plain tensors, got {type(tensor).__name__} on "
                f"{tensor.device} as {name!r}; give a name of yours instead (model='...')"
            )
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


fingerprint.__module__ = "distill"  # a pickle that names it outlives a move


def sample_hash(sample: Tensor) -> int:
    """Hash one sample's tokens or pixels: kind, shape and numbers; integers of any width are alike."""
    kind = "integer" if is_integer(sample) else str(sample.dtype)
    found = blake2b(f"{kind} {tuple(sample.shape)} ".encode(), digest_size=8)
    found.update(_bytes(sample.long() if kind == "integer" else sample))
    return int.from_bytes(found.digest(), "little", signed=True)


def _bytes(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data
