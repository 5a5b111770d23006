"""The best full rows: equal to trying every schedule, and sane where that is too many."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import combinations, pairwise

import numpy as np
import pytest

from compress.caching import dynamic_programme as programme
from compress.errors import PassError, RefusedError


def schedules(rows: int, count: int, max_gap: int | None) -> list[list[int]]:
    """Every schedule there is."""
    every = [[0, *rest] for rest in combinations(range(1, rows), count - 1)]
    return [full for full in every if max_gap is None or all(b - a <= max_gap for a, b in pairwise([*full, rows]))]


def served_from_one(cost: np.ndarray, full: list[int]) -> float:
    return sum(cost[max(row for row in full if row < i), i] for i in range(len(cost)) if i not in full)


@pytest.mark.parametrize("max_gap", [None, 4, 2])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 10])
def test_one_anchor_is_the_best_of_all_schedules(rows: int, max_gap: int | None) -> None:
    cost = np.random.default_rng(rows).random((rows, rows))
    for count in range(1, rows + 1):
        every = schedules(rows, count, max_gap)
        if not every:
            with pytest.raises(RefusedError, match=f"no {count} of {rows} rows at most {max_gap} apart"):
                programme.one_anchor(cost, count, max_gap)
            continue
        best = min(every, key=lambda full: served_from_one(cost, full))
        found = programme.one_anchor(cost, count, max_gap)
        assert found.cost == pytest.approx(served_from_one(cost, best), abs=1e-12)
        assert served_from_one(cost, found.rows) == pytest.approx(found.cost, abs=1e-12)
        assert found.rows in every


def test_what_was_not_measured_is_not_used() -> None:
    cost = np.random.default_rng(3).random((8, 8))
    cost[np.subtract.outer(np.arange(8), np.arange(8)) < -2] = np.nan
    found = programme.one_anchor(cost, 3)
    assert np.isfinite(found.cost)
    assert max(b - a for a, b in pairwise([*found.rows, 8])) <= 3
    with pytest.raises(RefusedError, match="no 2 of 8 rows"):
        programme.one_anchor(cost, 2)


@pytest.fixture
def drift() -> np.ndarray:
    """Errors (rows, rows) that grow with the distance to the row served from, fast at the start and at the end."""
    position = np.cumsum(0.2 + np.square(np.linspace(-1.0, 1.0, 50)))
    return np.square(np.subtract.outer(position, position))


def test_more_full_rows_leave_less_error(drift: np.ndarray) -> None:
    errors = [programme.one_anchor(drift, count, 30).cost for count in range(2, 51, 4)]
    assert all(late < early for early, late in pairwise(errors))
    assert programme.one_anchor(drift, 50).cost == 0.0
    gaps = np.diff(programme.one_anchor(drift, 10).rows)
    assert gaps[0] < gaps[len(gaps) // 2] > gaps[-1]


def test_fifty_rows_take_well_under_a_second(drift: np.ndarray) -> None:
    started = time.process_time()
    programme.one_anchor(drift, 25)
    assert time.process_time() - started < 1.0


def test_cosine_similarity() -> None:
    features = np.random.default_rng(2).normal(size=(5, 7, 6)).astype(np.float32)
    features[3] = 2.5 * features[1]
    features[4, 2] = 0.0
    similar = programme.cosine_similarity(features)
    for a in range(5):
        for b in range(5):
            cosines = [
                np.dot(x, y) / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-30)
                for x, y in zip(features[a].astype(float), features[b].astype(float), strict=True)
            ]
            assert similar[a, b] == pytest.approx(np.mean(cosines), abs=1e-12)
    assert similar[1, 3] == pytest.approx(1.0)
    assert programme.one_anchor(1.0 - similar[:4, :4], 2).cost < programme.one_anchor(1.0 - similar[:4, :4], 1).cost


@pytest.mark.parametrize(
    ("ask", "error", "reason"),
    [
        (lambda: programme.one_anchor(np.zeros((3, 4)), 2), PassError, "square"),
        (lambda: programme.cosine_similarity(np.zeros((3, 3))), PassError, "rows, tokens, channels"),
        (lambda: programme.one_anchor(np.zeros((3, 3)), 0), RefusedError, "0 of 3 rows"),
        (lambda: programme.one_anchor(np.zeros((3, 3)), 4), RefusedError, "4 of 3 rows"),
    ],
)
def test_raises(ask: Callable[[], object], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        ask()
