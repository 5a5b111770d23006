"""Which points of a sampler to keep: the path through them whose fitted updates miss the uncached run least."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.optimise.trajectory import Trajectory, solved

EMPHASES = (0.0, 0.5, 1.0, 2.0)
"""How much more an error counts towards the end, where less is left to correct it: its row to this power."""


@dataclass(frozen=True)
class PointErrors:
    """How far updates from two points of the uncached run miss its state at a third, before anything is run.

    Attributes:
        first: (rows + 1,): mean squared error at every row from point 0 alone.
        later: (rows, rows, rows + 1): [i, j, k] from the points i < j at row k > j; infinite elsewhere.
    """

    first: np.ndarray
    later: np.ndarray

    @property
    def rows(self) -> int:
        """Rows of the uncached run."""
        return len(self.first) - 1


def point_errors(trajectory: Trajectory, every: int = 1) -> PointErrors:
    """The errors of the best linear updates from the states and outputs of one and of two points.

    Args:
        trajectory: the uncached run.
        every: points are multiples of it; a sampler of order 2 has states of its own at every other row alone.
    """
    rows, gram = trajectory.rows, trajectory.gram
    first, later = np.full(rows + 1, np.inf), np.full((rows, rows, rows + 1), np.inf)
    squares = np.diag(gram)

    def missed(points: tuple[int, ...]) -> tuple[slice, np.ndarray]:
        after = slice(points[-1] + 1, rows + 1)
        places = np.array([*points, *(rows + 1 + point for point in points)])
        inner, target = gram[np.ix_(places, places)], gram[np.ix_(places, np.arange(rows + 1))][:, after]
        found = solved(inner, target)
        error = squares[: rows + 1][after] - 2 * (found * target).sum(0) + (found * (inner @ found)).sum(0)
        allowed = (np.arange(rows + 1) % every == 0) | (np.arange(rows + 1) == rows)
        return after, np.where(allowed[after], np.maximum(error, 0.0), np.inf)

    after, error = missed((0,))
    first[after] = error
    for j in range(every, rows, every):
        for i in range(0, j, every):
            after, error = missed((i, j))
            later[i, j, after] = error
    return PointErrors(first, later)


def best_points(errors: PointErrors, most: int, emphasis: float) -> list[tuple[int, ...]]:
    """For 1 to `most` points, those of least summed error, by dynamic programming over pairs of neighbours.

    Args:
        errors: of the updates.
        most: points at most.
        emphasis: see `EMPHASES`.

    Returns:
        Ascending rows, from row 0, for every number of points there are enough rows for.
    """
    rows = errors.rows
    weights = (np.maximum(np.arange(rows + 1), 1) / rows) ** emphasis
    reached = np.full((rows, rows), np.inf)
    reached[0] = (errors.first * weights)[:rows]
    edges = errors.later * weights
    before: list[np.ndarray] = []
    found: list[tuple[int, ...]] = [(0,)]
    for count in range(2, most + 1):
        ends = reached + edges[:, :, rows]
        if not np.isfinite(ends).any():
            break
        i, j = (int(at) for at in np.unravel_index(ends.argmin(), ends.shape))
        path = [j, i]
        for step in reversed(before):
            path.append(int(step[path[-1], path[-2]]))
        found.append(tuple(path[::-1]))
        if count < most:
            through = reached[:, :, None] + edges[:, :, :rows]
            before.append(through.argmin(0))
            reached = through.min(0)
    return found
