"""A method that touches no feature: guidance is left out where it does little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from compress.caching.method import Job, Method
from compress.errors import RefusedError
from export.step_plan import Step


def _inside(job: Job, steps: Sequence[Step]) -> Sequence[Step]:
    """Guide only the rows whose noise-to-signal ratio lies in the interval; the others run one half."""
    low, high = job.options["sigma"]
    ratios = [step.sigma / step.signal if step.signal > 0.0 else float("inf") for step in steps]
    guided = [low < ratio <= high for ratio in ratios]
    before = [step.guidance != "none" for step in steps]
    if not any(before) or all(after or not was for after, was in zip(guided, before, strict=True)):
        raise RefusedError(
            f"sigma: no guided row lies outside ({low:g}, {high:g}], so nothing would be saved: narrow the interval"
        )
    return [
        step if inside else replace(step, guidance="none", guidance_scale=1.0)
        for step, inside in zip(steps, guided, strict=True)
    ]


GUIDANCE_INTERVAL = Method(
    paper="Guidance interval, Kynkaanniemi et al. 2024, arXiv 2404.07724",
    layout=lambda job: None,
    paths=lambda job: [step.path for step in job.plan.steps],
    options={"sigma": (0.28, 5.42)},
    finish=_inside,
)
"""The interval is that of the paper for SDXL, as noise over signal."""
