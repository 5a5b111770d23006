"""The joint choice of grid points, cached calls and precision: equal to trying every path, and within its budget."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from compress.caching.joint_path import Call, Choices, JointPath, path_at_price, path_within
from compress.errors import PassError, RefusedError


def some_choices(points: int, seed: int, max_gap: int = 8, max_jump: int = 3) -> Choices:
    """Random errors, with two precisions and two cached paths whose latencies are whole numbers."""
    generator = np.random.default_rng(seed)
    return Choices(
        full_error=generator.random((2, points)) * np.array([[0.3], [0.02]]),
        forecast_error=generator.random((2, points, points, points)),
        skip_error=2.0 * generator.random((points, points + 1)),
        full_latency=(7.0, 10.0),
        cached_latency=(3.0, 1.0),
        weights=0.5 + generator.random(points),
        max_gap=max_gap,
        max_jump=max_jump,
    )


def every_path(choices: Choices, calls: tuple[Call, ...] = ()) -> Iterator[JointPath]:
    """Every path there is, and its error and latency straight from their definition."""
    points = choices.points
    if calls and points - calls[-1].point <= choices.max_jump:
        yield valued(choices, list(calls))
    nexts = range(calls[-1].point + 1, min(calls[-1].point + choices.max_jump + 1, points)) if calls else range(1)
    for point in nexts:
        if calls and point - max(call.point for call in calls if call.cached is None) > choices.max_gap:
            continue
        for precision in range(len(choices.full_latency)):
            yield from every_path(choices, (*calls, Call(point, None, precision)))
        for cached in range(len(choices.cached_latency) if calls else 0):
            yield from every_path(choices, (*calls, Call(point, cached, None)))


def valued(choices: Choices, calls: list[Call]) -> JointPath:
    error = latency = 0.0
    full: list[int] = []
    assert choices.weights is not None
    for call, after in zip(calls, [*calls[1:], Call(choices.points, None, None)], strict=True):
        if call.precision is not None:
            error += choices.weights[call.point] * choices.full_error[call.precision, call.point]
            latency += choices.full_latency[call.precision]
            full.append(call.point)
        else:
            assert call.cached is not None
            older = full[-2] if len(full) > 1 else full[-1]
            error += choices.weights[call.point] * choices.forecast_error[call.cached, older, full[-1], call.point]
            latency += choices.cached_latency[call.cached]
        error += choices.skip_error[call.point, after.point]
    return JointPath(calls, float(error), latency)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("points", "max_gap", "max_jump"), [(1, 8, 3), (2, 8, 3), (5, 8, 3), (6, 2, 2), (6, 4, 1)])
def test_within_every_budget_it_is_the_best_of_all_paths(points: int, max_gap: int, max_jump: int, seed: int) -> None:
    choices = some_choices(points, seed, max_gap, max_jump)
    paths = list(every_path(choices))
    by_calls = {tuple(path.calls): path for path in paths}
    fastest = min(path.latency for path in paths)
    for budget in np.arange(fastest, 10.0 * points + 1.5):
        best = min(path.error for path in paths if path.latency <= budget)
        found = path_within(choices, float(budget))
        assert found.error == pytest.approx(best, abs=1e-12)
        assert found.latency <= budget
        direct = by_calls[tuple(found.calls)]
        assert (found.error, found.latency) == pytest.approx((direct.error, direct.latency), abs=1e-12)
    with pytest.raises(RefusedError, match="more than the budget"):
        path_within(choices, 0.99 * fastest)


@pytest.mark.parametrize("price", [0.0, 0.003, 0.03, 0.3, 3.0])
def test_at_every_price_it_is_the_best_of_all_paths(price: float) -> None:
    choices = some_choices(5, 7)
    best = min(path.error + price * path.latency for path in every_path(choices))
    found = path_at_price(choices, price)
    assert found.error + price * found.latency == pytest.approx(best, abs=1e-12)


def test_latencies_that_are_no_multiples_stay_within_the_budget() -> None:
    """Where rounding up to units hides the best path, the hull may still hold it; nothing is ever over the budget."""
    choices = replace(some_choices(5, 11), full_latency=(0.7131, 1.0), cached_latency=(0.2937, 0.1172))
    paths = list(every_path(choices))
    for budget in np.linspace(1.1, 5.0, 23):
        best = min(path.error for path in paths if path.latency <= budget)
        close = min(path.error for path in paths if path.latency <= 0.985 * budget)
        found = path_within(choices, float(budget))
        assert found.latency <= budget
        assert best - 1e-12 <= found.error <= close + 1e-12


@pytest.mark.parametrize("price", [0.01, 0.05, 0.2, 0.8])
def test_the_hull_is_kept_where_units_are_too_coarse(price: float) -> None:
    """A budget of exactly the latency of a path of the hull leaves nothing for rounding up, and still finds it."""
    choices = replace(some_choices(14, 2), full_latency=(0.7131, 1.0), cached_latency=(0.2937, 0.1172))
    best = path_at_price(choices, price)
    assert path_within(choices, best.latency).error == pytest.approx(best.error, abs=1e-12)


def test_what_was_not_measured_is_not_used() -> None:
    choices = some_choices(6, 3)
    forecast = choices.forecast_error.copy()
    forecast[0] = np.nan
    full = choices.full_error.copy()
    full[1] = np.inf
    fewer = replace(choices, forecast_error=forecast, full_error=full)
    for budget in (20.0, 30.0, 60.0):
        found = path_within(fewer, budget)
        assert np.isfinite(found.error)
        assert {call.cached for call in found.calls} <= {None, 1}
        assert {call.precision for call in found.calls} <= {None, 0}
    with pytest.raises(RefusedError, match="measured errors"):
        path_within(replace(choices, full_error=np.full((2, 6), np.nan)), 60.0)


def test_a_call_needs_no_cache_where_it_costs_nothing_more() -> None:
    """With free latency the most precise full call wins everywhere, and no point is skipped."""
    choices = some_choices(8, 5)
    skip = np.where(np.subtract.outer(np.arange(8), np.arange(9)) == -1, 0.0, 1.0)
    exact = replace(choices, full_error=np.array([[1e-3] * 8, [0.0] * 8]), skip_error=skip)
    assert path_within(exact, 1e3) == ([Call(point, None, 1) for point in range(8)], 0.0, 80.0)


def realistic(points: int) -> Choices:
    """Errors as of a real sampler: forecasts worsen with distance, skipping with the square of the jump."""
    row = np.arange(points)
    ahead = np.abs(row - row[:, None]).astype(float)
    forecast = 1e-4 * ahead[None] ** 2 * (1.0 + ahead[:, :, None] / 4)
    skip = 2e-4 * np.square(np.maximum(np.arange(points + 1) - row[:, None] - 1, 0.0))
    full = np.stack([np.full(points, 1e-5), np.full(points, 1e-6)])
    weights = np.linspace(0.5, 2.0, points)
    return Choices(full, np.stack([forecast, 3 * forecast]), skip, (0.6217, 1.0), (0.2113, 0.0931), weights)


def test_fifty_points_take_about_a_second_and_more_budget_leaves_less_error() -> None:
    choices = realistic(50)
    started = time.process_time()
    paths = [path_within(choices, budget) for budget in (5.0, 8.0, 13.0, 21.0, 34.0)]
    assert time.process_time() - started < 5 * 2.0
    errors = [path.error for path in paths]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 5
    counts = [len(path.calls) for path in paths]
    assert counts[0] < counts[-1] == 50
    kinds = {(call.cached is None, call.precision) for path in paths for call in path.calls}
    assert kinds == {(True, 0), (True, 1), (False, None)}


def test_raises_on_shapes_and_limits() -> None:
    choices = some_choices(4, 0)
    for change, reason in (
        ({"full_error": np.zeros((1, 4))}, "full_error is of shape"),
        ({"forecast_error": np.zeros((2, 4, 4))}, "forecast_error is of shape"),
        ({"skip_error": np.zeros((4, 4))}, "skip_error is of shape"),
        ({"weights": np.ones(3)}, "weights is of shape"),
        ({"full_latency": (1.0, 0.0)}, "not positive"),
        ({"cached_latency": (1.0, float("inf"))}, "not positive"),
        ({"max_gap": 0}, "max_gap is 0"),
        ({"max_jump": 0}, "max_jump 0"),
    ):
        with pytest.raises(PassError, match=reason):
            replace(choices, **change)
