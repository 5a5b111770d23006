"""Full rows as the dynamic caches would choose them, decided once from calibration statistics in place of every run.

A gate that compares features at run time makes a sample depend on those it is batched with. Over the mean statistics of
calibration the same gate gives one schedule for all. A row is one network call, counted from 0; every function returns
the full rows, ascending, and row 0 is always among them. Relative L1 of a to b is mean |a - b| / mean |b|.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.errors import PassError, RefusedError


def first_block(
    relative: np.ndarray,
    threshold: float,
    warmup: int = 1,
    max_run: int | None = None,
    max_cached: int | None = None,
    last_full: bool = False,
) -> list[int]:
    """A row is full when what is watched has moved by more than `threshold` since the last full row.

    First Block Cache of diffusers watches the residual of the first block (threshold 0.05, no other limit). DBCache of
    cache-dit watches that of the first n blocks (threshold 0.08, warm-up 8), with both limits open to choice.

    Args:
        relative: (rows, rows); [i, j] is the relative L1 of the watched residual at row i to that at row j < i.
        threshold: above it a row is full.
        warmup: leading rows that are full anyway.
        max_run: at most so many cached rows in a row.
        max_cached: at most so many cached rows in all; when they are used up, every row is full.
        last_full: whether the last row is full anyway.

    Raises:
        PassError: `relative` is not square.
        RefusedError: a number is out of range.
    """
    if relative.ndim != 2 or relative.shape[0] != relative.shape[1]:
        raise PassError(f"relative differences of rows to rows are square, not of shape {relative.shape}")
    _check_threshold(threshold)
    if warmup < 1:
        raise RefusedError(f"warmup is {warmup}: the first row must be full, so give 1 or more")
    rows = len(relative)
    longest = rows if max_run is None else max_run
    most = rows if max_cached is None else max_cached
    full: list[int] = []
    for row in range(rows):
        run, cached = row - full[-1] - 1 if full else 0, row - len(full)
        forced = row < warmup or run >= longest or cached >= most or (last_full and row == rows - 1)
        if forced or relative[row, full[-1]] > threshold:
            full.append(row)
    return full


def teacache(differences: Sequence[float], polynomial: Sequence[float], threshold: float) -> list[int]:
    """A row is full when the predicted change of the output, summed since the last full row, reaches `threshold`.

    TeaCache (Liu et al. 2024, arXiv 2411.19108). The first and the last row are full.

    Args:
        differences: one per row; the relative L1 of the watched input (the first block's, after its modulation) to that
            of the row before. The first is not used.
        polynomial: coefficients that make a difference of outputs from one of inputs, highest power first.
        threshold: on the sum, which starts again at 0 after a full row.

    Raises:
        RefusedError: `threshold` is negative or not a number.
    """
    _check_threshold(threshold)
    changes = np.polyval(np.asarray(polynomial, float), np.asarray(differences, float))
    last = len(differences) - 1
    full, moved = [], 0.0
    for row, change in enumerate(changes):
        moved += change
        if row in (0, last) or moved >= threshold:
            full.append(row)
            moved = 0.0
    return full


def fit_polynomial(
    input_differences: Sequence[float], output_differences: Sequence[float], degree: int = 4
) -> tuple[float, ...]:
    """The least-squares polynomial from differences of inputs to differences of outputs, highest power first.

    Raises:
        PassError: the two are not of one length, or there are too few points for the degree.
    """
    if len(input_differences) != len(output_differences) or len(input_differences) <= degree:
        raise PassError(
            f"{len(input_differences)} differences of inputs and {len(output_differences)} of outputs do not determine "
            f"a polynomial of degree {degree}"
        )
    # In a domain of [-1, 1] the fit stays well conditioned; converting moves it back to the differences themselves.
    fitted = np.polynomial.Polynomial.fit(np.asarray(input_differences), np.asarray(output_differences), degree)
    coefficients = np.zeros(degree + 1)
    low_first = fitted.convert().coef
    coefficients[: len(low_first)] = low_first
    return tuple(float(coefficient) for coefficient in coefficients[::-1])


def magcache(
    ratios: Sequence[float],
    threshold: float = 0.06,
    max_skip: int = 3,
    retention: float = 0.2,
    calls: int | None = None,
) -> list[int]:
    """A row is cached while the magnitude it misses, summed since the last full row, stays within `threshold`.

    MagCache (Ma et al. 2025, arXiv 2506.09045), as `MagCacheConfig` of diffusers decides: the error of a cached row is
    |1 - product of the ratios since the last full row|.

    Args:
        ratios: one per row of calibration; the mean over tokens of |residual| / |residual of the row before|; first 1.
        threshold: on the summed error.
        max_skip: at most so many cached rows in a row.
        retention: share of leading rows that are full.
        calls: rows in all; by default as many as there are ratios, otherwise each takes the nearest ratio.

    Raises:
        RefusedError: there are no ratios, or a number is out of range.
    """
    _check_threshold(threshold)
    calls = len(ratios) if calls is None else calls
    if not ratios or calls < 1:
        raise RefusedError(f"{len(ratios)} ratios for {calls} rows: give at least one of each")
    if max_skip < 0 or not 0.0 <= retention <= 1.0:
        raise RefusedError(f"max_skip is {max_skip} and retention {retention}: give 0 or more, and a share from 0 to 1")
    kept = int(retention * calls + 0.5)
    full: list[int] = []
    product, missed = 1.0, 0.0
    for row, ratio in enumerate(_nearest(np.asarray(ratios, float), calls)):
        product *= ratio
        missed += abs(1.0 - product)
        if row == 0 or row < kept or missed > threshold or row - full[-1] > max_skip:
            full.append(row)
            product, missed = 1.0, 0.0
    return full


def smoothcache(errors: np.ndarray, alpha: float, max_skip: int = 3) -> list[int]:
    """From a full row, skip the most rows whose last is still within `alpha`; the row after them is full.

    SmoothCache (Liu et al. 2024, arXiv 2411.10510), for a group of layers that share a schedule. The last row is full.

    Args:
        errors: (rows, look-ahead + 1); [i, n] is the mean relative L1 between the group's outputs at rows i and i + n.
            Column 0 is not used, nor what lies past the last row.
        alpha: the error that is allowed.
        max_skip: at most so many cached rows in a row.

    Raises:
        PassError: `errors` is not a matrix.
        RefusedError: a number is out of range.
    """
    if errors.ndim != 2:
        raise PassError(f"errors by row and look-ahead are a matrix, not of shape {errors.shape}")
    _check_threshold(alpha)
    if max_skip < 0:
        raise RefusedError(f"max_skip is {max_skip}: give 0 or more")
    last = len(errors) - 1
    full, row = [], 0
    while row <= last:
        full.append(row)
        reach = min(max_skip, errors.shape[1] - 1, last - 1 - row)
        within = [ahead for ahead in range(1, reach + 1) if errors[row, ahead] <= alpha]
        row += max(within, default=0) + 1
    return full


def _nearest(ratios: np.ndarray, calls: int) -> np.ndarray:
    """Ratios for another number of rows, each the nearest of those there are; halves go to the even one."""
    if calls == 1:
        return ratios[-1:]
    # In single precision, as published: a half must fall on the same side.
    places = np.arange(calls, dtype=np.float32) * np.float32((len(ratios) - 1) / (calls - 1))
    return ratios[np.round(places).astype(int)]


def _check_threshold(threshold: float) -> None:
    if not threshold >= 0.0:
        raise RefusedError(f"the threshold is {threshold}: give 0 (cache nothing that differs) or more")
