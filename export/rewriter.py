"""Writes a quantized layer as nodes: its input rounded, its weights in few bits, its bias, and its second branch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.dialect import Dialect, LoweringError
from export.elements import element
from export.emitter import Emitter
from export.grids import Input
from export.packed import unpacked
from export.quant_plan import Affine, LayerQuant, LowRank, QuantPlanError
from export.stored_weights import half, rotate, widened

if TYPE_CHECKING:
    import onnx


class Rewriter(Emitter):
    """The new node list and initializers of one graph, with quantized layers in it."""

    def __init__(self, model: onnx.ModelProto, dialect: Dialect, folder: Path | None) -> None:
        super().__init__(model, folder)
        self.dialect = dialect
        self._transformed: dict[tuple[str, bytes, int], str] = {}
        self._dequantized: dict[tuple[str, Input], str] = {}
        self._weights: dict[tuple[str, str, str], str] = {}

    def rewrite(self, node: onnx.NodeProto, name: str, layer: LayerQuant, weight: np.ndarray) -> bool:
        """Emit the weights of one node in few bits, and Q and DQ around it where it computes in them.

        Returns:
            Whether the weights are read as they are; otherwise they are widened on load.
        """
        import onnx

        transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
        axis = 1 if node.op_type != "Conv" and not transposed else 0
        try:
            numbers = layer.weight.rounded(np.moveaxis(weight, axis, 0))
        except QuantPlanError as error:
            raise LoweringError(f"layer {name!r} has {error}") from None
        out = onnx.NodeProto()
        out.CopyFrom(node)
        biased = len(node.input) > 2 and bool(node.input[2])
        if not self._holds(name, layer, numbers[0].size):
            out.input[1] = self._stored(node.input[1], name, layer, numbers, axis)
            if biased and layer.bias is not None:
                out.input[2] = self._bias(node.input[2], name, layer)
            self.nodes.append(out)
            return False
        x = self._transform(node.input[0], layer)
        out.input[0] = x if layer.input is None else self._activation(x, layer.input)
        out.input[1] = self._numbers(node.input[1], name, layer, np.moveaxis(numbers, 0, axis), axis)
        if biased:
            as_int32 = self.dialect.conv_bias if node.op_type == "Conv" else self.dialect.gemm_bias
            if as_int32:
                out.input[2] = self._integer_bias(node.input[2], name, layer)
            elif layer.bias is not None:
                out.input[2] = self._bias(node.input[2], name, layer)
        result = node.output[0]
        self.nodes.append(out)
        if layer.low_rank is not None:
            out.output[0] = self.fresh(f"{result}.quantized")
        if node.op_type == "Conv" and self.dialect.conv_output and layer.output is not None:
            after = out.output[0]
            out.output[0] = self.fresh(f"{result}.float")
            self._quantize(out.output[0], layer.output, after)
        if layer.low_rank is not None:
            rounded = f"{result}.quantized" if layer.output is None or not self.dialect.conv_output else after
            self._branch(node, x, layer.low_rank, rounded, result)
        return True

    def _holds(self, name: str, layer: LayerQuant, columns: int) -> bool:
        """Whether this dialect reads the weights (out_channels, columns) of a layer as they are."""
        return self.dialect.form(layer) is not None

    def rebias(self, node: onnx.NodeProto, name: str, layer: LayerQuant) -> None:
        """Emit the addition of a layer's bias, which a plan may have replaced."""
        import onnx

        out = onnx.NodeProto()
        out.CopyFrom(node)
        for at, tensor in enumerate(node.input):
            if tensor in self.constants and layer.bias is not None:
                out.input[at] = self._bias(tensor, name, layer)
        self.nodes.append(out)

    def scores(self, node: onnx.NodeProto, *scales: float) -> None:
        """Emit signed Q and DQ before both sides of a product of queries and keys."""
        import onnx

        out = onnx.NodeProto()
        out.CopyFrom(node)
        for i, scale in enumerate(scales):
            result = self.fresh(f"{node.input[i]}.dequantized")
            out.input[i] = self._quantized(node.input[i], np.float32(scale), np.int8(0), result)
        self.nodes.append(out)

    def _transform(self, tensor: str, layer: LayerQuant) -> str:
        """Smooth and rotate an input, once for all layers that do the same to it."""
        if layer.smooth is None and not layer.rotation:
            return tensor
        key = tensor, b"" if layer.smooth is None else layer.smooth.tobytes(), layer.rotation
        if key not in self._transformed:
            made = tensor
            if layer.smooth is not None:
                factor = 1.0 / layer.smooth.astype(np.float32)
                factor = factor[:, None, None] if layer.op == "conv" else factor
                label = self.fresh(f"{tensor}.smoothness")
                made = self.emit("Mul", [made, self.constant(label, factor)], self.fresh(f"{tensor}.smooth"))
            if layer.rotation:
                made = rotate(self, f"{tensor}.rotated", made, layer.rotation)
            self._transformed[key] = made
        return self._transformed[key]

    def _branch(self, node: onnx.NodeProto, x: str, branch: LowRank, rounded: str, result: str) -> None:
        """Emit result = rounded + up(down(x))."""
        from onnx import helper

        down, up = branch.down, branch.up
        label = f"{result}.branch"
        if node.op_type == "Conv":
            kernel = next(list(a.ints) for a in node.attribute if a.name == "kernel_shape")
            down = down.reshape(len(down), -1, *kernel)
            first = helper.make_node("Conv", [x, half(self, f"{label}.down", down)], [self.fresh(f"{label}.few")])
            first.attribute.extend(a for a in node.attribute if a.name != "group")
            self.nodes.append(first)
            second = self.emit(
                "Conv", [first.output[0], half(self, f"{label}.up", up[..., None, None])], self.fresh(label)
            )
        else:
            few = self.emit("MatMul", [x, half(self, f"{label}.down", down.T)], self.fresh(f"{label}.few"))
            second = self.emit("MatMul", [few, half(self, f"{label}.up", up.T)], self.fresh(label))
        self.emit("Add", [rounded, second], result)

    def _activation(self, tensor: str, grid: Input) -> str:
        """Quantize and dequantize a tensor, once per grid."""
        if (tensor, grid) not in self._dequantized:
            self._dequantized[tensor, grid] = self._quantize(tensor, grid, self.fresh(f"{tensor}.dequantized"))
        return self._dequantized[tensor, grid]

    def _quantize(self, tensor: str, grid: Input, result: str) -> str:
        if not isinstance(grid, Affine):
            raise LoweringError(f"{tensor} is to be rounded to integers, but its grid is {type(grid).__name__}")
        return self._quantized(tensor, np.float32(grid.scale), np.uint8(grid.zero_point), result)

    def _quantized(self, tensor: str, scale: np.floating, zero_point: np.int8 | np.uint8, result: str) -> str:
        """Emit tensor -> QuantizeLinear -> DequantizeLinear -> result."""
        name = self.fresh(f"{tensor}.quantized")
        numbers = [
            self.constant(f"{name}.scale", np.asarray(scale)),
            self.constant(f"{name}.zero_point", np.asarray(zero_point)),
        ]
        self.emit("QuantizeLinear", [tensor, *numbers], name)
        return self.emit("DequantizeLinear", [name, *numbers], result)

    def _numbers(self, tensor: str, name: str, layer: LayerQuant, numbers: np.ndarray, axis: int) -> str:
        """Integer weights and their DequantizeLinear; a module called twice shares them."""
        key = (tensor, name, "weight")
        if key not in self._weights:
            label = self.fresh(f"{name}.weight.{layer.weight.element}")
            scales = np.broadcast_to(layer.weight.scale[:, 0], (numbers.shape[axis],)).astype(np.float32)
            inputs = [
                unpacked(self, label, element(layer.weight.element), numbers),
                self.constant(f"{label}.scale", scales),
                self.constant(f"{label}.zero_point", np.zeros(len(scales), np.int8)),
            ]
            self._weights[key] = self.emit("DequantizeLinear", inputs, self.fresh(f"{label}.dequantized"), axis=axis)
        return self._weights[key]

    def _stored(self, tensor: str, name: str, layer: LayerQuant, numbers: np.ndarray, axis: int) -> str:
        """Float weights widened on load; a module called twice shares them."""
        key = (tensor, name, "weight")
        if key not in self._weights:
            label = self.fresh(f"{name}.weight.{layer.weight.element}")
            made = widened(self, label, layer, numbers.reshape(len(numbers), -1), numbers.shape)
            if axis:
                made = self.emit("Transpose", [made], self.fresh(f"{label}.transposed"), perm=[1, 0])
            self._weights[key] = made
        return self._weights[key]

    def _bias(self, tensor: str, name: str, layer: LayerQuant) -> str:
        """The bias of the plan."""
        key = (tensor, name, "float bias")
        if key not in self._weights:
            bias = np.asarray(layer.bias, np.float32)
            self._weights[key] = self.constant(self.fresh(f"{name}.bias.corrected"), bias)
        return self._weights[key]

    def _integer_bias(self, tensor: str, name: str, layer: LayerQuant) -> str:
        """An int32 initializer with the accumulator's scale, and its DequantizeLinear."""
        grid = layer.input
        if not isinstance(grid, Affine):
            raise LoweringError(f"layer {name!r} has an integer bias, but its input grid is not an integer one")
        if tensor not in self.constants:
            raise LoweringError(f"the bias of layer {name!r} is not constant in the graph")
        key = (tensor, name, "bias")
        if key not in self._weights:
            bias = self.array(tensor) if layer.bias is None else layer.bias
            scale = np.broadcast_to(layer.weight.scale[:, 0], bias.shape).astype(np.float32) * np.float32(grid.scale)
            limits = np.iinfo(np.int32)
            rounded = np.round(bias.astype(np.float64) / scale)
            label = self.fresh(f"{name}.bias.int32")
            inputs = [
                self.constant(label, np.clip(rounded, limits.min, limits.max).astype(np.int32)),
                self.constant(f"{label}.scale", scale),
                self.constant(f"{label}.zero_point", np.zeros(scale.shape, np.int32)),
            ]
            self._weights[key] = self.emit("DequantizeLinear", inputs, self.fresh(f"{label}.dequantized"), axis=0)
        return self._weights[key]
