"""The best path through a sampler: which grid points are visited, which calls are cached, and in which precision.

Skipped sampler points, cached calls and low precision all trade error for latency; one shortest path weighs them
against each other. A node is a grid point whose call has been made, with the last two full calls before or at it; an
edge is the next call. Errors are mean squares and are taken to add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from compress.errors import PassError, RefusedError

UNITS = range(100, 1001)
"""Into how many units a latency budget may be divided: 1 % or finer."""


class Call(NamedTuple):
    """One network call of a path: at a grid point, either full in a precision, or by a cached path."""

    point: int
    cached: int | None
    precision: int | None


class JointPath(NamedTuple):
    """The calls in order, the summed squared error they are predicted to leave, and their latency."""

    calls: list[Call]
    error: float
    latency: float


@dataclass(frozen=True)
class Choices:
    """What a call may be, and what each costs; errors are mean squares, infinite or NaN where not measured.

    Attributes:
        full_error: (precisions, points); of a full call at a point.
        forecast_error: (cached paths, points, points, points); [k, j2, j1, g] of cached path k at point g, when
            j2 < j1 < g are the points of the last two full calls; [k, 0, 0, g] when point 0 is the only one.
        skip_error: (points, points + 1); [g, h] of the step of the sampler from g to h > g, without the points between;
            h = points is the end. It is added as it is, so scale it to the final latent like the weighted errors.
        full_latency: (precisions,), in any one unit.
        cached_latency: (cached paths,), in that unit.
        weights: (points,), on the errors of the calls: how much of them the final latent keeps. By default 1.
        max_gap: at most so many grid points from the last full call to any call.
        max_jump: at most so many grid points from one call to the next, and from the last to the end.

    Raises:
        PassError: the shapes do not fit together, a latency is not positive, or a limit is below 1.
    """

    full_error: np.ndarray
    forecast_error: np.ndarray
    skip_error: np.ndarray
    full_latency: Sequence[float]
    cached_latency: Sequence[float]
    weights: np.ndarray | None = None
    max_gap: int = 8
    max_jump: int = 3

    def __post_init__(self) -> None:
        points = self.points
        shapes = {
            "full_error": (self.full_error, (len(self.full_latency), points)),
            "forecast_error": (self.forecast_error, (len(self.cached_latency), points, points, points)),
            "skip_error": (self.skip_error, (points, points + 1)),
            "weights": (np.ones(points) if self.weights is None else self.weights, (points,)),
        }
        for name, (array, shape) in shapes.items():
            if array.shape != shape:
                raise PassError(f"{name} is of shape {array.shape}, but {shape} fits the other choices")
        if not all(0.0 < latency < math.inf for latency in (*self.full_latency, *self.cached_latency)):
            raise PassError("a latency is not positive")
        if self.max_gap < 1 or self.max_jump < 1:
            raise PassError(f"max_gap is {self.max_gap} and max_jump {self.max_jump}, but neither is below 1")

    @property
    def points(self) -> int:
        """Grid points of the sampler."""
        return int(self.skip_error.shape[0])


def path_within(choices: Choices, budget: float) -> JointPath:
    """The path of least error whose latency is within a budget.

    The lower convex hull of (latency, error) is followed to the budget: the price of latency is set to the slope
    between a path that is too slow and one that is fast enough, until no path lies below that line. What the hull jumps
    over is filled in by an exact search over latency in whole units of the budget, each call rounded up.

    Raises:
        RefusedError: even the fastest path is slower than the budget.
    """
    graph = _Graph(choices)
    fast = graph.search(error_scale=0.0, price=1.0)
    limit = budget * (1.0 + 1e-9)
    if not fast.latency <= limit:
        raise RefusedError(f"the fastest path takes {fast.latency:.6g}, more than the budget of {budget:.6g}: raise it")
    slow = graph.search(error_scale=1.0, price=0.0)
    if slow.latency <= limit:
        return slow
    while slow.error < fast.error:
        price = (fast.error - slow.error) / (slow.latency - fast.latency)
        found = graph.search(error_scale=1.0, price=price)
        line = fast.error + price * fast.latency
        if found.error + price * found.latency >= line * (1.0 - 1e-9):
            break
        slow, fast = (found, fast) if found.latency > limit else (slow, found)
    exact = graph.search_in_units(budget)
    return fast if exact is None or fast.error <= exact.error else exact


def path_at_price(choices: Choices, price: float) -> JointPath:
    """The path of least error + price x latency: one point of the lower convex hull.

    Raises:
        RefusedError: no path has measured errors all along.
    """
    return _Graph(choices).search(error_scale=1.0, price=price)


class _Edges(NamedTuple):
    """What every edge costs and how many units it spends. `cached` is by path, point, and a and b of the node."""

    full: np.ndarray
    cached: np.ndarray
    skip: np.ndarray
    full_units: list[int]
    cached_units: list[int]


_Node = tuple[int, int, int, int]
"""Point, units spent, a, b: the last full call is a points back, the one before it b points further; b = 0 is none."""


class _Graph:
    """The measured errors of all edges, and the search for the cheapest path over them."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.points = choices.points
        self.reach = min(choices.max_gap, self.points - 1)
        weights = np.ones(self.points) if choices.weights is None else choices.weights
        self.skip = _measured(choices.skip_error)
        self.full = _measured(choices.full_error * weights)
        distances = np.arange(self.reach + 1)
        g, a, b = np.meshgrid(np.arange(self.points), distances, distances, indexing="ij")
        first, second = g - a, g - a - b
        forecasts = choices.forecast_error[:, np.maximum(second, 0), np.maximum(first, 0), g]
        self.cached = _measured(forecasts * weights[:, None, None])  # nodes before point 0 are never reached

    def search(self, error_scale: float, price: float) -> JointPath:
        """The path of least error_scale x error + price x latency."""
        full, cached = (np.asarray(kind, float) for kind in (self.choices.full_latency, self.choices.cached_latency))
        edges = _Edges(
            _scaled(self.full, error_scale) + price * full[:, None],
            _scaled(self.cached, error_scale) + price * cached[:, None, None, None],
            _scaled(self.skip, error_scale),
            [0] * len(full),
            [0] * len(cached),
        )
        found = self._cheapest(edges, budget=0)
        if found is None:
            raise RefusedError("no path has measured errors all along: measure more, or allow shorter jumps and gaps")
        return found

    def search_in_units(self, budget: float) -> JointPath | None:
        """The path of least error whose latency, every call rounded up to whole units, is within the budget.

        Of the units in `UNITS`, the one that overstates the calls least.
        """
        latencies = np.array([*self.choices.full_latency, *self.choices.cached_latency])

        def overstated(units: int) -> float:
            return float((_units(latencies, budget, units) * budget / units / latencies).max().round(9))

        units = min(UNITS, key=overstated)
        spent, kinds = _units(latencies, budget, units).tolist(), len(self.choices.full_latency)
        return self._cheapest(_Edges(self.full, self.cached, self.skip, spent[:kinds], spent[kinds:]), units)

    def _cheapest(self, edges: _Edges, budget: int) -> JointPath | None:
        """The cheapest path of at most `budget` units, None where none is finite."""
        best = self._filled(edges, budget)
        last = best + edges.skip[:, self.points, None, None, None]
        last[: max(self.points - self.choices.max_jump, 0)] = np.inf
        if not np.isfinite(last).any():
            return None
        point, spent, a, b = (int(index) for index in np.unravel_index(last.argmin(), last.shape))
        return self._predicted(self._walked_back(edges, best, (point, spent, a, b)))

    def _filled(self, edges: _Edges, budget: int) -> np.ndarray:
        """What it costs to reach every node: (points, budget + 1, reach + 1, reach + 1) by point, units, a and b."""
        size = self.reach + 1
        best = np.full((self.points, budget + 1, size, size), np.inf)
        for precision, units in enumerate(edges.full_units):
            first = best[0, units:, 0, 0]
            np.minimum(first, edges.full[precision, 0], out=first)
        for point in range(1, self.points):
            for jump in self._jumps(point):
                before = best[point - jump, :, : size - jump] + edges.skip[point - jump, point]
                for path, units in enumerate(edges.cached_units):
                    ahead = best[point, units:, jump:]
                    np.minimum(ahead, before[: len(ahead)] + edges.cached[path, point, jump:], out=ahead)
                nearest = before.min(axis=2)
                for precision, units in enumerate(edges.full_units):
                    ahead = best[point, units:, 0, jump:]
                    np.minimum(ahead, nearest[: len(ahead)] + edges.full[precision, point], out=ahead)
        return best

    def _walked_back(self, edges: _Edges, best: np.ndarray, node: _Node) -> list[Call]:
        """The calls that lead to a node: its cheapest edge, and so on back to point 0."""
        calls: list[Call] = []
        while node[0] > 0:
            _, call, node = min(self._edges_into(edges, best, node), key=lambda option: option[0])
            calls.append(call)
        spendable = [
            cost if units <= node[1] else np.inf for cost, units in zip(edges.full[:, 0], edges.full_units, strict=True)
        ]
        return [Call(0, None, int(np.argmin(spendable))), *calls[::-1]]

    def _edges_into(self, edges: _Edges, best: np.ndarray, node: _Node) -> Iterator[tuple[float, Call, _Node]]:
        point, spent, a, b = node
        for jump in self._jumps(point):
            start, step = point - jump, edges.skip[point - jump, point]
            if a == 0 and b >= jump:
                for precision, units in enumerate(edges.full_units):
                    if units <= spent:
                        nodes = best[start, spent - units, b - jump]
                        cost = nodes.min() + step + edges.full[precision, point]
                        before = (start, spent - units, b - jump, int(nodes.argmin()))
                        yield cost, Call(point, None, precision), before
            if a >= jump:
                for path, units in enumerate(edges.cached_units):
                    if units <= spent:
                        before = (start, spent - units, a - jump, b)
                        yield best[before] + step + edges.cached[path, point, a, b], Call(point, path, None), before

    def _predicted(self, calls: list[Call]) -> JointPath:
        """The error and latency of calls, from the measured errors and not from any price."""
        error = latency = 0.0
        first = second = 0
        for call, after in zip(calls, [*(call.point for call in calls[1:]), self.points], strict=True):
            if call.precision is not None:
                error += float(self.full[call.precision, call.point])
                latency += self.choices.full_latency[call.precision]
                first, second = call.point, first
            if call.cached is not None:
                error += float(self.cached[call.cached, call.point, call.point - first, first - second])
                latency += self.choices.cached_latency[call.cached]
            error += float(self.skip[call.point, after])
        return JointPath(calls, error, latency)

    def _jumps(self, point: int) -> range:
        return range(1, min(self.choices.max_jump, self.reach, point) + 1)


def _units(latencies: np.ndarray, budget: float, units: int) -> np.ndarray:
    """Latencies in whole units of budget / units, rounded up."""
    return np.ceil(latencies * units / budget - 1e-9).astype(int)


def _measured(errors: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(errors), np.inf, errors)


def _scaled(errors: np.ndarray, scale: float) -> np.ndarray:
    """Errors times a scale that may be 0, the infinite ones left as they are."""
    finite = np.isfinite(errors)
    return np.where(finite, np.where(finite, errors, 0.0) * scale, np.inf)
