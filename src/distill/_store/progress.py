"""How far a writer is, in one line on a terminal."""

from __future__ import annotations

import sys
import time


class Progress:
    """Writes a line over itself, at most ten times a second, if standard error is a terminal.

    Args:
        total: How many samples there will be, if that is known.
        done: How many there are already.
        shown: Whether to write; None: if standard error is a terminal.
    """

    def __init__(self, total: int | None, done: int, shown: bool | None) -> None:
        self._total, self._done, self._added = total, done, 0
        self._shown = sys.stderr.isatty() if shown is None else shown
        self._start = self._last = time.monotonic()

    def add(self, samples: int, size: int) -> None:
        """Count samples, and say how far it is.

        Args:
            samples: How many were added.
            size: How many bytes this writer has written.
        """
        self._added += samples
        now = time.monotonic()
        if self._shown and now - self._last >= 0.1:
            self._last = now
            self._write(now, size, "\r")

    def close(self, size: int) -> None:
        """Say it for the last time, and end the line."""
        if self._shown:
            self._write(time.monotonic(), size, "\r", "\n")
            self._shown = False

    def _write(self, now: float, size: int, start: str, end: str = "") -> None:
        done = self._done + self._added
        share = f" of {self._total:,} ({done / max(self._total, 1):.0%})" if self._total is not None else ""
        rate = self._added / max(now - self._start, 1e-9)
        sys.stderr.write(f"{start}{done:,}{share} samples, {size / 1e6:,.1f} MB written, {rate:,.0f} samples/s  {end}")
        sys.stderr.flush()
