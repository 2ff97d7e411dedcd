"""Writes a teacher's answers into a folder."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor, nn

from distill._checks import as_constant, check_count, check_count_or_none, check_positive
from distill._store.files import HEADER, StoreError, sync_folder, write_json
from distill._store.fingerprint import fingerprint
from distill._store.header import Header, check_same, settle_header
from distill._store.index import Bools, Folder, Integers, as_ids
from distill._store.parts import DTYPES, OUTPUT, Batch, found_in, stored_tensor, stored_topk
from distill._store.progress import Progress
from distill._store.shards import Stored, spoken, write_shard
from distill.topk import TopK


class TeacherWriter:
    """Writes a teacher's outputs into a folder, sample by sample, for `StoredTeacher` to read.

    Samples added before `flush()` returned are safe, whatever happens to the process. To go on after a kill, open the
    folder again with the same options and add the samples that `missing` names. Several processes may write into one
    folder, each with its own writer.

    Args:
        folder: Where to write; made if it is not there.
        k: Store the k largest log-probabilities of the logits and one number for the rest (`TopK`): 4 k + 4 bytes a
            row, k / 8 more for a vocabulary above 65,536, 2 k more above 131,072. None: store what `add` is given.
        temperature: Of the top-k: what the logits are divided by.
        model: The teacher, whose weights are hashed, or a name of yours for it (a served model and its version). It is
            kept, so that answers of another teacher can be refused.
        vocabulary: The number of classes. Known where k is given and logits are added; must be given for a `TopK`.
        dtype: What tensors are stored in, float16, bfloat16 or float32. None: what they come in.
        shard_bytes: `add` calls `flush` by itself when so much has been added.
        total: How many samples there will be, for the progress line.
        progress: Whether to write that line; None: if standard error is a terminal.

    Raises:
        ValueError: If an option is out of range, or the folder holds something that was written with other options.
        TypeError: If the model is neither a module nor a name.
        StoreError: If a file in the folder is damaged, missing or of another version.
        ImportError: If safetensors is not installed: `pip install "distill[store]"`.

    Examples:
        >>> import tempfile, torch
        >>> from distill import StoredTeacher, TeacherWriter
        >>> teacher, inputs = torch.nn.Linear(8, 100), torch.randn(4, 8)
        >>> folder = tempfile.mkdtemp()
        >>> with TeacherWriter(folder, k=10, model=teacher) as writer:
        ...     writer.add([0, 1, 2, 3], teacher(inputs))
        >>> StoredTeacher(folder)([2, 0])
        TopK(shape=(2,), k=10, temperature=1.0, dtype=torch.float16, device='cpu')
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        k: int | None = None,
        temperature: float = 1.0,
        model: nn.Module | str | None = None,
        vocabulary: int | None = None,
        dtype: torch.dtype | None = None,
        shard_bytes: int = 2**27,
        total: int | None = None,
        progress: bool | None = None,
    ) -> None:
        try:
            import safetensors  # noqa: F401 - said here, not after the first hours
        except ImportError as error:
            raise ImportError('TeacherWriter needs safetensors: pip install "distill[store]"') from error
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
        self.folder = Path(folder).absolute()  # a process may change its directory
        self._k = check_count_or_none("k", k)
        self._temperature = float(as_constant("temperature", check_positive("temperature", temperature)))
        self._vocabulary = check_count_or_none("vocabulary", vocabulary)
        self._model = model if isinstance(model, str) or model is None else fingerprint(model)
        self._dtype = dtype
        self._shard_bytes = check_count("shard_bytes", shard_bytes)
        self.folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder.parent)
        self._there = self._open()
        self._header = None if self._there is None else self._there.header
        self._check_options()
        # Nobody else has this name: no other process, and no run before.
        self._name, self._shards, self._size, self._process = uuid4().hex[:12], 0, 0, os.getpid()
        self._added: set[bytes] = set()
        self._waiting: list[tuple[Integers, Integers | None, dict[str, Stored]]] = []
        self._waiting_size = 0
        self._closed = False
        self._progress = Progress(total, len(self), progress)

    def __len__(self) -> int:
        return len(self._added) + (0 if self._there is None else len(self._there))

    def __enter__(self) -> TeacherWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def missing(self, ids: Any) -> Tensor:
        """Which samples are not stored yet, neither by this writer nor in the folder when it was opened.

        Args:
            ids: As for `add`.

        Returns:
            `(N,)`, bool.

        Raises:
            ValueError: If these are no ids.
        """
        return torch.from_numpy(~self._known(as_ids(ids)))

    @torch.no_grad()
    def add(self, ids: Any, output: Any, tokens: Any = None, *, mask: Tensor | None = None) -> None:
        """Add what the teacher gave for some samples.

        Args:
            ids: Which samples: integers `(N,)`; or pairs `(N, 2)` of a sample and the seed of its augmentation.
            output: What the teacher gave: a tensor `(N, ...)`, something with `.logits`, a `TopK` with rows for N
                samples, a list of one tensor or `TopK` for each sample, or `TeacherOutput(output, features)` with
                features by path. `(N, T, C)` are sequences, whose T may differ from call to call.
            tokens: What the teacher saw, `(N, T)` or pixels `(N, ...)`, or a list of one tensor for each sample. A hash
                of each sample is kept, so that a question with other ones can be refused.
            mask: Which positions count, `(N, T)`, the attention mask of a padded batch: the others are not stored. It
                is for all that has T positions; an encoder's states beside a decoder's logits go in as lists.

        Raises:
            ValueError: If a sample is stored already, shapes do not fit each other or what was added before, a value
                is NaN or does not fit into the dtype, or probabilities are none.
            TypeError: If something must be a tensor and is none.
            OSError: If writing fails; the message says if the disk is full. What was added stays in memory.
        """
        if self._closed:
            raise ValueError("a writer must be open, got one that was closed")
        self._check_process()
        array = as_ids(ids)
        self._check_new(array)
        batch = Batch(len(array), tokens, mask)
        hashes, topk, parts = batch.hashes(), None, {}
        vocabulary = self._vocabulary
        for name, value in found_in(output).items():
            rows, lengths = batch.rows(name, value)
            if name == OUTPUT and (self._k is not None or isinstance(rows, TopK)):
                topk, vocabulary = self._topk(rows)
                parts[name] = stored_topk(topk, lengths, vocabulary)
            elif isinstance(rows, TopK):
                raise TypeError(f"only the output may be a TopK, got one as {name}")
            else:
                if name == OUTPUT:
                    self._check_classes(rows)
                parts[name] = stored_tensor(name, rows, lengths, self._dtype)
        self._check_used(topk, parts)
        header = Header(
            model=self._model,
            vocabulary=vocabulary,
            k=None if topk is None else topk.k,
            samples=0 if topk is None else topk.samples,
            temperature=None if topk is None else topk.temperature,
            ids=array.shape[1],
            tokens=hashes is not None,
            parts={name: stored.part for name, stored in parts.items()},
        )
        if self._header is not None:
            check_same(f"what is added to {self.folder} must be like what it has", header, self._header)
        self._header = header
        self._waiting.append((array, hashes, parts))
        self._added.update(row.tobytes() for row in array)
        self._waiting_size += sum(t.nbytes for stored in parts.values() for t in stored.arrays.values())
        self._progress.add(len(array), self._size)
        if self._waiting_size >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write all that was added; once this returns it is on the disk.

        Raises:
            OSError: If writing fails; the message says if the disk is full. What was added stays in memory, and
                `flush` may be called again.
            ValueError: If another process has begun to store something else in the folder.
        """
        header = self._header
        if not self._waiting or header is None:
            return
        self._check_process()
        settle_header(self.folder, header)
        ids, hashes, parts = zip(*self._waiting, strict=True)
        whole = {name: _together([part[name] for part in parts]) for name in header.parts}
        all_hashes = np.concatenate(hashes) if header.tokens else None
        name = f"{self._name}-{self._shards:06d}"
        size = write_shard(self.folder, name, header, np.concatenate(ids), all_hashes, whole)
        write_json(self.folder / f"{self._name}.json", {"writer": self._name, "shards": self._shards + 1})
        self._shards, self._size = self._shards + 1, self._size + size
        self._waiting, self._waiting_size = [], 0

    def close(self) -> None:
        """Flush; nothing can be added afterwards."""
        self.flush()
        self._progress.close(self._size)
        self._closed = True

    def _open(self) -> Folder | None:
        """What is in the folder already."""
        if (self.folder / HEADER).exists():
            return Folder(self.folder)
        if any(self.folder.glob("*.safetensors")):
            raise StoreError(f"{self.folder} must have a file {HEADER} beside its shards: it was deleted")
        return None

    def _check_options(self) -> None:
        """Compare what was given with what the folder has, before the first answer is computed."""
        if self._header is None:
            return
        given: dict[str, Any] = {"model": self._model, "k": self._k, "vocabulary": self._vocabulary}
        if self._k is not None:
            given["temperature"] = self._temperature
        for name, value in given.items():
            stored = getattr(self._header, name)
            if value != stored and (value is not None or name == "model"):
                raise ValueError(f"{self.folder} was written with {name}={stored!r}, got {value!r}")

    def _check_process(self) -> None:
        """Raise ValueError in a fork: it would write what its parent writes, under the same names."""
        if os.getpid() != self._process:
            raise ValueError("a writer must be used by the process that made it, got a fork: make one here")

    def _known(self, ids: Integers) -> Bools:
        known = np.array([row.tobytes() in self._added for row in ids])
        return known if self._there is None else known | self._there.find(ids)[1]

    def _check_new(self, ids: Integers) -> None:
        """Raise ValueError for ids that come twice or were stored before."""
        kinds, times = np.unique(ids, axis=0, return_counts=True)
        if len(kinds) < len(ids):
            raise ValueError(f"ids must differ, got {spoken(kinds[times.argmax()])} {times.max()} times")
        known = self._known(ids)
        if known.any():
            raise ValueError(
                f"a sample must be added once, got {spoken(ids[known][0])} again, one of {int(known.sum())}; "
                "missing(ids) says which are not stored yet"
            )

    def _check_used(self, topk: TopK | None, parts: dict[str, Stored]) -> None:
        """Raise ValueError for an option that would do nothing."""
        if topk is None and (self._k is not None or self._temperature != 1):
            raise ValueError(
                f"k and temperature must have an output to be of use, got k={self._k} and "
                f"temperature={self._temperature} without; logits themselves are stored as they are"
            )
        if self._dtype is not None and not any(stored.part.kind == "tensor" for stored in parts.values()):
            raise ValueError(f"dtype must have a tensor to be of use, got {self._dtype} and a top-k alone")

    def _check_classes(self, rows: Tensor) -> int:
        """How many classes logits have; raise ValueError if the vocabulary has others."""
        classes = rows.shape[-1]
        if self._vocabulary not in (None, classes):
            raise ValueError(f"logits must have the classes of the vocabulary, {self._vocabulary}, got {classes}")
        return classes

    def _topk(self, rows: Tensor | TopK) -> tuple[TopK, int]:
        """The output as a `TopK`, and how many classes there are."""
        if isinstance(rows, Tensor):
            if rows.ndim < 2:
                raise ValueError(f"with k the output must be logits (N, ..., C), got shape {tuple(rows.shape)}")
            return TopK.of(rows, self._k or 0, temperature=self._temperature), self._check_classes(rows)
        if self._vocabulary is None:
            raise ValueError("vocabulary must be given to store a TopK, which does not know it; got None")
        if rows.temperature != self._temperature or self._k not in (None, rows.k):
            raise ValueError(
                f"a TopK must have the writer's k={self._k} and temperature={self._temperature}, got k={rows.k} and "
                f"temperature={rows.temperature}"
            )
        return rows, self._vocabulary


TeacherWriter.__module__ = "distill"  # a pickle that names it outlives a move


def _together(parts: list[Stored]) -> Stored:
    """The same part of several batches."""
    first = parts[0]
    arrays = {end: torch.cat([part.arrays[end] for part in parts]) for end in first.arrays}
    lengths = [part.lengths for part in parts if part.lengths is not None]
    return Stored(first.part, arrays, np.concatenate(lengths) if lengths else None)
