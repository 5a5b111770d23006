"""Published schedules of full rows: which network calls run the whole denoiser, from their numbers alone.

A row is one network call, counted from 0 (never a scheduler timestep: second-order samplers call twice per timestep).
Every function returns the full rows, ascending; row 0 is always among them, for nothing is cached before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count, pairwise, takewhile

import numpy as np

from compress.errors import RefusedError

KEY_STEPS: dict[str, tuple[int, tuple[int, ...]]] = {
    "50ls": (50, (0, 1, 2, 3, 5, 10, 15, 25, 35)),
    "50ls2": (50, (0, 10, 11, 12, 15, 20, 25, 30, 35, 45)),
    "50ls3": (50, (0, 20, 25, 30, 35, 45, 46, 47, 48, 49)),
    "50ls4": (50, (0, 9, 13, 14, 15, 28, 29, 32, 36, 45)),
    "s2": (50, tuple(row for row in range(50) if row < 20 or row > 40 or row % 2 == 0)),
    "75ls": (75, tuple(row for row in range(75) if row < 10 or row > 65 or row % 5 == 0)),
    "100ls": (100, tuple(row for row in range(100) if row < 10 or row > 85 or row % 5 == 0)),
}
"""The named key sets of Faster Diffusion (Li et al. 2023, arXiv 2312.09608): for how many rows, and which."""


def uniform(calls: int, interval: int, warmup: int = 1) -> list[int]:
    """The first `warmup` rows, then every `interval`-th row after the last of them.

    DeepCache's uniform schedule (Ma et al. 2023, arXiv 2312.00858) with a warm-up; `warmup=1` is theirs.

    Raises:
        RefusedError: a number is below 1.
    """
    _at_least_one(calls=calls, interval=interval, warmup=warmup)
    return [row for row in range(calls) if row < warmup or (row - warmup + 1) % interval == 0]


def signed_power(calls: int, number: int, center: int | None = None, power: float = 1.4) -> list[int]:
    """`number` rows that crowd around `center`, from a grid that is even in the signed root of the distance to it.

    The non-uniform schedule of DeepCache (Ma et al. 2023, arXiv 2312.00858) with a root that keeps the sign, where a
    plain power of a negative number is complex. Row k is trunc(x_k) + center, x_k = sign(u_k) |u_k|^power, with u even
    from root(-center) to root(calls - center). Where two rows coincide, the power is lowered in steps of 0.02, down to
    the even rows floor(k calls / number).

    Args:
        calls: rows in all.
        number: full rows wanted.
        center: where they are densest; by default row 15 of 50, scaled to `calls`.
        power: how dense; 1 is even.

    Raises:
        RefusedError: a number is out of range.
    """
    _at_least_one(calls=calls, number=number)
    center = round(15 * calls / 50) if center is None else center
    if number > calls:
        raise RefusedError(f"{number} of {calls} rows cannot be full: ask for {calls} or fewer")
    if not 0 <= center < calls:
        raise RefusedError(f"center {center} is not one of the {calls} rows: give one from 0 to {calls - 1}")
    if not 1.0 <= power < math.inf:
        raise RefusedError(f"power is {power}: give 1 (even) or more")
    while power > 1.0:
        inner = np.linspace(_signed(-center, 1.0 / power), _signed(calls - center, 1.0 / power), number + 1)[1:-1]
        rows = [0, *(int(_signed(offset, power)) + center for offset in inner)]
        if all(early < late for early, late in pairwise(rows)):
            return rows
        power -= 0.02
    return [k * calls // number for k in range(number)]


def taylorseer(calls: int, interval: int = 5, before: int = 3) -> list[int]:
    """The first `before` rows, one row after a pause of one, then every `interval`-th: 0 1 2 4 9 14 ... by default.

    As `TaylorSeerCacheConfig(cache_interval, disable_cache_before_step)` of diffusers decides (TaylorSeer, Liu et al.
    2025, arXiv 2503.06923).

    Raises:
        RefusedError: a number is below 1.
    """
    _at_least_one(calls=calls, interval=interval, before=before)
    return [row for row in range(calls) if row < before or (row - before - 1) % interval == 0]


def key_steps(keys: str | int | Sequence[int], calls: int) -> list[int]:
    """The rows that compute the encoder in Faster Diffusion (Li et al. 2023, arXiv 2312.09608).

    Args:
        keys: a name of `KEY_STEPS`, whose rows are scaled to floor(row calls / its own number); `pro`, the rows where
            9 + 8 row is a perfect square (0 2 5 9 14 ...); a number m, every m-th row; or the rows themselves. The last
            three are never scaled.
        calls: rows in all.

    Raises:
        RefusedError: the name is unknown, or a row is out of range.
    """
    _at_least_one(calls=calls)
    if isinstance(keys, str) and keys in KEY_STEPS:
        base, rows = KEY_STEPS[keys]
        return sorted({row * calls // base for row in rows})
    if keys == "pro":
        return list(takewhile(lambda row: row < calls, (step * (step + 3) // 2 for step in count())))
    if isinstance(keys, str):
        raise RefusedError(f"{keys!r} is not a set of key steps; known are {', '.join(KEY_STEPS)}, pro")
    if isinstance(keys, int):
        _at_least_one(every=keys)
        return list(range(0, calls, keys))
    if outside := [row for row in keys if not 0 <= row < calls]:
        raise RefusedError(f"key steps {outside} are not among the {calls} rows: give rows from 0 to {calls - 1}")
    return sorted({0, *keys})


def _signed(base: float, exponent: float) -> float:
    return math.copysign(abs(base) ** exponent, base)


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise RefusedError(f"{name} is {number}: give 1 or more")
