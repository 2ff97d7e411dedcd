"""The terms of a Distiller in the log of a `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from typing_extensions import override


class TermLog(TrainerCallback):  # type: ignore[misc,unused-ignore]  # its types depend on the version
    """Means of the terms over the steps since the last log, as a Trainer's own loss is one.

    Steps are counted here: the number of a step says nothing of a training that was resumed or begins again.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, name: str, value: Tensor) -> None:
        """Add a term's part of a step."""
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self) -> list[tuple[str, Tensor]]:
        """The means by term since they were taken last."""
        means = [(name, value / max(self._steps, 1)) for name, value in self._sums.items()]
        self._sums, self._steps = {}, 0
        return means

    @override
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget what an earlier training, or try of a batch size, did not log."""
        self.take()

    @override
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Count a step."""
        self._steps += 1
