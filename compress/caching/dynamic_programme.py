"""The best full rows of a given number, by dynamic programming over measured errors of the cached ones.

A row is one network call, counted from 0. The errors of cached rows are taken to add up: how an error grows through the
sampler is not seen, unless it is in the weights that the caller multiplies the costs with.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from compress.errors import PassError, RefusedError

Objective = Literal["sum", "max"]


class Schedule(NamedTuple):
    """Full rows, ascending, and the error they are predicted to leave."""

    rows: list[int]
    cost: float


def one_anchor(cost: np.ndarray, count: int, max_gap: int | None = None) -> Schedule:
    """The `count` full rows that minimise the summed errors of the others, each served from the last full row.

    C[s][m] = min_j C[s-1][j] + sum_{i=j+1}^{m-1} cost[j, i], row 0 full: the rule of DDT (Wang et al. 2025, arXiv
    2504.05741), where cost is 1 - `cosine_similarity` of the features.

    Args:
        cost: (rows, rows); [j, i] is the error of row i when row j < i is the last full one. The rest is not used;
            NaN is not measured.
        count: of full rows.
        max_gap: at most so many rows from one full row to the next, and from the last one past the end.

    Raises:
        PassError: `cost` is not square.
        RefusedError: no schedule has so many full rows, or so few.
    """
    return shortest_path(_sums_past(cost), count, max_gap)


def shortest_path(edges: np.ndarray, count: int, max_gap: int | None = None, objective: Objective = "sum") -> Schedule:
    """The path of `count` edges from row 0 past the last row, whose edges are the segments between full rows.

    Args:
        edges: (rows, rows + 1); [j, m] is the error of caching rows j + 1 to m - 1, where j and m > j are full, or m is
            the number of rows, past the end. Infinite where it must not be.
        count: of full rows, so of edges.
        max_gap: at most so many rows along an edge.
        objective: `sum` of the edges; or `max`, the largest edge, among equals the second largest, and so on (the
            minimax path of LeMiCa, Gao et al. 2025, arXiv 2511.00090, with edges measured on final outputs).

    Returns:
        The schedule; its cost is the sum of the edges, or the largest.

    Raises:
        PassError: the shape of `edges` is another.
        RefusedError: no such path is finite.
    """
    if edges.ndim != 2 or edges.shape[1] != edges.shape[0] + 1:
        raise PassError(f"edges lead from each row to each later one and past the end, not of shape {edges.shape}")
    rows = len(edges)
    _check_count(rows, count)
    gap = np.arange(rows + 1) - np.arange(rows)[:, None]
    allowed = (gap >= 1) & (gap <= (rows if max_gap is None else max_gap)) & np.isfinite(edges)
    weights = _lexicographic(edges, allowed, count) if objective == "max" else np.where(allowed, edges, np.inf)

    best, before = weights[0], []
    for _ in range(count - 1):
        through = best[:rows, None] + weights
        before.append(through.argmin(axis=0))
        best = through[before[-1], np.arange(rows + 1)]
    path = [rows]
    for step in reversed(before):
        path.append(int(step[path[-1]]))
    path = [0, *path[::-1]]
    if not all(allowed[early, late] for early, late in pairwise(path)):
        raise _no_schedule(rows, count, max_gap)
    taken = [float(edges[early, late]) for early, late in pairwise(path)]
    return Schedule(path[:-1], max(taken) if objective == "max" else sum(taken))


def two_anchor(cost: np.ndarray, count: int, max_gap: int | None = None) -> Schedule:
    """The `count` full rows that minimise the summed errors of the others, each forecast from the last two full rows.

    V_s(j, m) = min_{j'} V_{s-1}(j', j) + sum_{i=j+1}^{m-1} cost[j', j, i], row 0 full.

    Args:
        cost: (rows, rows, rows); [j2, j1, i] is the error of row i when rows j2 < j1 < i are the last full ones, and
            [0, 0, i] when row 0 is the only one. The rest is not used; NaN is not measured.
        count: of full rows.
        max_gap: at most so many rows from one full row to the next, and from the last one past the end.

    Raises:
        PassError: `cost` has another shape.
        RefusedError: no schedule has so many full rows, or so few.
    """
    if cost.ndim != 3 or len(set(cost.shape)) != 1:
        raise PassError(f"errors of forecasts from two rows are of shape (rows, rows, rows), not {cost.shape}")
    rows = len(cost)
    _check_count(rows, count)
    segments = np.stack([_sums_past(matrix) for matrix in cost])
    gap = np.arange(rows + 1) - np.arange(rows)[:, None]
    segments[:, (gap < 1) | (gap > (rows if max_gap is None else max_gap))] = np.inf

    best, before = np.full((rows, rows), np.inf), []  # over the last two full rows
    best[0, 0] = 0.0
    for _ in range(count):
        through = best[:, :, None] + segments
        before.append(through.argmin(axis=0))
        ahead = through.min(axis=0)  # over the last full row and the next, or the end
        best = ahead[:, :rows]
    last, end = int(ahead[:, rows].argmin()), rows
    if not np.isfinite(ahead[last, end]):
        raise _no_schedule(rows, count, max_gap)
    path, lowest = [], float(ahead[last, end])
    for step in reversed(before):
        path.append(last)
        last, end = int(step[last, end]), last
    return Schedule(path[::-1], lowest)


def cosine_similarity(features: np.ndarray) -> np.ndarray:
    """The mean cosine of the tokens of any two rows, (rows, rows).

    Args:
        features: (rows, tokens, channels); the tokens of all samples of a batch count as one list.

    Raises:
        PassError: the shape is another.
    """
    if features.ndim != 3:
        raise PassError(f"features are of shape (rows, tokens, channels), not {features.shape}")
    wide = features.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=-1, keepdims=True)
    unit = (wide / np.where(lengths > 0.0, lengths, 1.0)).reshape(len(wide), -1)
    return unit @ unit.T / features.shape[1]


def _sums_past(cost: np.ndarray) -> np.ndarray:
    """Edges (rows, rows + 1) whose [j, m] is the sum of cost[j, i] over the rows i between j and m; NaN is infinite."""
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1]:
        raise PassError(f"errors of rows served from rows are square, not of shape {cost.shape}")
    edges = np.zeros((len(cost), len(cost) + 1))
    later = np.triu(np.ones(cost.shape, bool), 1)
    np.cumsum(np.where(later, np.where(np.isnan(cost), np.inf, cost), 0.0), axis=1, out=edges[:, 1:])
    return edges


def _lexicographic(edges: np.ndarray, allowed: np.ndarray, count: int) -> np.ndarray:
    """Whole numbers whose least sum over `count` edges is the lexicographically least descending list of them.

    An edge that is larger by rank weighs more than `count` edges of the rank below. Python integers hold them exactly.
    """
    _, ranks = np.unique(np.where(allowed, edges, np.inf), return_inverse=True)
    powers = [(count + 1) ** rank for rank in range(int(ranks.max()) + 1)]
    weights = np.empty(edges.shape, object)
    weights.ravel()[:] = [powers[rank] for rank in ranks.ravel()]
    return weights


def _check_count(rows: int, count: int) -> None:
    if not 1 <= count <= rows:
        raise RefusedError(f"{count} of {rows} rows cannot be full: ask for 1 to {rows}")


def _no_schedule(rows: int, count: int, max_gap: int | None) -> RefusedError:
    limit = "" if max_gap is None else f" at most {max_gap} apart"
    return RefusedError(f"no {count} of {rows} rows{limit} have measured errors between them: ask for more full rows")
