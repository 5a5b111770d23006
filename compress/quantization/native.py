"""Linear layers that multiply in 8 bits by our operators: each token of the input has a scale of its own."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import PassError
from compress.quantization.transforms import InputTransform, weight_of
from export.quant_plan import LayerQuant
from kernels.quantize import DTYPES, Kind

_KINDS: dict[str, Kind] = {"int8": "int8", "e4m3": "fp8"}


def native_layer(layer: nn.Linear, quant: LayerQuant, form: str) -> None:
    """Let a linear layer round its input token by token and call `latent::gemm_w8a8`; its float weight goes.

    Args:
        layer: not shared; its parameters are replaced, not changed.
        quant: of the layer, one that `export.dialect.Operators` has a form for.
        form: that form.

    Raises:
        PassError: the form is none of 8 bits.
    """
    import_module("kernels.operators")  # registers torch.ops.latent
    if form not in _KINDS:
        raise PassError(f"{form!r} is no 8-bit form; those are {', '.join(_KINDS)}")
    kind, weight = _KINDS[form], layer.weight
    numbers = torch.from_numpy(quant.weight.rounded(weight_of(weight, quant).cpu().numpy()))
    scales = torch.from_numpy(quant.weight.scale.reshape(-1)).expand(len(numbers)).contiguous()
    place = weight.device
    layer.register_parameter("weight", None)
    # Whole numbers, since floats take the precision that the network is to compute in: those of scales are their bits.
    layer.register_buffer("codes", numbers.to(DTYPES[kind]).view(torch.int8).to(place))
    layer.register_buffer("scale_bits", scales.view(torch.int32).to(place))
    if quant.bias is not None:
        layer.bias = nn.Parameter(torch.from_numpy(quant.bias).to(place), requires_grad=False)
    branch = quant.low_rank
    layer.register_buffer("down", None if branch is None else torch.from_numpy(branch.down).float().to(place))
    layer.register_buffer("up", None if branch is None else torch.from_numpy(branch.up).float().to(place))
    layer.transform = InputTransform(quant, place)
    layer.forward = _Forward(layer, kind)  # type: ignore[assignment, method-assign]


class _Forward:
    """The computation of such a layer."""

    def __init__(self, layer: nn.Module, kind: Kind) -> None:
        self.layer, self.kind = layer, kind

    def __call__(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        x = layer.transform(x)
        codes, scale = torch.ops.latent.quantize(x, self.kind)
        weight, weight_scale = layer.codes.view(DTYPES[self.kind]), layer.scale_bits.view(torch.float32)
        y: Tensor = torch.ops.latent.gemm_w8a8(codes, scale, weight, weight_scale, layer.bias, x.dtype)
        if layer.down is not None:
            y = y + nn.functional.linear(nn.functional.linear(x, layer.down), layer.up)
        return y
