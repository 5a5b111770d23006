"""Cut k of a UNet against branch k of the official DeepCache package, installed for this test."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from compress.families import FAMILIES
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.cache import Cache
from compress.sampler import compile_sampler
from export.step_plan import Segment
from tests import tiny

pytestmark = [pytest.mark.network, pytest.mark.slow]

BRANCHES = 9  # three levels of two layers: the package counts three branches to a level


@pytest.fixture(scope="module")
def helper_class(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """DeepCacheSDHelper of the package `DeepCache`, installed without its dependencies into a folder of its own."""
    folder = tmp_path_factory.mktemp("deepcache")
    options = ["--quiet", "--no-deps", "--disable-pip-version-check", "--target", str(folder)]
    command = [sys.executable, "-m", "pip", "install", *options, "DeepCache==0.1.1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip(f"DeepCache cannot be installed: {result.stderr.strip().splitlines()[-1]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        from DeepCache import DeepCacheSDHelper

        assert Path(sys.modules["DeepCache"].__file__ or "").is_relative_to(folder)
    return DeepCacheSDHelper


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = tiny.unet(
        layers_per_block=2,
        block_out_channels=(16, 16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    tiny.shake(unet)
    return unet


@pytest.mark.parametrize("branch", range(BRANCHES))
def test_cut_is_branch(helper_class: Any, unet: UNet2DConditionModel, branch: int) -> None:
    """A stale call of the package equals our shallow path on the slot of the call before: difference 0.0."""
    family = FAMILIES[type(unet).__name__]
    assert len(family.cut_names(unet)) == BRANCHES
    times = torch.tensor([900.0, 800.0])
    first = family.example_inputs(unet, 2, tiny.SIDE, tiny.SIDE, 5) | {"timestep": times[:1].repeat(2)}
    second = first | {"sample": first["sample"].flip(0) * 0.9, "timestep": times[1:].repeat(2)}
    text = first["encoder_hidden_states"]

    segments, paths, _ = family.segments(unet, family.cut_layout(unet, branch))
    by_name = {segment.name: segment for segment in segments}
    known: dict[str, torch.Tensor] = {}
    helper = helper_class(types.SimpleNamespace(unet=unet, scheduler=types.SimpleNamespace(timesteps=times)))
    helper.set_params(cache_interval=2, cache_branch_id=branch)
    with torch.inference_mode():
        for inputs, path in ((first, "full"), (second, "shallow")):
            known |= inputs
            for name in paths[path]:
                outputs = by_name[name].module(**{key: known[key] for key in by_name[name].inputs})
                known |= zip(by_name[name].outputs, outputs, strict=True)
        fresh = family.whole(unet, *second.values())
        helper.enable()
        unet(first["sample"], times[0], encoder_hidden_states=text)
        theirs = unet(second["sample"], times[1], encoder_hidden_states=text).sample
        helper.disable()
    assert (known[family.output] - theirs).abs().max() == 0.0
    assert (theirs - fresh).abs().max() > 1e-4, "nothing was cached, so the comparison proves nothing"


STEPS, GUIDANCE, PROMPT = 7, 3.0, "a large red circle"
NOISE = np.random.default_rng(0).standard_normal((1, 4, tiny.SIDE, tiny.SIDE)).astype(np.float32)


@pytest.fixture(scope="module")
def pipeline(unet: UNet2DConditionModel, tiny_folder: Callable[[str], Path]) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder("unet"), safety_checker=None)
    pipeline.unet = unet
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model(unet: UNet2DConditionModel, tiny_folder: Callable[[str], Path]) -> LatentDiffusion:
    """Sampled, uncached."""
    model = load(tiny_folder("unet"))
    model.denoiser = unet
    segments = {segment.name: Segment(segment.inputs, segment.outputs) for segment in model.segments()}
    scheduler = model.scheduler_config
    model.step_plan = compile_sampler(
        scheduler["_class_name"], scheduler, STEPS, GUIDANCE, segments=segments, paths={"full": ("denoiser",)}
    )
    return model


def theirs(pipeline: StableDiffusionPipeline) -> np.ndarray:
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
    latents: np.ndarray = pipeline(PROMPT, latents=torch.from_numpy(NOISE), **options).images.numpy()
    return latents


@pytest.fixture(scope="module")
def fresh(pipeline: StableDiffusionPipeline) -> np.ndarray:
    """What the pipeline gives without the package."""
    return theirs(pipeline)


@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("branch", range(BRANCHES))
def test_whole_run(
    helper_class: Any,
    pipeline: StableDiffusionPipeline,
    model: LatentDiffusion,
    fresh: np.ndarray,
    branch: int,
    interval: int,
) -> None:
    """The package in the diffusers pipeline and the cache pass in our runtime end in the same latents."""
    helper = helper_class(pipeline)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        expected = theirs(pipeline)
    finally:
        helper.disable()

    cached = replace(model)
    Cache(cut=branch, interval=interval).apply(cached, [], PassContext([], 0, 2 * tiny.SIDE, 2 * tiny.SIDE))
    ours = cached.runtime().sample([PROMPT], noise=NOISE)
    scale = np.abs(expected).max()
    assert np.abs(ours - expected).max() <= 1e-5 * scale
    assert np.abs(expected - fresh).max() > 1e-3 * scale, "nothing was cached, so the comparison proves nothing"
