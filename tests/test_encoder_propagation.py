"""Encoder propagation against a plain loop over a UNet of diffusers, by the rules of Faster Diffusion.

They are those of its pipeline that batches decoders: the encoder never sees what is injected at its own step. Its
serial pipeline injects before the network call, so that the encoder does see it, at the key steps of the second half.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from compress.model.latent_diffusion import load
from compress.passes.base import PassContext
from compress.passes.cache import Cache
from tests import tiny
from tests.tiny_engine import sampled

SCALE, PROMPT = 3.0, "a large red circle"
NOISE = np.random.default_rng(0).standard_normal((1, 4, tiny.SIDE, tiny.SIDE)).astype(np.float32)
PUBLISHED = {"50ls": (50, {0, 1, 2, 3, 5, 10, 15, 25, 35}), 4: (20, {0, 4, 8, 12, 16})}
"""Keys of the recipe -> how many steps, and which of them are key steps."""
LATE, INJECTED = 500, 0.003


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Callable[[str], Path]) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_folder("unet"), safety_checker=None)


@pytest.fixture(scope="module")
def expected(pipeline: StableDiffusionPipeline) -> Callable[[str | int], np.ndarray]:
    """The latents of the plain loop, once per set of keys."""

    @cache
    def run(keys: str | int) -> np.ndarray:
        steps, rows = PUBLISHED[keys]
        theirs, fresh = plain_loop(pipeline, steps, rows), plain_loop(pipeline, steps, set(range(steps)))
        assert difference(theirs, fresh) > 1e-3, "nothing was cached, so a comparison proves nothing"
        return theirs

    return run


@torch.inference_mode()
def plain_loop(pipeline: Any, steps: int, keys: set[int]) -> np.ndarray:
    """The encoder at the keys, on the latent as it is; the decoder at every step, with its own time embedding.

    In the second half of the noise levels the scheduler gets the latent with a little of the first one added.
    """
    unet, scheduler = pipeline.unet, pipeline.scheduler
    scheduler.set_timesteps(steps)
    prompt, empty = pipeline.encode_prompt(PROMPT, "cpu", 1, True)
    text = torch.cat([empty, prompt])
    first = latents = torch.from_numpy(NOISE) * scheduler.init_noise_sigma
    for row, t in enumerate(scheduler.timesteps):
        emb = unet.time_embedding(unet.time_proj(t.expand(2))) + unet.add_embedding(text)
        if row in keys:
            kept = encoder(unet, scheduler.scale_model_input(torch.cat([latents, latents]), t), emb, text)
        unguided, guided = decoder(unet, *kept, emb, text).chunk(2)
        given = latents + INJECTED * first if t < LATE else latents
        latents = scheduler.step(unguided + SCALE * (guided - unguided), t, given).prev_sample
    return np.asarray(latents)


def encoder(
    unet: Any, sample: torch.Tensor, emb: torch.Tensor, text: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """What the middle block gives, and every skip."""
    hidden = unet.conv_in(sample)
    skips: tuple[torch.Tensor, ...] = (hidden,)
    for block in unet.down_blocks:
        crossed = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        hidden, given = block(hidden, emb, **crossed)
        skips += given
    return unet.mid_block(hidden, emb, encoder_hidden_states=text), skips


def decoder(
    unet: Any, hidden: torch.Tensor, skips: tuple[torch.Tensor, ...], emb: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """The network output."""
    for block in unet.up_blocks:
        crossed = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        count = len(block.resnets)
        hidden = block(hidden, skips[-count:], emb, **crossed)
        skips = skips[:-count]
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("span", [False, True])
@pytest.mark.parametrize("keys", [pytest.param("50ls", marks=pytest.mark.slow), 4])
def test_rules_of_faster_diffusion(
    tiny_folder: Callable[[str], Path], expected: Callable[[str | int], np.ndarray], keys: str | int, span: bool
) -> None:
    """One by one and as spans, the latents are those of the plain loop."""
    model = sampled(load(tiny_folder("unet")), PUBLISHED[keys][0])
    method = Cache("encoder-propagation", key_steps=keys, inject=INJECTED, span=span)
    method.apply(model, [], PassContext([], 0, 2 * tiny.SIDE, 2 * tiny.SIDE))
    assert model.step_plan is not None
    assert (max(step.span for step in model.step_plan.steps) > 1) == span
    assert difference(model.runtime().sample([PROMPT], noise=NOISE), expected(keys)) <= 1e-5
