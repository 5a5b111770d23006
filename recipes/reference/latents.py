"""The training set of the denoisers: scenes drawn, encoded and tokenised once, kept as half-precision latents."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from recipes.reference.checkpoint import read_checkpoint, write_checkpoint
from recipes.reference.scenes import draw_scenes
from recipes.reference.text import tokenise

LATENT_COUNT = {"cpu": 36864, "cuda": 262144}
_BATCH = {"cpu": 64, "cuda": 1024}


@torch.no_grad()
def cached_latents(
    path: Path,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    device: torch.device,
    count: int = LATENT_COUNT["cpu"],
    report: Callable[[str], None] = print,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents float16 (count, 4, 16, 16) and token ids int64 (count, 20) of train scenes 0 ... count - 1."""
    state = read_checkpoint(path)
    done = 0 if state is None else len(state["latents"])
    latents = [] if state is None else [state["latents"]]
    tokens = [] if state is None else [state["tokens"]]
    began = saved = time.monotonic()
    first = done
    while done < count:
        size = min(_BATCH[device.type], count - done)
        scenes = draw_scenes("train", done, size, device)
        pictures = (scenes.images * 2.0 - 1.0).contiguous(memory_format=torch.channels_last)
        latents.append(vae.encode(pictures).latent_dist.mean.to("cpu", torch.float16).contiguous())
        tokens.append(tokenise(tokenizer, scenes.captions))
        done += size
        now = time.monotonic()
        if now - saved > 30.0 or done == count:
            latents, tokens = [torch.cat(latents)], [torch.cat(tokens)]
            write_checkpoint(path, {"latents": latents[0], "tokens": tokens[0]})
            left = (now - began) / (done - first) * (count - done)
            report(f"latents: {done}/{count}, {left / 60:.1f} min left")
            saved = now
    return latents[0][:count], tokens[0][:count]
