"""Files from elsewhere: fetched once, checked against their md5, unpacked and unpickled safely."""

from __future__ import annotations

import hashlib
import http.client
import io
import pickle
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
from tqdm import tqdm  # type: ignore[import-untyped]  # tqdm ships no types

_CHUNK = 1 << 20  # bytes read from the network at a time
_TIMEOUT = 60.0  # seconds without a byte before a connection counts as dead
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
        ValueError: The file has another md5.
    """
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
    """Read a pickle that may hold NumPy arrays and plain containers, and nothing else.

    Args:
        path: The file that the content came from, for the error.
        content: The pickle.

    Returns:
        The object in it.

    Raises:
        ValueError: The pickle asks for something else, or is cut short.
    """
    try:
        # CIFAR's files were written by Python 2, whose strings are bytes: latin1 maps them one to one.
        return _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} must be a pickle of arrays and plain containers: {error}") from error


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
                while chunk := response.read(_CHUNK):
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


class _ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays and plain containers, and refuses everything else.

    A pickle can name any function to be called; here it gets only the few that arrays are made of.
    """

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted") from None


def _dtype(code: str, align: int = 0, copy: int = 0) -> np.dtype[Any]:
    """`numpy.dtype` as a pickle calls it; old ones say 0 and 1, which NumPy 2.4.0 to 2.4.4 warn about."""
    return np.dtype(code, align=bool(align), copy=bool(copy))


def _encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode` as Python 3 uses it to put bytes into a pickle that Python 2 can read."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"_codecs.encode is admitted for latin1 only, got {encoding!r}")
    return text.encode(encoding)


_reconstruct = np.empty(0).__reduce__()[0]  # its module was renamed in NumPy 2: this finds it in both
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}
