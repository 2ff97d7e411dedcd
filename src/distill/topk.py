"""A teacher known by its k largest log-probabilities and one number for all the rest.

This file is the data alone. It stands below the engine, because whatever takes a teacher's logits may meet a `TopK`
instead: the rows of the engine, the Distiller, a stored teacher. How losses compute with it is `_engine/topk.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill._checks import as_constant, check_count, check_numbers, check_positive, check_tensor, is_integer, ordinary
from distill._merged import draw, in_blocks, log_probs_of, rest_of, round_rows, wide

_ROUNDED = 1e-3  # what a row may be off one, for log-probabilities that somebody printed with a few digits


@dataclass(frozen=True, eq=False, repr=False, init=False)
class TopK:
    """A teacher's k largest log-probabilities, and the log-probability of all other classes together.

    Use it in place of the teacher's logits in `kl`, `reverse_kl`, `js`, `skew_kl`, `skew_reverse_kl`, `tvd` and
    `alpha_beta`: these compare k + 1 classes, the k given ones and one for all others, in student and teacher alike.
    Where student and teacher agree the gradient is 0, which it is not if the teacher is normalised over its k classes
    and the student is left whole. With k = C it is the loss of all logits; with fewer classes it is at most that (for
    `alpha_beta` only if the exponents sum to 1).

    On a CPU the values are checked at each use. On a GPU a check has to wait for the device, so there only `check` does
    it.

    Args:
        indices: The classes, `(..., k)`, integers, different within a row, in any order.
        log_probs: Logarithms of their probabilities under softmax(logits / temperature), `(..., k)`. Any floating
            dtype. It is detached.
        log_tail: Logarithm of the probability of all other classes, `(...)`. None: what the rows leave of one, computed
            from `log_probs` as they are, so that rows in half precision sum to one as well.
        temperature: What the logits were divided by, positive and finite. A loss with another one refuses it.
        samples: How many of the last classes are draws from the rest, with replacement, each of which stands for the
            same share of it; their log-probabilities are the true ones. The others are exact, and `log_tail` is what
            they leave. Only `kl` takes these: its value and gradient are then those of all logits on average.

    Attributes:
        shape: The shape of the samples, `(...)`, without k. Indices and `reshape` act on it.

    Raises:
        TypeError: If what must be a tensor is none.
        ValueError: If shapes, dtypes or devices do not fit, or the temperature is not positive and finite.

    Examples:
        >>> import torch
        >>> from distill import KLLoss, TopK
        >>> teacher = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
        >>> topk = TopK.of(teacher, k=2)
        >>> topk.log_probs.exp(), topk.log_tail.exp()
        (tensor([[0.5000, 0.2000]]), tensor([0.3000]))
        >>> KLLoss(temperature=1.0)(teacher, topk)
        tensor(0.)
    """

    indices: Tensor
    log_probs: Tensor
    log_tail: Tensor
    temperature: float
    samples: int

    def __init__(
        self,
        indices: Tensor,
        log_probs: Tensor,
        log_tail: Tensor | None = None,
        temperature: float = 1.0,
        *,
        samples: int = 0,
    ) -> None:
        check_tensor("indices", indices)
        check_tensor("log_probs", log_probs)
        if not is_integer(indices):
            raise ValueError(f"indices must be integers, got {indices.dtype}")
        if not log_probs.is_floating_point():
            raise ValueError(f"log_probs must be floating-point, got {log_probs.dtype}")
        check_numbers("log_probs", log_probs)
        if indices.shape != log_probs.shape or indices.ndim == 0 or indices.shape[-1] == 0:
            raise ValueError(
                "indices and log_probs must have the same shape (..., k) with a k of at least 1, "
                f"got {tuple(indices.shape)} and {tuple(log_probs.shape)}"
            )
        check_count("samples", samples, least=0)
        if samples >= indices.shape[-1]:
            raise ValueError(
                f"samples must be fewer than the {indices.shape[-1]} classes, of which one is exact, got {samples}"
            )
        exact = log_probs.detach()[..., : indices.shape[-1] - samples]
        tail = rest_of(exact) if log_tail is None else check_tensor("log_tail", log_tail).detach()
        if tail.shape != indices.shape[:-1] or not tail.is_floating_point():
            raise ValueError(
                f"log_tail must be floating-point, one number a row, {tuple(indices.shape[:-1])}, "
                f"got {tail.dtype} of shape {tuple(tail.shape)}"
            )
        if not indices.device == log_probs.device == tail.device:
            raise ValueError(
                "indices, log_probs and log_tail must be on one device, "
                f"got {indices.device}, {log_probs.device} and {tail.device}"
            )
        values = {
            "indices": indices,
            "log_probs": log_probs.detach(),
            "log_tail": tail,
            "temperature": as_constant("temperature", check_positive("temperature", temperature)),
            "samples": samples,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls,
        logits: Tensor,
        k: int,
        *,
        temperature: float = 1.0,
        samples: int = 0,
        generator: torch.Generator | None = None,
    ) -> TopK:
        """The k largest of logits, and the rest as one number; optionally with classes drawn from the rest.

        Args:
            logits: `(..., C)`, the classes last; -inf is a probability of 0. They are detached.
            k: How many classes are kept, at most C.
            temperature: What the logits are divided by.
            samples: How many classes are drawn from the others, with replacement, each with its own probability among
                them. The loss is then unbiased instead of a lower bound, and noisy; only `kl` takes it.
            generator: What draws.

        Returns:
            The rows in float32, or float64 if the logits are; `.to(torch.float16)` makes them smaller.

        Raises:
            TypeError: If the logits are no tensor.
            ValueError: If they are empty or not floating-point, k is not from 1 to C, no class is left to draw from, or
                the temperature is not positive and finite.
        """
        logits = _check_logits(logits)
        classes = logits.shape[-1]
        if check_count("k", k) > classes:
            raise ValueError(f"k must be at most the number of classes, {classes}, got {k}")
        if check_count("samples", samples, least=0) and k == classes:
            raise ValueError(f"samples must have classes left to draw from, got k={k} of {classes}")
        check_positive("temperature", temperature)

        def rows(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            indices = part.topk(k, -1).indices
            log_probs, log_tail = log_probs_of(part, indices, temperature)
            if not samples:
                return indices, log_probs, log_tail
            drawn = draw(part, indices, temperature, samples, generator)
            total = torch.logsumexp(part / temperature, -1, keepdim=True)
            more = part.gather(-1, drawn) / temperature - total
            return torch.cat([indices, drawn], -1), torch.cat([log_probs, more], -1), log_tail

        indices, log_probs, log_tail = in_blocks(rows, logits)
        return cls(indices, log_probs, log_tail, temperature, samples=samples)

    def gather(self, logits: Tensor) -> TopK:
        """The same classes of other logits, and what these leave, at the same temperature.

        `TopK.of(student, k).gather(teacher)` is the teacher at the classes that the student thinks likely: what
        `reverse_kl` is about, since it weighs by the student.

        Args:
            logits: `(..., C)`, the classes last.

        Raises:
            TypeError: If the logits are no tensor.
            ValueError: If they do not fit the rows, or classes were drawn.
        """
        logits = _check_logits(logits)
        if logits.shape[:-1] != self.shape or logits.device != self.device:
            raise ValueError(
                f"logits must be (..., C) for rows of shape {tuple(self.shape)} on {self.device}, "
                f"got {tuple(logits.shape)} on {logits.device}"
            )
        if self.samples:
            raise ValueError(f"classes of other logits must not be draws from these, got samples={self.samples}")
        self.check(logits.shape[-1])

        def rows(part: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return indices, *log_probs_of(part, indices.long(), self.temperature)

        return self._like(*in_blocks(rows, logits, self.indices))

    @property
    def shape(self) -> torch.Size:
        """The shape of the samples, without k."""
        return self.log_tail.shape

    @property
    def k(self) -> int:
        """How many classes are exact."""
        return self.indices.shape[-1] - self.samples

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.indices.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `log_probs`."""
        return self.log_probs.dtype

    def __len__(self) -> int:
        return len(self.log_tail)

    def __getitem__(self, index: Any) -> TopK:
        tail = self.log_tail[index]
        whole = index if isinstance(index, tuple) else (index,)
        if any(part is Ellipsis for part in whole):  # which would take in the last dimension, too
            whole = (*whole, slice(None))
        return self._like(self.indices[whole], self.log_probs[whole], tail)

    def reshape(self, *shape: int | tuple[int, ...]) -> TopK:
        """The same rows in another shape, `reshape(-1)` as one list of them."""
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        tail = self.log_tail.reshape(sizes)  # type: ignore[arg-type]  # one tuple or integers
        full = *tail.shape, self.indices.shape[-1]
        return self._like(self.indices.reshape(full), self.log_probs.reshape(full), tail)

    def to(
        self,
        device: torch.device | torch.dtype | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> TopK:
        """The same on another device, or with `log_probs` in another dtype.

        In a narrower dtype the tail is what the rounded rows leave of one. Where that would be less than half of what
        it was, the row is rounded down, so that a tail with a probability keeps one. It stays float32 or wider.

        Args:
            device: A device, or a dtype.
            dtype: The dtype of `log_probs`, floating-point.
            non_blocking: As in `Tensor.to`.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        new = self
        if dtype is not None and dtype != self.dtype:
            if not dtype.is_floating_point:
                raise ValueError(f"dtype must be floating-point, got {dtype}")
            check_numbers("log_probs", torch.empty(0, dtype=dtype))
            narrow = torch.finfo(dtype).eps > torch.finfo(self.dtype).eps
            log_probs, tail = self.log_probs.to(dtype), self.log_tail
            if narrow:
                log_probs, tail = round_rows(self.log_probs, tail, dtype, self.k)
            new = self._like(self.indices, log_probs, tail)
        if device is None:
            return new
        tensors = new.indices, new.log_probs, new.log_tail
        return self._like(*(tensor.to(device, non_blocking=non_blocking) for tensor in tensors))

    def pin_memory(self) -> TopK:
        """The same in pinned memory; a DataLoader with `pin_memory=True` calls it."""
        return self._like(*(tensor.pin_memory() for tensor in (self.indices, self.log_probs, self.log_tail)))

    def check(self, classes: int | None = None) -> TopK:
        """Look at the values, which waits for a GPU, and return the same.

        Args:
            classes: How many there are.

        Raises:
            ValueError: If an index is no class or comes twice in a row, a value is NaN, or a row sums to more than one,
                or with its tail to something else than one; rounding in the dtype of `log_probs` is allowed for.
        """
        if self.indices.numel() == 0:
            return self
        indices, exact = self.indices.long(), self.log_probs[..., : self.k]
        low, high = (int(value) for value in indices.aminmax())
        if low < 0 or (classes is not None and high >= classes):
            must = "not negative" if classes is None else f"classes from 0 to {classes - 1}"
            raise ValueError(f"indices of a TopK must be {must}, got {low if low < 0 else high}")
        ordered = indices[..., : self.k].sort(-1).values
        twice = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
        if len(twice):
            raise ValueError(f"indices of a TopK must differ within a row, got {int(twice[0])} twice")
        exact = wide(exact)
        p = exact.exp()
        # A logarithm is rounded by so much of itself, its probability by so much of itself times that.
        rounding = (p * exact.masked_fill(p == 0, 0.0).abs()).sum(-1) * torch.finfo(self.dtype).eps
        over = p.sum(-1) - 1 - rounding
        if not bool((over <= _ROUNDED).all()):
            raise ValueError(
                "log_probs of a TopK must be logarithms of probabilities, which sum to at most one in a row, "
                f"got a row that sums to {float(p.sum(-1).max()):.6g}"
            )
        off = (p.sum(-1) + wide(self.log_tail).exp() - 1).abs() - rounding
        if not bool((off <= _ROUNDED).all()):
            raise ValueError(
                "log_probs and log_tail of a TopK must sum to one in a row, "
                f"got a row that is off by {float(off.max()):.6g}"
            )
        return self

    def rows(self, dtype: torch.dtype, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the engine takes: `log_probs` and the tail beside them, `(..., k + 1)`, and the classes as int64.

        Args:
            dtype: The dtype of the first.
            mask: Where it is 0 the row may be anything: its classes become 0.
        """
        values = torch.cat([self.log_probs.to(dtype), self.log_tail.unsqueeze(-1).to(dtype)], -1)
        indices = ordinary(self.indices).long()
        return values, indices if mask is None else indices.masked_fill((mask == 0).unsqueeze(-1), 0)

    def __repr__(self) -> str:
        samples = f", samples={self.samples}" if self.samples else ""
        return (
            f"TopK(shape={tuple(self.shape)}, k={self.k}{samples}, temperature={self.temperature}, "
            f"dtype={self.dtype}, device={str(self.device)!r})"
        )

    def _like(self, indices: Tensor, log_probs: Tensor, log_tail: Tensor) -> TopK:
        return TopK(indices, log_probs, log_tail, self.temperature, samples=self.samples)


TopK.__module__ = "distill"


def _check_logits(logits: Tensor) -> Tensor:
    logits = check_tensor("logits", logits).detach()
    if not logits.is_floating_point() or logits.ndim == 0 or logits.numel() == 0:
        raise ValueError(
            f"logits must be floating-point (..., C) and not empty, got {logits.dtype} of shape {tuple(logits.shape)}"
        )
    check_numbers("logits", logits)
    return logits
