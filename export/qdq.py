"""Lowers a QuantPlan into a float ONNX graph: standard QuantizeLinear and DequantizeLinear nodes, int8 weights."""

from __future__ import annotations

import ast
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.attention_scores import AttentionScores
from export.elements import element
from export.emitter import Emitter
from export.gates import split_gates
from export.packed import unpacked
from export.quant_plan import Affine, LayerQuant, LowRank, QuantPlan, QuantPlanError
from export.stored_weights import half, rotate, widened
from export.weights import store_float16

if TYPE_CHECKING:
    import onnx

SCOPES = "pkg.torch.onnx.name_scopes"
"""Node metadata the exporter writes: the module names from the outermost inwards, then the node's own name."""

HALVED = 1024
"""Matrices and kernels with fewer numbers, and all vectors, stay float32 where larger ones are stored as float16."""

_OPS = {"Conv": "conv", "MatMul": "linear", "Gemm": "linear"}


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
    """

    conv_output: bool
    conv_bias: bool
    gemm_bias: bool
    attention: bool
    gates: bool

    def computes(self, layer: LayerQuant) -> bool:
        """Whether a layer computes in integers; otherwise its weights are only stored in few bits."""
        return isinstance(layer.input, Affine) and layer.input.bits == 8 and layer.weight.is_int8


DIALECTS = {
    "onnxruntime": Dialect(conv_output=True, conv_bias=True, gemm_bias=True, attention=False, gates=False),
    "openvino": Dialect(conv_output=False, conv_bias=False, gemm_bias=False, attention=True, gates=True),
}


@dataclass
class Lowered:
    """What a lowering did.

    Attributes:
        layers: of the plan, found in this graph.
        attentions: likewise.
        nodes: rewritten, by ONNX operator; `weight only` are those that still compute in float,
            `attention` the products of queries and keys, `gate` the second products that gated layers were given.
        halved: initializers stored as float16.
    """

    layers: set[str] = field(default_factory=set)
    attentions: set[str] = field(default_factory=set)
    nodes: Counter[str] = field(default_factory=Counter)
    halved: int = 0


def lower(
    model: onnx.ModelProto,
    plan: QuantPlan,
    dialect: str,
    *,
    prefix: str = "denoiser.",
    partial: bool = False,
    folder: Path | None = None,
) -> Lowered:
    """Rewrite the graph in place: each planned `Conv`, `MatMul`, `Gemm` reads u8 activations and s8 or s4 weights.

    Attention the plan names reads signed 8-bit queries and keys, where the dialect says that this pays.

    A layer whose input the dialect does not quantize keeps its float activations and gets `Cast, Mul` behind its
    weights, and whatever undoes their transforms, which runtimes compute once on load (`DequantizeLinear` would run at
    every call). The float weights that remain are stored as the plan says.

    Layers are found by the module names in the nodes' metadata, never by initializer names (the exporter transposes
    and renames the weights of 3-D linears). A tensor that feeds several layers with equal grids is quantized once.

    Args:
        model: float graph, opset >= 13, with the exporter's node metadata still in it.
        plan: of the whole part.
        dialect: a key of `DIALECTS`.
        prefix: put before the plan's names to give the names in the metadata.
        partial: the graph is one segment of the part, so layers of the plan may be missing; the caller then compares
            the union over all segments with the plan.
        folder: where the weights lie that the graph only refers to: those that are planned are read one at a time, and
            the others in the end.

    Raises:
        LoweringError: an unknown dialect; a layer of the plan that is in the graph but has no constant weight, or
            another shape; a layer that is not in the graph at all (unless `partial`).
    """
    from onnx import TensorProto
    from onnx.external_data_helper import load_external_data_for_model

    if dialect not in DIALECTS:
        raise LoweringError(f"the dialect {dialect!r} is unknown; known are {', '.join(sorted(DIALECTS))}")
    rewriter = _Rewriter(model, DIALECTS[dialect], folder)
    scores = AttentionScores(model.graph, rewriter.constants)
    result = Lowered()
    present: set[str] = set()
    planned = {f"{prefix}{name}": name for name in plan.layers}
    attentions = {f"{prefix}{name}": name for name in plan.attentions if DIALECTS[dialect].attention}
    for node in list(model.graph.node):
        scopes = _scopes(node)
        present.update(planned[scope] for scope in scopes if scope in planned)
        owner = scopes[-2] if len(scopes) > 1 else ""
        if owner in attentions and scores.is_one(node):
            attention = plan.attentions[attentions[owner]]
            factors = (scores.factor(node.input[0]), scores.factor(node.input[1]))
            rewriter.scores(node, attention.query * factors[0], attention.key * factors[1])
            result.attentions.add(attentions[owner])
            result.nodes["attention"] += 1
            continue
        name = planned.get(owner)
        if name is not None and node.op_type == "Add" and any(tensor in rewriter.constants for tensor in node.input):
            rewriter.rebias(node, name, plan.layers[name])
            continue
        if name is None or node.op_type not in _OPS or node.input[1] not in rewriter.constants:
            rewriter.nodes.append(node)
            continue
        layer = plan.layers[name]
        if _OPS[node.op_type] != layer.op:
            raise LoweringError(f"layer {name!r} is planned as {layer.op} but is a {node.op_type} in the graph")
        weight = rewriter.array(node.input[1])
        if rewriter.constants[node.input[1]].data_type != TensorProto.FLOAT:
            raise LoweringError(f"the weight of layer {name!r} is not float32 in the graph")
        rewriter.rewrite(node, name, layer, weight)
        result.layers.add(name)
        result.nodes[node.op_type if DIALECTS[dialect].computes(layer) else "weight only"] += 1
    unlowered = present - result.layers
    if unlowered:
        raise LoweringError(f"planned layers without a constant weight in the graph: {_some(unlowered)}")
    if not partial:
        require_all(plan, [result], dialect)
    floats = _large_floats(model)
    rewriter.finish()
    if folder is not None:
        load_external_data_for_model(model, str(folder))
    if DIALECTS[dialect].gates and (gates := split_gates(model)):
        result.nodes["gate"] = gates
    if plan.storage == "float16":
        result.halved = store_float16(model, floats)
    return result


def require_all(plan: QuantPlan, lowered: list[Lowered], dialect: str) -> None:
    """Check that the graphs of a part, together, hold every layer of its plan, and what attention the dialect lowers.

    Raises:
        LoweringError: names the missing layers.
    """
    missing = set(plan.layers).difference(*(each.layers for each in lowered))
    if DIALECTS[dialect].attention:
        missing |= set(plan.attentions).difference(*(each.attentions for each in lowered))
    if missing:
        planned = len(plan.layers) + len(plan.attentions)
        raise LoweringError(f"{len(missing)} of {planned} planned layers are in no graph: {_some(missing)}")


def _large_floats(model: onnx.ModelProto) -> set[str]:
    return {
        tensor.name for tensor in model.graph.initializer if len(tensor.dims) > 1 and math.prod(tensor.dims) >= HALVED
    }


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")


def _scopes(node: onnx.NodeProto) -> list[str]:
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            return [str(scope) for scope in ast.literal_eval(entry.value)]
    return []


class _Rewriter(Emitter):
    """The new node list and initializers of one graph, with quantized layers in it."""

    def __init__(self, model: onnx.ModelProto, dialect: Dialect, folder: Path | None) -> None:
        super().__init__(model, folder)
        self.dialect = dialect
        self._transformed: dict[tuple[str, bytes, int], str] = {}
        self._dequantized: dict[tuple[str, Affine], str] = {}
        self._weights: dict[tuple[str, str, str], str] = {}

    def rewrite(self, node: onnx.NodeProto, name: str, layer: LayerQuant, weight: np.ndarray) -> None:
        """Emit the weights of one node in few bits, and Q and DQ around it where it computes in integers."""
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
        if not self.dialect.computes(layer):
            out.input[1] = self._stored(node.input[1], name, layer, numbers, axis)
            if biased and layer.bias is not None:
                out.input[2] = self._bias(node.input[2], name, layer)
            self.nodes.append(out)
            return
        grid = layer.input
        if not isinstance(grid, Affine):
            raise LoweringError(f"layer {name!r} computes in integers, but its input grid is not an integer one")
        x = self._transform(node.input[0], layer)
        out.input[0] = self._activation(x, grid)
        out.input[1] = self._integers(node.input[1], name, layer, np.moveaxis(numbers, 0, axis), axis)
        if biased:
            as_int32 = self.dialect.conv_bias if node.op_type == "Conv" else self.dialect.gemm_bias
            if as_int32:
                out.input[2] = self._integer_bias(node.input[2], name, layer, grid)
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

    def _activation(self, tensor: str, grid: Affine) -> str:
        """Quantize and dequantize a tensor, once per grid."""
        if (tensor, grid) not in self._dequantized:
            self._dequantized[tensor, grid] = self._quantize(tensor, grid, self.fresh(f"{tensor}.dequantized"))
        return self._dequantized[tensor, grid]

    def _quantize(self, tensor: str, grid: Affine, result: str) -> str:
        return self._quantized(tensor, np.float32(grid.scale), np.uint8(grid.zero_point), result)

    def _quantized(self, tensor: str, scale: np.float32, zero_point: np.int8 | np.uint8, result: str) -> str:
        """Emit tensor -> QuantizeLinear -> DequantizeLinear -> result."""
        name = self.fresh(f"{tensor}.quantized")
        numbers = [
            self.constant(f"{name}.scale", np.asarray(scale)),
            self.constant(f"{name}.zero_point", np.asarray(zero_point)),
        ]
        self.emit("QuantizeLinear", [tensor, *numbers], name)
        return self.emit("DequantizeLinear", [name, *numbers], result)

    def _integers(self, tensor: str, name: str, layer: LayerQuant, numbers: np.ndarray, axis: int) -> str:
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

    def _integer_bias(self, tensor: str, name: str, layer: LayerQuant, grid: Affine) -> str:
        """An int32 initializer with the accumulator's scale, and its DequantizeLinear."""
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
