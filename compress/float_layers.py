"""Layers that are worth computing in float: rounding their inputs costs most, and they are few multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.quantization.allocation import allocate
from compress.quantization.layer import channel_errors

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.passes.base import PassContext
    from compress.quantization.statistics import LayerStatistics
    from export.quant_plan import LayerQuant

WORTH = 5.0
"""A layer must take as many times its share of the multiply-accumulates off the error, to be computed in float."""


def float_layers(
    model: LatentDiffusion,
    layers: Mapping[str, LayerQuant],
    seen: Mapping[tuple[str, str], LayerStatistics],
    sensitivities: Mapping[str, Tensor],
    share: float,
    context: PassContext,
) -> list[str]:
    """The layers whose inputs had better not be rounded, within a share of the multiply-accumulates of all of them.

    What rounding the input of a layer costs is its error on the rows of calibration, weighted by what the rest of the
    run makes of it; a knapsack takes the most off within the share.

    Args:
        model: its denoiser is float.
        layers: of the denoiser, quantized.
        seen: what calibration kept of them, with rows.
        sensitivities: of the same layers, see `compress.sensitivity`.
        share: of the multiply-accumulates, at most.
        context: of the pass.
    """
    calls = 1 if model.step_plan is None else model.step_plan.network_calls
    batches = -(-len(context.prompts) // context.batch)
    costs, gains = list[int](), list[float]()
    total = 0.0
    for done, (name, quant) in enumerate(layers.items()):
        layer, statistics = model.denoiser.get_submodule(name), seen["denoiser", name]
        weight: Tensor = layer.weight
        own, stored = (
            float((sensitivities[name] * channel_errors(layer, one, statistics, calls, batches)).sum())
            for one in (quant, replace(quant, input=None, output=None, bias=None))
        )
        costs.append(statistics.positions * weight.numel())
        gains.append(max(0.0, own - stored))
        total += own
        context.progress("find layers for float", done + 1, len(layers))
    whole = sum(costs)
    worth = [gain * whole >= WORTH * cost * total > 0 for cost, gain in zip(costs, gains, strict=True)]
    chosen = allocate(
        [[0, cost] if good else [0] for cost, good in zip(costs, worth, strict=True)],
        [[gain, 0.0] if good else [gain] for gain, good in zip(gains, worth, strict=True)],
        int(share * whole),
    )
    return [] if chosen is None else [name for name, at in zip(layers, chosen, strict=True) if at]


def call_weights(sensitivities: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """How much each network call counts for each layer, 1 on average; all alike where a layer reaches nothing.

    It is the root of the sensitivity, which is that to errors independent from place to place: errors of rounding are
    partly alike everywhere, and those are felt more evenly. With the sensitivity itself, int4-w4a8 of the reference
    UNet is 1.3 dB worse.
    """
    means = {name: own.mean(1).sqrt() for name, own in sensitivities.items()}
    return {
        name: (own / own.mean() if float(own.sum()) > 0 else torch.ones_like(own)).tolist()
        for name, own in means.items()
    }
