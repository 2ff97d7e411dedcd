"""What a checkpoint must hold, what its bits depend on, and the identity of a network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# What a resumed run must have as it had it, since the user can choose it. What may change, such as the version of
# PyTorch, is noted with the epoch from which it holds, and the tables show it.
CHOSEN = {"threads": "--threads", "engine": "--engine"}


def identity(weights: Mapping[str, Tensor]) -> str:
    """Return the identity of a network: equal for two that are equal bit by bit.

    Args:
        weights: Its state dict.

    Returns:
        Such as `"sha256:9f86d0..."`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def check_tensors(found: Any, wanted: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors that are not, by name, shape and type, those of a network.

    Args:
        found: What was read.
        wanted: What must be there.
        what: What it is, for the error.

    Raises:
        ValueError: If anything differs.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"{what} must map names to tensors, got {type(found).__name__}")
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        if name not in found:
            raise ValueError(f"{what} must hold {name}, which is missing")
        if name not in wanted:
            raise ValueError(f"{what} must hold the network's tensors only, got {name!r}")
        got, must = found[name], wanted[name]
        if not isinstance(got, Tensor):
            raise ValueError(f"{name} of the {what} must be a tensor, got {type(got).__name__}")
        if (got.shape, got.dtype) != (must.shape, must.dtype):
            raise ValueError(
                f"{name} of the {what} must be {must.dtype} of shape {tuple(must.shape)}, "
                f"got {got.dtype} of shape {tuple(got.shape)}"
            )


def check_optimizer(found: Any, optimizer: torch.optim.Optimizer, needed: nn.Module) -> None:
    """Refuse the state of another optimizer; PyTorch would take most of them.

    Args:
        found: What was read.
        optimizer: The optimizer that is to go on; its learning rate is set anew at each epoch.
        needed: A module whose every parameter must have its momentum. What else is trained may lack it.

    Raises:
        ValueError: If anything differs.
    """
    if not isinstance(found, Mapping) or set(found) != {"state", "param_groups"}:
        raise ValueError("the optimizer's state must hold state and param_groups")
    wanted = optimizer.state_dict()["param_groups"]
    if not isinstance(found["param_groups"], list) or not all(isinstance(it, dict) for it in found["param_groups"]):
        raise ValueError("the optimizer's param_groups must be a list of options")
    groups = [{**group, "lr": 0.0} for group in found["param_groups"]]
    if groups != [{**group, "lr": 0.0} for group in wanted]:
        raise ValueError("the optimizer's options must be the recipe's, got others")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index in found["state"]:
        if index not in range(len(parameters)):
            raise ValueError(f"the optimizer must know {len(parameters)} parameters, got one numbered {index!r}")
    must = {id(parameter) for parameter in needed.parameters()}
    for index, parameter in enumerate(parameters):
        if index in found["state"] or id(parameter) in must:
            momentum = {"momentum_buffer": parameter}
            check_tensors(found["state"].get(index, {}), momentum, f"optimizer's state of parameter {index}")


def check_random(found: Any, wanted: Mapping[str, Tensor | None]) -> None:
    """Refuse what no generator of random numbers can go on from.

    Args:
        found: What was read.
        wanted: States of the generators, by name; None where there is none on this device.

    Raises:
        ValueError: If a state is missing or has another size.
    """
    if not isinstance(found, Mapping) or set(found) != set(wanted):
        raise ValueError(f"the random states must be those of {', '.join(wanted)}")
    check_tensors(
        {name: state for name, state in found.items() if wanted[name] is not None or state is not None},
        {name: state for name, state in wanted.items() if state is not None},
        "random states",
    )


def go_on(parts: Any, now: Mapping[str, Any], epoch: int) -> list[dict[str, Any]]:
    """Compare what a run was made with so far with what it goes on with.

    Args:
        parts: What it was made with: a dict for each part, the earliest first, with the first epoch under `"from"`.
        now: What it goes on with.
        epoch: The epoch that comes next.

    Returns:
        The parts, with one more if anything is different now.

    Raises:
        ValueError: If what the user can choose is another, or the parts are none.
    """
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) and "from" in part for part in parts):
        raise ValueError("what the run was made with must be a list of parts, each with its first epoch")
    last = parts[-1]
    for name, option in CHOSEN.items():
        if name in last and last[name] != now[name]:
            raise ValueError(
                f"{name} must be {last[name]}, as before, or the bits would be others, got {now[name]}: "
                f"give {option} {last[name]}"
            )
    if {**last, "from": 0} == {**now, "from": 0}:
        return list(parts)
    return [*parts, {**now, "from": epoch}]


def course(parts: Sequence[Mapping[str, Any]], name: str) -> str:
    """Say what a run was made with, and from which epoch on with something else.

    Args:
        parts: What `go_on` returned.
        name: A field of the parts.

    Returns:
        Such as `"2.13.0"`, or `"2.13.0, 2.14.1 from epoch 121"`.
    """
    text, before = "", None
    for part in parts:
        value = str(part.get(name, "not recorded"))
        if value != before:
            text += f", {value} from epoch {part['from']}" if text else value
        before = value
    return text
