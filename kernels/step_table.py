"""The table of numbers by which one kernel makes the update of every sampler: a row per network call, NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernels.errors import KernelError

FIXED = 5
"""Numbers before the windows: guidance scale, noise, first latent, scale and timestep of the next network call."""

INDICES = 4
"""Whole numbers of a row: guided, draw, entry read, entry written."""


@dataclass(frozen=True)
class StepTable:
    """One sampler run as numbers.

    Attributes:
        coefficients: float32 (rows, 5 + latents + outputs + forecasts): guidance scale, noise, first latent, input
            scale and timestep of the next call, then by lag those of latents, of guided outputs and of kept network
            outputs.
        indices: int32 (rows, 4): 1 in a guided row; the number of its noise draw; the newest kept network output,
            from which this row's is forecast, or -1 where the network runs; where its output is kept, or -1.
        latents, outputs: how many latents and guided outputs the updates look back to, the current ones included.
        forecasts: how many network outputs are kept for forecasts.
        draws: how many noises all rows need.
        first_input_scale: what the first latent is multiplied by before the first call.
        first_timestep: of the first call.
        initial: whether a row looks back to the first latent.
    """

    coefficients: np.ndarray
    indices: np.ndarray
    latents: int
    outputs: int
    forecasts: int
    draws: int
    first_input_scale: float
    first_timestep: float
    initial: bool

    @property
    def rows(self) -> int:
        """Network calls, those that are forecast included."""
        return len(self.coefficients)


def step_table(
    x: np.ndarray,
    m: np.ndarray,
    noise: np.ndarray,
    timestep: np.ndarray,
    input_scale: np.ndarray,
    guidance_scale: np.ndarray,
    initial: np.ndarray | None = None,
    forecast: Sequence[Sequence[float]] = (),
    keep: Sequence[bool] = (),
) -> StepTable:
    """Lay the rows of a sampler out for the kernel.

    Args:
        x: (rows, latents) coefficients by lag over latents.
        m: (rows, outputs) coefficients by lag over guided network outputs.
        noise: (rows,) coefficient of fresh noise; 0 draws none.
        timestep: (rows,) that the network is called with.
        input_scale: (rows,) of the latent before each network call.
        guidance_scale: (rows,); NaN in rows without guidance.
        initial: (rows,) coefficient of the first latent; None is 0.
        forecast: per row the coefficients over kept network outputs, newest first; none where the network runs.
        keep: per row whether its network output is kept.

    Raises:
        KernelError: lengths that do not fit, a number that is not finite, a look back past the first row, or a forecast
            from outputs never kept.
    """
    rows = len(x)
    initial = np.zeros(rows) if initial is None else initial
    forecast, keep = forecast or [()] * rows, keep or [False] * rows
    parts = (m, noise, timestep, input_scale, guidance_scale, initial, forecast, keep)
    if not rows or {len(part) for part in parts} != {rows}:
        raise KernelError("a step table needs at least one row, and every coefficient for each")
    history = max(len(row) for row in forecast)
    guided = ~np.isnan(guidance_scale)
    following = np.append(input_scale[1:], 1.0), np.append(timestep[1:], 0.0)
    padded = np.array([[*row, *[0.0] * (history - len(row))] for row in forecast]).reshape(rows, history)
    fixed = np.stack([np.where(guided, guidance_scale, 1.0), noise, initial, *following], axis=1)
    coefficients = np.concatenate([fixed, x, m, padded], axis=1).astype(np.float32)
    if not np.isfinite(coefficients).all():
        raise KernelError("a step table holds a coefficient that is not finite")
    draw = np.cumsum(noise != 0) - 1
    indices = np.stack([guided, np.where(noise != 0, draw, -1), *_entries(forecast, keep, history)], axis=1)
    for name, window in (("latents", x), ("network outputs", m)):
        if np.triu(window, 1)[: window.shape[1]].any():
            raise KernelError(f"a row of the step table looks back to {name} from before the first row")
    return StepTable(
        coefficients=np.ascontiguousarray(coefficients),
        indices=np.ascontiguousarray(indices.astype(np.int32)),
        latents=x.shape[1],
        outputs=m.shape[1],
        forecasts=history,
        draws=int((noise != 0).sum()),
        first_input_scale=float(input_scale[0]),
        first_timestep=float(timestep[0]),
        initial=bool(np.any(initial)),
    )


def _entries(forecast: Sequence[Sequence[float]], keep: Sequence[bool], history: int) -> tuple[list[int], list[int]]:
    """Per row the newest entry that is read and the entry that is written, -1 for none."""
    read, written, count = [], [], 0
    for row, coefficients in enumerate(forecast):
        if coefficients and (keep[row] or len(coefficients) > count):
            raise KernelError(f"row {row} forecasts from {len(coefficients)} network outputs, {count} were kept")
        read.append((count - 1) % history if coefficients else -1)
        written.append(count % history if keep[row] and history else -1)
        count += bool(keep[row])
    return read, written
