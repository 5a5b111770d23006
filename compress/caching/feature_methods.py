"""Methods that keep whole features of a network: DeepCache and encoder propagation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from compress.caching import schedules
from compress.caching.method import Job, Method, forecast_of, rows_on, spans
from compress.errors import RefusedError
from compress.families import Layout
from export.step_plan import Step

SCHEDULES = ("uniform", "signed-power")


def _cut(job: Job) -> Layout:
    return job.family.cut_layout(job.denoiser, job.options["cut"])


def _deepcache(job: Job) -> Sequence[str]:
    options, calls = job.options, job.calls
    warmup = options["warmup"] or forecast_of(options).history
    if options["schedule"] not in SCHEDULES:
        raise RefusedError(f"schedule: {options['schedule']!r} is unknown; known are {', '.join(SCHEDULES)}")
    if options["schedule"] == "uniform":
        full = schedules.uniform(calls, options["interval"], warmup)
    else:
        number = min(calls, math.ceil(calls / options["interval"]))
        dense = schedules.signed_power(calls, number, options["center"], options["power"])
        full = sorted({*dense, *range(min(warmup, calls))})
    if len(full) == calls:
        raise RefusedError(
            f"with {calls} network calls, {warmup} of them warm-up, none is left to skip: take more sampling steps or "
            "a shorter warmup"
        )
    return rows_on(full, calls, "shallow")


DEEPCACHE = Method(
    paper="DeepCache, Ma et al. 2023, arXiv 2312.00858",
    layout=_cut,
    paths=_deepcache,
    options={
        "cut": 0,
        "interval": 3,
        "schedule": "uniform",
        "center": None,
        "power": 1.4,
        "forecast": "reuse",
        "order": None,
        "damping": None,
        "warmup": None,
    },
)
"""One cut. `schedule: signed-power` crowds the full rows around `center` (row 15 of 50)."""


def _encoder(job: Job) -> Layout:
    return job.family.encoder_layout(job.denoiser)


def _keys(job: Job) -> Sequence[str]:
    full = schedules.key_steps(job.options["key_steps"], job.calls)
    if len(full) == job.calls:
        raise RefusedError(f"every one of the {job.calls} network calls is a key step: nothing is left to propagate")
    return rows_on(full, job.calls, "decoder")


def _injected(job: Job, steps: Sequence[Step]) -> Sequence[Step]:
    """Batch the decoders of a span, and add a little of the first latent to every later one.

    In the second half of the noise levels (t below 500) the latent handed to the sampler becomes x + alpha x_T. Where
    the latent is larger than the prior's unit variance, so is what is added.
    """
    alpha = job.options["inject"]
    if job.options["span"]:
        steps = spans(steps, "decoder")
    if not alpha:
        return steps
    first = job.plan.init_noise_sigma
    added = [alpha / first * max(1.0, math.hypot(step.signal, step.sigma)) * (step.t < 500) for step in steps]
    return [
        replace(step, initial=sum(a * added[row - lag] for lag, a in step.x.items())) for row, step in enumerate(steps)
    ]


ENCODER_PROPAGATION = Method(
    paper="Faster Diffusion, Li et al. 2023, arXiv 2312.09608",
    layout=_encoder,
    paths=_keys,
    options={"key_steps": "50ls", "inject": 0.003, "span": True, "forecast": "reuse", "order": None, "damping": None},
    finish=_injected,
)
"""The encoder runs at key steps; the decoders of the rows between them as one batch, since they see no latent."""
