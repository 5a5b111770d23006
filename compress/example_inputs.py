"""Inputs of any part of a model at one size, for calls that only need their shapes to be right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion


def example_inputs(model: LatentDiffusion, part: str, batch: int, height: int, width: int) -> dict[str, Tensor]:
    """Input name -> tensor, on the CPU; prompts are as long as they may be.

    Args:
        model: with the part.
        part: one of `model.parts()`.
        batch: samples.
        height: of the pictures in pixels.
        width: likewise.
    """
    side = int(model.latent["downscale"])
    tokens = max([int(entry["max_length"]) for entry in model.conditioning.get("encoders", ())], default=8)
    sizes = {"batch": batch, "height": height // side, "width": width // side, "prompt_tokens": tokens}
    if part == "denoiser":
        return model.family.example_inputs(model.denoiser, **sizes)
    found: dict[str, Tensor] = model.parts()[part].example_inputs(**sizes)
    return found
