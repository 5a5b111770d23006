"""What a recipe will need before it is run: minutes, memory and disk, from a few measured calls; and its limits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.cost import Cost
from compress.errors import RefusedError
from compress.peak_memory import resident_bytes

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.passes.base import Edit, PassContext
    from compress.recipe.schema import Recipe

MIB = 2**20
PAIRED = 64
EXPORT_SECONDS = 20.0
"""Tracing, writing and checking one graph on two cores of a server CPU."""
_FAKE_QUANTIZED = 2.5
_ENGINE = 0.35


@dataclass(frozen=True)
class Estimate:
    """What a recipe will need, and of what.

    Attributes:
        work: its pieces; those of quantization are measured beforehand, all others right within a factor of two.
        resident_bytes: of memory, that the model and the libraries take.
        disk_mib: stored results of the passes and the engine folder.
    """

    work: tuple[Cost, ...]
    resident_bytes: int
    disk_mib: float

    @property
    def minutes(self) -> float:
        """Of the whole run, on this machine as busy as it is now."""
        return sum(one.seconds for one in self.work) / 60.0

    @property
    def memory_mib(self) -> float:
        """At the peak of the process."""
        return (self.resident_bytes + max((one.bytes for one in self.work), default=0)) / MIB

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "minutes": self.minutes,
            "memory_mib": self.memory_mib,
            "disk_mib": self.disk_mib,
            "work": {one.what: {"minutes": one.seconds / 60.0, "mib": one.bytes / MIB} for one in self.work},
        }

    def refuse_beyond(self, memory_gib: float | None, minutes: float | None) -> None:
        """Check limits, where there are any.

        Raises:
            RefusedError: one is exceeded; names what takes most, and the way out.
        """
        if minutes is not None and self.minutes > minutes:
            most = max(self.work, key=lambda one: one.seconds)
            raise RefusedError(
                f"this needs about {self.minutes:.3g} minutes, and limits.minutes is {minutes:g}: {most.what} takes "
                f"most ({most.seconds / 60.0:.3g}), less with {most.way_out}; or raise the limit"
            )
        if memory_gib is not None and self.memory_mib > 1024.0 * memory_gib:
            most = max(self.work, key=lambda one: one.bytes)
            largest, way = f"{most.what} ({most.bytes / MIB / 1024.0:.3g})", most.way_out
            if self.resident_bytes > most.bytes:
                largest = f"the model with its libraries ({self.resident_bytes / MIB / 1024.0:.3g})"
                way = "a smaller model, or fewer of its parts"
            raise RefusedError(
                f"this needs about {self.memory_mib / 1024.0:.3g} GiB of memory, and limits.memory_gib is "
                f"{memory_gib:g}: {largest} takes most, less with {way}; or raise the limit"
            )


def estimate(
    recipe: Recipe, model: LatentDiffusion, edits: Sequence[Edit], context: PassContext, *, engine: bool = True
) -> Estimate:
    """Let the passes measure what they will take, time one network call, and add up the calls the recipe implies.

    Args:
        recipe: to follow.
        model: float, with its step plan.
        edits: of all passes.
        context: of the passes.
        engine: one is exported and measured after the passes.
    """
    resident = resident_bytes()
    weights = sum(p.numel() * p.element_size() for part in model.parts().values() for p in part.parameters())
    picture = _seconds_a_picture(recipe, model)
    work = []
    for step in recipe.passes:
        measured = step.costs(model, edits, context)
        if measured is not None:
            work += measured
        elif "calibration" in step.required():
            seconds = len(context.prompts) * picture * 2.0
            work.append(Cost(f"the pass {step.name}", seconds, 3 * weights, "fewer calibration.samples"))
    if engine:
        work += _after_the_passes(recipe, model, weights, picture)
    saved = sum(edit.bytes_before - edit.bytes_after for edit in edits)
    disk = weights * max(1, len(recipe.passes)) + max(0, weights - saved) * 2
    return Estimate(tuple(work), resident, disk / MIB)


def _after_the_passes(recipe: Recipe, model: LatentDiffusion, weights: int, picture: float) -> list[Cost]:
    """Export and evaluation, from constants."""
    work = []
    graphs = EXPORT_SECONDS * (len(model.parts()) + 2)
    work.append(Cost("export", graphs, 2 * weights, "fewer targets"))
    if recipe.evaluate is not None:
        samples = recipe.evaluate.samples
        seconds = samples * picture * (1.0 + _ENGINE * (len(recipe.targets) + len(recipe.evaluate.against)))
        seconds += min(samples, PAIRED) * picture * (_FAKE_QUANTIZED * len(recipe.passes) + _ENGINE)
        work.append(Cost("evaluation", seconds, 3 * weights, "fewer evaluate.samples"))
    return work


def _seconds_a_picture(recipe: Recipe, model: LatentDiffusion) -> float:
    """Seconds of float32 network calls for one picture in a batch; the better of two after a warm-up."""
    plan = model.step_plan
    calls = recipe.sampler.steps if plan is None else plan.network_calls
    halves = 2 if plan is not None and any(step.guidance != "none" for step in plan.steps) else 1
    batch = 1 if recipe.evaluate is None else recipe.evaluate.batch
    factor = int(model.latent["downscale"])
    inputs = model.family.example_inputs(
        model.denoiser,
        batch=batch * halves,
        height=recipe.shapes.height.best // factor,
        width=recipe.shapes.width.best // factor,
        prompt_tokens=recipe.shapes.prompt_tokens.best if recipe.shapes.prompt_tokens is not None else 8,
    )
    denoiser = model.parts()["denoiser"]
    seconds = []
    with torch.inference_mode():
        for _ in range(3):
            began = time.perf_counter()
            denoiser(**inputs)
            seconds.append(time.perf_counter() - began)
    return float(np.min(seconds[1:])) * calls / batch
