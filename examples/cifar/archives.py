"""Files from elsewhere: fetched once, checked against their md5, unpacked and unpickled safely."""

from __future__ import annotations

import hashlib
import http.client
import io
import math
import pickle
import pickletools
import re
import shutil
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm  # type: ignore[import-untyped]  # tqdm ships no types

_CHUNK = 1 << 20  # bytes read from the network at a time
_TIMEOUT = 60.0  # seconds without a byte before a connection counts as dead
_LONGEST = 6 * 3600.0  # seconds after which a download is given up
_LARGEST = 1 << 30  # bytes; the larger of the two archives has 170 million
_STALE = 24 * 3600.0  # seconds after which no download can still be under way


@dataclass(frozen=True)
class Archive:
    """A `.tar.gz` on the web.

    Attributes:
        url: Where it is. The last part is also its file name.
        md5: Its published md5, in hexadecimal digits.
    """

    url: str
    md5: str

    @property
    def filename(self) -> str:
        """The archive's file name."""
        return self.url.rsplit("/", 1)[-1]


def read_checked(path: Path, md5: str, *, remedy: str) -> bytes:
    """Read a file whose md5 is known.

    Args:
        path: The file.
        md5: What its md5 must be, in hexadecimal digits.
        remedy: What to do about a wrong file; the error ends with it.

    Returns:
        The file's bytes: the very ones that were checked.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: The file has another md5, or is far too large to have it.
    """
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(f"{path} must have at most {_LARGEST:,} bytes, got {size:,}: it is another file; {remedy}")
    content = path.read_bytes()
    got = hashlib.md5(content, usedforsecurity=False).hexdigest()
    _check_md5(str(path), md5, got, size=f"{len(content):,}", remedy=remedy)
    return content


def fetch(archive: Archive, folder: Path, *, download: bool, progress: bool) -> None:
    """Make sure that a folder is there; where it is not, unpack it from an archive.

    The archive is looked for beside the folder and is downloaded to there if need be. Archive and folder get their
    names only once they are complete, so an interrupted call leaves neither half done.

    Args:
        archive: Holds the folder at its top level.
        folder: The folder wanted. One that is there already is left alone.
        download: Whether the archive may be downloaded.
        progress: Whether a download shows a progress bar.

    Raises:
        FileNotFoundError: Neither the folder nor the archive is there, and `download` is off.
        OSError: The archive could not be downloaded.
        ValueError: The archive has another md5, has a member that must not be unpacked, or lacks the folder.
    """
    if folder.is_dir():
        return
    path = folder.parent / archive.filename
    if not path.is_file() and not download:
        raise FileNotFoundError(f"{folder} is not there, and downloading is off. {_by_hand(archive, path)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_parts(path)
    # A name of its own for each call: two at the same time must not write to one file.
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.", suffix=".part", dir=path.parent) as part:
        if not path.is_file():
            _download(archive, Path(part) / path.name, path, progress=progress)
            (Path(part) / path.name).replace(path)
        _unpack(path, archive.md5, Path(part))
        unpacked = Path(part) / folder.name
        if not unpacked.is_dir():
            raise ValueError(f"{path} must hold the folder {folder.name} at its top level, but does not")
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker, and its folder is as good
                raise


def unpickle_arrays(path: Path, content: bytes) -> Any:
    """Read a pickle that may hold arrays of numbers and plain containers, and nothing else.

    Nothing that the pickle names is called: NumPy's functions are stood in for by markers, which only keep what they
    are given, and arrays are made of that afterwards, once it is checked.

    Args:
        path: The file that the content came from, for the error.
        content: The pickle.

    Returns:
        The object in it.

    Raises:
        ValueError: The pickle asks for something else, is cut short, or is malformed.
    """
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name not in _OPCODES or (opcode.name in _MEMO and int(argument or 0) > len(content)):
                raise pickle.UnpicklingError(f"the instruction {opcode.name} is not admitted")
        # CIFAR's files were written by Python 2, whose strings are bytes: latin1 maps them one to one.
        return _plain(_ArrayUnpickler(io.BytesIO(content), encoding="latin1").load())
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a malformed pickle raises anything
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else repr(error)
        raise ValueError(f"{path} must be a pickle of arrays and plain containers: {reason}") from error


def _check_md5(what: str, expected: str, got: str, *, size: str, remedy: str) -> None:
    if got != expected:
        raise ValueError(
            f"{what} must have the md5 {expected}, got {got} ({size} bytes): "
            f"it is truncated, damaged or another file; {remedy}"
        )


def _by_hand(archive: Archive, path: Path) -> str:
    return f"To do without the download, put {archive.url} (md5 {archive.md5}) at {path}; it is unpacked from there"


def _remove_stale_parts(path: Path) -> None:
    """Remove what earlier calls left when they were killed."""
    for part in path.parent.glob(f"{path.name}.*.part"):
        with suppress(FileNotFoundError):  # another process has just finished with it
            if time.time() - part.stat().st_mtime > _STALE:
                shutil.rmtree(part, ignore_errors=True)


def _download(archive: Archive, part: Path, path: Path, *, progress: bool) -> None:
    """Download to `part` and check the md5; `path` is where the caller will move it."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(archive.url, timeout=_TIMEOUT) as response, part.open("wb") as file:
            size = response.headers["Content-Length"]
            total = int(size) if size else None
            with tqdm(
                desc=archive.filename, total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=not progress
            ) as bar:
                # read1 returns what has come: read would wait for a whole chunk, however slowly it trickles in.
                received_bytes, end = 0, time.monotonic() + _LONGEST
                while chunk := response.read1(_CHUNK):
                    received_bytes += len(chunk)
                    if received_bytes > _LARGEST:
                        raise OSError(f"it must have at most {_LARGEST:,} bytes, and has more")
                    if time.monotonic() > end:
                        raise OSError(f"it must come within {_LONGEST / 3600:g} hours, got {received_bytes:,} bytes")
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{archive.url} could not be downloaded: {error!r}. {_by_hand(archive, path)}") from error
    received = f"{part.stat().st_size:,}" + (f" of {total:,}" if total else "")
    remedy = f"nothing of it is kept. {_by_hand(archive, path)}"
    _check_md5(f"the download of {archive.url}", archive.md5, digest.hexdigest(), size=received, remedy=remedy)


def _unpack(path: Path, md5: str, into: Path) -> None:
    content = read_checked(path, md5, remedy="remove it to have it downloaded anew")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
        members = _plain_members(tar, path)
        if hasattr(tarfile, "data_filter"):
            tar.extractall(into, members, filter="data")
        else:  # Python 3.10 before 3.10.12
            tar.extractall(into, members)


def _plain_members(tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The archive's members, as long as each is a file or a folder that stays inside."""
    for member in tar:
        # The Windows rules know both kinds of slash and drive letters, so they cover every system.
        name = PureWindowsPath(member.name)
        if name.anchor or ".." in name.parts or not (member.isfile() or member.isdir()):
            raise ValueError(
                f"{path} must hold only files and folders that stay inside it, got the member {member.name!r} "
                f"(tar type {member.type!r}); nothing of it is kept"
            )
        yield member


class _Marker:
    """Stands for a function that a pickle names, and only keeps what it is called with."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any) -> Any:
        if self.name == "encode":  # as Python 3 puts bytes into a pickle that Python 2 can read
            if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] != "latin1":
                raise pickle.UnpicklingError(f"_codecs.encode is admitted for latin1 only, got {arguments[-1]!r}")
            return arguments[0].encode("latin1")
        if self.name == "ndarray":
            raise pickle.UnpicklingError("a call of numpy.ndarray is not admitted")
        return _Kept(self.name, arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"a state of {self.name} is not admitted")


class _Kept:
    """What a marker was called with, and the state that followed."""

    __slots__ = ("arguments", "name", "state")
    state: Any

    def __init__(self, name: str, arguments: Any) -> None:
        self.name, self.arguments, self.state = name, arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ArrayUnpickler(pickle.Unpickler):
    """Gives a pickle markers for the few functions that arrays are made of, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _Marker(_ADMITTED[module, name])
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted") from None


def _plain(value: Any, depth: int = 0) -> Any:
    """Replace what was kept by arrays; refuse what is neither that nor plain."""
    if depth > 8:
        raise pickle.UnpicklingError("containers may be nested 8 deep")
    if isinstance(value, _Kept):
        return _array(value)
    if type(value) is dict:
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, depth + 1) for item in value)
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise pickle.UnpicklingError(f"{type(value).__name__} is not admitted")


def _array(kept: _Kept) -> npt.NDArray[Any]:
    """Make the array that NumPy pickles as a call of `_reconstruct` and a state."""
    if kept.name != "_reconstruct" or type(kept.state) is not tuple or len(kept.state) != 5:
        raise pickle.UnpicklingError("an array must be a call of _reconstruct with its state of 5")
    shape, dtype, fortran, content = kept.state[1:]
    if not isinstance(dtype, _Kept) or dtype.name != "dtype" or type(dtype.state) is not tuple:
        raise pickle.UnpicklingError("an array must have a dtype")
    code, order = dtype.arguments[0], dtype.state[1]
    if type(code) is not str or not re.fullmatch(r"b1|[iu][1248]|f[248]", code) or order not in ("<", ">", "|", "="):
        raise pickle.UnpicklingError(f"an array must be of numbers, got the dtype {code!r} {order!r}")
    if type(shape) is not tuple or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
        raise pickle.UnpicklingError(f"an array must have a shape of sizes, got {shape!r}")
    if type(content) is str:  # of Python 2
        content = content.encode("latin1")
    kind = np.dtype(code).newbyteorder(order)
    if type(content) is not bytes or len(content) != math.prod(shape) * kind.itemsize:
        raise pickle.UnpicklingError(f"an array of shape {shape!r} must have as many bytes")
    return np.frombuffer(content, kind).reshape(shape, order="F" if fortran else "C")


_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): "_reconstruct",
    ("numpy._core.multiarray", "_reconstruct"): "_reconstruct",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
}
_MEMO = {"PUT", "BINPUT", "LONG_BINPUT"}
# What builds plain containers, and the two that arrays take: a call and a state.
_CONTAINERS = """
    PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT LONG BININT BININT1 BININT2 LONG1 LONG4 FLOAT
    BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES
    BINBYTES8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS
    MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD
"""
_OPCODES = _MEMO.union(_CONTAINERS.split())
