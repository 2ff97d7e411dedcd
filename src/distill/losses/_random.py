"""What losses that draw random numbers share."""

from typing import Any

import torch
from torch import nn
from typing_extensions import override


def drawing(generator: torch.Generator | None, device: torch.device) -> dict[str, Any]:
    """Where `torch.rand` and its kin draw from: `generator`, or the global one of `device` where that is None.

    A generator of None is left out: given by name it keeps `torch.compile` from tracing sizes that change.
    """
    return {"device": device} if generator is None else {"generator": generator, "device": generator.device}


class RandomLoss(nn.Module):
    """A loss that draws from `generator`, or from the global one where that is None.

    A copy of it, by `deepcopy` or `pickle`, gets a generator of its own in the same state. Not every version of torch
    can copy or pickle a generator: its device and state stand in for it.
    """

    generator: torch.Generator | None

    @override
    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.generator is not None:
            state["generator"] = (str(self.generator.device), self.generator.get_state())
        return state

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if self.generator is not None:
            device, numbers = state["generator"]
            self.generator = torch.Generator(device)
            self.generator.set_state(numbers)
