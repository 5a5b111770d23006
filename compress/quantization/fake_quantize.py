"""Fake-quantize: a float network that rounds weights and activations exactly as its lowering will."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import PassError
from compress.quantization.attention import intercept, rounding
from compress.quantization.native import native_layer
from compress.quantization.rounding import round_input, round_weight
from compress.quantization.transforms import InputTransform, product, weight_of
from compress.twin import twin
from export.dialect import DIALECTS, Operators
from export.qdq import HALVED
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
    quantized = twin(module)
    chosen = None if dialect is None else DIALECTS[dialect]
    for name, quant in plan.layers.items():
        layer = _submodule(quantized, name)
        if not isinstance(layer, nn.Conv2d if quant.op == "conv" else nn.Linear):
            raise PassError(f"the quantization plan has {name!r} as {quant.op}, but it is a {type(layer).__name__}")
        computes = chosen is None or chosen.computes(quant)
        rounded = quant if chosen is None else chosen.settled(quant)
        form = chosen.form(quant) if isinstance(chosen, Operators) else None
        if form is not None:
            native_layer(layer, quant, form)  # type: ignore[arg-type]
            continue
        round_layer(layer, rounded, computes, computes and (chosen is None or chosen.conv_output))
    if chosen is None or chosen.attention:
        for name, attention in plan.attentions.items():
            intercept(_submodule(quantized, name), rounding(attention))
    if plan.storage == "float16" or (chosen is not None and chosen.half):
        _halve(quantized, {f"{name}.weight" for name in plan.layers})
    return quantized


def round_layer(layer: nn.Module, quant: LayerQuant, inputs: bool = True, outputs: bool = True) -> None:
    """Let a linear or convolution layer compute with the numbers of its plan; its weight becomes the rounded one.

    Args:
        layer: not shared; its parameters are replaced, not changed.
        quant: of the layer.
        inputs: round the input; without it the few bits only store the weights.
        outputs: round the output of a convolution.
    """
    weight: Any = layer.weight
    rows = round_weight(weight_of(weight, quant), quant.weight)
    if quant.low_rank is not None and not (inputs and quant.input is not None):
        rows = rows + product(quant.low_rank, rows.device)
    layer.weight = nn.Parameter(rows.reshape(weight.shape), requires_grad=False)
    if quant.bias is not None:
        layer.bias = nn.Parameter(torch.from_numpy(quant.bias).to(weight.device), requires_grad=False)
    if quant.transforms or (inputs and quant.input is not None):
        after = quant.output if outputs else None
        layer.forward = _Forward(layer, quant, inputs and quant.input is not None, after)


class _Forward:
    """The computation of a layer with its input transformed and rounded, and perhaps a second branch beside it."""

    def __init__(self, layer: nn.Module, quant: LayerQuant, rounds: bool, after: Affine | None) -> None:
        self.layer, self.quant, self.rounds, self.after = layer, quant, rounds, after
        device = next(layer.parameters()).device
        # What the computation reads is the layer's own, so that it goes along wherever the layer is moved.
        layer.transform = InputTransform(quant, device)
        branch = product(quant.low_rank, device) if quant.low_rank is not None and rounds else None
        layer.register_buffer("branch", branch, persistent=False)

    def __call__(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        x = layer.transform(x)
        rounded = x
        if self.rounds and self.quant.input is not None:
            rounded = round_input(x, self.quant.input, -1 if self.quant.op == "linear" else 1)
        y = computed(layer, rounded, layer.weight, layer.bias)
        if self.after is not None:
            y = round_input(y, self.after)
        return y if layer.branch is None else y + computed(layer, x, layer.branch, None)


def computed(layer: nn.Module, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """What a linear or convolution layer gives with other weights, of any shape that has as many numbers."""
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, rows.reshape(layer.weight.shape), bias)
    return nn.functional.linear(x, rows, bias)


def _submodule(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise PassError(f"the quantization plan names {name!r}, which is not in the network") from None


def _halve(module: nn.Module, quantized: set[str]) -> None:
    for owner_name, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            path = f"{owner_name}.{name}" if owner_name else name
            half = parameter.detach().half()
            if path not in quantized and half.ndim > 1 and half.numel() >= HALVED and half.isfinite().all():
                setattr(owner, name, nn.Parameter(half.float(), requires_grad=False))
