"""The fused denoising step makes the latents of every scheduler of diffusers, in plain torch and as a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.schedulers import GivenNoise, exact, plain, set_up
from export.plan_table import plan_table
from export.start import started_at
from kernels import denoise_step as fused
from tests.interpreted import Interpreter, largest_error
from tests.test_kernels_denoise_step import SHAPE, error, randn, run
from tests.test_sampler import CASES, LATENT, compiled

STEPS = 10
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array_wrap__ must accept context:DeprecationWarning"
)  # KDPM2 in diffusers


def of_diffusers(name: str, options: dict[str, Any], outputs: torch.Tensor) -> torch.Tensor:
    """The latents that diffusers' scheduler makes in float64 of the same network outputs and noises."""
    setup = set_up(name, {}, STEPS, options)
    scheduler = setup.build()
    noises = randn(len(outputs), *SHAPE, seed=1).float()
    latent = exact(3 * randn(*SHAPE, seed=0).float())
    after: list[torch.Tensor] = []
    with GivenNoise(lambda: exact(noises[len(after)])):
        for t, output in zip(scheduler.timesteps, outputs, strict=True):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(latent, t)
            latent = exact(plain(scheduler.step(exact(output), t, latent, return_dict=False, **setup.step)[0]))
            after.append(plain(latent).reshape(SHAPE))
    return torch.stack(after)


@pytest.mark.parametrize(("name", "options", "predictions"), CASES)
def test_agrees_with_every_scheduler(name: str, options: dict[str, Any], predictions: tuple[str | None, ...]) -> None:
    options = options if predictions[0] is None else {**options, "prediction_type": predictions[0]}
    table = plan_table(compiled(name, options, STEPS))
    outputs = randn(table.rows, *SHAPE, seed=2).float()
    got = run(fused, table, outputs, torch.float32, "reference")
    truth = of_diffusers(name, options, outputs)
    assert max(largest_error(ours, theirs) for ours, theirs in zip(got, truth, strict=True)) <= 1e-6


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {"clip_sample": False, "eta": 0.7}),
        ("EulerAncestralDiscreteScheduler", LATENT),
        ("DPMSolverMultistepScheduler", {**LATENT, "solver_order": 3}),
        ("PNDMScheduler", {**LATENT, "skip_prk_steps": False}),
        ("UniPCMultistepScheduler", LATENT),
        ("FlowMatchEulerDiscreteScheduler", {}),
    ],
)
def test_the_kernel_makes_the_rows_of_a_sampler(interpreter: Interpreter, name: str, options: dict[str, Any]) -> None:
    plan = compiled(name, options, 5, 4.0)
    assert interpreter.run(error, "denoise_step", plan=plan.to_json(), dtype="float32") <= 1e-6


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
def test_a_run_that_starts_late_has_a_table_of_its_own(name: str) -> None:
    """A multistep sampler has no history where image-to-image begins."""
    plan = compiled(name, LATENT, 6, 4.0)
    late = started_at(plan, 4, plan.latent_input)
    assert late.steps[0].x != plan.steps[4].x or name == "HeunDiscreteScheduler"
    assert error(fused, late.to_json(), "float32", mode="reference") <= 1e-6
