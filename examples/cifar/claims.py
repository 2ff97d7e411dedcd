"""Who trains which run: two commands on one output folder, also on two machines, share the runs between them.

A claim is a file beside a run's checkpoint that names the process which trains it. No result depends on claims, they
save work: should two processes train one run after all, each writes whole files, and the first to finish is the one
that counts. So a claim that is wrongly taken for abandoned does no harm.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path

from cifar.files import DAY, has_ended, host, write_atomically
from cifar.settings import RunConfig

RENEWED = 20.0  # seconds after which a claim is given a new time
SILENT = 180.0  # seconds without one after which its process counts as dead; a shared folder may show it a minute late
EMPTY = 5.0  # the same for a claim without content: its process was killed between two instructions
SETTLED = 0.5  # seconds in which everybody who found a claim abandoned has written another


class Claims:
    """The claims of one command; a context manager that renews them meanwhile and gives them back at the end."""

    def __init__(self, out: Path) -> None:
        """Claim nothing yet.

        Args:
            out: The output folder.
        """
        self._folder = out / "checkpoints"
        self._id = secrets.token_hex(8)
        self._held: dict[Path, bytes] = {}
        self._watched: dict[Path, tuple[object, float]] = {}  # how a claim looked, and since when
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Claims:
        """Remove what killed commands left, and begin to renew."""
        self._clean()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give back every claim, and remove those of commands that were killed meanwhile."""
        self._end.set()
        self._thread.join()
        for path in list(self._held):
            self._drop(path)
        self._clean()

    def take(self, run: RunConfig) -> bool:
        """Claim a run, unless another command has.

        Args:
            run: The run.

        Returns:
            Whether it is claimed for this command now.
        """
        path, content = self._path(run), self._content(os.getpid())
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("xb") as file:
                file.write(content)
        except FileExistsError:
            if not self._abandoned(path):
                return False
            # Others may have found the same: all write, and the last one has it.
            write_atomically(path, lambda file: file.write(content))
            time.sleep(SETTLED)
            if _read(path) != content:
                return False
        self._held[path] = content
        return True

    def hand_over(self, run: RunConfig, pid: int) -> None:
        """Note which process trains a run, where it is not this one: the claim holds until that one has ended.

        Args:
            run: A run that `take` has claimed.
            pid: The process, one that ends with this one.
        """
        path, content = self._path(run), self._content(pid)
        write_atomically(path, lambda file: file.write(content))
        self._held[path] = content

    def release(self, run: RunConfig) -> None:
        """Give a claim back.

        Args:
            run: A run that `take` has claimed; nothing happens for others.
        """
        if (path := self._path(run)) in self._held:
            self._drop(path)

    def holder(self, run: RunConfig) -> str:
        """Say who trains a run.

        Args:
            run: The run.

        Returns:
            Such as `"process 812 on node3"`.
        """
        where, pid, _ = read_claim(_read(self._path(run)))
        return f"process {pid} on {where}" if where else "another command"

    def _path(self, run: RunConfig) -> Path:
        return self._folder / f"{run.run_id}.claim"

    def _clean(self) -> None:
        for path in self._folder.glob("*.claim"):
            if self._abandoned(path):
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _content(self, pid: int) -> bytes:
        return json.dumps({"host": host(), "pid": pid, "id": self._id}).encode()

    def _drop(self, path: Path) -> None:
        content = self._held.pop(path)
        with suppress(OSError):
            if _read(path) == content:
                path.unlink(missing_ok=True)

    def _abandoned(self, path: Path) -> bool:
        """Whether who wrote a claim is dead: known of this machine's processes, and of others by their silence.

        Only this process's clock is asked for how long: that of a shared folder may be another.
        """
        try:
            content, status = path.read_bytes(), path.stat()
        except OSError:  # given back just now
            return False
        where, pid, token = read_claim(content)
        if where == host() and (has_ended(pid) or (pid == os.getpid() and token != self._id)):
            return True
        look, now = (content, status.st_mtime_ns), time.monotonic()
        if self._watched.get(path, (None, now))[0] != look:
            self._watched[path] = look, now
        silent = now - self._watched[path][1]
        return silent > (SILENT if content else EMPTY) or time.time() - status.st_mtime > DAY

    def _renew(self) -> None:
        while not self._end.wait(RENEWED):
            for path in list(self._held):
                with suppress(OSError):
                    os.utime(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def read_claim(content: bytes) -> tuple[str, int, str]:
    """Read who holds a claim.

    Args:
        content: Of the file.

    Returns:
        The machine's name, the process's number and the command's mark; an empty name and -1 where that is not said.
    """
    try:
        said = json.loads(content)
        return str(said["host"]), int(said["pid"]), str(said["id"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return "", -1, ""
