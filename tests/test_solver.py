"""The pass `solver`: fewer calls at fitted updates; what it keeps, what it proves, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compress.compiler import apply
from compress.engine.export_engine import export_engine
from compress.errors import PassError, RefusedError
from compress.measure.baselines import plan_with_steps
from compress.measure.metrics import latent_peak, psnr_per_sample
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.cache import Cache
from compress.passes.solver import Solver
from compress.store import Store
from export.engine import Engine
from export.quant_plan import QuantPlan
from export.runtime import Runtime
from export.target import TARGETS
from tests import tiny_engine as toy

PROMPTS = ["a red circle", "a small blue square", "a large green square"]
CONTEXT = PassContext(PROMPTS, 0, toy.SIDE, toy.SIDE)
STEPS, CALLS = 12, 4


def model(tiny_folder: Callable[[str], Path], family: str = "unet", steps: int = STEPS) -> LatentDiffusion:
    return toy.sampled(load(tiny_folder(family)), steps)


def applied(found: LatentDiffusion, calls: int = CALLS, context: PassContext = CONTEXT) -> LatentDiffusion:
    changed, step = found.clone(), Solver(calls=calls)
    edits = step.plan(changed, [])
    assert [edit.action for edit in edits] == ["solver"]
    step.apply(changed, edits, context)
    step.check(changed, edits)
    return changed


@pytest.mark.parametrize("family", ["unet", "sd3"])
def test_it_beats_as_many_steps_on_other_noises(family: str, tiny_folder: Callable[[str], Path]) -> None:
    found = model(tiny_folder, family)
    changed = applied(found)
    assert changed.step_plan is not None
    assert found.step_plan is not None
    runtime, seeds = found.runtime(), [70, 71, 72]
    full, fitted, own = (
        runtime.altered(plan=plan).sample(PROMPTS, seeds, toy.SIDE, toy.SIDE)
        for plan in (found.step_plan, changed.step_plan, plan_with_steps(found, CALLS))
    )
    decibels = [float(psnr_per_sample(full, made, latent_peak(full)).mean()) for made in (fitted, own)]
    assert decibels[0] > decibels[1] + 2.0
    said = changed.step_plan.key["solver"]
    assert said["held_out_psnr_db"]["solver"] > said["held_out_psnr_db"]["fewer steps"]
    assert said["points"][0] == 0
    assert len(said["points"]) == changed.step_plan.network_calls == changed.step_plan.key["steps"] == CALLS


def test_it_makes_up_for_quantization(tiny_folder: Callable[[str], Path]) -> None:
    """Where weights are clipped, all outputs shrink: a plan fitted on that model ends closer to the float run."""
    found = model(tiny_folder)
    clipped = toy.quantized(found.clone(), "denoiser", ["conv_out"])
    layer = clipped.quant_plans["denoiser"].layers["conv_out"]
    clipped.quant_plans["denoiser"] = QuantPlan(
        {"conv_out": replace(layer, weight=replace(layer.weight, scale=np.float32(0.4) * layer.weight.scale))}
    )
    full, runtime = sample(found.runtime()), clipped.runtime()
    errors = [
        float(np.mean((sample(runtime.altered(plan=applied(one).step_plan)) - full) ** 2)) for one in (clipped, found)
    ]
    assert errors[0] < 0.5 * errors[1]
    assert errors[0] < float(np.mean((sample(runtime) - full) ** 2))


def sample(runtime: Runtime) -> np.ndarray:
    return runtime.sample(PROMPTS, [70, 71, 72], toy.SIDE, toy.SIDE)


def test_an_engine_computes_it_and_a_cache_may_follow(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    found = model(tiny_folder)
    stages = apply(found, [Solver(calls=6), Cache(cut=1, interval=2)], [], CONTEXT, Store(tmp_path / "store"))
    last = stages["cache"]
    assert last.step_plan is not None
    assert [step.path for step in last.step_plan.steps] == ["full", "shallow"] * 3
    target = TARGETS["onnxruntime-cpu"]
    export_engine(last, [target], toy.SHAPES, tmp_path / "engine")
    made = Engine.open(tmp_path / "engine", target.name).sample(PROMPTS, [1, 2, 3], toy.SIDE, toy.SIDE)
    expected = last.runtime().sample(PROMPTS, [1, 2, 3], toy.SIDE, toy.SIDE)
    assert np.abs(made - expected).max() <= 1e-4 * np.abs(expected).max()


def test_equal_models_give_equal_plans(tiny_folder: Callable[[str], Path]) -> None:
    assert applied(model(tiny_folder)).step_plan == applied(model(tiny_folder)).step_plan


def test_what_cannot_be_fitted_is_refused(tiny_folder: Callable[[str], Path]) -> None:
    found = model(tiny_folder)
    assert found.step_plan is not None
    with pytest.raises(RefusedError, match=r"calls: 12 are no fewer .* give 1 to 11"):
        Solver(calls=STEPS).plan(found, [])
    noisy = replace(found.step_plan, steps=tuple(replace(step, noise=0.1) for step in found.step_plan.steps))
    with pytest.raises(RefusedError, match="choose a deterministic scheduler"):
        Solver(calls=CALLS).plan(replace(found, step_plan=noisy), [])
    with pytest.raises(RefusedError, match="must be compiled first"):
        Solver(calls=CALLS).plan(replace(found, step_plan=None), [])
    with pytest.raises(RefusedError, match="put this pass before cache, once"):
        Solver(calls=2).plan(applied(found), [])
    with pytest.raises(RefusedError, match="needs the key calibration"):
        Solver(calls=CALLS).apply(found, [], PassContext([], 0, toy.SIDE, toy.SIDE))
    with pytest.raises(PassError, match="has not the 4 calls"):
        Solver(calls=CALLS).check(found, [])


def test_a_plan_that_is_no_better_is_refused(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the scheduler's own few steps were as good as all of them."""
    from compress.measure import baselines

    monkeypatch.setattr(baselines, "plan_with_steps", lambda model, steps: model.step_plan)
    found = model(tiny_folder)
    with pytest.raises(RefusedError, match=r"set sampler\.steps to 4 in place of this pass"):
        applied(found)
