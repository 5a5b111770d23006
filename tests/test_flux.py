"""What Flux asks of a sampler: guidance in the conditioning, sigmas and shift as its pipeline computes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from compress import compiler
from compress.errors import RefusedError
from compress.guidance import place_guidance
from compress.inspect import stock_of_model
from compress.measure.baselines import plan_with_steps
from compress.measure.original import PipelineCall
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.recipe.schema import Recipe
from compress.schedulers import completed, set_up
from tests import tiny

EULER = "FlowMatchEulerDiscreteScheduler"
TOLD = {"even_sigmas": True, "image_seq_len": 1024}


@pytest.fixture
def model(tiny_folder: Callable[[str], Path]) -> LatentDiffusion:
    return load(tiny_folder("flux"))


def recipe(model: LatentDiffusion, sampler: str, side: int = 16) -> Recipe:
    return Recipe.parse(
        f"schema_version: 1\nmodel: {model.folder}\nsampler: {sampler}\ntargets: [onnxruntime-cpu]\n"
        f"shapes: {{height: {side}, width: {side}}}\nout: out\n"
    )


def test_the_scale_is_embedded_and_the_plan_unguided(model: LatentDiffusion) -> None:
    before = model.hash()
    compiler.sample(model, recipe(model, "{steps: 4, guidance_scale: 2.0}"))
    assert model.step_plan is not None
    assert {step.guidance for step in model.step_plan.steps} == {"none"}
    assert model.conditioning["guidance"] == 2.0
    assert model.hash() != before
    call = PipelineCall.of(model.step_plan, model.conditioning, 16, 16)
    assert (call.guidance_scale, call.max_sequence_length) == (2.0, tiny.PROMPT_TOKENS + 4)
    runtime = model.runtime()
    gentle = runtime.sample(["a ring"], [1], 16, 16)
    runtime.conditioning["guidance"] = 6.0
    assert np.abs(runtime.sample(["a ring"], [1], 16, 16) - gentle).max() > 1e-4


def test_what_cannot_be_guided_is_refused(model: LatentDiffusion) -> None:
    with pytest.raises(RefusedError, match="guidance_interval has no effect on a denoiser that embeds its guidance"):
        compiler.sample(model, recipe(model, "{steps: 4, guidance_scale: 2.0, guidance_interval: [0.2, 0.8]}"))
    model.denoiser = tiny.flux(guidance_embeds=False)
    with pytest.raises(RefusedError, match=r"guidance_scale is 2, but this flux denoiser embeds no guidance"):
        place_guidance(model, 2.0)
    assert place_guidance(model, 1.0) == place_guidance(model, 0.0) == 1.0


def test_the_schedule_is_that_of_the_size_and_survives_other_step_counts(model: LatentDiffusion) -> None:
    """The pipeline's formula at the recipe's size; other step counts are spaced anew."""
    times: dict[tuple[int, int], list[float]] = {}
    for side, steps in ((16, 4), (64, 4), (64, 3)):
        compiler.sample(model, recipe(model, f"{{steps: {steps}}}", side))
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.scheduler_config)
        tokens = (side // 4) ** 2
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens))
        assert model.step_plan is not None
        times[side, steps] = [step.t for step in model.step_plan.steps]
        assert times[side, steps] == scheduler.timesteps.tolist()
    assert [step.t for step in plan_with_steps(model, 4).steps] == times[64, 4] != times[16, 4]


def test_what_the_recipe_says_wins() -> None:
    shifting, plain = {"use_dynamic_shifting": True}, {"shift": 3.0}
    assert completed(EULER, shifting, {}, TOLD) == TOLD
    assert completed(EULER, plain, {}, TOLD) == {"even_sigmas": True}
    assert completed(EULER, plain, shifting, TOLD) == TOLD | shifting
    assert completed(EULER, shifting, {"mu": 1.0, "sigmas": [1.0, 0.5]}, TOLD) == {"mu": 1.0, "sigmas": [1.0, 0.5]}
    assert completed(EULER, shifting, {"image_seq_len": 9}, TOLD) == {"even_sigmas": True, "image_seq_len": 9}
    assert completed("DDIMScheduler", {}, {}, TOLD) == {}
    assert completed("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, {}, TOLD) == {}
    assert completed("NoScheduler", {}, {}, TOLD) == {}
    assert set_up(EULER, plain, 4, {"even_sigmas": True}).timesteps == {"sigmas": [1.0, 0.75, 0.5, 0.25]}
    assert set_up(EULER, plain, 4, {"even_sigmas": False}).timesteps == {}
    with pytest.raises(RefusedError, match="DDIMScheduler has no option 'even_sigmas'"):
        set_up("DDIMScheduler", {}, 4, {"even_sigmas": True})


def test_inspect_lists_every_block(model: LatentDiffusion) -> None:
    stock = stock_of_model(model)
    names = [cut["module"] for cut in stock["cuts"]]
    assert names == [f"{stack}.{i}" for stack in ("transformer_blocks", "single_transformer_blocks") for i in (0, 1)]
    assert stock["conditioning"] == "flux"
    assert all(part["macs"] > 0 for part in stock["parts"].values())
