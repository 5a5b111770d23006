"""Brevitas layers in place of linear and convolution layers: a second opinion."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from export.quant_plan import Affine, LayerQuant


def with_brevitas_layers(module: nn.Module, names: Collection[str], *, activations: bool = True) -> nn.Module:
    """A copy in which the named layers are Brevitas' `QuantLinear` and `QuantConv2d`; parameters are copied.

    Weights: signed 8 bits, symmetric, narrow range, one scale per output channel. Inputs, and the outputs of
    convolutions: unsigned 8 bits, asymmetric, per tensor, calibrated under `brevitas.graph.calibrate.calibration_mode`
    to the average over calls of the 99.999 % interval; none of them without `activations`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import brevitas.nn as qnn
        from brevitas.graph.quantize import layerwise_quantize
        from brevitas.quant import Int8WeightPerChannelFloat, ShiftedUint8ActPerTensorFloat

    activation = ShiftedUint8ActPerTensorFloat if activations else None
    quantizers = {
        "weight_quant": Int8WeightPerChannelFloat,
        "input_quant": activation,
        "bias_quant": None,
        "return_quant_tensor": False,
    }
    layers: dict[type[nn.Module], Any] = {
        nn.Linear: (qnn.QuantLinear, quantizers | {"output_quant": None}),
        nn.Conv2d: (qnn.QuantConv2d, quantizers | {"output_quant": activation}),
    }
    others = [name for name, layer in module.named_modules() if type(layer) in layers and name not in names]
    return layerwise_quantize(copy.deepcopy(module), compute_layer_map=layers, name_blacklist=others)


def weight_scales(layer: nn.Module) -> tuple[float, ...]:
    """The scales Brevitas gives the weights of one of its layers, by output channel."""
    with torch.no_grad():
        scale: Tensor = layer.quant_weight().scale  # type: ignore[operator]
    return tuple(scale.flatten().tolist())


def calibrated_grids(layer: nn.Module) -> tuple[Affine, Affine | None]:
    """The grids of input and (convolutions) output that Brevitas calibrated."""
    output: Any = layer.output_quant
    return _grid(layer.input_quant), _grid(output) if output.is_quant_enabled else None


def _grid(proxy: Any) -> Affine:
    with torch.no_grad():
        return Affine(float(proxy.scale()), int(proxy.zero_point()))


def set_grids(layer: nn.Module, quant: LayerQuant) -> None:
    """Give a Brevitas layer the grids of a plan instead of calibrated ones."""
    proxies: Any = ((layer.input_quant, quant.input), (layer.output_quant, quant.output))
    for proxy, grid in proxies:
        if grid is None:
            proxy.disable_quant = True
            continue
        inner = proxy.fused_activation_quant_proxy.tensor_quant
        for part, value in (
            (inner.scaling_impl, grid.scale * 255),
            (inner.zero_point_impl, grid.zero_point * grid.scale),
        ):
            part.value.data.fill_(value)
            part.counter = part.collect_stats_steps + 1
