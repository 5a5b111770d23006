"""Prospects: what each format would cost in each layer of the denoiser, predicted, and compared with measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from compress.quantization.allocation import allocate
from compress.quantization.layer import Methods, channel_errors, quantized_layer
from compress.quantization.scheme import Scheme
from export.quant_plan import LayerQuant, QuantPlan

if TYPE_CHECKING:
    from torch import nn

    from compress.model.latent_diffusion import LatentDiffusion
    from compress.passes.base import PassContext
    from compress.quantization.statistics import LayerStatistics

VALIDATED = 8
"""Layers whose predicted error is compared with a measured one."""
MEASURED = 8
"""Calibration prompts that it is measured on."""


@dataclass(frozen=True)
class Option:
    """One format for one layer.

    Attributes:
        scheme: its name.
        bytes: of the weights and their scales.
        error: what it adds to the squared error of the denoiser's output, as predicted.
    """

    scheme: str
    bytes: int
    error: float


@dataclass(frozen=True)
class Prospects:
    """What each layer could be.

    Attributes:
        options: of every layer.
        rank_correlation: Spearman's, between the predicted and the measured error of some layers, quantized alone;
            None of fewer than four layers.
    """

    options: Mapping[str, Sequence[Option]]
    rank_correlation: float | None

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the most bytes of all layers."""
        own = [[option.bytes for option in options] for options in self.options.values()]
        return sum(map(min, own)), sum(map(max, own))

    def within(self, budget: int) -> dict[str, str] | None:
        """The format of each layer with the least error in all that fits into so many bytes; None if none does."""
        rows = self.options.values()
        chosen = allocate([[o.bytes for o in own] for own in rows], [[o.error for o in own] for own in rows], budget)
        if chosen is None:
            return None
        return {name: own[at].scheme for (name, own), at in zip(self.options.items(), chosen, strict=True)}

    def uniform(self, scheme: str) -> dict[str, str]:
        """One format in every layer that may have it, and the largest one in the others."""
        largest = {name: max(own, key=lambda option: option.bytes).scheme for name, own in self.options.items()}
        names = {name: [option.scheme for option in own] for name, own in self.options.items()}
        return {name: scheme if scheme in names[name] else largest[name] for name in self.options}

    def bytes(self, schemes: Mapping[str, str]) -> int:
        """Of all layers."""
        by_name = {name: {option.scheme: option.bytes for option in own} for name, own in self.options.items()}
        return sum(by_name[name][chosen] for name, chosen in schemes.items())

    def rivals(self, budget: int, error: float) -> list[dict[str, str]]:
        """Uniform formats that fit into so many bytes and are predicted to have no more error, the best one first."""
        names = dict.fromkeys(option.scheme for own in self.options.values() for option in own)
        fitting = [one for one in map(self.uniform, names) if self.bytes(one) <= budget and self.error(one) <= error]
        return sorted(fitting, key=self.error)

    def error(self, schemes: Mapping[str, str]) -> float:
        """The predicted squared error of the denoiser's output; layers that are not named stay in float."""
        by_name = {name: {option.scheme: option.error for option in own} for name, own in self.options.items()}
        return sum(by_name[name][chosen] for name, chosen in schemes.items())


def prospects(
    model: LatentDiffusion,
    formats: Mapping[str, Sequence[Scheme]],
    seen: Mapping[tuple[str, str], LayerStatistics],
    weights: Mapping[str, torch.Tensor],
    observer: Methods,
    context: PassContext,
) -> Prospects:
    """Predict what every format costs in every layer: its error there, weighted by what the output makes of it.

    Args:
        model: its denoiser is float and uncut.
        formats: layer of the denoiser -> formats it may have.
        seen: what calibration kept of them, with rows.
        weights: of the same layers, see `compress.sensitivity`.
        observer: how scales are chosen; weights are rounded to the nearest, whatever is done in the end.
        context: of the pass.
    """
    calls, batches = (
        1 if model.step_plan is None else model.step_plan.network_calls,
        -(-len(context.prompts) // context.batch),
    )
    options, smallest = dict[str, list[Option]](), dict[str, LayerQuant]()
    for done, (name, schemes) in enumerate(formats.items()):
        layer, statistics = model.denoiser.get_submodule(name), seen["denoiser", name]
        made = {row.name: quantized_layer(layer, row, statistics, observer) for row in schemes}
        options[name] = [
            Option(
                row.name,
                _bytes(layer, row),
                float((weights[name] * channel_errors(layer, made[row.name], statistics, calls, batches)).sum()),
            )
            for row in schemes
        ]
        least = min(options[name], key=lambda option: option.bytes)
        smallest[name] = made[least.scheme]
        context.progress("predict errors of formats", done + 1, len(formats))
    found = Prospects(options, None)
    sample = _spread({name: max(option.error for option in own) for name, own in options.items()})
    if len(sample) < 4:
        return found
    predicted = [found.error({name: smallest[name].scheme}) for name in sample]
    measured = [measured_error(model, QuantPlan({name: smallest[name]}), context) for name in sample]
    return Prospects(options, rank_correlation(predicted, measured))


def _bytes(layer: nn.Module, row: Scheme) -> int:
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    return row.weight.bytes_of(len(weight), weight.numel() // len(weight))


def _spread(errors: Mapping[str, float]) -> list[str]:
    """Some layers, evenly over the order of their errors."""
    ordered = sorted(errors, key=errors.__getitem__)
    return [ordered[at] for at in np.linspace(0, len(ordered) - 1, min(VALIDATED, len(ordered))).round().astype(int)]


def measured_error(model: LatentDiffusion, plan: QuantPlan, context: PassContext) -> float:
    """The squared error of the latents that a quantized denoiser ends in, summed over them, mean over some samples."""
    other = model.clone(networks=False)
    other.quant_plans["denoiser"] = plan
    prompts = list(context.prompts[:MEASURED])
    seeds = [context.seed + at for at in range(len(prompts))]
    exact, made = (
        one.runtime().sample(prompts, seeds, context.height, context.width).astype(np.float64) for one in (model, other)
    )
    return float(np.square(made - exact).sum() / len(prompts))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, of values without ties."""
    a, b = (np.argsort(np.argsort(values)).astype(np.float64) for values in (first, second))
    return float(np.corrcoef(a, b)[0, 1])
