"""Finds the products of queries and keys in a float graph, and by how much each side was scaled before."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_ON_THE_WAY = {"Add", "Mul", "Div", "Where", "Cast"}
"""What may stand between the scores and their softmax: scale, mask, type."""


class AttentionScores:
    """The products `queries x keys` of one graph, as the exporter writes scaled dot product attention."""

    def __init__(self, graph: onnx.GraphProto, constants: Mapping[str, onnx.TensorProto]) -> None:
        self._constants = constants
        self._producer = {name: node for node in graph.node for name in node.output}
        self._readers: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self._readers[name].append(node)

    def is_one(self, node: onnx.NodeProto) -> bool:
        """Whether a node is a product of two computed tensors that goes to a softmax, and nowhere else."""
        if node.op_type != "MatMul" or node.input[0] in self._constants or node.input[1] in self._constants:
            return False
        readers = self._readers[node.output[0]]
        while len(readers) == 1 and readers[0].op_type in _ON_THE_WAY:
            readers = self._readers[readers[0].output[0]]
        return len(readers) == 1 and readers[0].op_type == "Softmax"

    def factor(self, tensor: str) -> float:
        """The constant a side of the product was multiplied by last: the root of the softmax scale; 1 for none."""
        from onnx import numpy_helper

        node = self._producer.get(tensor)
        if node is None or node.op_type != "Mul":
            return 1.0
        constants = [self._constants[name] for name in node.input if name in self._constants]
        if not constants or math.prod(constants[0].dims) != 1:
            return 1.0
        return float(numpy_helper.to_array(constants[0]).item())
