"""Files of a run that a kill at any moment leaves whole: written aside, then moved into place."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from cifar.records import RunResult
from cifar.settings import RunConfig


class CheckpointError(Exception):
    """A file of an earlier run cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class RunFiles:
    """The files of one run under the output folder.

    Attributes:
        checkpoint: State after the last whole epoch; there only while the run is unfinished.
        weights: The finished network.
        result: The finished run's numbers; written last, so its presence says that the run is done.
    """

    checkpoint: Path
    weights: Path
    result: Path

    @classmethod
    def of(cls, out: Path, config: RunConfig) -> RunFiles:
        """Return the files of a run.

        Args:
            out: The output folder.
            config: The run's settings.

        Returns:
            The paths, whether or not there are such files.
        """
        name = config.run_id
        return cls(out / "checkpoints" / f"{name}.pt", out / "weights" / f"{name}.pt", out / "runs" / f"{name}.json")

    def load_checkpoint(self, config: RunConfig) -> dict[str, Any] | None:
        """Return the state of the unfinished run, or None if there is none.

        Args:
            config: The settings asked for.

        Returns:
            What `save_state` was given.

        Raises:
            CheckpointError: If the file is unreadable, or was made with other settings.
        """
        return _load_state(self.checkpoint, config) if self.checkpoint.exists() else None

    def load_weights(self, config: RunConfig) -> dict[str, torch.Tensor]:
        """Return the state dict of the finished network.

        Args:
            config: The settings asked for.

        Returns:
            The state dict, on the CPU.

        Raises:
            CheckpointError: If the file is missing or unreadable, or was made with other settings.
        """
        if not self.weights.exists():
            raise CheckpointError(
                f"{self.weights} is missing although {self.result} says that the run is finished; "
                f"delete the second and run the same command again: that run starts over"
            )
        weights: dict[str, torch.Tensor] = _load_state(self.weights, config)["model"]
        return weights

    def load_result(self, config: RunConfig) -> RunResult | None:
        """Return the numbers of the finished run, or None if it is not finished.

        Args:
            config: The settings asked for.

        Returns:
            The run.

        Raises:
            CheckpointError: If a file of the run is unreadable, or was made with other settings.
        """
        if not self.result.exists():
            return None
        self.load_weights(config)
        return read_result(self.result)

    def finish(self, config: RunConfig, weights: Mapping[str, torch.Tensor], result: RunResult) -> None:
        """Write the finished network and its numbers, and drop the checkpoint.

        Args:
            config: The run's settings.
            weights: State dict of the network.
            result: The run's numbers.
        """
        save_state(self.weights, config, {"model": dict(weights)})
        self.save_result(result)
        self.checkpoint.unlink(missing_ok=True)
        for path in (self.checkpoint, self.weights, self.result):
            for leftover in path.parent.glob(f"{path.name}.*.tmp"):  # of a process killed while it wrote
                leftover.unlink()

    def save_result(self, result: RunResult) -> None:
        """Write the numbers of the finished run.

        Args:
            result: The run's numbers.
        """
        text = json.dumps(result.to_json(), indent=1) + "\n"
        write_atomically(self.result, lambda file: file.write(text.encode()))


def read_result(path: Path) -> RunResult:
    """Read the numbers of a finished run.

    Args:
        path: The run's JSON file.

    Returns:
        The run.

    Raises:
        CheckpointError: If the file is not what `RunFiles.finish` writes.
    """
    try:
        return RunResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no readable result ({error}); delete it and run the same command again: that run starts over"
        ) from error


def save_state(path: Path, config: RunConfig, state: Mapping[str, Any]) -> None:
    """Write a state and the settings that it belongs to.

    Args:
        path: The file.
        config: The run's settings.
        state: Tensors, plain containers and plain values.
    """
    write_atomically(path, lambda file: torch.save({"config": config.to_dict()} | dict(state), file))


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that whoever opens it sees the old content or the new, whole.

    Args:
        path: The file; its folder is made if need be.
        write: Writes the content into the open file that it gets.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _load_state(path: Path, config: RunConfig) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums that torch.save wrote
            if (member := archive.testzip()) is not None:
                raise ValueError(f"wrong checksum of {member}")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["config"]
        if not isinstance(found, dict):
            raise TypeError(f"its settings must be a dict, got {type(found).__name__}")
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch.load has no common class for what a damaged file raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({reason}); delete it and run the same command again: "
            f"that run starts over"
        ) from error
    wanted = config.to_dict()
    differ = [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
    if differ:
        listed = ", ".join(f"{name} is {found.get(name)!r}, asked for {wanted.get(name)!r}" for name in differ)
        raise CheckpointError(
            f"{path} belongs to a run with other settings: {listed}; ask for its settings, or give another --out"
        )
    return state
