"""What a recipe will need before it is run: minutes, memory and disk, from one timed network call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from compress.passes.base import Size

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.passes.base import Edit
    from compress.recipe.schema import Recipe

MIB = 2**20
PAIRED = 64
EXPORT_SECONDS = 20.0
"""Tracing, writing and checking one graph on two cores of a server CPU."""
_FAKE_QUANTIZED = 2.5
_ENGINE = 0.35


@dataclass(frozen=True)
class Estimate:
    """An estimate, right within about a factor of two.

    Attributes:
        minutes: of the whole run, on this machine as busy as it is now.
        memory_mib: peak of the process.
        disk_mib: stored results of the passes and the engine folder.
    """

    minutes: float
    memory_mib: float
    disk_mib: float

    def to_dict(self) -> dict[str, float]:
        """Return plain data for JSON."""
        return asdict(self)


def estimate(recipe: Recipe, model: LatentDiffusion, edits: Sequence[Edit]) -> Estimate:
    """Time one network call in float32 and add up the calls that the recipe implies."""
    picture = _seconds_a_picture(recipe, model)
    work = EXPORT_SECONDS * (len(model.parts()) + 2)
    if recipe.calibration is not None and any("calibration" in step.required() for step in recipe.passes):
        work += recipe.calibration.samples * picture * 2.0
    if recipe.evaluate is not None:
        samples = recipe.evaluate.samples
        work += samples * picture * (1.0 + _ENGINE * (len(recipe.targets) + len(recipe.evaluate.against)))
        work += min(samples, PAIRED) * picture * (_FAKE_QUANTIZED * len(recipe.passes) + _ENGINE)
    costs = [cost for step in recipe.passes if (cost := step.cost(model, _size(recipe))) is not None]
    work += sum(cost.seconds for cost in costs)
    weights = sum(p.numel() * p.element_size() for part in model.parts().values() for p in part.parameters())
    saved = sum(edit.bytes_before - edit.bytes_after for edit in edits)
    resident = _resident_bytes()
    return Estimate(
        minutes=work / 60.0,
        memory_mib=(resident + max([4.0 * weights, *(cost.memory_bytes for cost in costs)])) / MIB,
        disk_mib=(weights * max(1, len(recipe.passes)) + max(0, weights - saved) * 2) / MIB,
    )


def _size(recipe: Recipe) -> Size:
    shapes = recipe.shapes
    tokens = shapes.prompt_tokens.best if shapes.prompt_tokens is not None else 8
    return Size(shapes.height.best, shapes.width.best, tokens)


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
        height=_size(recipe).height // factor,
        width=_size(recipe).width // factor,
        prompt_tokens=_size(recipe).prompt_tokens,
    )
    denoiser = model.parts()["denoiser"]
    seconds = []
    with torch.inference_mode():
        for _ in range(3):
            began = time.perf_counter()
            denoiser(**inputs)
            seconds.append(time.perf_counter() - began)
    return float(np.min(seconds[1:])) * calls / batch


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
