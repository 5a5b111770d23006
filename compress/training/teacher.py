"""A frozen denoiser asked for clean latents, with guidance and without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.training.predictions import clean_of

Conditioning = Mapping[str, Tensor]
Denoise = Callable[..., tuple[Tensor, ...]]
"""Called with named tensors, as a segment of a denoiser is; gives the network output first."""


@dataclass(frozen=True)
class Network:
    """A denoiser with what its output means.

    Attributes:
        denoise: the denoiser.
        latent_input: its input for the latent.
        prediction: see `compress.training.predictions.linear`.
        bf16: it computes in bfloat16 where that is safe; everything after it is float32.
    """

    denoise: Denoise
    latent_input: str
    prediction: str
    bf16: bool = False

    def clean(
        self, latents: Tensor, times: Tensor, signal: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The clean latents it estimates, float32 (samples, channels, h, w).

        Args:
            latents: float32 (samples, channels, h, w), as the network takes them.
            times: timestep values (samples,).
            signal: of every sample, (samples, 1, 1, 1).
            sigma: likewise.
            conditioning: the other inputs by name, a sample a row.
        """
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.denoise(**{self.latent_input: latents}, timestep=times, **conditioning)[0]
        return clean_of(self.prediction, output.float(), latents, signal, sigma)


@dataclass(frozen=True)
class Teacher:
    """A network that is imitated.

    Attributes:
        network: never trained.
        unconditional: conditioning of no prompt, one row.
    """

    network: Network
    unconditional: Conditioning

    @torch.no_grad()
    def guided(
        self,
        latents: Tensor,
        times: Tensor,
        signal: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        scales: Tensor,
    ) -> Tensor:
        """Clean latents of `uncond + scale * (cond - uncond)`, both halves in one batch.

        Guidance of network outputs is guidance of clean latents, which are linear in them at one latent and level.

        Args:
            latents: see `Network.clean`, as the following.
            times: likewise.
            signal: likewise.
            sigma: likewise.
            conditioning: likewise.
            scales: of guidance, (samples,); 1 is none.
        """
        count = len(latents)
        both = {
            name: torch.cat([self.unconditional[name].expand(count, *tensor.shape[1:]), tensor])
            for name, tensor in conditioning.items()
        }
        z, t, a, s = (torch.cat([tensor, tensor]) for tensor in (latents, times, signal, sigma))
        uncond, cond = self.network.clean(z, t, a, s, both).chunk(2)
        return uncond + scales.view(-1, 1, 1, 1) * (cond - uncond)
