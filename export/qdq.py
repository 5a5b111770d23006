"""Lowers a QuantPlan into a float ONNX graph: standard QuantizeLinear and DequantizeLinear nodes, int8 weights."""

from __future__ import annotations

import ast
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from export.attention_scores import AttentionScores
from export.gates import split_gates
from export.quant_plan import Affine, LayerQuant, QuantPlan
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
    model: onnx.ModelProto, plan: QuantPlan, dialect: str, *, prefix: str = "denoiser.", partial: bool = False
) -> Lowered:
    """Rewrite the graph in place: each planned `Conv`, `MatMul`, `Gemm` reads u8 activations and s8 weights.

    Attention the plan names reads signed 8-bit queries and keys, where the dialect says that this pays.

    A layer without an input grid keeps its float activations and gets `Cast, Mul` behind its s8 weights, which runtimes
    compute once on load (`DequantizeLinear` would run at every call). The float weights that remain are stored as
    the plan says.

    Layers are found by the module names in the nodes' metadata, never by initializer names (the exporter transposes
    and renames the weights of 3-D linears). A tensor that feeds several layers with equal grids is quantized once.

    Args:
        model: float graph, opset >= 13, with the exporter's node metadata still in it.
        plan: of the whole part.
        dialect: a key of `DIALECTS`.
        prefix: put before the plan's names to give the names in the metadata.
        partial: the graph is one segment of the part, so layers of the plan may be missing; the caller then compares
            the union over all segments with the plan.

    Raises:
        LoweringError: an unknown dialect; a layer of the plan that is in the graph but has no constant weight, or
            another shape; a layer that is not in the graph at all (unless `partial`).
    """
    from onnx import TensorProto, numpy_helper

    if dialect not in DIALECTS:
        raise LoweringError(f"the dialect {dialect!r} is unknown; known are {', '.join(sorted(DIALECTS))}")
    rewriter = _Rewriter(model, DIALECTS[dialect])
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
        if name is None or node.op_type not in _OPS or node.input[1] not in rewriter.constants:
            rewriter.nodes.append(node)
            continue
        layer = plan.layers[name]
        if _OPS[node.op_type] != layer.op:
            raise LoweringError(f"layer {name!r} is planned as {layer.op} but is a {node.op_type} in the graph")
        weight = numpy_helper.to_array(rewriter.constants[node.input[1]])
        if rewriter.constants[node.input[1]].data_type != TensorProto.FLOAT:
            raise LoweringError(f"the weight of layer {name!r} is not float32 in the graph")
        rewriter.rewrite(node, name, layer, weight)
        result.layers.add(name)
        result.nodes[node.op_type if layer.input else "weight only"] += 1
    unlowered = present - result.layers
    if unlowered:
        raise LoweringError(f"planned layers without a constant weight in the graph: {_some(unlowered)}")
    if not partial:
        require_all(plan, [result], dialect)
    floats = _large_floats(model)
    rewriter.finish()
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


class _Rewriter:
    """The new node list and initializers of one graph."""

    def __init__(self, model: onnx.ModelProto, dialect: Dialect) -> None:
        self.model, self.dialect = model, dialect
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
        self.dequantized: dict[tuple[str, Affine], str] = {}
        self.weights: dict[tuple[str, str, str], str] = {}
        self.uses: defaultdict[str, int] = defaultdict(int)

    def rewrite(self, node: onnx.NodeProto, name: str, layer: LayerQuant, weight: np.ndarray) -> None:
        """Emit Q and DQ around one node."""
        import onnx

        transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
        channels = 1 if node.op_type != "Conv" and not transposed else 0
        by_channel = np.moveaxis(weight, channels, 0)
        if by_channel.shape[0] != len(layer.weight_scale):
            raise LoweringError(
                f"layer {name!r} has {by_channel.shape[0]} output channels, its plan {len(layer.weight_scale)}"
            )
        quantized = np.moveaxis(layer.quantize_weight(by_channel), 0, channels)
        out = onnx.NodeProto()
        out.CopyFrom(node)
        out.input[1] = self.weight(node.input[1], name, layer, quantized, channels)
        if layer.input is not None:
            out.input[0] = self.activation(node.input[0], layer.input)
            as_int32 = self.dialect.conv_bias if node.op_type == "Conv" else self.dialect.gemm_bias
            if len(node.input) > 2 and node.input[2] and as_int32:
                out.input[2] = self.bias(node.input[2], name, layer, layer.input)
        self.nodes.append(out)
        if node.op_type == "Conv" and self.dialect.conv_output and layer.output is not None:
            result = node.output[0]
            out.output[0] = self.fresh(f"{result}.float")
            self.quantize(out.output[0], layer.output, result)

    def scores(self, node: onnx.NodeProto, *scales: float) -> None:
        """Emit signed Q and DQ before both sides of a product of queries and keys."""
        import onnx

        out = onnx.NodeProto()
        out.CopyFrom(node)
        for i, scale in enumerate(scales):
            result = self.fresh(f"{node.input[i]}.dequantized")
            out.input[i] = self.quantized(node.input[i], np.float32(scale), np.int8(0), result)
        self.nodes.append(out)

    def activation(self, tensor: str, grid: Affine) -> str:
        """Quantize and dequantize a tensor, once per grid."""
        if (tensor, grid) not in self.dequantized:
            self.dequantized[tensor, grid] = self.quantize(tensor, grid, self.fresh(f"{tensor}.dequantized"))
        return self.dequantized[tensor, grid]

    def quantize(self, tensor: str, grid: Affine, result: str) -> str:
        """Emit Q and DQ to a grid."""
        return self.quantized(tensor, np.float32(grid.scale), np.uint8(grid.zero_point), result)

    def quantized(self, tensor: str, scale: np.float32, zero_point: np.int8 | np.uint8, result: str) -> str:
        """Emit tensor -> QuantizeLinear -> DequantizeLinear -> result."""
        from onnx import helper

        name = self.fresh(f"{tensor}.quantized")
        numbers = [
            self.constant(f"{name}.scale", np.asarray(scale)),
            self.constant(f"{name}.zero_point", np.asarray(zero_point)),
        ]
        self.nodes += [
            helper.make_node("QuantizeLinear", [tensor, *numbers], [name], f"{name}.node"),
            helper.make_node("DequantizeLinear", [name, *numbers], [result], f"{result}.node"),
        ]
        return result

    def weight(self, tensor: str, name: str, layer: LayerQuant, quantized: np.ndarray, axis: int) -> str:
        """An int8 initializer and its DequantizeLinear; a module called twice shares them."""
        from onnx import helper

        key = (tensor, name, "weight")
        if key not in self.weights:
            label = self.fresh(f"{name}.weight.int8")
            scales = np.asarray(layer.weight_scale, np.float32)
            if layer.input is None:
                shape = [-1 if i == axis else 1 for i in range(quantized.ndim)]
                self.weights[key] = self.widened(label, quantized, scales.reshape(shape))
                return self.weights[key]
            scale = self.constant(f"{label}.scale", scales)
            zero_point = self.constant(f"{label}.zero_point", np.zeros(len(layer.weight_scale), np.int8))
            self.weights[key] = self.fresh(f"{label}.dequantized")
            self.nodes.append(
                helper.make_node(
                    "DequantizeLinear",
                    [self.constant(label, quantized), scale, zero_point],
                    [self.weights[key]],
                    f"{label}.node",
                    axis=axis,
                )
            )
        return self.weights[key]

    def widened(self, label: str, stored: np.ndarray, scale: np.ndarray) -> str:
        """Emit stored -> Cast to float32 -> Mul by scale: constant, so a runtime computes it once on load."""
        from onnx import TensorProto, helper

        result = self.fresh(f"{label}.float32")
        self.nodes.append(
            helper.make_node("Cast", [self.constant(label, stored)], [result], f"{result}.node", to=TensorProto.FLOAT)
        )
        scaled = self.fresh(f"{label}.scaled")
        factor = self.constant(f"{label}.scale", scale)
        self.nodes.append(helper.make_node("Mul", [result, factor], [scaled], f"{scaled}.node"))
        return scaled

    def bias(self, tensor: str, name: str, layer: LayerQuant, grid: Affine) -> str:
        """An int32 initializer with the accumulator's scale, and its DequantizeLinear."""
        from onnx import helper, numpy_helper

        if tensor not in self.constants:
            raise LoweringError(f"the bias of layer {name!r} is not constant in the graph")
        key = (tensor, name, "bias")
        if key not in self.weights:
            scale = (np.asarray(layer.weight_scale, np.float32) * np.float32(grid.scale)).astype(np.float32)
            limits = np.iinfo(np.int32)
            rounded = np.round(numpy_helper.to_array(self.constants[tensor]).astype(np.float64) / scale)
            label = self.fresh(f"{name}.bias.int32")
            inputs = [
                self.constant(label, np.clip(rounded, limits.min, limits.max).astype(np.int32)),
                self.constant(f"{label}.scale", scale),
                self.constant(f"{label}.zero_point", np.zeros(scale.shape, np.int32)),
            ]
            self.weights[key] = self.fresh(f"{label}.dequantized")
            self.nodes.append(
                helper.make_node("DequantizeLinear", inputs, [self.weights[key]], f"{label}.node", axis=0)
            )
        return self.weights[key]

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add an initializer."""
        from onnx import numpy_helper

        self.taken.add(name)
        self.constants[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def fresh(self, name: str) -> str:
        """A tensor name nobody has."""
        while name in self.taken or name in self.constants:
            self.uses[name] += 1
            name = f"{name}.{self.uses[name]}"
        self.taken.add(name)
        return name

    def finish(self) -> None:
        """Put the nodes and the initializers still read into the graph."""
        graph = self.model.graph
        read = {name for node in self.nodes for name in node.input} | {output.name for output in graph.output}
        del graph.node[:]
        graph.node.extend(self.nodes)
        del graph.initializer[:]
        graph.initializer.extend(tensor for name, tensor in self.constants.items() if name in read)
        kept = {value.name for value in graph.value_info}
        stale = kept - read
        values = [value for value in graph.value_info if value.name not in stale]
        del graph.value_info[:]
        graph.value_info.extend(values)
