"""One shard: a safetensors file with samples, an index of them, and checksums of every byte."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill._store.files import FORMAT, VERSION, StoreError, check_version, write_file
from distill._store.header import Header, Part, check_same
from distill._store.packing import Array

NAME = re.compile(r"(?P<writer>[0-9a-f]{12})-(?P<number>\d{6})")
_ENDS = {"tensor": ("",), "top-k": ("/indices", "/indices_high", "/log_probs", "/log_tail")}
_CHECKSUM = re.compile(rb'"checksum":"([0-9a-f]{8})"')
# What the bytes are read as: they are only copied, so that all floats of 16 bits are alike.
_KINDS = {"U8": "u1", "U16": "<u2", "F16": "<u2", "BF16": "<u2", "I32": "<i4", "U32": "<u4", "F32": "<u4", "I64": "<i8"}


class Stored(NamedTuple):
    """One part of some samples, as it goes into a shard.

    Attributes:
        part: What it is.
        arrays: The rows of all samples, by the end of the array's name.
        lengths: How many rows each sample has; None: one each.
    """

    part: Part
    arrays: dict[str, Tensor]
    lengths: np.ndarray[Any, np.dtype[np.int64]] | None


def write_shard(
    folder: Path, name: str, header: Header, ids: Array, hashes: Array | None, parts: Mapping[str, Stored]
) -> int:
    """Write samples as one shard, and return its size in bytes.

    Args:
        folder: The folder.
        name: The shard's name: the writer's, and its number.
        header: The header, which the shard repeats.
        ids: `(N, 1)` or `(N, 2)`, int64.
        hashes: `(N,)`, int64, of tokens or pixels.
        parts: All that the header names, in its order.
    """
    from safetensors.torch import save

    index = {"ids": ids} if hashes is None else {"ids": ids, "hashes": hashes}
    index |= {f"lengths/{part}": stored.lengths for part, stored in parts.items() if stored.lengths is not None}
    index["crc32"] = np.stack([_checksums(stored, len(ids)) for stored in parts.values()], 1)
    tensors = {f"index/{key}": torch.from_numpy(np.ascontiguousarray(array)) for key, array in index.items()}
    of_index = _crc(tensors[key].numpy() for key in sorted(tensors))
    for part, stored in parts.items():
        for end, tensor in stored.arrays.items():
            tensors[part + end] = tensor.view(torch.uint16) if tensor.dtype == torch.int16 else tensor
    about = {"format": FORMAT, "version": str(VERSION), "shard": name, "header": header.text()}
    data = memoryview(save(tensors, metadata={**about, "index": f"{of_index:08x}", "checksum": "0" * 8}))
    start = 8 + int.from_bytes(data[:8], "little")
    head = bytes(data[8:start])
    head = head.replace(b'"checksum":"00000000"', b'"checksum":"%08x"' % zlib.crc32(head))
    write_file(folder / f"{name}.safetensors", [data[:8], head, data[start:]])
    return len(data)


class Shard:
    """A shard in memory, by memory map: its index was checked, each sample is when it is read first.

    Attributes:
        path: Where it is.
        size: Its bytes.
        ids: `(N, 1)` or `(N, 2)`.
        hashes: `(N,)`, or None.
        checksums: `(N, parts)`.
        lengths: For each part `(N,)`, or empty where samples have none.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.size, table, about, data = _mapped(path)
        if about.get("shard") != path.stem:
            raise StoreError(f"{path} must be the shard {path.stem}, got the content of {about.get('shard')}")
        if about.get("header") != header.text():
            other = Header.of(json.loads(about["header"]))
            check_same(f"{path} must be of the teacher of its folder", other, header, StoreError)
        arrays = {name: _array(data, **entry) for name, entry in table.items()}
        if f"{_crc(arrays[key] for key in sorted(arrays) if key.startswith('index/')):08x}" != about["index"]:
            raise StoreError(f"{path} must have the checksum of its index, got another: it is damaged")
        self.ids, self.hashes = arrays["index/ids"], arrays.get("index/hashes")
        self.checksums = arrays["index/crc32"]
        self._good = np.zeros(self.checksums.shape, dtype=bool)
        self._names = list(header.parts)
        self._arrays = [
            [arrays[name + end] for end in _ENDS[part.kind] if name + end in arrays]
            for name, part in header.parts.items()
        ]
        none = np.zeros(0, np.int64)
        self.lengths = [arrays.get(f"index/lengths/{name}", none) for name in self._names]
        self._ends = [np.cumsum(lengths) if len(lengths) else None for lengths in self.lengths]

    def read(self, row: int, number: int) -> list[Array]:
        """The arrays of one part of one sample, views of the file.

        Args:
            row: Which sample of the shard.
            number: Which part, counted in the header's order.

        Raises:
            StoreError: If they are not what was written.
        """
        ends = self._ends[number]
        first, last = (row, row + 1) if ends is None else (int(ends[row - 1]) if row else 0, int(ends[row]))
        pieces = [array[first:last] for array in self._arrays[number]]
        if not self._good[row, number]:
            found, wanted = _crc(pieces), int(self.checksums[row, number])
            if found != wanted:
                raise StoreError(
                    f"{self.path}: the {self._names[number]} of id {spoken(self.ids[row])} must have the checksum "
                    f"{wanted:08x}, got {found:08x}: it is damaged"
                )
            self._good[row, number] = True
        return pieces


def _mapped(path: Path) -> tuple[int, dict[str, Any], dict[str, str], Array]:
    """The size of a shard, its table of arrays, what it says of itself, and the bytes of the arrays."""
    size = path.stat().st_size
    # A private map that keeps no file open: there may be more shards than a process may have files.
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy() if size else np.empty(0, "u1")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    head = data[8:start].tobytes()
    try:
        table = json.loads(head)
    except ValueError as error:
        raise StoreError(f"{path} must be a safetensors file, but it is torn or damaged, {size} bytes") from error
    about: Any = table.pop("__metadata__", None) if isinstance(table, dict) else None
    check_version(path, about)
    checksum = _CHECKSUM.search(head)
    if checksum is None or zlib.crc32(head.replace(checksum[0], b'"checksum":"00000000"')) != int(checksum[1], 16):
        raise StoreError(f"{path} must have the checksum of its header, got another: it is damaged")
    wanted = start + max(entry["data_offsets"][1] for entry in table.values())
    if size != wanted:
        raise StoreError(f"{path} must have {wanted} bytes, got {size}: it is torn")
    return size, table, about, data[start:]


def _array(data: Array, dtype: str, shape: list[int], data_offsets: list[int]) -> Array:
    return data[slice(*data_offsets)].view(_KINDS[dtype]).reshape(shape)


def _checksums(stored: Stored, samples: int) -> Array:
    """One for each sample of a part."""
    ends = range(1, samples + 1) if stored.lengths is None else np.cumsum(stored.lengths).tolist()
    arrays = [bits(tensor) for tensor in stored.arrays.values()]
    found, first = [], 0
    for last in ends:
        found.append(_crc(array[first:last] for array in arrays))
        first = last
    return np.array(found, dtype=np.uint32)


def spoken(sample: Array) -> Any:
    """An id as people write it: a number, or a pair."""
    return sample.tolist() if len(sample) > 1 else int(sample[0])


def bits(tensor: Tensor) -> Array:
    """A tensor's memory as an array: NumPy has no bfloat16."""
    plain = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.view(plain).numpy().view(f"<u{tensor.element_size()}")


def _crc(arrays: Iterable[Array]) -> int:
    found = 0
    for array in arrays:
        found = zlib.crc32(array.data, found)
    return found
