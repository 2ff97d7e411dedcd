"""The files of a run: its checkpoint, its network and its numbers; what is wrong with one is named."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import distill
from cifar.files import write_atomically
from cifar.records import RunResult
from cifar.settings import RunConfig
from cifar.states import identity

FORMAT = 2  # of checkpoints and weights; those of format 1 do not say so, and can be read
FIELDS = {
    "checkpoint": ({"model", "optimizer", "random", "history", "start_time"}, {"revision", "parts", "teacher"}),
    "weights": ({"model"}, set[str]()),
}  # those that must be there, and those that may


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
        try:
            return _load_state(self.checkpoint, config, "checkpoint")
        except FileNotFoundError:  # also if another command has just finished the run
            return None

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
        weights: dict[str, torch.Tensor] = _load_state(self.weights, config, "weights")["model"]
        with unusable(self.weights):
            if not isinstance(weights, dict) or not all(isinstance(it, torch.Tensor) for it in weights.values()):
                raise ValueError("its network must be a dict of tensors")
        return weights

    def load_result(self, config: RunConfig) -> RunResult | None:
        """Return the numbers of the finished run, or None if it is not finished.

        Args:
            config: The settings asked for.

        Returns:
            The run.

        Raises:
            CheckpointError: If a file of the run is unreadable, or was made with other settings, or if the student's
                teacher is not the network that lies there now.
        """
        if not self.result.exists():
            return None
        weights = self.load_weights(config)
        result = read_result(self.result)
        wanted = {"method": config.label, "dataset": config.dataset, "seed": config.seed, "nepoch": config.epochs}
        wanted |= {"student": f"resnet{config.student}", "recipe": config.recipe.name}
        wanted |= {"teacher": config.teacher_name, "weight": config.weight}
        for name, value in wanted.items():
            if getattr(result, name) != value:
                raise CheckpointError(
                    f"{self.result} belongs to another run: {name} is {getattr(result, name)!r}, must be {value!r}; "
                    "delete it and run the same command again: that run starts over"
                )
        if result.identity not in ("-", identity(weights)):
            raise CheckpointError(
                f"{self.weights} is not the network whose numbers {self.result} holds; delete both and run the same "
                "command again: that run starts over"
            )
        if config.teacher is not None:
            teacher = config.teacher_config()
            theirs = RunFiles.of(self.result.parent.parent, teacher)
            if theirs.weights.exists():
                check_teacher(self.result, result.taught_by, theirs.weights, theirs.load_weights(teacher))
        with suppress(OSError):
            self.checkpoint.unlink(missing_ok=True)  # of a process killed at the very end
        return result

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
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no readable result ({error}); delete it and run the same command again: that run starts over"
        ) from error


def check_teacher(path: Path, taught_by: str | None, where: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse to go on under another teacher than the one before.

    Args:
        path: The student's file.
        taught_by: The identity of its teacher, as the file has it; None or `"-"` if it has none.
        where: The teacher's file.
        weights: The teacher.

    Raises:
        CheckpointError: If it is another.
    """
    if taught_by not in (None, "-", identity(weights)):
        raise CheckpointError(
            f"{path} belongs to a student of another teacher than {where}; put the old teacher back, or delete the "
            "first and run the same command again: that run starts over"
        )


@contextmanager
def unusable(path: Path) -> Iterator[None]:
    """Name the file whose content cannot be used, whatever that raises.

    Args:
        path: The file.

    Raises:
        CheckpointError: In place of any error but one of the system.
    """
    try:
        yield
    except (OSError, MemoryError, CheckpointError):
        raise
    except Exception as error:  # PyTorch has no common class for what damaged content raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({reason}); delete it and run the same command again: "
            f"that run starts over"
        ) from error


def save_state(path: Path, config: RunConfig, state: Mapping[str, Any]) -> None:
    """Write a state and the settings that it belongs to.

    Args:
        path: The file.
        config: The run's settings.
        state: Tensors, plain containers and plain values.
    """
    made_by = {"config": config.to_dict(), "format": FORMAT, "library": distill.__version__}
    content = io.BytesIO()  # PyTorch's writer hides why the system refused a write
    torch.save(made_by | dict(state), content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def _load_state(path: Path, config: RunConfig, kind: str) -> dict[str, Any]:
    content = io.BytesIO(path.read_bytes())  # from here on, what fails is the content and not the system
    with unusable(path):
        try:
            with zipfile.ZipFile(content) as archive:  # torch.load does not compare the checksums that torch.save wrote
                if (member := archive.testzip()) is not None:
                    raise ValueError(f"wrong checksum of {member}")
            content.seek(0)
            state: dict[str, Any] = torch.load(content, map_location="cpu", weights_only=True)
        except OSError as error:  # a damaged length may point outside
            raise ValueError(str(error)) from error
        _check_fields(state, *FIELDS[kind])
        found = state["config"]
        if not isinstance(found, dict):
            raise TypeError(f"its settings must be a dict, got {type(found).__name__}")
    wanted = config.to_dict()
    differ = [name for name in sorted(wanted.keys() | found.keys(), key=str) if wanted.get(name) != found.get(name)]
    if differ:
        listed = ", ".join(f"{name} is {found.get(name)!r}, asked for {wanted.get(name)!r}" for name in differ)
        raise CheckpointError(
            f"{path} belongs to a run with other settings: {listed}; ask for its settings, or give another --out"
        )
    with unusable(path):
        missing = FIELDS[kind][0] - state.keys()
        if missing:
            raise ValueError(f"it must hold {', '.join(sorted(missing))}")
    return state


def _check_fields(state: Any, needed: Collection[str], optional: Collection[str]) -> None:
    if not isinstance(state, dict) or "config" not in state:
        raise TypeError("it must be a dict with the run's settings")
    written = state.get("format", 1)
    if not isinstance(written, int) or not 1 <= written <= FORMAT:
        raise ValueError(
            f"its format must be one of 1 to {FORMAT}, got {written!r}, of distill {state.get('library')}: "
            "a newer version can read it"
        )
    known = {"config", "format", "library", *needed, *optional}
    if unknown := [name for name in state if name not in known]:
        raise ValueError(f"it must hold nothing unknown, got {unknown[0]!r}")
