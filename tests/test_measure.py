"""Stages, traces, quality, timing, memory and size, on real pipelines at toy size."""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import PassError
from compress.measure import memory
from compress.measure.baselines import ORIGINAL, Task, baselines, contest, fewer_steps_quality, plan_with_steps
from compress.measure.latency import Contestant, Timing, interleave
from compress.measure.original import PipelineCall, open_pipeline
from compress.measure.quality import (
    Judge,
    Stage,
    Workload,
    changes,
    check_changed,
    generate,
    planned_metrics,
    step_errors,
    trace,
)
from compress.measure.scorer import Scorer
from compress.measure.size import original_size
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.cache import Cache
from compress.prompts import Prompt
from compress.report.report import Plan
from compress.sampler import compile_sampler
from export.step_plan import Segment
from tests.test_scorer import write_scorer

SIDE = 16
PROMPTS = [
    Prompt("a red circle", {"colour": "red", "level": "dark"}),
    Prompt("a large blue square", {"colour": "blue"}),
    Prompt("the yellow triangle on the left", {"colour": "green", "level": "bright"}),
    Prompt("a small green ring", {"colour": "green"}),
    Prompt("a ring", {}),
]
Sampled = Callable[..., LatentDiffusion]


@pytest.fixture(scope="module")
def sampled(tiny_folder: Callable[[str], Path]) -> Sampled:
    """A toy model with its own scheduler compiled; the caller's own."""

    @functools.cache
    def compiled(family: str, steps: int) -> LatentDiffusion:
        model = load(tiny_folder(family))
        model.step_plan = compile_sampler(
            model.scheduler_config["_class_name"],
            model.scheduler_config,
            steps,
            3.0,
            segments={segment.name: Segment(segment.inputs, segment.outputs) for segment in model.segments()},
            paths={"full": ("denoiser",)},
        )
        return model

    def make(family: str = "unet", steps: int = 6) -> LatentDiffusion:
        return compiled(family, steps).clone()

    return make


def cached(model: LatentDiffusion, **options: Any) -> LatentDiffusion:
    model, cache = model.clone(), Cache(cut=1, interval=3, **options)
    edits = cache.plan(model, [])
    cache.apply(model, edits, PassContext(prompts=(), seed=0, height=SIDE, width=SIDE))
    return model


def workload(batch: int = 16) -> Workload:
    return Workload.of(PROMPTS, 7, SIDE, SIDE, batch)


@pytest.mark.parametrize("family", ["unet", "sd3"])
def test_a_stage_does_not_depend_on_the_batch(sampled: Sampled, family: str) -> None:
    stage = sampled(family).runtime()
    calls: list[tuple[str, int, int]] = []
    whole = generate(stage, workload(), "original", lambda *call: calls.append(call))
    parts = generate(stage, workload(batch=2), "original")
    assert whole.images.shape == (5, SIDE, SIDE, 3)
    np.testing.assert_allclose(parts.latents, whole.latents, atol=2e-5)
    assert calls == [("original", 0, 5), ("original", 5, 5)]
    assert len(whole.first(2)) == 2


def test_a_stage_survives_the_disk(sampled: Sampled, tmp_path: Path) -> None:
    stage = generate(sampled().runtime(), workload().first(2), "original")
    stage.save(tmp_path / "stage.npz")
    again = Stage.load(tmp_path / "stage.npz")
    np.testing.assert_array_equal(again.latents, stage.latents)
    np.testing.assert_array_equal(again.images, stage.images)


def test_not_a_number_is_an_error(sampled: Sampled) -> None:
    model = sampled()
    with torch.no_grad():
        model.denoiser.conv_out.bias[0] = float("nan")
    with pytest.raises(PassError, match="'compressed' gives latents that are not finite"):
        generate(model.runtime(), workload(), "compressed")
    model = sampled()
    with torch.no_grad():
        model.vae.decoder.conv_out.bias[0] = float("inf")
    with pytest.raises(PassError, match="VAE decoder of the stage 'compressed'"):
        generate(model.runtime(), workload(), "compressed")


def test_a_flat_picture_is_an_error(sampled: Sampled) -> None:
    model = sampled()
    with torch.no_grad():
        model.vae.decoder.conv_out.weight.zero_()
    with pytest.raises(PassError, match="one flat colour for the prompt 'a red circle'"):
        generate(model.runtime(), workload(), "compressed")
    assert len(generate(model.runtime(), workload(), "2 steps", allow_flat=True)) == 5


def test_a_change_that_changed_nothing_is_an_error(sampled: Sampled) -> None:
    model = sampled()
    before = generate(model.runtime(), workload(), "original")
    with pytest.raises(PassError, match="quantize changed no latent"):
        check_changed(before, generate(model.clone().runtime(), workload(), "after"), "quantize")
    check_changed(before, generate(cached(model).runtime(), workload(), "after"), "cache")


def test_a_trace_is_the_run_itself(sampled: Sampled) -> None:
    stage = sampled().runtime()
    found = trace(stage, workload())
    assert found.latents.shape == found.outputs.shape == (6, 5, 4, SIDE // 2, SIDE // 2)
    np.testing.assert_array_equal(found.latents[-1], generate(stage, workload(), "original").latents)


@pytest.mark.parametrize("family", ["unet", "sd3"])
def test_forced_by_itself_a_run_has_no_error(sampled: Sampled, family: str) -> None:
    stage = sampled(family).runtime()
    free = trace(stage, workload())
    forced = trace(stage, workload(), given=free)
    np.testing.assert_array_equal(forced.latents, free.latents)
    np.testing.assert_allclose(forced.outputs, free.outputs, atol=1e-6)
    curve = step_errors("original", free, free, forced)
    assert max(curve.relative_l2) == 0.0
    assert max(curve.one_step) < 1e-6


def test_errors_of_a_cached_model_begin_with_the_first_shallow_call(sampled: Sampled) -> None:
    """Full calls given the original's latents are exact; shallow ones err; errors of the free run stay."""
    model = sampled()
    changed = cached(model)
    assert changed.step_plan is not None
    paths = [step.path for step in changed.step_plan.steps]
    assert paths == ["full", "shallow", "shallow"] * 2
    reference = trace(model.runtime(), workload())
    stage = changed.runtime()
    curve = step_errors("compressed", reference, trace(stage, workload()), trace(stage, workload(), given=reference))
    for path, error in zip(paths, curve.one_step, strict=True):
        assert error < 1e-6 if path == "full" else error > 1e-4
    assert curve.relative_l2[0] < 1e-6 < curve.relative_l2[1]
    assert curve.psnr_db[0] > 100 > curve.psnr_db[-1]
    assert Plan.of(changed.step_plan).rows[1].reads == {"deep": (1.0,)}


def test_traces_of_different_length_are_refused(sampled: Sampled) -> None:
    model, longer = sampled(), sampled(steps=7)
    one, other = (trace(each.runtime(), workload().first(1)) for each in (model, longer))
    with pytest.raises(PassError, match="another number of times"):
        step_errors("compressed", one, other, other)


def test_quality_against_the_original_and_by_the_scorer(sampled: Sampled, tmp_path: Path) -> None:
    model = sampled()
    original = generate(model.runtime(), workload(), "original")
    stage = generate(cached(model).runtime(), workload(), "compressed")
    judge = Judge(PROMPTS, Scorer(write_scorer(tmp_path, lambda raw: raw.update(image_size=[8, 8]))))
    judged = judge.quality(original)
    assert set(judged.estimates) == {"attribute_accuracy"}
    assert judged.estimates["attribute_accuracy"].n == 4
    found = judge.quality(stage.first(3), original, judged)
    assert set(found.estimates) == {"latent_psnr_db", "image_psnr_db", "ssim", "attribute_accuracy"}
    assert found.estimates["ssim"].n == 3
    assert judge.quality(original, original).estimates["image_psnr_db"].value == 150
    change = changes(judged, found)["attribute_accuracy"]
    assert judged.hits is not None
    assert found.hits is not None
    assert change.value == pytest.approx((found.hits[:, 0].sum() - judged.hits[:3, 0].sum()) / 5)
    assert set(Judge(PROMPTS).quality(stage, original).estimates) == {"latent_psnr_db", "image_psnr_db", "ssim"}


def test_frechet_distance_needs_pictures_and_is_zero_for_the_same() -> None:
    planned = planned_metrics(scorer=True, clip=False, samples=31)
    assert "frechet_distance" not in planned
    assert "clip_score" not in planned
    assert {"frechet_distance", "clip_score"} < set(planned_metrics(scorer=True, clip=True, samples=32))


def test_contestants_take_turns() -> None:
    order: list[str] = []
    names = ["a", "b", "c"]

    def player(name: str) -> Contestant:
        return Contestant(name, lambda: order.append(name))

    found = interleave([player(name) for name in names], rounds=3, warm_up=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert all(len(timing.times) == 3 for timing in found.values())
    with pytest.raises(PassError, match="share a name"):
        interleave([player("a"), player("a")], rounds=1)
    with pytest.raises(PassError, match="at least one round"):
        interleave([player("a")], rounds=0)


def test_timing_measures_wall_time_and_stops_at_its_budget() -> None:
    sleeper, idler = Contestant("sleeper", lambda: time.sleep(0.03)), Contestant("idler", lambda: None)
    found = interleave([sleeper, idler], rounds=1000, budget_s=0.2)
    assert 5 <= len(found["sleeper"].times) < 20
    assert 30 <= found["sleeper"].median < 300
    assert found["idler"].median < found["sleeper"].median


def test_median_and_its_interval() -> None:
    timing = Timing(np.arange(1.0, 16.0))
    assert timing.median == 8
    assert timing.quartiles == (4.5, 11.5)
    estimate = timing.estimate()
    assert estimate.interval == (4.0, 13.0)
    generator, covered = np.random.default_rng(0), 0
    for _ in range(300):
        low, high = Timing(generator.exponential(1.0, 15)).estimate().interval or (9.0, 9.0)
        covered += low <= np.log(2) <= high
    assert 0.92 < covered / 300 < 1.0
    assert Timing(np.array([1.0, 2.0])).estimate().interval is None


@pytest.mark.parametrize("family", ["unet", "sd3", "dit", "pixart", "flux", "sdxl"])
def test_the_original_runs_as_its_user_runs_it(tiny_folder: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """The SD3 pipeline wants a VAE with a shift; the DiT pipeline has its null class at 1000, past the toy's ten."""
    folder = shutil.copytree(tiny_folder(family), tmp_path / family)
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"shift_factor": 0.1}))
    scale = 1.0 if family == "dit" else 3.0
    call = PipelineCall(None, steps=2, guidance_scale=scale, height=SIDE, width=SIDE, max_sequence_length=4)
    pipeline = open_pipeline(folder, call)
    prompt = 3 if family == "dit" else "a red circle"
    image = pipeline.generate(prompt, seed=1)
    assert image.shape == (SIDE, SIDE, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, pipeline.generate(prompt, seed=1))
    assert not np.array_equal(image, pipeline.with_steps(3).generate(prompt, seed=1))


def test_contest_finds_the_steps_of_equal_latency(sampled: Sampled, tmp_path: Path) -> None:
    """The cached model stands for the engine, the model itself for a plain runtime."""
    model = sampled(steps=8)
    changed = cached(model)
    assert model.step_plan is not None
    call = PipelineCall.of(model.step_plan, model.conditioning, SIDE, SIDE)
    assert call.scheduler == "DDIMScheduler"
    engine = changed.runtime()
    found = contest(
        Task("a red circle", SIDE, SIDE),
        threads=1,
        pipeline=open_pipeline(model.folder, call),
        steps=8,
        engines=["openvino-cpu"],
        open_engine=lambda target, threads: engine,
        plain=["openvino-cpu"],
        open_plain=lambda target, threads: model.runtime(),
        plan_with=lambda steps: plan_with_steps(model, steps),
        rounds=3,
    )
    assert [row.role for row in found.rows] == ["original", "engine", "plain runtime", "fewer steps", "fewer steps"]
    assert found.rows[0].name == ORIGINAL
    assert set(found.equal_steps) == {"original", "plain openvino-cpu"}
    assert all(1 <= steps < 8 for steps in found.equal_steps.values())
    assert all(row.median == found.timings[row.name].median > 0 for row in found.rows)

    original = generate(model.runtime(), workload(), "original")
    judge = Judge(PROMPTS)
    fewer = fewer_steps_quality(
        found.equal_steps,
        model.runtime(),
        lambda steps: plan_with_steps(model, steps),
        workload(),
        judge,
        original,
        judge.quality(original),
    )
    quality = {"openvino-cpu": judge.quality(generate(engine, workload(), "engine"), original)}
    points = baselines(found, {"original": judge.quality(original), **quality}, fewer)
    assert {point.role for point in points} == {"original", "engine", "plain runtime", "fewer steps"}
    assert all(point.quality["image_psnr_db"] < 60 for point in points if point.role == "fewer steps")


def test_steps_of_equal_latency_lie_on_a_line() -> None:
    from compress.measure.baselines import _equal_steps

    assert _equal_steps(goal=60.0, steps=20, whole=210.0, few=5, short=60.0) == 5
    assert _equal_steps(goal=69.9, steps=20, whole=210.0, few=5, short=60.0) == 5
    assert _equal_steps(goal=70.1, steps=20, whole=210.0, few=5, short=60.0) == 6
    assert _equal_steps(goal=5.0, steps=20, whole=210.0, few=5, short=60.0) == 1
    assert _equal_steps(goal=500.0, steps=20, whole=210.0, few=5, short=60.0) == 19
    with pytest.raises(PassError, match="too noisy"):
        _equal_steps(goal=5.0, steps=20, whole=50.0, few=5, short=60.0)


def test_fewer_steps_are_the_same_sampler(sampled: Sampled) -> None:
    model = sampled()
    plan = plan_with_steps(cached(model), 3)
    assert plan.network_calls == 3
    assert set(plan.paths) == {"full"}
    assert model.step_plan is not None
    assert plan.key["scheduler"] == model.step_plan.key["scheduler"]
    assert plan_with_steps(model, 6) == model.step_plan


def test_peak_memory_is_the_process_own() -> None:
    """A child of a large parent does not inherit the parent's peak."""
    ballast = np.ones(60 * 2**20 // 8)
    small = memory._peak("import sys\n", ["", "", "1"])
    large = memory._peak("import sys\nblock = bytearray(b'1') * (80 * 2**20)\n", ["", "", "1"])
    assert ballast.sum() > 0
    assert small < 40
    assert 75 < large - small < 90
    with pytest.raises(PassError, match="ValueError: no such luck"):
        memory._peak("raise ValueError('no such luck')\n", ["", "", "1"])


def test_peak_memory_of_the_original(sampled: Sampled) -> None:
    model = sampled()
    assert model.step_plan is not None
    call = PipelineCall.of(model.step_plan, model.conditioning, SIDE, SIDE, steps=1)
    assert 150 < memory.pipeline_peak_mib(model.folder, call.to_json(), "a red circle") < 4000


def test_size_of_the_original_is_its_weights_in_float32(sampled: Sampled) -> None:
    model = sampled()
    size = original_size(model, ["denoiser", "vae_decoder", "text_encoder"])
    denoiser = sum(parameter.numel() for parameter in model.denoiser.parameters()) * 4 / 2**20
    assert size.parts["denoiser"] == pytest.approx(denoiser)
    vae = original_size(model, ["vae_decoder", "vae_encoder"])
    assert vae.mib == pytest.approx(sum(parameter.numel() for parameter in model.vae.parameters()) * 4 / 2**20)
    assert size.mib == pytest.approx(sum(size.parts.values()))
