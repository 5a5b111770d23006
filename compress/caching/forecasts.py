"""Linear forecasts: the coefficients that make a cached feature out of those of the last full rows.

A published forecast is, with rare exceptions, a weighted sum of kept features, with weights known before sampling: so
one row of a step plan holds them as numbers. A row is one network call, counted from 0. `done` are the full rows before
it, ascending; coefficients are in order of age, newest first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.polynomial.hermite import hermval

from compress.errors import PassError


def reuse(row: int, done: Sequence[int]) -> tuple[float, ...]:
    """The last feature as it is.

    Raises:
        PassError: as for every forecast, `done` is empty, not ascending, or not before `row`.
    """
    _check_history(row, done)
    return (1.0,)


def taylor(row: int, done: Sequence[int], order: int, damping: float = 1.0) -> tuple[float, ...]:
    """TaylorSeer (Liu et al. 2025, arXiv 2503.06923): sum_i F_i (damping k)^i / i!, k rows after the last full one.

    F_0 is the last feature, and F_{i+1} the change of F_i over the last two full rows, divided by their distance. So
    order 1 is the line through the last two features at any gaps. Order 2 and above are backward differences put where
    derivatives belong: they err on a parabola too, the less the shorter the gaps.

    Args:
        row: where to forecast.
        done: the full rows before it, ascending.
        order: at most how many differences; with a shorter history, as many as it allows (one less than its length).
        damping: scales k, so term i by damping^i; 0 is reuse.

    Returns:
        min(order + 1, len(done)) coefficients, newest first.

    Raises:
        PassError: `done` is not a history of `row`, or `order` is negative.
    """
    return _expansion(row, done, order, lambda i, k: (damping * k) ** i)


def hermite(row: int, done: Sequence[int], order: int, scale: float = 0.5) -> tuple[float, ...]:
    """HiCache (Feng et al. 2025, arXiv 2508.16984): TaylorSeer with scaled Hermite polynomials in place of powers.

    sum_n F_n H~_n(k) / n!, where H~_n(k) = scale^n H_n(scale k) and H_n are the polynomials of the physicists (1, 2x,
    4x^2 - 2, ...). Order 1 is `taylor` with damping 2 scale^2, so 0.5 by default.

    Args:
        row: where to forecast.
        done: the full rows before it, ascending.
        order: as in `taylor`.
        scale: contracts the polynomials.

    Returns:
        min(order + 1, len(done)) coefficients, newest first.

    Raises:
        PassError: `done` is not a history of `row`, or `order` is negative.
    """
    return _expansion(row, done, order, lambda n, k: scale**n * float(hermval(scale * k, [0.0] * n + [1.0])))


def _expansion(row: int, done: Sequence[int], order: int, polynomial: Callable[[int, int], float]) -> tuple[float, ...]:
    """The recursion of the factors, run on unit vectors in place of features: a forecast is linear in them."""
    _check_history(row, done)
    if order < 0:
        raise PassError(f"the order of a forecast is {order}, but 0 is the lowest")
    history = done[-(order + 1) :]
    factors: list[np.ndarray] = []
    for position, unit in enumerate(np.eye(len(history))):
        fresh = [unit]
        for old in factors[:order]:
            fresh.append((fresh[-1] - old) / (history[position] - history[position - 1]))
        factors = fresh
    weights = sum(polynomial(i, row - history[-1]) / math.factorial(i) * factor for i, factor in enumerate(factors))
    return tuple(float(weight) for weight in np.asarray(weights)[::-1])


def _check_history(row: int, done: Sequence[int]) -> None:
    if not done or any(early >= late for early, late in zip(done, (*done[1:], row), strict=True)):
        raise PassError(f"{list(done)} are not full rows in ascending order before row {row}")
