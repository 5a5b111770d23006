"""Importance: what it costs to remove a unit of a network, by four estimates from nothing to a measured output."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compress.denoising import Noising
from compress.pruning.axis import Axis, Network
from compress.pruning.units import Chunk, chunks, cuts_of
from compress.sensitivity import network_calls

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.passes.base import PassContext

Importance = Literal["taylor", "magnitude", "additive", "random"]

TIMESTEPS = 20
"""At which the denoising loss is differentiated."""
SAMPLES = 16
"""Calibration prompts whose latents are noised."""
MOMENTS = 4
"""Network calls of a run, evenly spread, whose outputs are compared."""
COMPARED = 4
"""Calibration prompts of which."""


def losses(
    model: LatentDiffusion,
    part: str,
    axes: Sequence[Axis],
    multiple: int,
    importance: Importance,
    cutoff: float,
    context: PassContext,
) -> dict[Chunk, float]:
    """What may be removed, and what each removal costs; only costs of one estimate compare.

    - `magnitude`: the squares of all weights that make or use a unit.
    - `taylor`: of the same weights the products with the gradient of the denoising loss, without their sign, summed
      over timesteps (Fang et al. 2023, arXiv 2305.10924, who leave out those of so much noise that they say little).
    - `additive`: the squared change of the output without the units, as if changes added up (LAPTOP-Diff, Zhang et al.
      2024, arXiv 2404.11098); within an axis, units are gathered by magnitude.
    - `random`: nothing is known; a uniform number for each unit, times its weights.

    Args:
        model: float and uncut.
        part: `denoiser` or `vae_decoder`.
        axes: of its network.
        multiple: of the channels that are left.
        importance: the estimate.
        cutoff: of `taylor`, see there.
        context: prompts, seed and size.
    """
    network = model.denoiser if part == "denoiser" else model.vae
    named = dict(network.named_parameters())
    if importance == "random":
        random = torch.Generator().manual_seed(context.seed)
        ones = {path: torch.ones(()).expand(tensor.shape) for path, tensor in named.items()}

        def scored(axis: Axis) -> Tensor:
            return axis.scores(ones) * torch.rand(axis.size, generator=random, dtype=torch.float64)
    else:
        elements = taylor(model, cutoff, context) if importance == "taylor" else _squares(named)

        def scored(axis: Axis) -> Tensor:
            return axis.scores(elements)

    scores = [scored(axis) for axis in axes]
    found = [(one, own) for axis, own in zip(axes, scores, strict=True) for one in chunks(axis, own, multiple)]
    if importance == "additive":
        return _measured(model, part, [one for one, _ in found], context)
    return {one: float(own[list(one.units)].sum()) for one, own in found}


def _squares(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {path: tensor.detach().square() for path, tensor in named.items()}


def taylor(model: LatentDiffusion, cutoff: float, context: PassContext) -> dict[str, Tensor]:
    """Of every parameter of the denoiser, |weight * gradient| of the denoising loss, summed over timesteps.

    The latents are those of the model's own runs. Timesteps come with rising noise, and end at the first whose loss is
    less than `cutoff` of the largest one before (Fang et al. 2023, arXiv 2305.10924, section 4.2).

    Args:
        model: float and uncut.
        cutoff: 0 keeps all timesteps.
        context: prompts, seed and size.
    """
    noising = Noising.of(model.scheduler_config)
    calls, ended = network_calls(model, context, SAMPLES)
    part, device = model.parts()["denoiser"], next(model.denoiser.parameters()).device
    given = {key: torch.from_numpy(calls[0][key]).to(device) for key in part.inputs}
    latent = model.runtime(simulate=False).latent_input
    clean = torch.from_numpy(ended).to(given[latent])
    random = torch.Generator().manual_seed(context.seed)
    halves = len(given[latent]) // len(clean)
    named = dict(model.denoiser.named_parameters())
    largest = 0.0
    try:
        model.denoiser.requires_grad_(True)
        for done, timestep in enumerate(noising.timesteps(TIMESTEPS)):
            noise = torch.randn(clean.shape, generator=random).to(clean)
            noised, target = noising.at(timestep, clean, noise)
            given[latent] = noised.repeat(halves, *[1] * (noised.ndim - 1))
            given["timestep"] = torch.full_like(given["timestep"], timestep)
            with torch.enable_grad():
                output = part(**given)[0]
                loss = functional.mse_loss(output, target.repeat(halves, *[1] * (target.ndim - 1)))
                largest = max(largest, loss.item())
                if loss.item() < cutoff * largest:
                    break
                loss.backward()
            context.progress("differentiate the denoising loss", done + 1, TIMESTEPS)
        zero = torch.zeros(())
        return {
            path: (tensor.detach() * (zero if tensor.grad is None else tensor.grad)).abs()
            for path, tensor in named.items()
        }
    finally:
        model.denoiser.zero_grad(set_to_none=True)
        model.denoiser.requires_grad_(False)


def _measured(model: LatentDiffusion, part: str, found: Sequence[Chunk], context: PassContext) -> dict[Chunk, float]:
    """Mean squared change of the output, summed over a sample, when only this chunk is missing."""
    network = model.denoiser if part == "denoiser" else model.vae
    run = _outputs(model, part, context)
    whole, made = run(network), {}
    for done, one in enumerate(found):
        made[one] = float((run(without(network, one)) - whole).double().square().sum() / len(whole))
        context.progress("measure what each unit is worth", done + 1, len(found))
    return made


def without(network: Network, chunk: Chunk) -> Network:
    """The network without some units; what is not cut is shared with it."""
    other = sharing_copy(network)
    (cut,) = cuts_of([chunk])
    cut.make(other)
    return other


def sharing_copy(network: Network) -> Network:
    """A network of the same tensors, which may be cut without cutting the other."""
    shared = {id(tensor): tensor for tensor in itertools.chain(network.parameters(), network.buffers())}
    return copy.deepcopy(network, shared)


def _outputs(model: LatentDiffusion, part: str, context: PassContext) -> Callable[[Network], Tensor]:
    """A function that runs a network in the place of a part's, on what the part is given along some runs."""
    calls, ended = network_calls(model, context, COMPARED)
    if part == "vae_decoder":
        latent, spec = torch.from_numpy(ended), model.latent
        given = {"latent_sample": latent / spec["scaling_factor"] + spec["shift_factor"]}
    else:
        places = np.unique(np.linspace(0, len(calls) - 1, MOMENTS).round().astype(int))
        axes = model.family.dynamic_axes()
        given = {
            key: torch.from_numpy(
                np.concatenate([calls[at][key] for at in places])
                if axes.get(key, {}).get(0) == "batch"
                else calls[0][key]
            )
            for key in model.parts()["denoiser"].inputs
        }

    def run(network: Network) -> Tensor:
        whole: Any = model.parts()[part].over(network) if part != "denoiser" else None
        if whole is None:
            whole = model.family.segments(network, None).segments[0].module
        with torch.inference_mode():
            output: Tensor = whole(**given)[0]
        return output

    return run
