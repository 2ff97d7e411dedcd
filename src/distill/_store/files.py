"""The files of a stored teacher: errors, JSON under a checksum, and writes that a kill cannot tear."""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

FORMAT, VERSION = "distill teacher", 1
HEADER = "teacher.json"


class StoreError(ValueError):
    """A file of a stored teacher is damaged, missing, of another version or of another teacher.

    Examples:
        >>> from distill import StoredTeacher, StoreError
        >>> try:
        ...     StoredTeacher("no/such/folder")
        ... except StoreError as error:
        ...     print(str(error)[:47])
        a stored teacher must have a file teacher.json,
    """


StoreError.__module__ = "distill"  # a pickle that names it outlives a move


def as_text(values: Mapping[str, Any]) -> str:
    """JSON in one spelling, so that equal values are equal texts."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write values with the format, the version and their checksum."""
    values = {"format": FORMAT, "version": VERSION, **values}
    values["checksum"] = zlib.crc32(as_text(values).encode())
    write_file(path, [json.dumps(values, indent=1, ensure_ascii=False).encode(), b"\n"])


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote, without format, version and checksum.

    Raises:
        StoreError: If the file is damaged, no file of a stored teacher, or of another version.
        FileNotFoundError: If there is none.
    """
    try:
        values = json.loads(path.read_bytes().decode())
    except ValueError as error:
        raise StoreError(f"{path} must be JSON, but it is damaged: {error}") from error
    check_version(path, values)
    checksum = values.pop("checksum", None)
    if checksum != zlib.crc32(as_text(values).encode()):
        raise StoreError(f"{path} must have the checksum of what it says, got {checksum}: it is damaged")
    return {name: value for name, value in values.items() if name not in ("format", "version")}


def check_version(path: Path, values: Any) -> None:
    """Raise StoreError if a file's values are not of this format and version."""
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise StoreError(f"{path} must be of the format {FORMAT!r}; it is another file, or damaged")
    if str(values.get("version")) != str(VERSION):
        raise StoreError(f"{path} must have version {VERSION} of the format, got version {values.get('version')}")


def write_file(path: Path, chunks: Iterable[Any]) -> None:
    """Write a file that is there either whole or not at all, and stays there once this returns.

    Raises:
        OSError: If it cannot be written; the message says if the disk is full. No part of it is left.
    """
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                "the disk is full: what was added since the last flush is not written but still in memory; make room "
                "and call flush() again",
                str(path),
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder last; Windows has no such call, and opens no folder."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
