"""How far a fused denoiser is from itself unfused."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from compress.families import Family, Network
from compress.fusion.fused import fused

_SIDE, _TOKENS = 8, 7  # of the inputs: smallest steps of the latent, and words


def difference(family: Family, denoiser: Network, fusions: Mapping[str, str]) -> float:
    """`||fused - plain|| / ||plain||` of the network outputs, on small seeded inputs."""
    inputs = small_inputs(family, denoiser)
    return relative(*(run(family, network, inputs) for network in (fused(denoiser, fusions), denoiser)))


def relative(made: Tensor, wanted: Tensor) -> float:
    """`||made - wanted|| / ||wanted||`, in float64."""
    return float((made.double() - wanted.double()).norm() / wanted.double().norm())


def run(family: Family, network: Network, inputs: Mapping[str, Tensor]) -> Tensor:
    """The output of one network call; the inputs take the type and the device of the network, the timestep no type."""
    weight = next(network.parameters())
    given = (
        tensor.to(weight.device, weight.dtype if name != "timestep" and tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    )
    with torch.no_grad():
        return family.whole(network, *given)


def small_inputs(family: Family, denoiser: Network, batch: int = 2) -> dict[str, Tensor]:
    """Seeded inputs as small as the denoiser takes."""
    sides = family.dynamic_axes().get(family.inputs(denoiser)[0], {})
    free = "height" in sides.values()
    side = _SIDE * family.latent_multiple(denoiser) if free else family.latent_side(denoiser)
    return family.example_inputs(denoiser, batch, side, side, _TOKENS)


def in_type(denoiser: Network, dtype: torch.dtype) -> Network:
    """A copy with weights of its own in another type."""
    return copy.deepcopy(denoiser).to(dtype)
