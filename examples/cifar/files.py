"""Files that a kill at any moment leaves whole: written under a name of their own, then moved into place."""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

DAY = 24 * 3600.0  # seconds after which nobody still writes a file
_TEMPORARY = re.compile(r"\..+\.(?P<host>[^.]*)\.(?P<pid>\d+)\.[0-9a-f]{16}\.tmp|.+\.\d+\.tmp")  # then: format 1


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that whoever opens it sees the old content or the new, whole.

    Args:
        path: The file; its folder is made if need be.
        write: Writes the content into the open file that it gets.

    Raises:
        OSError: If it cannot be written; names the file. The old content stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(temporary_name(path.name))
    try:
        with aside.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
    """Return a name to write a file under before it takes its own; no two calls give the same, on any machine.

    Args:
        name: The file's name.

    Returns:
        A hidden name that says which process of which machine writes.
    """
    return f".{name[:120]}.{host()}.{os.getpid()}.{secrets.token_hex(8)}.tmp"


def remove_leftovers(out: Path) -> None:
    """Remove what killed processes left half written: at once those of this machine, after a day those of others.

    Args:
        out: The output folder.
    """
    for folder in (out, out / "checkpoints", out / "weights", out / "runs"):
        for path in folder.glob("*.tmp"):
            with suppress(OSError):  # another process may be quicker
                if _abandoned(path):
                    path.unlink()


def _abandoned(path: Path) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    if match is None:  # nobody's of ours
        return False
    if match["host"] == host() and has_ended(int(match["pid"])):
        return True
    return time.time() - path.stat().st_mtime > DAY


def has_ended(pid: int) -> bool:
    """Say whether a process of this machine is known to have ended.

    Args:
        pid: Its number.

    Returns:
        False also where nobody can tell: on Windows the question would end it.
    """
    if os.name != "posix" or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    # In a container often nobody asks for the exit code of what was killed: its number stays taken.
    with suppress(OSError):
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] == "Z"
        )
    return False


def host() -> str:
    """Return the name of this machine, of letters, digits and hyphens."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:60]
