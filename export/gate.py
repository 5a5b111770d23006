"""The gate at run time: how far the watched tensor of each sample has moved, and whether that calls for a full run."""

from __future__ import annotations

import numpy as np

from export.plan_rows import Gate

Halves = tuple[np.ndarray, ...]
"""A tensor (samples, ...) of the conditional half, that of the unconditional half before it where both ran."""


class GateState:
    """What the gate of a plan remembers of every sample during one run; samples never influence each other."""

    def __init__(self, gate: Gate, samples: int) -> None:
        self._gate = gate
        self._reference: Halves | None = None
        self._accumulated = np.zeros(samples)
        self._cached_calls = np.zeros(samples, np.int64)

    def judge(self, watched: Halves) -> tuple[np.ndarray, np.ndarray]:
        """Decide a gated row, and remember the decision.

        Args:
            watched: the watched tensor at this row.

        Returns:
            The values that were compared with the threshold (samples,) float64, and whether each sample takes its
            full path (samples,) bool. A value that is not a number is a reason for the full path.
        """
        values = self._values(watched)
        full = ~((values < self._gate.threshold) & (self._cached_calls < self._gate.max_run))
        self._cached_calls += 1
        self._cached_calls[full] = 0
        if self._gate.reference == "previous":
            self._accumulated = np.where(full, 0.0, values)
            self._remember(watched)
        else:
            self._remember(watched, full)
        return values, full

    def ran_full(self, watched: Halves) -> None:
        """All samples took the full path without being asked."""
        self._accumulated[...] = 0.0
        self._cached_calls[...] = 0
        self._remember(watched)

    def ran_cached(self, watched: Halves | None) -> None:
        """All samples took a cached path without being asked; `watched` is None where it was not computed."""
        self._cached_calls += 1
        if watched is not None and self._gate.reference == "previous":
            self._accumulated = self._values(watched)
            self._remember(watched)

    def resized(self) -> None:
        """The latent has another shape from here on: there is nothing to compare with."""
        self._reference = None

    def _values(self, watched: Halves) -> np.ndarray:
        """Where there is nothing to compare with, the values are not numbers."""
        samples = len(self._accumulated)
        if self._reference is None or len(self._reference) < len(watched):
            return np.full(samples, np.nan)
        pairs = list(zip(watched, self._reference[-len(watched) :], strict=True))
        metric = np.array([_change([(now[at], then[at]) for now, then in pairs]) for at in range(samples)])
        values = np.polyval(self._gate.polynomial, metric)
        return values + self._accumulated if self._gate.reference == "previous" else values

    def _remember(self, watched: Halves, which: np.ndarray | None = None) -> None:
        kept = self._reference
        if kept is not None and len(kept) > len(watched):
            kept = kept[-len(watched) :]
        if kept is None or len(kept) < len(watched) or kept[0].shape != watched[0].shape:
            kept = tuple(np.array(half) for half in watched)
        for half, now in zip(kept, watched, strict=True):
            half[...] = now if which is None else np.where(which.reshape(-1, *[1] * (now.ndim - 1)), now, half)
        self._reference = kept


def _change(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """`sum |now - then| / sum |then|` of one sample over its guidance halves, in float64."""
    moved = sum(float(np.abs(now - then).sum(dtype=np.float64)) for now, then in pairs)
    size = sum(float(np.abs(then).sum(dtype=np.float64)) for _, then in pairs)
    return moved / size if size else float("nan")
