"""The operations of a network by our kernels, in bf16 or with its large products in fp8."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.adaln import adaln
from kernels.attention import attention
from kernels.attention_fp8 import attention_fp8
from kernels.cross_attention import cross_attention
from kernels.gated_residual import gated_residual
from kernels.gelu import gelu, gelu_quantized
from kernels.gemm_w8a8 import gemm_w8a8
from kernels.group_norm_silu import group_norm_silu
from kernels.quantize import Quantized, quantize
from recipes.benchmarks.gpu.networks import parameters_of

_SHORT = 128  # keys that one tile holds
_MULTIPLE = 16  # of the sizes that products in fp8 take


class Ours:
    """By the kernels, where they are chosen; see `kernels.dispatch`."""

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """See `networks.Operations`."""
        return layer(x)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `networks.Operations`."""
        return cross_attention(q, k, v) if k.shape[2] <= _SHORT else attention(q, k, v)

    def norm_silu(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """See `networks.Operations`."""
        return group_norm_silu(x, parameters_of(norm))

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """See `networks.Operations`."""
        return adaln(x, shift, scale)

    def gated(self, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        """See `networks.Operations`."""
        return gated_residual(x, gate, y)

    def geglu(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """See `networks.Operations`."""
        return layer(gelu(x, gated=True))

    def gelu(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """See `networks.Operations`."""
        return layer(gelu(x, tanh=True))


class OursFp8(Ours):
    """The same, with weights and activations of linear layers in e4m3, and long attention likewise."""

    def __init__(self, network: nn.Module) -> None:
        """Round the weights of a network, once."""
        self._weights = {
            id(layer): quantize(layer.weight.detach(), "fp8")
            for layer in network.modules()
            if isinstance(layer, nn.Linear) and layer.in_features % _MULTIPLE == layer.out_features % _MULTIPLE == 0
        }

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """See `networks.Operations`."""
        weights = self._weights.get(id(layer))
        return layer(x) if weights is None else self._product(quantize(x.contiguous(), "fp8"), weights, layer)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `networks.Operations`."""
        return attention_fp8(q, k, v)

    def geglu(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """See `networks.Operations`."""
        weights = self._weights.get(id(layer))
        if weights is None:
            return super().geglu(x, layer)
        return self._product(gelu_quantized(x, "fp8", gated=True), weights, layer)

    def gelu(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """See `networks.Operations`."""
        weights = self._weights.get(id(layer))
        if weights is None:
            return super().gelu(x, layer)
        return self._product(gelu_quantized(x, "fp8", tanh=True), weights, layer)

    def _product(self, x: Quantized, weights: Quantized, layer: nn.Linear) -> Tensor:
        return gemm_w8a8(x, weights, layer.bias, dtype=torch.bfloat16)
