"""The best full rows of a given number, by dynamic programming over measured errors of the cached ones.

A row is one network call, counted from 0. The errors of cached rows are taken to add up: how an error grows through the
sampler is not seen, unless it is in the weights that the caller multiplies the costs with.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from compress.errors import PassError, RefusedError


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
    edges = _sums_past(cost)
    rows = len(edges)
    if not 1 <= count <= rows:
        raise RefusedError(f"{count} of {rows} rows cannot be full: ask for 1 to {rows}")
    gap = np.arange(rows + 1) - np.arange(rows)[:, None]
    edges[(gap < 1) | (gap > (rows if max_gap is None else max_gap))] = np.inf

    best, before = edges[0], []  # over the next full row, or the end
    for _ in range(count - 1):
        through = best[:rows, None] + edges
        before.append(through.argmin(axis=0))
        best = through.min(axis=0)
    if not np.isfinite(best[rows]):
        limit = "" if max_gap is None else f" at most {max_gap} apart"
        raise RefusedError(
            f"no {count} of {rows} rows{limit} have measured errors between them: ask for more full rows"
        )
    path = [rows]
    for step in reversed(before):
        path.append(int(step[path[-1]]))
    return Schedule([0, *path[:0:-1]], float(best[rows]))


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
