"""The resident memory of this process while something runs, looked at many times a second."""

from __future__ import annotations

import threading
from types import TracebackType

INTERVAL = 0.005
"""Seconds between two looks."""


def resident_bytes() -> int:
    """Of this process, now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """A context in which the largest resident memory is kept.

    Attributes:
        bytes: the largest so far.
    """

    def __init__(self) -> None:
        self.bytes = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident_bytes())

    def _look(self) -> None:
        while not self._done.wait(INTERVAL):
            self.bytes = max(self.bytes, resident_bytes())
