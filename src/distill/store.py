"""A teacher on disk: what writes it and what reads it, and `python -m distill.store info FOLDER`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distill._store.files import VERSION, StoreError
from distill._store.fingerprint import fingerprint
from distill._store.index import Folder
from distill._store.reader import StoredTeacher
from distill._store.writer import TeacherWriter

__all__ = ["StoreError", "StoredTeacher", "TeacherWriter", "fingerprint"]


def describe(folder: Path, *, check: bool = False) -> str:
    """What is in a folder, how large it is, and of which teacher.

    Args:
        folder: The folder.
        check: Whether to read every sample and compare it with its checksum.

    Raises:
        StoreError: If a file is damaged, missing, of another version or of another teacher than the rest.
    """
    found = Folder(folder)
    header = found.header
    if check:
        for shard in found.shards:
            for row in range(len(shard.ids)):
                for number in range(len(header.parts)):
                    shard.read(row, number)
    size = sum(shard.size for shard in found.shards)
    tokens = max(sum(int(shard.lengths[at].sum()) for shard in found.shards) for at in range(len(header.parts)))
    rows = [
        ("format", f"version {VERSION}"),
        ("teacher", header.model or "not known"),
        ("samples", f"{len(found):,}, by {'a sample and a seed' if header.ids == 2 else 'a number'}"),
        ("hashes", f"of tokens or pixels {'kept' if header.tokens else 'not kept'}"),
    ]
    if tokens:
        rows.append(("tokens", f"{tokens:,}"))
    unit, count = ("token", tokens) if tokens else ("sample", len(found))
    rows.append(("bytes", f"{size:,}" + (f", {size / count:,.1f} a {unit}" if count else "")))
    for name, part in header.parts.items():
        top = (
            f", k={header.k} of {header.vocabulary:,}, temperature {header.temperature}" if part.kind == "top-k" else ""
        )
        rows.append((name, f"{part}{top}"))
    writers = len({shard.path.stem.split("-")[0] for shard in found.shards})
    rows.append(("shards", f"{len(found.shards)} of {writers} writers{', every sample as it was written' * check}"))
    if found.left:
        rows.append(
            ("left over", f"{len(found.left)} files of killed writers, which may be deleted when none is running")
        )
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those of the command line; None: of this process.

    Returns:
        0, or 1 if something is wrong with the folder.
    """
    parser = argparse.ArgumentParser(prog="python -m distill.store", description="Look at a teacher on disk.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="say what is in a folder, how large it is, and of which teacher")
    info.add_argument("folder", type=Path)
    info.add_argument("--check", action="store_true", help="read every sample and compare it with its checksum")
    options = parser.parse_args(arguments)
    try:
        sys.stdout.write(describe(options.folder, check=options.check) + "\n")
    except StoreError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
