"""Sensitivity: how much a small error of a layer at some network call changes the latents the run ends in."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import PassError
from export.plan_rows import Step

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.passes.base import PassContext

SAMPLES = 4
"""Calibration prompts that are run backwards."""
POSITIONS = 2048
"""Of latents that go back together: what is kept on the way there grows with them."""


def sensitivities(model: LatentDiffusion, layers: Collection[str], context: PassContext) -> dict[str, Tensor]:
    """For each layer, float64 (network calls, out_channels): the squared change of the final latents by its errors.

    An error of mean square e in one channel of a layer's output at one call, independent from place to place, adds
    `sensitivity * e` to the squared error of the latents, summed over them, on average over samples. That is the
    squared norm of the columns of the Jacobian of the whole run, estimated as the expected square of the gradient of a
    random projection (Hutchinson 1989); the gradient goes back through the updates of the step plan and every call.

    Args:
        model: its denoiser is float and uncut.
        layers: linear or convolution, of the denoiser.
        context: gives prompts and seed, and hears of progress.
    """
    calls, latents = network_calls(model, context, SAMPLES)
    shape = latents.shape
    plan = model.step_plan
    denoiser = model.denoiser
    modules: dict[str, Any] = {name: denoiser.get_submodule(name) for name in layers}
    sums = {name: torch.zeros(len(calls), len(module.weight), dtype=torch.float64) for name, module in modules.items()}
    part = model.family.segments(denoiser, None).segments[0].module
    device = next(denoiser.parameters()).device
    random = torch.Generator().manual_seed(context.seed)
    probe = (torch.randint(0, 2, shape, generator=random) * 2 - 1).to(torch.float64)
    back = _Adjoint(plan.steps, probe)  # type: ignore[union-attr]
    at = 0
    handles = [module.register_forward_hook(_watch(sums[name], lambda: at)) for name, module in modules.items()]
    latent = model.runtime(simulate=False).latent_input
    batched = {key for key, axes in model.family.dynamic_axes().items() if axes.get(0) == "batch"}
    together = max(1, POSITIONS // math.prod(shape[2:]))
    try:
        for at in reversed(range(len(calls))):
            wanted = back.halves(at)
            gradients = []
            for first in range(0, len(wanted), together):
                some = slice(first, first + together)
                inputs = {
                    key: torch.from_numpy(value[some] if key in batched else value).to(device)
                    for key, value in calls[at].items()
                }
                inputs[latent].requires_grad_()
                with torch.enable_grad():
                    output = part(**inputs)[0]
                    output.backward(wanted[some].to(output))
                gradients.append(inputs[latent].grad.double().cpu())  # type: ignore[union-attr]
            back.take(at, torch.cat(gradients))
            context.progress("find sensitive layers", len(calls) - at, len(calls))
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / shape[0] for name, total in sums.items()}


class _Adjoint:
    """The updates of a step plan, backwards: how the final latents depend on every latent and network output."""

    def __init__(self, steps: Any, last: Tensor) -> None:
        self.steps = list[Step](steps)
        self.latents = [torch.zeros_like(last) for _ in self.steps] + [last]
        self.outputs = [torch.zeros_like(last) for _ in self.steps]

    def halves(self, at: int) -> Tensor:
        """Of the network output of a row, both guidance halves where both run, unconditional first."""
        step, after = self.steps[at], self.latents[at + 1]
        for lag, coefficient in step.x.items():
            if at - lag >= 0:
                self.latents[at - lag] += coefficient * after
        for lag, coefficient in step.m.items():
            if at - lag >= 0:
                self.outputs[at - lag] += coefficient * after
        self.latents[0] += step.initial * after
        own, scale = self.outputs[at], step.guidance_scale
        return own if step.guidance == "none" else torch.cat([(1.0 - scale) * own, scale * own])

    def take(self, at: int, gradient: Tensor) -> None:
        """Of what the network was given at a row."""
        self.latents[at] += self.steps[at].input_scale * sum(gradient.split(len(self.latents[at])))


def network_calls(
    model: LatentDiffusion, context: PassContext, samples: int
) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """What the denoiser is given at each network call of one run of a few samples, and the latents they end in.

    Raises:
        PassError: the denoiser is cut, or a row of the plan runs it twice or on another size.
    """
    floats = model.runtime(simulate=False)
    whole = model.family.segments(model.denoiser, None).segments[0]
    steps = floats.plan.steps
    given = {key for segment in floats.plan.segments.values() for key in segment.inputs}
    if set(whole.inputs) - given or any(s.guidance == "cfg_sequential" or s.level != 1.0 or s.span > 1 for s in steps):
        raise PassError("differentiating needs an uncut denoiser and one call a row: put cache after this pass")
    functions, found = dict(floats.functions), list[dict[str, np.ndarray]]()
    inner = functions[whole.name]

    def watched(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found.append({key: np.array(arrays[key]) for key in model.parts()["denoiser"].inputs})
        return inner(arrays)

    functions[whole.name] = watched
    prompts = list(context.prompts[:samples])
    seeds = [context.seed + at for at in range(len(prompts))]
    latents = floats.altered(functions=functions).sample(prompts, seeds, context.height, context.width)
    return found, latents


def _watch(total: Tensor, at: Any) -> Any:
    """A forward hook that adds up the squared gradients of a layer's output, by call and channel."""

    def hook(layer: nn.Module, _: Any, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        axis = 1 if isinstance(layer, nn.Conv2d) else output.ndim - 1
        others = [place for place in range(output.ndim) if place != axis]

        def add(gradient: Tensor) -> None:
            total[at()] += gradient.double().square().sum(others).cpu()

        output.register_hook(add)

    return hook
