"""What a run is going to end at, seen from one of its rows: the clean estimate behind a preview."""

from __future__ import annotations

import math

import numpy as np

from export.plan_rows import Step


def clean_estimate(prediction: str, step: Step, latents: np.ndarray, output: np.ndarray) -> np.ndarray:
    """The clean latents that a row's network output stands for.

    A row's latent is `signal * clean + sigma * noise`. The network gives the noise (`epsilon`), the clean latent
    (`sample`), `noise - clean` (`flow`), or the velocity `(signal * noise - sigma * clean) / norm` of the latent
    scaled to unit variance (`v_prediction`; Salimans and Ho 2022, arXiv 2202.00512).

    Args:
        prediction: what the network predicts, see `export.step_plan.StepPlan`.
        step: the row.
        latents: (samples, channels, h, w) before the row's update.
        output: the guided network output, of the same shape.

    Returns:
        float32, of the same shape.
    """
    signal, sigma = step.signal, step.sigma
    norm = math.hypot(signal, sigma)
    if prediction == "sample":
        clean = output
    elif prediction == "flow":
        clean = (latents - sigma * output) / (signal + sigma)
    elif prediction == "v_prediction":
        clean = signal / norm**2 * latents - sigma / norm * output
    else:
        clean = (latents - sigma * output) / signal
    return np.asarray(clean, np.float32)
