"""The denoising loss a model was trained with, at chosen timesteps: noised latents, and what should be predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.errors import RefusedError
from compress.training.predictions import PREDICTIONS, output_of


@dataclass(frozen=True)
class Noising:
    """How latents were noised in training.

    Attributes:
        steps: timesteps of the training.
        prediction: `epsilon`, `v_prediction`, `sample`, or `flow` (noise less latent, Lipman et al. 2022, arXiv
            2210.02747).
        alphas: cumulated, (steps,), float64; of a flow, unused.
    """

    steps: int
    prediction: str
    alphas: Tensor

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Noising:
        """Read a scheduler's configuration.

        Raises:
            RefusedError: the training is of another kind.
        """
        from diffusers import DDPMScheduler

        name, prediction = config["_class_name"], config.get("prediction_type", "epsilon")
        steps = int(config.get("num_train_timesteps", 1000))
        if name.startswith("FlowMatch"):
            return cls(steps, "flow", torch.empty(0, dtype=torch.float64))
        if name.startswith("EDM") or prediction not in PREDICTIONS or prediction == "flow":
            raise RefusedError(
                f"the denoising loss of a {name} with prediction_type {prediction!r} is not known: take importance "
                "magnitude or additive, which do without"
            )
        shared = {key: value for key, value in config.items() if key in _BETAS}
        return cls(steps, prediction, DDPMScheduler(**shared).alphas_cumprod.double())

    def timesteps(self, count: int) -> list[float]:
        """Evenly spread, least noise first."""
        places = [(at + 0.5) / count * self.steps for at in range(count)]
        return places if self.prediction == "flow" else [float(int(place)) for place in places]

    def at(self, timestep: float, latent: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The noised latent, and what the network should give of it; shapes as the latent's."""
        if self.prediction == "flow":
            sigma = timestep / self.steps
            signal = 1.0 - sigma
        else:
            signal = float(self.alphas[int(timestep)].sqrt())
            sigma = (1.0 - signal**2) ** 0.5
        levels = torch.tensor(signal), torch.tensor(sigma)
        return signal * latent + sigma * noise, output_of(self.prediction, latent, noise, *levels)


_BETAS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
