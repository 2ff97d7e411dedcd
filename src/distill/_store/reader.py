"""A teacher that gives what was stored of another."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distill._distiller.taps import parse_path
from distill._distiller.terms import TeacherOutput
from distill._store.files import StoreError
from distill._store.fingerprint import fingerprint
from distill._store.gather import gather
from distill._store.index import Folder, Integers, as_ids
from distill._store.parts import FEATURE, OUTPUT, Batch
from distill._store.shards import Shard, spoken
from distill.topk import TopK


class StoredTeacher(nn.Module):
    """A teacher that returns the outputs which a `TeacherWriter` stored, by the ids of the samples.

    Use it in place of a live teacher: `Distiller(student, StoredTeacher(folder), ...)`, called with
    `teacher_inputs=ids`, `(ids, tokens)` or `(ids, tokens, mask)`. Paths of terms find the features that were stored
    under them. It has no parameters and nothing in its `state_dict()`. `.to()` says where its answers go and in which
    dtype; until then they are on the CPU, as stored. Copies and pickles open the folder again, so that workers of a
    `DataLoader` may read it, and refuse it where what was there has been replaced.

    Samples are read by memory map. Each is compared with its checksum when a process reads it first.

    Args:
        folder: What a `TeacherWriter` has written. What is added later is not seen.
        model: The teacher that the answers must be of: a module, whose weights are hashed, or the name it was stored
            under. None: any.
        vocabulary: The number of classes that they must be of. None: any.
        temperature: The temperature that a stored top-k must have. None: any; a loss of another one refuses it anyway.
        features: The paths of the features to read, where not all that are stored are needed. None: all.

    Raises:
        StoreError: If a file is damaged, missing, of another version or of another teacher than the rest.
        ValueError: If what is stored is of another model, vocabulary or temperature, both of which are named, or a
            feature is not stored.

    Examples:
        >>> import tempfile, torch
        >>> from distill import Distiller, KLLoss, StoredTeacher, TeacherWriter
        >>> teacher, student = torch.nn.Linear(8, 10), torch.nn.Linear(8, 10)
        >>> inputs, labels, ids = torch.randn(4, 8), torch.tensor([1, 2, 3, 4]), torch.arange(4)
        >>> folder = tempfile.mkdtemp()
        >>> with TeacherWriter(folder, model=teacher) as writer:
        ...     writer.add(ids, teacher(inputs), inputs)
        >>> live = Distiller(student, teacher, KLLoss())(inputs, labels)
        >>> stored = Distiller(student, StoredTeacher(folder), KLLoss())(inputs, labels, teacher_inputs=(ids, inputs))
        >>> torch.equal(live.loss, stored.loss)
        True
    """

    _place: Tensor

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        model: nn.Module | str | None = None,
        vocabulary: int | None = None,
        temperature: float | None = None,
        features: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self._folder = Path(folder).absolute()
        self._opened = Folder(self._folder)
        if not len(self):
            raise StoreError(f"{self._folder} must have a sample, got none: its writer had written nothing yet")
        self._check("model", model if isinstance(model, str) or model is None else fingerprint(model))
        self._check("vocabulary", vocabulary)
        self._check("temperature", temperature)
        stored = [name.removeprefix(FEATURE) for name in self._opened.header.parts if name != OUTPUT]
        for path in features or ():
            if path not in stored:
                raise ValueError(f"features must be stored, those of {stored}, got {path!r}")
        self._paths = [path for path in stored if features is None or path in features]
        self.register_buffer("_place", torch.empty(0), persistent=False)
        self._dtype: torch.dtype | None = None
        self._build()

    def __len__(self) -> int:
        return len(self._opened)

    def __contains__(self, sample: Any) -> bool:
        return bool(self._opened.find(as_ids([sample]))[1][0])

    def ids(self) -> Tensor:
        """All ids in ascending order, `(N,)`, or `(N, 2)` where they are pairs of a sample and a seed."""
        ids = torch.from_numpy(self._opened.ids)
        return ids if ids.shape[1] == 2 else ids[:, 0]

    @override
    def forward(self, ids: Any = None, tokens: Any = None, mask: Tensor | None = None, **others: Any) -> Any:
        """Give the stored outputs, and let taps see the stored features.

        Args:
            ids: Which samples, `(N,)`, or `(N, 2)` where they were stored as pairs of a sample and a seed.
            tokens: What the student sees, `(N, T)` or pixels `(N, ...)`: compared with what the teacher saw.
            mask: Which positions count, `(N, T)`, where the batch is padded: the rows of each sample go there, and the
                others are 0 (all classes alike in a `TopK`). None: shorter samples are padded at the end.
            **others: Refused: inputs of a student are no ids.

        Returns:
            A tensor or `TopK` with a first dimension of samples; None where only features are stored.

        Raises:
            KeyError: If a sample is not stored.
            ValueError: If these are no ids, or tokens, pixels or mask are not those of the stored samples.
            StoreError: If a sample's numbers are damaged.
        """
        if ids is None or others:
            got = ", ".join(others) or "nothing"
            raise TypeError(f"a stored teacher must be asked with ids (teacher_inputs=ids), got {got}")
        output, features = self.read(ids, tokens, mask)
        for path, calls in self._calls.items():
            module = self.get_submodule(path)
            for given, gave in calls:
                module(*(NotStored() if name is None else features[name] for name in (given, gave)))
        return output

    @torch.no_grad()
    def read(self, ids: Any, tokens: Any = None, mask: Tensor | None = None) -> TeacherOutput:
        """The same as a `TeacherOutput`, for `teacher_output=`: in a worker of a `DataLoader`, say.

        Args:
            ids: As for a call, and so the others.
            tokens: What the student sees.
            mask: Which positions count.

        Returns:
            The outputs, and the features by path.
        """
        if torch.compiler.is_compiling():  # reading files is nothing to compile
            read = torch.compiler.disable(self._read)  # type: ignore[no-untyped-call]  # pragma: no cover - traced
            return read(ids, tokens, mask)  # type: ignore[no-any-return]  # pragma: no cover - traced
        return self._read(ids, tokens, mask)

    def _read(self, ids: Any, tokens: Any, mask: Tensor | None) -> TeacherOutput:
        array = as_ids(ids)
        places, known = self._opened.find(array)
        if not known.all():
            there = self._opened.ids
            raise KeyError(
                f"every sample must be stored, got {spoken(array[~known][0])}, one of {int((~known).sum())} that are "
                f"not; {self._folder} has {len(there)} samples, from {spoken(there[0])} to {spoken(there[-1])}"
            )
        samples = self._opened.rows_of(places)
        batch = Batch(len(array), tokens, mask)
        self._check_hashes(array, samples, batch.hashes())
        names = list(self._opened.header.parts)
        found = {}
        for name in [OUTPUT] * (OUTPUT in names) + [FEATURE + path for path in self._paths]:
            found[name] = self._moved(gather(self._opened.header, name, names.index(name), samples, batch))
        output = found.pop(OUTPUT, None)
        return TeacherOutput(output, {name.removeprefix(FEATURE): value for name, value in found.items()})

    @override
    def extra_repr(self) -> str:
        """Show the folder and what is in it."""
        return f"{str(self._folder)!r}, samples={len(self)}"

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Without what is opened again: maps of files, and modules of a private class."""
        left_out = ("_opened", "_modules", "_calls")
        kept = {name: value for name, value in self.__dict__.items() if name not in left_out}
        return kept | {"_modules": {}, "_shards": [shard.path.stem for shard in self._opened.shards]}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {"_shards": [], **state}
        shards = state.pop("_shards")
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._opened = Folder(self._folder)
        # Writers have names of their own: with these shards it is the teacher that was asked for, with more or not.
        if gone := {*shards} - {shard.path.stem for shard in self._opened.shards}:
            raise StoreError(
                f"{self._folder} must have what it had when this StoredTeacher was opened, but {len(gone)} of "
                f"{len(shards)} shards are gone: another teacher may be there now; open it with StoredTeacher(folder)"
            )
        self._build()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredTeacher:
        """Take over a dtype only where one is asked for: `.to(device)` keeps what is stored."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        narrow, wide = (fn(self._place.new_empty(0, dtype=dtype)).dtype for dtype in (torch.float16, torch.float64))
        self._dtype = narrow if narrow == wide else self._dtype
        return self

    def _check(self, name: str, wanted: Any) -> None:
        """Raise ValueError if what is stored is of something else than what is asked for."""
        header = self._opened.header
        stored = getattr(header, name)
        output = header.parts.get(OUTPUT)
        if name == "temperature" and stored is None:  # logits and hidden states serve every temperature
            return
        if name == "vocabulary" and stored is None and output is not None and output.shape:
            stored = output.shape[-1]
        if wanted is not None and wanted != stored:
            raise ValueError(f"{name} of what is stored in {self._folder} must be {wanted!r}, got {stored!r}")

    def _check_hashes(self, ids: Integers, samples: list[tuple[Shard, int]], asked: Integers | None) -> None:
        if asked is None:
            return
        for number, (shard, row) in enumerate(samples):
            if shard.hashes is None:
                raise ValueError(f"tokens can be checked only where they were stored, got none in {self._folder}")
            if shard.hashes[row] != asked[number]:
                raise ValueError(
                    f"tokens or pixels of id {spoken(ids[number])} must be those that the teacher saw, with the hash "
                    f"{shard.hashes[row]}, got {asked[number]}; of a padded batch, give the mask as well"
                )

    def _moved(self, value: Tensor | TopK) -> Tensor | TopK:
        """On the device of `.to()`, and a tensor in its dtype; a top-k is computed with in a wider one anyway."""
        if isinstance(value, TopK):
            return value if value.device == self._place.device else value.to(self._place.device)
        return value.to(self._place.device, self._dtype or value.dtype)

    def _build(self) -> None:
        """A module for every path that has something stored, so that it can be tapped like the teacher's own."""
        # By module: for each of its calls the features of its input and its output, or None.
        self._calls: dict[str, list[list[str | None]]] = {}
        for path in self._paths:
            name, takes_input, call = parse_path(path)
            calls = self._calls.setdefault(name, [])
            calls.extend([None, None] for _ in range((call or 0) + 1 - len(calls)))
            calls[call or 0][not takes_input] = path
            module: nn.Module = self
            for part in name.split("."):
                module = module._modules.setdefault(part, Recorded())  # type: ignore[assignment]


StoredTeacher.__module__ = "distill"  # a pickle that names it outlives a move


class Recorded(nn.Module):
    """Stands at a path, and gives what is stored."""

    @override
    def forward(self, given: Any, gave: Any) -> Any:
        """What the module of the teacher was given, and gave."""
        return gave


class NotStored:
    """What a tap sees of a module of which something else is stored: its input, or another call."""
