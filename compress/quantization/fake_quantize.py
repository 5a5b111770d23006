"""Fake-quantize: a float network that rounds weights and activations exactly as its integer lowering will."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import PassError
from compress.quantization.attention import intercept, rounding
from export.qdq import DIALECTS, HALVED
from export.quant_plan import Affine, LayerQuant, QuantPlan


def fake_quantized(module: nn.Module, plan: QuantPlan, *, dialect: str | None = None) -> nn.Module:
    """A copy whose planned layers compute with quantized numbers in float32; all other weights are shared.

    Args:
        module: the component the plan was made for.
        plan: module names relative to `module`.
        dialect: round what its lowering rounds, a key of `export.qdq.DIALECTS`; None rounds all that the plan has.

    Raises:
        PassError: a layer of the plan is not in the module, or of another kind.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    quantized = copy.deepcopy(module, shared)
    for name, quant in plan.layers.items():
        layer = _submodule(quantized, name)
        if not isinstance(layer, nn.Conv2d if quant.op == "conv" else nn.Linear):
            raise PassError(f"the quantization plan has {name!r} as {quant.op}, but it is a {type(layer).__name__}")
        _round_layer(layer, quant, dialect is None or DIALECTS[dialect].conv_output)
    if dialect is None or DIALECTS[dialect].attention:
        for name, attention in plan.attentions.items():
            intercept(_submodule(quantized, name), rounding(attention))
    if plan.storage == "float16":
        _halve(quantized, {f"{name}.weight" for name in plan.layers})
    return quantized


def round_to(x: Tensor, grid: Affine) -> Tensor:
    """Quantize and dequantize, as ONNX `QuantizeLinear`, `DequantizeLinear` do; any shape."""
    quantized = torch.clamp(torch.round(x / grid.scale) + grid.zero_point, 0, 255)
    return (quantized - grid.zero_point) * grid.scale


def rounded_weight(weight: Tensor, quant: LayerQuant) -> Tensor:
    """The float values of the int8 weight, (out_channels, ...)."""
    scale = torch.tensor(quant.weight_scale).reshape(-1, *(1,) * (weight.ndim - 1))
    return torch.clamp(torch.round(weight.detach().float() / scale), -127, 127) * scale


def _submodule(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise PassError(f"the quantization plan names {name!r}, which is not in the network") from None


def _round_layer(layer: nn.Module, quant: LayerQuant, conv_outputs: bool) -> None:
    weight: Any = layer.weight
    layer.weight = nn.Parameter(rounded_weight(weight, quant), requires_grad=False)
    if quant.input is not None:
        grid = quant.input
        layer.register_forward_pre_hook(lambda _, args: (round_to(args[0], grid), *args[1:]))
    if quant.output is not None and conv_outputs:
        after = quant.output
        layer.register_forward_hook(lambda _, args, output: round_to(output, after))


def _halve(module: nn.Module, quantized: set[str]) -> None:
    for owner_name, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            path = f"{owner_name}.{name}" if owner_name else name
            half = parameter.detach().half()
            if path not in quantized and half.ndim > 1 and half.numel() >= HALVED and half.isfinite().all():
                setattr(owner, name, nn.Parameter(half.float(), requires_grad=False))
