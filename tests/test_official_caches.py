"""Cache plans on Flux against the hooks of diffusers: First-Block-Cache, TaylorSeer, MagCache."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxPipeline, MagCacheConfig, TaylorSeerCacheConfig

from compress import compiler
from compress.caching.method import Cached, Forecast, Job, cached_steps, rows_on
from compress.caching.methods import METHODS
from compress.caching.statistics import collect
from compress.caching.sublayer_methods import layout_of
from compress.families import Layout
from compress.families.sublayers import Kind
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.cache import Cache
from compress.recipe.schema import Recipe
from export.noise import INITIAL, noise
from export.step_plan import Segment
from tests import tiny

STEPS, PIXELS, SCALE = 10, 2 * tiny.SIDE, 2.0
PROMPTS = ["a large red circle", "a small blue square"]
SEEDS = [3, 4]
LOUDNESS = 1.5


def louder(transformer: torch.nn.Module) -> None:
    """Let the blocks add so much, and so unevenly from call to call, that caching them shows."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "transformer_blocks" in name or "time_text_embed" in name:
                parameter.mul_(LOUDNESS)


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Callable[[str], Path]) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(tiny_folder("flux"))
    pipeline.set_progress_bar_config(disable=True)
    louder(pipeline.transformer)
    return pipeline


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> LatentDiffusion:
    """Sampled as the pipeline samples; clone before changing it."""
    model = load(tiny_folder("flux"))
    louder(model.denoiser)
    recipe = Recipe.parse(
        f"schema_version: 1\nmodel: {model.folder}\nsampler: {{steps: {STEPS}, guidance_scale: {SCALE}}}\n"
        f"targets: [onnxruntime-cpu]\nshapes: {{height: {PIXELS}, width: {PIXELS}}}\nout: out\n"
    )
    compiler.sample(model, recipe)
    return model


class Run(NamedTuple):
    """What a run ends in, and the network calls that were full in it."""

    latents: np.ndarray
    full: list[int]


def theirs(pipeline: FluxPipeline, config: Any = None, prompts: Sequence[str] = PROMPTS[:1]) -> Run:
    """The pipeline of diffusers; a call is full where the second block computes its attention."""
    transformer = pipeline.transformer
    started: list[None] = []
    full: list[int] = []
    hooks = [
        transformer.register_forward_pre_hook(lambda *_: started.append(None)),
        transformer.transformer_blocks[1].attn.to_q.register_forward_hook(lambda *_: full.append(len(started) - 1)),
    ]
    first = torch.from_numpy(noise(SEEDS[: len(prompts)], INITIAL, (4, tiny.SIDE, tiny.SIDE)))
    if config is not None:
        transformer.enable_cache(config)
    try:
        packed = pipeline(
            list(prompts),
            height=PIXELS,
            width=PIXELS,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            max_sequence_length=tiny.PROMPT_TOKENS + 4,
            latents=FluxPipeline._pack_latents(first, *first.shape),
            output_type="latent",
        ).images
    finally:
        if config is not None:
            transformer.disable_cache()
        for hook in hooks:
            hook.remove()
    assert len(started) == STEPS
    return Run(FluxPipeline._unpack_latents(packed, PIXELS, PIXELS, pipeline.vae_scale_factor).numpy(), full)


def ours(model: LatentDiffusion, cached: Cached | Cache) -> Run:
    """Our runtime, on what the pass or one of its methods makes."""
    changed = model.clone()
    if isinstance(cached, Cache):
        cached.apply(changed, [], PassContext([], 0, PIXELS, PIXELS))
    else:
        segments, paths, slots = model.family.segments(model.denoiser, cached.layout)
        table = {segment.name: Segment(segment.inputs, segment.outputs) for segment in segments}
        assert changed.step_plan is not None
        changed.step_plan = replace(
            changed.step_plan, segments=table, paths=paths, slots=slots, steps=cached.steps, gate=cached.gate
        )
        changed.layout = cached.layout
    plan = changed.step_plan
    assert plan is not None
    full = []

    def see(row: int, _: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
        if tensors["gate_full"].all() if "gate_full" in tensors else not plan.steps[row].read:
            full.append(row)

    return Run(changed.runtime().sample(PROMPTS[:1], SEEDS[:1], PIXELS, PIXELS, on_step=see), full)


def job_of(model: LatentDiffusion, method: str, statistics: Any = None, **options: Any) -> Job:
    assert model.step_plan is not None
    return Job(model.family, model.denoiser, model.step_plan, {**METHODS[method].options, **options}, statistics)


def by_hand(model: LatentDiffusion, first: int, full: Sequence[int]) -> Cached:
    """What the blocks from `first` on add is read from the last full row."""
    assert model.step_plan is not None
    slots = model.family.block_slots(model.denoiser, first, model.family.block_count(model.denoiser))
    layout = Layout.of(slots, {"cached": tuple(slots)})
    steps = cached_steps(model.step_plan.steps, layout, rows_on(full, STEPS, "cached"), Forecast())
    return Cached(layout, tuple(steps), {})


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


def same(our: Run, their: Run, fresh: Run) -> None:
    """Equal rows and latents, of which some were cached, to some effect."""
    assert our.full == their.full
    assert 1 < len(their.full) < STEPS, "a plan with both kinds of rows is needed to prove anything"
    assert difference(our.latents, their.latents) <= 1e-5
    assert difference(their.latents, fresh.latents) > 1e-3, "nothing was cached, so the comparison proves nothing"


@pytest.fixture(scope="module")
def fresh(pipeline: FluxPipeline, model: LatentDiffusion) -> Run:
    """Nothing cached: here already the two agree."""
    run = theirs(pipeline)
    assert run.full == list(range(STEPS))
    assert model.step_plan is not None
    assert difference(ours(model, Cached(None, model.step_plan.steps, {})).latents, run.latents) <= 1e-5
    return run


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8])
def test_first_block_cache(pipeline: FluxPipeline, model: LatentDiffusion, fresh: Run, threshold: float) -> None:
    """Our gate decides as theirs, and a plan of their decisions ends where they do."""
    their = theirs(pipeline, FirstBlockCacheConfig(threshold=threshold))
    same(ours(model, Cache("first-block-cache", gate="dynamic", threshold=threshold)), their, fresh)
    same(ours(model, by_hand(model, 1, their.full)), their, fresh)


@pytest.mark.parametrize(("interval", "warmup"), [(2, 1), (3, 3), (4, 2)])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("mlp", [False, True], ids=["attention", "attention and MLP"])
def test_taylorseer(
    pipeline: FluxPipeline, model: LatentDiffusion, fresh: Run, mlp: bool, order: int, interval: int, warmup: int
) -> None:
    """By default their hooks keep attention alone; ours keeps the MLP too, as they do when asked."""
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=warmup,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r".*\.(attn|ff|ff_context|proj_mlp)"] if mlp else None,
    )
    their = theirs(pipeline, config)
    options: dict[str, Any] = {"interval": interval, "order": order, "warmup": warmup}
    same(ours(model, attention_alone(model, options) if not mlp else Cache("taylorseer", **options)), their, fresh)


def attention_alone(model: LatentDiffusion, options: dict[str, Any]) -> Cached:
    kinds: dict[str, tuple[Kind, ...]] = {"cached": ("self_attention",)}
    method = replace(METHODS["taylorseer"], layout=lambda job: layout_of(job, kinds))
    return method.build(job_of(model, "taylorseer", **options))


@pytest.mark.parametrize(("threshold", "max_run", "retention"), [(0.06, 3, 0.2), (0.2, 2, 0.0), (0.5, 5, 0.4)])
def test_magcache(
    pipeline: FluxPipeline, model: LatentDiffusion, fresh: Run, threshold: float, max_run: int, retention: float
) -> None:
    """The same random ratios make the same rows; what all blocks add is read from the last full one."""
    ratios = [1.0, *np.random.default_rng(5).uniform(0.94, 1.06, STEPS - 1).tolist()]
    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=max_run,
        retention_ratio=retention,
        num_inference_steps=STEPS,
        mag_ratios=ratios,
    )
    their = theirs(pipeline, config)
    job = job_of(model, "magcache", np.array(ratios), threshold=threshold, max_run=max_run, retention=retention)
    same(ours(model, METHODS["magcache"].build(job)), their, fresh)
    same(ours(model, by_hand(model, 0, their.full)), their, fresh)


def test_magcache_calibration(
    pipeline: FluxPipeline, model: LatentDiffusion, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our ratios of one batch of two prompts are those diffusers prints."""
    theirs(pipeline, MagCacheConfig(num_inference_steps=STEPS, calibrate=True), PROMPTS)
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0,"))
    method, job = METHODS["magcache"], job_of(model, "magcache")
    layout = method.layout(job)
    assert layout is not None
    assert method.recorder is not None
    found = collect(model, layout, method.recorder(job), PassContext(PROMPTS, SEEDS[0], PIXELS, PIXELS))
    np.testing.assert_allclose(found, json.loads(printed), rtol=1e-4)
    assert np.ptp(found[1:]) > 1e-2, "ratios that are all alike prove nothing"
