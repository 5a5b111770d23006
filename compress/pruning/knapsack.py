"""Which units to remove so that enough is saved and least is lost: a knapsack over a tree of blocks and their units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")

BINS = 1000
"""Into how many parts what must be saved is divided."""


@dataclass(frozen=True)
class Item(Generic[T]):
    """Something that can be removed.

    Attributes:
        what: it is.
        saving: of removing it, with all that is inside.
        loss: likewise.
        inside: items that leave with it, or one by one where it stays.
    """

    what: T
    saving: float
    loss: float
    inside: tuple[Item[T], ...] = ()


def least_loss(items: Sequence[Item[T]], wanted: float) -> list[Item[T]] | None:
    """What to remove to save as much as is wanted at the least sum of losses; None where all together are too little.

    Dynamic programming over whole bins of the saving; what it finds is checked with the savings as they are.

    Args:
        items: at the top; none is inside another.
        wanted: in the unit of the savings.
    """
    if wanted <= 0.0:
        return []
    curve: _Curve[T] = _Curve(wanted / BINS, BINS + BINS // 4)
    curve.take_all(items)
    for at in np.flatnonzero(np.isfinite(curve.loss)):
        if at >= BINS:
            chosen = list(curve.pick(int(at)))
            if sum(item.saving for item in chosen) >= wanted * (1.0 - 1e-9):
                return chosen
    everything = list(items)
    return everything if sum(item.saving for item in items) >= wanted else None


class _Curve(Generic[T]):
    """The least loss of saving at least so many bins, and what is removed then."""

    def __init__(self, size: float, top: int) -> None:
        self.size, self.top = size, top
        self.loss = np.full(top + 1, np.inf)
        self.loss[0] = 0.0
        self._steps: list[Callable[[int], tuple[int, Iterator[Item[T]]]]] = []

    def take_all(self, items: Sequence[Item[T]]) -> None:
        """Let any of these be removed as well."""
        for item in items:
            if item.inside:
                self._take_group(item)
            else:
                self._take(item)

    def pick(self, at: int) -> Iterator[Item[T]]:
        """What is removed to save at least that many bins."""
        for step in reversed(self._steps):
            at, items = step(at)
            yield from items

    def _bins(self, item: Item[T]) -> int:
        return min(round(item.saving / self.size), self.top)

    def _take(self, item: Item[T]) -> None:
        left = np.maximum(np.arange(self.top + 1) - self._bins(item), 0)
        removed = self.loss[left] + item.loss
        taken = removed < self.loss
        self.loss = np.where(taken, removed, self.loss)
        self._steps.append(lambda at: (int(left[at]), iter((item,))) if taken[at] else (at, iter(())))

    def _take_group(self, item: Item[T]) -> None:
        """All of it, or some of what is inside."""
        inner: _Curve[T] = _Curve(self.size, self.top)
        inner.take_all(item.inside)
        whole = np.where(np.arange(self.top + 1) <= self._bins(item), item.loss, np.inf)
        together = np.minimum(inner.loss, whole)
        best, share = self.loss.copy(), np.zeros(self.top + 1, dtype=int)
        for bins in np.flatnonzero(np.isfinite(together)):
            left = np.maximum(np.arange(self.top + 1) - bins, 0)
            removed = self.loss[left] + together[bins]
            better = removed < best
            best, share = np.where(better, removed, best), np.where(better, bins, share)
        self.loss = best

        def step(at: int) -> tuple[int, Iterator[Item[T]]]:
            bins = int(share[at])
            own = iter((item,)) if whole[bins] < inner.loss[bins] else inner.pick(bins)
            return max(at - bins, 0), own

        self._steps.append(step)
