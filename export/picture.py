"""Pictures as bytes and as the VAE's floats in [-1, 1], rounded as the diffusers image processor rounds."""

from __future__ import annotations

import numpy as np


def to_pictures(sample: np.ndarray) -> np.ndarray:
    """Float (samples, 3, height, width) in [-1, 1], clipped, to uint8 (samples, height, width, 3)."""
    unit = np.clip(np.asarray(sample, np.float32) * np.float32(0.5) + np.float32(0.5), 0.0, 1.0)
    return np.rint(unit * np.float32(255.0)).astype(np.uint8).transpose(0, 2, 3, 1).copy()


def from_pictures(pictures: np.ndarray) -> np.ndarray:
    """Bytes, uint8 (samples, height, width, 3), to float32 (samples, 3, height, width) in [-1, 1]."""
    unit = np.asarray(pictures).astype(np.float32).transpose(0, 3, 1, 2) / np.float32(255.0)
    return np.ascontiguousarray(np.float32(2.0) * unit - np.float32(1.0))
