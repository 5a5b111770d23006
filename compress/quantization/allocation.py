"""The multiple-choice knapsack: one format for each layer, the least error in all that fits into so many bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BINS = 1 << 15
"""Steps in which bytes above the least possible are counted; each layer is rounded up by at most one of them."""


def allocate(sizes: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """Choose one option of every layer; None where even the smallest ones do not fit.

    By dynamic programming, so no other choice has less error unless it fits by less than a bin a layer.

    Args:
        sizes: of the options of each layer, in bytes.
        errors: of the same options; they add up.
        budget: bytes of all layers together, at most.
    """
    least = [min(own) for own in sizes]
    spare = budget - sum(least)
    if spare < 0:
        return None
    unit = max(1, -(-spare // BINS))
    room = spare // unit + 1
    total, chosen = np.zeros(room), []
    for own, lost, smallest in zip(sizes, errors, least, strict=True):
        best, taken = np.full(room, np.inf), np.zeros(room, np.uint8)
        for option, (size, error) in enumerate(zip(own, lost, strict=True)):
            bins = -(-(size - smallest) // unit)
            if bins >= room:
                continue
            found = total[: room - bins] + error
            better = found < best[bins:]
            best[bins:][better], taken[bins:][better] = found[better], option
        total = best
        chosen.append(taken)
    at, result = int(total.argmin()), []
    for own, smallest, taken in zip(reversed(sizes), reversed(least), reversed(chosen), strict=True):
        option = int(taken[at])
        result.append(option)
        at -= -(-(own[option] - smallest) // unit)
    return result[::-1]
