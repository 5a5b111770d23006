"""Fidelity: how close a rewritten model's latents are to the float model's, on the noises of calibration."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from compress.measure.metrics import latent_peak, psnr_per_sample

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.passes.base import PassContext


class Fidelity:
    """To one model; its own latents are computed once, when they are needed.

    Args:
        model: float.
        context: prompts, seed, size, and targets: what the first of them computes is what counts.
    """

    def __init__(self, model: LatentDiffusion, context: PassContext) -> None:
        self._model, self._context = model, context

    @functools.cached_property
    def _exact(self) -> np.ndarray:
        return latents_of(self._model, self._context)

    def psnr(self, made: LatentDiffusion) -> float:
        """Of the latents, mean over samples, in dB."""
        found = latents_of(made, self._context)
        return float(psnr_per_sample(self._exact, found, latent_peak(self._exact)).mean())


def latents_of(model: LatentDiffusion, context: PassContext) -> np.ndarray:
    """One per calibration prompt."""
    dialect = context.targets[0].dialect if context.targets else None
    runtime, found = model.runtime(dialect=dialect), list[np.ndarray]()
    for first in range(0, len(context.prompts), context.batch):
        prompts = list(context.prompts[first : first + context.batch])
        seeds = [context.seed + first + i for i in range(len(prompts))]
        found.append(runtime.sample(prompts, seeds, context.height, context.width))
    return np.concatenate(found)
