"""What losses that draw random numbers share."""

from typing import Any

import torch


def drawing(generator: torch.Generator | None, device: torch.device) -> dict[str, Any]:
    """Where `torch.rand` and the like draw from: `generator`, or the global one of `device` where that is None.

    A generator of None is left out: given by name it keeps `torch.compile` from tracing sizes that change.
    """
    return {"device": device} if generator is None else {"generator": generator, "device": generator.device}
