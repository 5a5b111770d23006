"""What rows read from slots and leave in them, by guidance half: forecasts, and values to forecast from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.program import Read, Row, Write
from export.slots import Cause, Slots

Tensors = dict[str, np.ndarray]
Found = Mapping[str, list[np.ndarray]]
"""Slot -> its values, newest first, as they are kept."""

NOTHING: Found = {}

# Which guidance halves a batch holds is said by its kind: `conditional`, `both`, or, where one half runs after the
# other, `unconditional` and then `conditional`.


@dataclass(frozen=True)
class Fallback:
    """A row that ran the full path because a slot could not be read."""

    row: int
    slot: str
    cause: Cause


class Memory:
    """The slots of one run."""

    def __init__(self, slots: Slots, samples: int) -> None:
        self._slots = slots
        self._samples = samples
        self._buffers: dict[Any, np.ndarray] = {}

    def resized(self) -> None:
        """The latent has another shape from here on."""
        self._buffers.clear()
        self._slots.resized()

    def found(self, at: int, row: Row) -> tuple[Found, Fallback | None]:
        """The values of all slots that a row reads, or why it cannot be run as written."""
        counts = (2 * self._samples,) if row.both else (self._samples, 2 * self._samples)
        found = {}
        for read in row.reads:
            values = self._slots.find(read.slot, read.rows, counts, reuse=read.alphas is None)
            if isinstance(values, str):
                return NOTHING, Fallback(at, read.slot, values)
            found[read.slot] = values
        return found, None

    def forecast(
        self, row: Row, read: Read, base: np.ndarray | None, found: Found, kind: str, index: np.ndarray | None = None
    ) -> np.ndarray:
        """`sum_i alphas[i] * value[i]` (+ base) of the guidance halves that run."""
        values = [self._view(value, row, kind, read.mean) for value in found[read.slot]]
        if index is not None:
            values = [value[index] for value in values]
        value = values[0]
        if read.alphas is not None:
            dtype = value.dtype if value.dtype == np.float32 else np.result_type(value, np.float32)
            total = self.buffer((read.slot, kind), value.shape, dtype)
            np.multiply(value, read.alphas[0], out=total)
            for older, alpha in zip(values[1:], read.alphas[1:], strict=True):
                term = self.buffer(("term", read.slot, kind), value.shape, dtype)
                np.multiply(older, alpha, out=term)
                np.add(total, term, out=total)
            value = total
        if base is not None:
            whole = self.buffer(("residual", read.slot, kind), value.shape, np.result_type(base, value))
            return np.add(base, value, out=whole)
        return np.array(value) if read.copied and read.alphas is None else value

    def _view(self, value: np.ndarray, row: Row, kind: str, mean: bool) -> np.ndarray:
        """Of a kept value the guidance halves that run; both may be kept where one does."""
        samples = self._samples
        if kind == "both" or len(value) == samples:
            return value
        if kind == "unconditional":
            return value[:samples]
        if mean and not row.both:
            return (value[:samples] + value[samples:]) * value.dtype.type(0.5)
        return value[samples:]

    def store(self, writes: Sequence[Write], tensors: Tensors, kind: str, at: int, row: Row, opened: Tensors) -> None:
        """Keep what a row is to write; `opened` carries its new values from one guidance half to the next."""
        for write in writes:
            value, base = tensors[write.tensor], None if write.base is None else tensors[write.base]
            if write.slot not in opened:
                planned = write.slot in row.step.write
                count = 2 * len(value) if row.halves == "sequential" else len(value)
                dtype = value.dtype if base is None else np.result_type(value, base)
                opening = self._slots.write if planned else self._slots.write_unplanned
                opened[write.slot] = opening(write.slot, at, (count, *value.shape[1:]), dtype)
            target = opened[write.slot]
            if row.halves == "sequential":
                target = target[: len(value)] if kind == "unconditional" else target[len(value) :]
            if base is None:
                target[...] = value
            else:
                np.subtract(value, base, out=target)

    def fill(self, row: Row, tensors: Tensors, kind: str, at: int, index: np.ndarray | None, opened: Tensors) -> None:
        """Put what the full path gave for some samples, or all, in the place of their newest values in the slots.

        A newest value that cannot be read is left alone, unless all samples are new.
        """
        for write in row.fills:
            counts = (self._samples, 2 * self._samples) if row.halves == "conditional" else (2 * self._samples,)
            if write.newest is None:
                continue
            found = self._slots.find(write.slot, (write.newest,), counts, reuse=True)
            if write.slot in opened or isinstance(found, str):
                if index is None:
                    self.store((write,), tensors, kind, at, row, opened)
                continue
            value = tensors[write.tensor] if write.base is None else tensors[write.tensor] - tensors[write.base]
            views = [self._view(kept, row, kind, mean=False) for kept in found]
            if row.halves == "conditional":  # where both halves are kept, the other one would be stale
                views += [kept[: self._samples] for kept in found if len(kept) > self._samples]
            for view in views:
                view[... if index is None else index] = value

    def buffer(self, key: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of unknown content, the same one for the same key as long as shape and dtype stay."""
        kept = self._buffers.get(key)
        if kept is None or kept.shape != shape or kept.dtype != dtype:
            kept = self._buffers[key] = np.empty(shape, dtype)
        return kept
