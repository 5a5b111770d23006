"""The clean estimate gives back the clean latent whatever a perfect network predicts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from export.plan_rows import Step
from export.preview import clean_estimate

VARIANCE_PRESERVING = (math.cos(0.7), math.sin(0.7))
VARIANCE_EXPLODING = (1.0, 3.0)
RECTIFIED_FLOW = (0.3, 0.7)


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [
        ("epsilon", VARIANCE_PRESERVING),
        ("epsilon", VARIANCE_EXPLODING),
        ("v_prediction", VARIANCE_PRESERVING),
        ("v_prediction", VARIANCE_EXPLODING),
        ("flow", RECTIFIED_FLOW),
        ("sample", VARIANCE_EXPLODING),
    ],
)
def test_a_perfect_network_shows_the_clean_latent(prediction: str, schedule: tuple[float, float]) -> None:
    signal, sigma = schedule
    clean, noise = np.random.default_rng(0).standard_normal((2, 1, 4, 3, 5))
    said = {
        "epsilon": noise,
        "sample": clean,
        "flow": noise - clean,
        "v_prediction": (signal * noise - sigma * clean) / math.hypot(signal, sigma),
    }
    step = Step(t=1.0, x={0: 1.0}, m={0: 1.0}, signal=signal, sigma=sigma)
    found = clean_estimate(prediction, step, signal * clean + sigma * noise, said[prediction])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, clean, atol=1e-5)
