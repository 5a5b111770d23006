"""Lowers a QuantPlan into a float ONNX graph: standard QuantizeLinear and DequantizeLinear nodes, int8 weights."""

from __future__ import annotations

import ast
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from export.attention_scores import AttentionScores
from export.dialect import DIALECTS, Dialect, LoweringError
from export.gates import split_gates
from export.half_graph import halve
from export.quant_plan import QuantPlan
from export.rewriter import Rewriter
from export.tensorrt_rewriter import TensorRTRewriter
from export.weights import store_float16

if TYPE_CHECKING:
    import onnx

__all__ = ["DIALECTS", "HALVED", "SCOPES", "Dialect", "Lowered", "LoweringError", "lower", "require_all", "scopes_of"]

SCOPES = "pkg.torch.onnx.name_scopes"
"""Node metadata the exporter writes: the module names from the outermost inwards, then the node's own name."""

HALVED = 1024
"""Matrices and kernels with fewer numbers, and all vectors, stay float32 where larger ones are stored as float16."""

_OPS = {"Conv": "conv", "MatMul": "linear", "Gemm": "linear"}


@dataclass
class Lowered:
    """What a lowering did.

    Attributes:
        layers: of the plan, found in this graph.
        attentions: likewise.
        nodes: rewritten, by ONNX operator; `weight only` are those that still compute in float,
            `attention` the products of queries and keys, `gate` the second products that gated layers were given.
        halved: initializers stored as float16.
        widened: layers of the plan whose weights a runtime turns to float when it loads (or builds) the graph.
    """

    layers: set[str] = field(default_factory=set)
    attentions: set[str] = field(default_factory=set)
    nodes: Counter[str] = field(default_factory=Counter)
    halved: int = 0
    widened: set[str] = field(default_factory=set)


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
    chosen = DIALECTS[dialect]
    rewriter = (TensorRTRewriter if dialect == "tensorrt" else Rewriter)(model, chosen, folder)
    scores = AttentionScores(model.graph, rewriter.constants)
    result = Lowered()
    present: set[str] = set()
    planned = {f"{prefix}{name}": name for name in plan.layers}
    attentions = {f"{prefix}{name}": name for name in plan.attentions if chosen.attention}
    for node in list(model.graph.node):
        scopes = scopes_of(node)
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
        layer = chosen.settled(plan.layers[name])
        if _OPS[node.op_type] != layer.op:
            raise LoweringError(f"layer {name!r} is planned as {layer.op} but is a {node.op_type} in the graph")
        weight = rewriter.array(node.input[1])
        if rewriter.constants[node.input[1]].data_type != TensorProto.FLOAT:
            raise LoweringError(f"the weight of layer {name!r} is not float32 in the graph")
        if not rewriter.rewrite(node, name, layer, weight):
            result.widened.add(name)
        result.layers.add(name)
        result.nodes[node.op_type if chosen.computes(layer) else "weight only"] += 1
    unlowered = present - result.layers
    if unlowered:
        raise LoweringError(f"planned layers without a constant weight in the graph: {_some(unlowered)}")
    if not partial:
        require_all(plan, [result], dialect)
    floats = _large_floats(model)
    rewriter.finish()
    if folder is not None:
        load_external_data_for_model(model, str(folder))
    if chosen.gates and (gates := split_gates(model)):
        result.nodes["gate"] = gates
    if chosen.half:
        halve(model)
    elif plan.storage == "float16":
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


def scopes_of(node: onnx.NodeProto) -> list[str]:
    """The module names in the metadata of a node, from the outermost inwards, then its own name, where it has any."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            return [str(scope) for scope in ast.literal_eval(entry.value)]
    return []
