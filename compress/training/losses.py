"""Losses between clean latents, weighted by the noise level they were estimated at."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Weight = Literal["snr+1", "max(snr,1)"]


def weighted_error(clean: Tensor, target: Tensor, signal: Tensor, sigma: Tensor, weight: Weight) -> Tensor:
    """The mean squared error of clean latents, each sample weighted by its signal-to-noise ratio (SNR).

    SNR + 1 makes it the error of v; max(SNR, 1) is truncated SNR (Salimans and Ho 2022, arXiv 2202.00512, section 4).
    The weight of plain epsilon, SNR alone, vanishes at pure noise, where a few-step student does most of its work.

    Args:
        clean: estimated, (samples, channels, h, w).
        target: wanted, likewise.
        signal: (samples, 1, 1, 1); the ratio is `signal^2 / sigma^2`.
        sigma: likewise.
        weight: how samples are weighted.
    """
    ratio = (signal / sigma).square()
    factor = ratio + 1.0 if weight == "snr+1" else torch.clamp(ratio, min=1.0)
    return (factor * (clean - target).square()).mean()
