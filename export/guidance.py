"""Classifier-free guidance: one network output from those of the guidance halves."""

from __future__ import annotations

import numpy as np

from export.plan_rows import Step


def guide(halves: tuple[np.ndarray, ...], step: Step, out: np.ndarray) -> None:
    """Form `uncond + guidance_scale * (cond - uncond)` in a guided row, the conditional output in others.

    Args:
        halves: (samples, channels, h, w) each: the conditional output, the unconditional one before it where it ran.
        step: the row.
        out: float32 of the same shape.
    """
    if step.guidance == "none":
        out[...] = halves[-1]
        return
    uncond, cond = halves
    np.subtract(cond, uncond, out=out)
    out *= np.float32(step.guidance_scale)
    out += uncond
