"""The engine: one training step after the other, on CUDA as one replayed graph that nothing on the host holds up."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import Literal

import torch
from torch import Tensor, nn

from cifar.data import Dataset
from cifar.losses import make_target
from cifar.steps import EpochMeter, load_batch, train_step

Mode = Literal["eager", "graph", "compile"]

MODES: dict[Mode, str] = {
    "eager": "operations one by one",
    "graph": "the whole step as one CUDA graph",
    "compile": "networks and losses through torch.compile, on CUDA inside a graph of the whole step",
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and numbers of GNU's malloc.h
WARM_UP = 3  # steps before a capture: kernels are chosen, and what is made on first use is made


def find_mode(name: str, device: torch.device) -> Mode:
    """Return the mode to train in.

    Args:
        name: `"auto"` (a graph on CUDA, eager elsewhere) or one of `MODES`.
        device: The device to train on.

    Returns:
        The mode.

    Raises:
        ValueError: If the device has no such mode.
    """
    if name == "auto":
        return "graph" if device.type == "cuda" else "eager"
    if name == "graph" and device.type != "cuda":
        raise ValueError(f"a graph needs a CUDA device, got {device}")
    for mode in MODES:
        if mode == name:
            return mode
    raise ValueError(f"the mode must be one of {', '.join(MODES)}, got {name!r}")


def keep_freed_memory() -> None:
    """Let this process keep the memory that a step frees, for the next one; with GNU's C library only.

    It would give most of it back to the system after each backward pass, and take it anew, page by page, in the next
    step. What is computed stays the same, bit by bit.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that all versions take: no map of a step is that large
        mallopt(M_TRIM_THRESHOLD, -1)  # never


class Engine:
    """Takes training steps: augmentation, teacher, student, losses, backward, optimizer and sums.

    The model is the library's `Distiller` (or a `CrossEntropy`) as it stands: it is compiled and captured from outside.

    Attributes:
        meter: The sums of the epoch.
        images: Images trained in this epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: Dataset,
        generator: torch.Generator,
        *,
        batch_size: int,
        precision: str,
        mode: Mode,
        indices: bool = False,
    ) -> None:
        """Prepare the steps; nothing is compiled or captured before the first one.

        Args:
            model: A `Distiller` or a `CrossEntropy`.
            optimizer: Holds the parameters to train. Changing its learning rate is all right, also between steps.
            data: The data set, on the device to train on.
            generator: Source of the augmentation, on that device.
            batch_size: Images per step.
            precision: `"float32"`, or `"bfloat16"` for autocast.
            mode: What `find_mode` returned.
            indices: Whether the model's target holds the images' places in the training set beside their labels.
        """
        device = data.train_images.device
        self.meter = EpochMeter(device)
        self.images = 0
        self._model = model
        self._called: nn.Module = model
        if mode == "compile":
            self._called = torch.compile(model)  # type: ignore[assignment]  # a module, which torch does not say
        self._optimizer = optimizer
        self._data = data
        self._generator = generator
        self._precision = precision
        self._indices = indices
        self._index = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._captures = mode != "eager" and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured_lr: list[float] = []

    def start_epoch(self) -> None:
        """Put the model in training mode and the sums to zero."""
        self._model.train()
        self.meter.reset()
        self.images = 0

    def step(self, index: Tensor) -> None:
        """Train on one batch; on CUDA the host does not wait for it.

        Args:
            index: Indices of training images, `(batch_size,)`.
        """
        self._index.copy_(index)
        self.images += len(index)
        if not self._captures:
            self._take()
            return
        lr = [group["lr"] for group in self._optimizer.param_groups]
        if self._graph is None or lr != self._captured_lr:
            # The learning rate is a constant of the graph. It changes twice in a run.
            self._graph, self._captured_lr = self._capture(), lr
        self._graph.replay()

    def _take(self) -> None:
        images, labels = load_batch(self._data, self._index, self._generator)
        target = make_target(labels, self._index, indices=self._indices)
        self.meter.update(train_step(self._called, self._optimizer, images, target, self._precision), labels)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Record a step without taking one: what the warm-up changes is put back."""
        device = self._index.device
        kept = _Snapshot(self._model, self._optimizer, self._generator, self.meter)
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._take()
        torch.cuda.current_stream(device).wait_stream(side)
        kept.restore(self.meter)
        self._optimizer.zero_grad()  # so that the gradients are made in the graph's own memory
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        try:
            with torch.cuda.graph(graph):
                self._take()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"a step must be fit for a CUDA graph, where nothing waits for the device, got: {reason}; "
                "--engine eager runs it without one"
            ) from error
        return graph


class _Snapshot:
    """What a step changes, kept to be put back in place: a graph knows tensors by their memory."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator, meter: EpochMeter
    ) -> None:
        self._tensors = [(tensor, tensor.clone()) for tensor in (*model.parameters(), *model.buffers())]
        self._optimizer = optimizer
        self._state = {
            (parameter, name): value.clone()
            for parameter, values in optimizer.state.items()
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        self._generator = generator
        self._random = generator.get_state(), torch.get_rng_state()
        self._cuda_random = torch.cuda.get_rng_state(generator.device) if generator.device.type == "cuda" else None
        self._sums = [tensor.clone() for tensor in meter.tensors()]

    @torch.no_grad()
    def restore(self, meter: EpochMeter) -> None:
        for tensor, value in self._tensors:
            tensor.copy_(value)
        for parameter, values in self._optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    # A buffer that the first step made starts at zero: SGD's momentum is then the gradient, as in a
                    # first step without one.
                    before = self._state.get((parameter, name))
                    value.zero_() if before is None else value.copy_(before)
        self._generator.set_state(self._random[0])
        torch.set_rng_state(self._random[1])
        if self._cuda_random is not None:
            torch.cuda.set_rng_state(self._cuda_random, self._generator.device)
        for tensor, value in zip(meter.tensors(), self._sums, strict=True):
            tensor.copy_(value) if tensor.shape == value.shape else tensor.zero_()
