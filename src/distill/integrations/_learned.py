"""What learns in a Distiller beside its student, in a `transformers.Trainer`, which knows only its model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill._distiller.distiller import Distiller

_FILE = "distiller.pt"


class Learned:
    """Losses, adapters and a task loss that learn: in the optimizer, over processes, in checkpoints with the weights.

    Args:
        distiller: The Distiller.
    """

    def __init__(self, distiller: Distiller) -> None:
        self._distiller = distiller
        self._cleared_by: Any = None

    def zero_grad(self) -> None:
        """Clear the gradients; a Trainer clears the model's."""
        for parameter in self._parameters():
            parameter.grad = None

    def join(
        self, optimizer: Any, *, fresh: bool, weight_decay: float, decays: Callable[[nn.Module], Collection[str]]
    ) -> None:
        """Have the optimizer step and clear what learns.

        Args:
            optimizer: The optimizer.
            fresh: Whether it was just built, over the model alone.
            weight_decay: The Trainer's.
            decays: Gives the names of a module's parameters that it acts on: not biases and norms.

        Raises:
            ValueError: If it is the user's and does not hold what learns.
        """
        learned = [parameter for parameter in self._parameters() if parameter.requires_grad]
        if fresh and learned:
            modules = self._modules()
            names = decays(modules)
            decaying = {parameter for name, parameter in modules.named_parameters() if name in names}
            for decay, group in (
                (weight_decay, [parameter for parameter in learned if parameter in decaying]),
                (0.0, [parameter for parameter in learned if parameter not in decaying]),
            ):
                if group:
                    optimizer.add_param_group({"params": group, "weight_decay": decay})
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not held.issuperset(map(id, learned)):
            raise ValueError("the optimizer must hold what learns in the losses: build it over distiller.parameters()")
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate has wrapped it where `train` is called again
        if self._cleared_by is not inner:
            inner.register_step_post_hook(lambda *_: self.zero_grad())
            self._cleared_by = inner

    def average(self, accelerator: Any) -> None:
        """Average the gradients over the processes."""
        for parameter in self._parameters():
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")

    def save(self, folder: str) -> None:
        """Save it in a checkpoint."""
        state = {"learned": self._modules().state_dict(), "weights": dict(self._distiller.weights)}
        torch.save(state, Path(folder) / _FILE)

    def load(self, folder: str) -> None:
        """Load it from a checkpoint, if it was saved there."""
        file = Path(folder) / _FILE
        if file.is_file():
            state = torch.load(file, map_location="cpu", weights_only=True)
            self._modules().load_state_dict(state["learned"])
            self._distiller.weights.update(state["weights"])

    def _modules(self) -> nn.ModuleDict:
        """All but the student, as they are now: a task loss may be replaced."""
        children = self._distiller.named_children()
        return nn.ModuleDict({name: child for name, child in children if child is not self._distiller.student})

    def _parameters(self) -> list[nn.Parameter]:
        """Those that the student has not as well."""
        own = [*self._modules().parameters()]
        shared = {*self._distiller.student.parameters()} if own else ()  # they may be many, and this is asked each step
        return [parameter for parameter in own if parameter not in shared]
