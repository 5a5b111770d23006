"""Linear forecasts: exact where they must be, and equal to diffusers and to formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers.hooks.taylorseer_cache import TaylorSeerState

from compress.caching import forecasts
from compress.errors import PassError

HISTORIES = [[0], [0, 1], [0, 1, 2, 4, 9], [0, 3, 6, 9, 12], [2, 3, 7, 8, 20]]


def applied(alphas: tuple[float, ...], features: np.ndarray, done: list[int]) -> np.ndarray:
    """The forecast of features (rows, ...), from the newest of the full rows backwards."""
    return sum(alpha * features[row] for alpha, row in zip(alphas, reversed(done), strict=False))


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("done", HISTORIES)
def test_taylor_is_what_diffusers_computes(order: int, done: list[int]) -> None:
    generator = torch.Generator().manual_seed(order)
    features = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    state = TaylorSeerState(taylor_factors_dtype=torch.float64, max_order=order)
    for row in done:
        state.current_step = row
        state.update((features[row],))
    for row in range(done[-1] + 1, done[-1] + 5):
        state.current_step = row
        alphas = forecasts.taylor(row, done, order)
        assert len(alphas) == min(order + 1, len(done))
        np.testing.assert_allclose(applied(alphas, features.numpy(), done), state.predict()[0].numpy(), rtol=1e-12)


@pytest.mark.parametrize("damping", [0.5, 1.0, 1.2])
def test_taylor_of_order_1_is_the_line_through_the_last_two(damping: float) -> None:
    """At distance k from the last full row, which came g after the one before: (1 + d k/g, -d k/g)."""
    for done in (done for done in HISTORIES if len(done) > 1):
        slope = damping * 2 / (done[-1] - done[-2])
        assert forecasts.taylor(done[-1] + 2, done, 1, damping) == pytest.approx((1 + slope, -slope), abs=1e-15)


@pytest.mark.parametrize("done", [[1, 2], [1, 4], [0, 3, 8], [0, 1, 2, 4, 9]])
def test_taylor_of_order_1_is_exact_on_a_ramp_at_any_gaps(done: list[int]) -> None:
    ramp = np.array([0.3, -2.0]) + np.arange(20.0)[:, None] * np.array([0.7, 1.1])
    for row in range(done[-1] + 1, 20):
        np.testing.assert_allclose(applied(forecasts.taylor(row, done, 1), ramp, done), ramp[row], rtol=1e-12)
        assert np.abs(applied(forecasts.reuse(row, done), ramp, done) - ramp[row]).min() > 0.5


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_errs_by_the_gap_times_the_next_derivative(order: int) -> None:
    """On a smooth curve of position gap x row, the error at one gap ahead falls as gap^2: more orders do not help.

    A backward difference is a derivative up to a relative error of the gap. So from order 2 on the error is that of
    the slope, gap^2 (1/2 - 1/2 + ...), and only constants and lines are met exactly.
    """

    def error(gap: float) -> float:
        curve = np.exp(gap * np.arange(-order, 2))
        done = list(range(order + 1))
        return abs(float(applied(forecasts.taylor(order + 1, done, order), curve, done)) - curve[-1])

    assert 3.5 < error(0.02) / error(0.01) < 4.5
    parabola = np.arange(10.0) ** 2
    assert applied(forecasts.taylor(7, [4, 5, 6], 2), parabola, [4, 5, 6]) == pytest.approx(36 + 11 + 1)


def test_taylor_by_hand() -> None:
    """Full rows 0, 1, 5; row 7: k = 2, F_1 = (f5 - f1)/4, F_2 = (F_1 - (f1 - f0))/4."""
    assert forecasts.taylor(7, [0, 1, 5], 0) == (1.0,)
    assert forecasts.taylor(7, [0, 1, 5], 1) == (1.5, -0.5)
    half = 2**2 / 2 / 4
    assert forecasts.taylor(7, [0, 1, 5], 2) == pytest.approx((1.5 + half / 4, -0.5 - half / 4 - half, half))


def test_damping_scales_the_distance_of_every_order() -> None:
    done = [0, 2, 5, 6]
    for order in (1, 2, 3):
        np.testing.assert_allclose(
            forecasts.taylor(8, done, order, damping=1.5), forecasts.taylor(9, done, order), rtol=1e-13
        )
        damped = forecasts.taylor(8, done, order, damping=0.0)
        assert damped == pytest.approx((1.0, *[0.0] * order))


def test_hermite_by_its_polynomials() -> None:
    """H~_1 = 2 s^2 k, H~_2 = s^2 (4 s^2 k^2 - 2), H~_3 = s^3 (8 s^3 k^3 - 12 s k), over the factors of TaylorSeer."""
    features, done, row = np.random.default_rng(0).normal(size=(9, 4)), [0, 2, 3, 6], 8
    k = row - 6
    first = [(features[b] - features[a]) / (b - a) for a, b in ((0, 2), (2, 3), (3, 6))]
    second = [(first[1] - first[0]) / 1, (first[2] - first[1]) / 3]
    third = (second[1] - second[0]) / 3
    for s in (0.5, 0.8):
        terms = [
            features[6],
            first[2] * 2 * s**2 * k,
            second[1] * s**2 * (4 * s**2 * k**2 - 2) / 2,
            third * s**3 * (8 * s**3 * k**3 - 12 * s * k) / 6,
        ]
        for order in range(4):
            alphas = forecasts.hermite(row, done, order, scale=s)
            np.testing.assert_allclose(applied(alphas, features, done), sum(terms[: order + 1]), rtol=1e-12)


def test_hermite_of_order_1_is_damped_taylor() -> None:
    assert forecasts.hermite(9, [0, 4, 7], 1) == pytest.approx(forecasts.taylor(9, [0, 4, 7], 1, damping=0.5))
    assert forecasts.hermite(9, [0, 4, 7], 1, scale=math.sqrt(0.5)) == pytest.approx(forecasts.taylor(9, [0, 4, 7], 1))


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (lambda: forecasts.reuse(3, []), "not full rows in ascending order"),
        (lambda: forecasts.taylor(3, [0, 3], 1), "before row 3"),
        (lambda: forecasts.taylor(3, [2, 1], 1), "not full rows in ascending order"),
        (lambda: forecasts.taylor(3, [1, 1], 1), "not full rows in ascending order"),
        (lambda: forecasts.hermite(3, [0, 1], -1), "order of a forecast is -1"),
    ],
)
def test_raises(ask: Callable[[], object], reason: str) -> None:
    with pytest.raises(PassError, match=reason):
        ask()
