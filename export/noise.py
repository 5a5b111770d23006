"""Standard-normal noise that depends on (seed, row) alone: equal on every backend and in every batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

INITIAL = 0
"""The row of the initial latent; the noise drawn after network call k has row k + 1."""


def noise(seeds: Sequence[int], row: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw one standard-normal float32 array per seed.

    Args:
        seeds: one non-negative seed per sample.
        row: `INITIAL`, or 1 + the index of the network call.
        shape: of one sample, e.g. (channels, height, width).

    Returns:
        float32 (len(seeds), *shape). Source: Salmon et al. 2011, Philox4x64-10, as in NumPy.
    """
    draw = [
        np.random.Generator(np.random.Philox(key=np.array([seed, row], np.uint64))).standard_normal(shape, np.float32)
        for seed in seeds
    ]
    return np.stack(draw) if draw else np.empty((0, *shape), np.float32)
