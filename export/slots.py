"""Slots: rings of buffers for tensors kept between network calls, stamped so that nothing stale is ever read."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from export.plan_rows import Slot

Cause = Literal["missing", "stale", "shape"]
"""Why a value cannot be read: never written, written in another run or by another row, or of another shape."""

_NEVER = -1


@dataclass(slots=True)
class Entry:
    """One kept array and its stamp: the run and the row that wrote it, and its shape then."""

    array: np.ndarray = field(default_factory=lambda: np.empty(0))
    run: int = _NEVER
    row: int = _NEVER
    shape: tuple[int, ...] = ()

    def opened(self, run: int, row: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Stamp the entry; its buffer, of which nothing is known, is to be filled."""
        if self.array.shape != shape or self.array.dtype != dtype:
            self.array = np.empty(shape, dtype)
        self.run, self.row, self.shape = run, row, shape
        return self.array


class Slots:
    """The kept tensors of one run at a time; the buffers are used again, within a run and by later ones.

    Besides the `history` entries of its ring, a slot has one entry for values that the plan did not ask for: what a
    full call leaves that ran because something else was unreadable. So nothing the plan counts on is pushed out.
    """

    def __init__(self, slots: Mapping[str, Slot]) -> None:
        self._rings = {name: deque(Entry() for _ in range(slot.history)) for name, slot in slots.items()}
        self._unplanned = {name: Entry() for name in slots}
        self._tails: dict[str, tuple[int, ...]] = {}
        self.run = 0

    def begin(self) -> None:
        """Begin another run: whatever was written before is stale from here on."""
        self.run += 1
        self.resized()

    def resized(self) -> None:
        """The latent has another shape from here on."""
        self._tails.clear()

    def write(self, name: str, row: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The buffer of a new newest value, to be filled; the oldest value is forgotten.

        Args:
            name: of the slot.
            row: that writes.
            shape: of all guidance halves that the row runs, halves * samples first.
            dtype: of the value.
        """
        ring = self._rings[name]
        ring.rotate(1)
        self._tails.setdefault(name, shape[1:])
        return ring[0].opened(self.run, row, shape, dtype)

    def write_unplanned(self, name: str, row: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The buffer of a value that the plan did not ask for, to be filled; see the class."""
        self._tails.setdefault(name, shape[1:])
        return self._unplanned[name].opened(self.run, row, shape, dtype)

    def find(
        self, name: str, rows: Sequence[int], counts: Sequence[int], reuse: bool = False
    ) -> list[np.ndarray] | Cause:
        """The newest values of a slot, or why they cannot be read.

        Args:
            name: of the slot.
            rows: those that the plan says wrote the values, newest first.
            counts: the lengths of the first axis that will do.
            reuse: a single value is wanted as it is, so that an unplanned one written since will do as well.
        """
        ring, tail = self._rings[name], self._tails.get(name)
        found = []
        for at, row in enumerate(rows):
            cause = self._fault(ring[at], row, tail, counts)
            if cause is not None:
                extra = self._unplanned[name]
                if not reuse or extra.row <= row or self._fault(extra, extra.row, tail, counts) is not None:
                    return cause
                return [extra.array]
            found.append(ring[at].array)
        return found

    def forget(self, name: str) -> None:
        """Drop all values of a slot."""
        for entry in (*self._rings[name], self._unplanned[name]):
            entry.run = entry.row = _NEVER

    def _fault(self, entry: Entry, row: int, tail: tuple[int, ...] | None, counts: Sequence[int]) -> Cause | None:
        if entry.run == _NEVER:
            return "missing"
        if entry.run != self.run or entry.row != row:
            return "stale"
        return "shape" if entry.shape[0] not in counts or entry.shape[1:] != tail else None
