"""Bilinear resampling of latents to another size, as two small matrices, for plans whose level rises."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from export.plan_rows import Step

RISE = 1 << 32
"""The fresh noise of a level that rises at row k is the draw `RISE + k`; see `export.noise`."""

_WHOLE = 1e-6
"""A level is a float: a third of 48 is 16 to rounding."""


def resample(latents: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resample bilinearly, pixel centres at half-integers (`align_corners=False`), without smoothing.

    Args:
        latents: float32 (samples, channels, h, w).
        size: the new height and width.

    Returns:
        float32 (samples, channels, *size); every sample by itself.
    """
    rows, columns = (_weights(old, new) for old, new in zip(latents.shape[2:], size, strict=True))
    return (rows @ latents.astype(np.float64) @ columns.T).astype(np.float32)


def level_size(size: tuple[int, int], level: float) -> tuple[int, int]:
    """Height and width of the latent at a level; they are whole where `fits` says so."""
    return round(size[0] * level), round(size[1] * level)


def fits(size: tuple[int, int], level: float, multiple: int) -> bool:
    """Whether a level leaves whole multiples of `multiple`, at least one, of the height and width of the latent."""
    scaled = level_size(size, level)
    exact = all(abs(new - old * level) < _WHOLE for old, new in zip(size, scaled, strict=True))
    return exact and all(new >= multiple and new % multiple == 0 for new in scaled)


def risen(
    clean: np.ndarray, step: Step, row: int, size: tuple[int, int], draw: Callable[[int, tuple[int, ...]], np.ndarray]
) -> np.ndarray:
    """The latent of a row whose level is larger than that of the row before.

    Args:
        clean: the estimate that the row before hands over (samples, channels, h, w).
        step: the row, whose `signal` and `sigma` say how noisy it begins.
        row: its index.
        size: height and width at its level.
        draw: standard-normal noise of (draw number, shape).

    Returns:
        float32 `signal * resample(clean) + sigma * noise`.
    """
    larger = resample(clean, size)
    return np.float32(step.signal) * larger + np.float32(step.sigma) * draw(RISE + row, larger.shape)


@functools.cache
def _weights(old: int, new: int) -> np.ndarray:
    """(new, old) interpolation weights; rows add up to 1."""
    weights = np.zeros((new, old))
    centres = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    below = np.floor(centres).astype(int)
    above = np.minimum(below + 1, old - 1)
    at = np.arange(new)
    np.add.at(weights, (at, below), 1 - (centres - below))
    np.add.at(weights, (at, above), centres - below)
    weights.flags.writeable = False
    return weights
