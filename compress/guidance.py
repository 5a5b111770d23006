"""Where a guidance scale goes: into the step plan, or into the conditioning of a denoiser that embeds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.errors import RefusedError

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion


def place_guidance(model: LatentDiffusion, scale: float, interval: tuple[float, float] | None = None) -> float:
    """Put the scale into the model's conditioning where the denoiser embeds it, and return what is left to the plan.

    Args:
        model: its conditioning is changed.
        scale: of guidance; embedded (Meng et al. 2022, arXiv 2210.03142) it costs no second network call.
        interval: of the network calls that are guided.

    Returns:
        The scale of classifier-free guidance; 1 is none.

    Raises:
        RefusedError: the denoiser was trained to run without guidance, or with it at every call.
    """
    kind = model.family.guidance(model.denoiser)
    if kind == "classifier-free":
        return scale
    if kind == "none":
        if scale > 1.0:
            raise RefusedError(
                f"sampler.guidance_scale is {scale:g}, but this {model.family.name} denoiser embeds no guidance, and "
                "its pipeline would ignore the scale: write guidance_scale: 1.0"
            )
        return 1.0
    if interval is not None:
        raise RefusedError(
            "sampler.guidance_interval has no effect on a denoiser that embeds its guidance: leave it out"
        )
    model.conditioning["guidance"] = float(scale)
    return 1.0
