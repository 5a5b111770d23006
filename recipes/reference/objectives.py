"""The training objectives of the denoisers: v-prediction with min-SNR weights, and rectified flow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from transformers import CLIPTextModelWithProjection

from recipes.reference.denoisers import unet_scheduler

EMPTY_PROMPT_SHARE = 0.1


class LatentBatches:
    """Batches of (latents, tokens, noise, stratified uniform numbers), each a pure function of the step number.

    Drawn on `device`: devices differ in their numbers.
    """

    def __init__(
        self, latents: torch.Tensor, tokens: torch.Tensor, empty: torch.Tensor, device: torch.device, batch: int
    ) -> None:
        self.latents, self.tokens, self.empty = latents.to(device), tokens.to(device), empty.to(device)
        self.device, self.batch = device, batch

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents float32 (b, 4, 16, 16), tokens (b, 20) with 10 % empty prompts, noise, uniform (b,)."""
        generator = torch.Generator(self.device).manual_seed(1_000_003 * (step + 1))
        draw = {"generator": generator, "device": self.device}
        rows = torch.randint(len(self.latents), (self.batch,), **draw)
        latents = self.latents[rows].float()
        dropped = torch.rand(self.batch, **draw) < EMPTY_PROMPT_SHARE
        tokens = torch.where(dropped[:, None], self.empty, self.tokens[rows])
        noise = torch.randn(latents.shape, **draw)
        uniform = (torch.arange(self.batch, device=self.device) + torch.rand(self.batch, **draw)) / self.batch
        return latents, tokens, noise, uniform


def unet_objective(
    unet: UNet2DConditionModel, encoder: CLIPTextModelWithProjection, batches: LatentBatches
) -> Callable[[int], torch.Tensor]:
    """Loss of a step: v-prediction (Salimans and Ho 2022, arXiv 2202.00512), min-SNR-5 weights (arXiv 2303.09556)."""
    alphas = unet_scheduler().alphas_cumprod.to(batches.device)

    def loss_at(step: int) -> torch.Tensor:
        latents, tokens, noise, uniform = batches.at(step)
        with torch.no_grad():
            text = encoder(tokens, output_hidden_states=True).last_hidden_state
        times = (uniform * len(alphas)).long().clamp_max(len(alphas) - 1)
        alpha = alphas[times][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1.0 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1.0 - alpha).sqrt() * latents
        ratio = (alpha / (1.0 - alpha)).flatten()
        weight = ratio.clamp_max(5.0) / (ratio + 1.0)
        error = (unet(noisy, times, encoder_hidden_states=text).sample - target).square().mean((1, 2, 3))
        return (weight * error).sum() / weight.sum()

    return loss_at


def mmdit_objective(
    mmdit: SD3Transformer2DModel, encoder: CLIPTextModelWithProjection, batches: LatentBatches
) -> Callable[[int], torch.Tensor]:
    """Loss of a step: rectified flow with logit-normal times (Esser et al. 2024, arXiv 2403.03206, section 3.1).

    The text enters as the SD3 pipeline without T5 forms it: penultimate states of both encoders side by side, one zero
    token (max_sequence_length=1), pooled outputs side by side.
    """

    def loss_at(step: int) -> torch.Tensor:
        latents, tokens, noise, uniform = batches.at(step)
        with torch.no_grad():
            out = encoder(tokens, output_hidden_states=True)
            hidden = torch.cat([out.hidden_states[-2]] * 2, dim=-1)
            text = torch.cat([hidden, torch.zeros_like(hidden[:, :1])], dim=1)
            pooled = torch.cat([out.text_embeds] * 2, dim=-1)
        sigma = torch.special.ndtri(uniform.clamp(1e-4, 1.0 - 1e-4)).add(0.2).sigmoid()
        level = sigma[:, None, None, None]
        noisy = (1.0 - level) * latents + level * noise
        speed = mmdit(noisy, encoder_hidden_states=text, pooled_projections=pooled, timestep=1000.0 * sigma).sample
        return (speed - (noise - latents)).square().mean()

    return loss_at
