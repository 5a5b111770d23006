"""Writes a quantized layer as TensorRT reads it: symmetric Q/DQ, float8, 4-bit weights in blocks, NVFP4."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from export.dialect import LoweringError
from export.elements import element
from export.grids import Affine, Dynamic, Input
from export.packed import packed
from export.quant_plan import LayerQuant
from export.rewriter import Rewriter
from export.stored_weights import float_weights

if TYPE_CHECKING:
    import onnx

DOMAIN = "trt"
"""Of the operators that TensorRT's parser adds to ONNX's."""

DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"
"""x (float16), tensor scale -> e2m1 numbers and the e4m3 scales of their blocks."""


class TensorRTRewriter(Rewriter):
    """See `Rewriter`; scales are float16, as is all that is computed from them, but for those of NVFP4."""

    def _holds(self, name: str, layer: LayerQuant, columns: int) -> bool:
        """Blocks of weights fill a row, or the weights are widened."""
        form = self.dialect.form(layer)
        fills = not layer.weight.group or columns % layer.weight.group == 0
        if form == "nvfp4" and not fills and layer.input is not None:
            raise LoweringError(
                f"layer {name!r} has {columns} inputs, which blocks of {layer.weight.group} do not fill: "
                "TensorRT cannot round them to nvfp4; leave it in another format"
            )
        return form is not None and fills

    def _quantize(self, tensor: str, grid: Input, result: str) -> str:
        from onnx import TensorProto

        if isinstance(grid, Affine):
            return self._quantized(tensor, np.float16(grid.scale), np.int8(0), result)
        if isinstance(grid, Dynamic):
            return self._to_fp4(tensor, grid, result)
        name = self.fresh(f"{tensor}.quantized")
        inputs = [
            self.constant(f"{name}.scale", np.asarray(grid.scale, np.float16)),
            self.tensor(_zeros(f"{name}.zero_point", TensorProto.FLOAT8E4M3FN)),
        ]
        self.emit("QuantizeLinear", [tensor, *inputs], name)
        return self.emit("DequantizeLinear", [name, *inputs], result)

    def _to_fp4(self, tensor: str, grid: Dynamic, result: str) -> str:
        """Blocks along the last axis, each with an e4m3 scale that is found at run time."""
        from onnx import TensorProto, helper

        name = self.fresh(f"{tensor}.fp4")
        scales = self.fresh(f"{name}.scales")
        whole = self.constant(self.fresh(f"{name}.tensor"), np.asarray(grid.tensor_scale, np.float32))
        self._require_domain()
        self.nodes.append(
            helper.make_node(
                DYNAMIC_QUANTIZE,
                [tensor, whole],
                [name, scales],
                f"{name}.node",
                domain=DOMAIN,
                axis=-1,
                block_size=grid.group,
                scale_type=TensorProto.FLOAT8E4M3FN,
            )
        )
        floats = self.emit("DequantizeLinear", [scales, whole], self.fresh(f"{scales}.float"))
        return self.emit("DequantizeLinear", [name, floats], result, axis=-1, block_size=grid.group)

    def _require_domain(self) -> None:
        self._require(opset=23, ir=11)
        if all(entry.domain != DOMAIN for entry in self.model.opset_import):
            self.model.opset_import.add(domain=DOMAIN, version=1)

    def _numbers(self, tensor: str, name: str, layer: LayerQuant, numbers: np.ndarray, axis: int) -> str:
        """Weights in few bits and their DequantizeLinear; a module called twice shares them."""
        key = (tensor, name, "weight")
        if key not in self._weights:
            form = self.dialect.form(layer)
            label = self.fresh(f"{name}.weight.{layer.weight.element}")
            if form == "int4" or form == "nvfp4":
                self._weights[key] = self._blocks(label, layer, numbers, axis)
            else:
                self._weights[key] = self._channels(label, layer, numbers, axis)
        return self._weights[key]

    def _stored(self, tensor: str, name: str, layer: LayerQuant, numbers: np.ndarray, axis: int) -> str:
        """Float weights: TensorRT converts no constants of few bits but by DequantizeLinear."""
        key = (tensor, name, "weight")
        if key not in self._weights:
            label = self.fresh(f"{name}.weight.widened")
            self._weights[key] = self.constant(label, np.moveaxis(float_weights(layer, numbers), 0, axis))
        return self._weights[key]

    def _channels(self, label: str, layer: LayerQuant, numbers: np.ndarray, axis: int) -> str:
        """int8 or e4m3, with a scale for each output channel."""
        from onnx import TensorProto

        channels = numbers.shape[axis]
        scales = np.broadcast_to(layer.weight.scale[:, 0], (channels,)).astype(np.float16)
        kind = element(layer.weight.element)
        if kind.is_integer:
            stored, code = self.constant(label, numbers.astype(np.int8)), TensorProto.INT8
        else:
            stored, code = self.tensor(packed(label, kind, numbers)), TensorProto.FLOAT8E4M3FN
        zeros = self.tensor(_zeros(f"{label}.zero_point", code, channels))
        inputs = [stored, self.constant(f"{label}.scale", scales), zeros]
        return self.emit("DequantizeLinear", inputs, self.fresh(f"{label}.dequantized"), axis=axis)

    def _blocks(self, label: str, layer: LayerQuant, numbers: np.ndarray, axis: int) -> str:
        """4 bits, with a scale for each block of inputs; those of NVFP4 are e4m3 numbers, with one scale in turn."""
        from onnx import TensorProto

        grid = layer.weight
        kind = element(grid.element)
        scales = np.broadcast_to(grid.scale, (numbers.shape[axis], grid.scale.shape[1]))
        scales = scales.T if axis else scales
        tensor = packed(label, kind, numbers)
        if kind.is_integer:
            inputs = [self.tensor(tensor), self.constant(f"{label}.scale", scales.astype(np.float16))]
        else:
            tensor.data_type = TensorProto.FLOAT4E2M1
            scale_kind = element("e4m3")
            whole = np.float32(grid.tensor_scale)
            stored = self.tensor(packed(f"{label}.scale", scale_kind, scale_kind.round(scales / whole)))
            widened = [stored, self.constant(f"{label}.tensor", np.asarray(whole))]
            inputs = [
                self.tensor(tensor),
                self.emit("DequantizeLinear", widened, self.fresh(f"{label}.scale.float")),
            ]
        result = self.fresh(f"{label}.dequantized")
        return self.emit("DequantizeLinear", inputs, result, axis=1 - axis, block_size=grid.group)


def _zeros(name: str, code: int, *dims: int) -> onnx.TensorProto:
    """8-bit zeros of any type."""
    from onnx import TensorProto

    return TensorProto(name=name, data_type=code, dims=dims, raw_data=bytes(int(np.prod(dims))))
