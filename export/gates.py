"""Splits the product before a gate (GEGLU: `a * gelu(b)`) into one product per half, so that no half is copied out."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

HALF = ".half"
"""Precedes the number of a half in the name of its dequantized weight."""


def split_gates(model: onnx.ModelProto) -> int:
    """Rewrite `x @ W + b -> Split` to two products, in place; the weights stay as they are stored.

    W is a per-column dequantized int8 initializer; what is stored is split by nodes a runtime computes once on load.
    Only a `Split` along axis -1 is known to be along the columns.

    Returns:
        How many were rewritten.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    readers: defaultdict[str, int] = defaultdict(int)
    for node in graph.node:
        for name in node.input:
            readers[name] += 1
    replaced: dict[str, list[onnx.NodeProto]] = {}
    gone: set[str] = set()
    for node in graph.node:
        found = _gate(node, producer, readers, constants)
        if found is not None:
            product, bias, weight = found
            replaced[node.output[0]] = _halves(node, product, bias, weight)
            gone.update(part.output[0] for part in (product, bias) if part is not None)
    nodes = []
    for node in graph.node:
        if node.output[0] in replaced:
            nodes += replaced[node.output[0]]
        elif node.output[0] not in gone:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return len(replaced)


Gate = tuple["onnx.NodeProto", "onnx.NodeProto | None", "onnx.NodeProto"]
"""The product, the addition of its bias, and what dequantizes its weight."""


def _gate(
    node: onnx.NodeProto, producer: dict[str, onnx.NodeProto], readers: dict[str, int], constants: set[str]
) -> Gate | None:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    if node.op_type != "Split" or len(node.output) != 2 or axis != -1 or readers[node.input[0]] != 1:
        return None
    if len(node.input) > 1 and node.input[1]:
        return None
    before, bias = producer.get(node.input[0]), None
    if before is not None and before.op_type == "Add":
        bias = before
        computed = [name for name in bias.input if name not in constants]
        before = producer.get(computed[0]) if len(computed) == 1 and readers[computed[0]] == 1 else None
    if before is None or before.op_type != "MatMul":
        return None
    weight = producer.get(before.input[1])
    if weight is None or weight.op_type != "DequantizeLinear" or not constants.issuperset(weight.input):
        return None
    return before, bias, weight


def _halves(
    split: onnx.NodeProto, product: onnx.NodeProto, bias: onnx.NodeProto | None, weight: onnx.NodeProto
) -> list[onnx.NodeProto]:
    from onnx import helper

    nodes: list[onnx.NodeProto] = []

    def halved(name: str, axis: int) -> list[str]:
        parts = [f"{split.output[0]}.{name}{HALF}{i}" for i in range(2)]
        nodes.append(helper.make_node("Split", [name], parts, f"{parts[0]}.node", axis=axis, num_outputs=2))
        return parts

    stored, scale, zero_point = halved(weight.input[0], 1), halved(weight.input[1], 0), halved(weight.input[2], 0)
    added = []
    if bias is not None:
        added = halved(next(name for name in bias.input if name != product.output[0]), 0)
    for i, output in enumerate(split.output):
        widened = f"{weight.output[0]}{HALF}{i}"
        multiplied = f"{output}.product" if added else output
        nodes += [
            helper.make_node(
                "DequantizeLinear", [stored[i], scale[i], zero_point[i]], [widened], f"{widened}.node", axis=1
            ),
            helper.make_node("MatMul", [product.input[0], widened], [multiplied], f"{product.name}{HALF}{i}"),
        ]
        if added:
            nodes.append(helper.make_node("Add", [multiplied, added[i]], [output], f"{output}.node"))
    return nodes
