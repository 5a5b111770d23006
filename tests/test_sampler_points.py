"""Which points of a sampler are kept, and how updates between them are fitted: least squares and a shortest path."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from compress.optimise.fitting import Fit, update
from compress.optimise.points import EMPHASES, PointErrors, best_points, point_errors
from compress.optimise.trajectory import Trajectory, gram_of, watched
from export.plan_rows import Step

ROWS, SHAPE = 7, (3, 2, 4, 4)


@pytest.fixture(scope="module")
def trajectory() -> Trajectory:
    """A curved path: every state is the one before, a share of its output, and something of its own."""
    rng = np.random.default_rng(0)

    def run(see: object) -> np.ndarray:
        latents = rng.standard_normal(SHAPE)
        for row in range(ROWS):
            output = np.tanh(2.0 * latents + 0.3 * row) + 0.2 * rng.standard_normal(SHAPE)
            see(row, Step(t=row, x={0: 1.0}, m={0: 0.1}), {0: latents}, {0: output})  # type: ignore[operator]
            latents = latents - 0.4 * output
        return latents

    return watched(run)


def residual(trajectory: Trajectory, points: tuple[int, ...], after: int) -> float:
    """The mean squared error of an update that `update` gives, from the states themselves."""
    told = update(trajectory, points, after, 2, 2)
    newest = points[::-1]
    outputs = {row: (trajectory.states[row] - trajectory.states[row + 1]) / 0.4 for row in range(ROWS)}
    made = sum(c * trajectory.states[newest[lag]] for lag, c in told.x.items())
    made = made + sum(c * outputs[newest[lag]] for lag, c in told.m.items())
    return float(np.mean((made - trajectory.states[after]) ** 2))


def test_gram_is_the_mean_of_products() -> None:
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(SHAPE).astype(np.float32) for _ in range(3)]
    gram = gram_of(arrays)
    for i, j in itertools.product(range(3), range(3)):
        assert gram[i, j] == pytest.approx(np.mean(arrays[i].astype(float) * arrays[j]), rel=1e-6)


def test_errors_are_those_of_the_best_updates(trajectory: Trajectory) -> None:
    errors = point_errors(trajectory)
    for after in (1, 3, ROWS):
        assert errors.first[after] == pytest.approx(residual(trajectory, (0,), after), rel=1e-3, abs=1e-9)
    for i, j, after in ((0, 1, 2), (0, 3, 6), (2, 5, ROWS)):
        assert errors.later[i, j, after] == pytest.approx(residual(trajectory, (i, j), after), rel=1e-3, abs=1e-9)
    assert np.isinf(errors.later[3, 3]).all()
    assert np.isinf(errors.later[2, 5, :6]).all()
    assert errors.later[0, 1, 2] < errors.later[0, 1, 5]


@pytest.mark.parametrize("emphasis", EMPHASES)
def test_the_points_are_the_best_of_all(trajectory: Trajectory, emphasis: float) -> None:
    errors = point_errors(trajectory)
    found = best_points(errors, ROWS, emphasis)
    assert [len(points) for points in found] == list(range(1, ROWS + 1))
    weights = (np.maximum(np.arange(ROWS + 1), 1) / ROWS) ** emphasis

    def cost(points: tuple[int, ...]) -> float:
        ends = (*points, ROWS)
        total = weights[ends[1]] * errors.first[ends[1]]
        return total + sum(
            weights[k] * errors.later[i, j, k] for i, j, k in zip(ends, ends[1:], ends[2:], strict=False)
        )

    for points in found[1:]:
        rivals = [(0, *rest) for rest in itertools.combinations(range(1, ROWS), len(points) - 1)]
        assert cost(points) == pytest.approx(min(map(cost, rivals)), rel=1e-9, abs=1e-15)


def test_points_may_be_every_other_row_alone(trajectory: Trajectory) -> None:
    found = best_points(point_errors(trajectory, 2), ROWS, 0.0)
    assert [len(points) for points in found] == [1, 2, 3, 4]
    assert found[-1] == (0, 2, 4, 6)


def test_too_few_rows_end_the_list() -> None:
    errors = PointErrors(np.array([np.inf, 0.0]), np.full((1, 1, 2), np.inf))
    assert best_points(errors, 3, 0.0) == [(0,)]


def test_a_fit_corrects_what_earlier_rows_got_wrong() -> None:
    """The target is twice the latents less the output before: found exactly, whatever was declared."""
    rng = np.random.default_rng(2)
    latents, output, before = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(3))
    fit = Fit([2.0 * latents - before])
    step = Step(t=1.0, x={0: 0.0}, m={0: 7.0, 1: 7.0})
    fitted = fit(0, step, {0: latents, 1: output}, {0: output, 1: before, 2: latents})
    assert fitted.x == {0: pytest.approx(2.0, abs=1e-4)}
    assert fitted.m == {0: pytest.approx(0.0, abs=1e-4), 1: pytest.approx(-1.0, abs=1e-4)}
    assert fit.steps == [fitted]


def test_terms_that_hardly_differ_keep_small_coefficients() -> None:
    rng = np.random.default_rng(3)
    one = rng.standard_normal(SHAPE)
    other = one + 1e-7 * rng.standard_normal(SHAPE)
    fit = Fit([one + 1e-3 * rng.standard_normal(SHAPE)])
    fitted = fit(0, Step(t=1.0, x={0: 0.0}, m={0: 0.0}), {0: one}, {0: other})
    assert max(abs(fitted.x[0]), abs(fitted.m[0])) < 1.1
