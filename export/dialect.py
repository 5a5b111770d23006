"""Dialects: what a runtime wants of a quantized graph, and which numbers it then really rounds to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from export.quant_plan import Affine, Dynamic, LayerQuant, Scaled

Form = Literal["int8", "e4m3", "int4", "nvfp4"]
"""What the numbers of a layer are in the graph where a runtime reads them as they are."""

INT4_BLOCKS = (64, 128)
"""Weights that share a scale, in 4-bit products of TensorRT."""

_ZERO = 128
"""The zero point of an unsigned 8-bit grid that is symmetric: less it, the codes are those of int8."""


class LoweringError(ValueError):
    """A plan that does not fit the graph; the message names the layers."""


@dataclass(frozen=True)
class Dialect:
    """What a runtime needs beside Q/DQ around the inputs and weights to pick its integer kernels.

    Attributes:
        conv_output: quantize the output of each convolution (ONNX Runtime fuses `DQ, Conv, Q` to `QLinearConv`, and
            computes in float without the Q).
        conv_bias, gemm_bias: store the bias as int32 with scale `input scale * weight scale` (ONNX Runtime fuses no
            `Conv` or `Gemm` whose bias is float).
        attention: quantize the queries and keys the plan names (OpenVINO fuses attention of 8-bit scores into one
            kernel; ONNX Runtime gains nothing from them).
        gates: compute the two halves of a gated layer as two products (OpenVINO copies the halves of one, and fuses the
            activation into one of two; ONNX Runtime is slower with two).
        half: all that is left in float is float16, but for what `export.half_graph` keeps.
    """

    conv_output: bool
    conv_bias: bool
    gemm_bias: bool
    attention: bool
    gates: bool
    half: bool = False

    def form(self, layer: LayerQuant) -> Form | None:
        """How the weights of a layer are read; None where they are widened to float when the graph is loaded."""
        computes = isinstance(layer.input, Affine) and layer.input.bits == 8 and layer.weight.is_int8
        return "int8" if computes else None

    def computes(self, layer: LayerQuant) -> bool:
        """Whether a layer computes in few bits; otherwise its weights are only stored in them."""
        return layer.input is not None and self.form(layer) is not None

    def settled(self, layer: LayerQuant) -> LayerQuant:
        """The layer with the grids that its lowering rounds to."""
        return layer


class TensorRT(Dialect):
    """Explicit Q/DQ of TensorRT: symmetric grids, scales in float16, 4-bit weights in blocks; products of tokens."""

    def form(self, layer: LayerQuant) -> Form | None:
        """See `Dialect.form`; weights may also be read so by a layer that computes in float16."""
        weight, given = layer.weight, layer.input
        if weight.is_int8 and (given is None or (isinstance(given, Affine) and given.bits == 8)):
            return "int8"
        if weight.element == "e4m3" and not weight.group:
            return "e4m3" if given is None or (isinstance(given, Scaled) and given.element == "e4m3") else None
        if layer.op != "linear":
            return None
        if weight.element == "int4" and weight.group in INT4_BLOCKS and given is None:
            return "int4"
        if (weight.element, weight.group, weight.stored) == ("e2m1", 16, "e4m3"):
            dynamic = isinstance(given, Dynamic) and (given.element, given.group, given.stored) == ("e2m1", 16, "e4m3")
            return "nvfp4" if given is None or dynamic else None
        return None

    def settled(self, layer: LayerQuant) -> LayerQuant:
        """Scales as float16 holds them; the zero point of activations in the middle."""
        form = self.form(layer)
        if form is None or form == "nvfp4":
            return layer
        given = layer.input
        if isinstance(given, Affine):
            low, high = given.range
            given = Affine(_half(max(high / (_ZERO - 1), -low / _ZERO)), _ZERO)
        elif isinstance(given, Scaled):
            given = replace(given, scale=_half(given.scale))
        weight = replace(layer.weight, scale=_halves(layer.weight.scale))
        return replace(layer, weight=weight, input=given, output=None)


class Operators(Dialect):
    """Our operators on a GPU: products of linear layers whose tokens have scales; all else is emulated in float."""

    def form(self, layer: LayerQuant) -> Form | None:
        """See `Dialect.form`."""
        weight, given = layer.weight, layer.input
        if layer.op != "linear" or not isinstance(given, Dynamic) or given.group or given.stored != "float32":
            return None
        if weight.is_int8 and given.element == "int8":
            return "int8"
        return "e4m3" if given.element == weight.element == "e4m3" and not weight.group else None

    def computes(self, layer: LayerQuant) -> bool:
        """See `Dialect.computes`: in float, if not by an operator."""
        return layer.input is not None


DIALECTS = {
    "onnxruntime": Dialect(conv_output=True, conv_bias=True, gemm_bias=True, attention=False, gates=False),
    "openvino": Dialect(conv_output=False, conv_bias=False, gemm_bias=False, attention=True, gates=True),
    "tensorrt": TensorRT(conv_output=False, conv_bias=False, gemm_bias=False, attention=False, gates=False, half=True),
    "operators": Operators(conv_output=False, conv_bias=False, gemm_bias=False, attention=False, gates=False),
}


def _half(scale: float) -> float:
    return float(_halves(np.asarray(scale)))


def _halves(scale: np.ndarray) -> np.ndarray:
    """The nearest positive float16 numbers, as float32."""
    limits = np.finfo(np.float16)
    return np.clip(scale, limits.smallest_subnormal, limits.max).astype(np.float16).astype(np.float32)
