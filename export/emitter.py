"""The nodes and initializers of an ONNX graph that is being rewritten."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx


class Emitter:
    """A new node list beside the old one.

    Attributes:
        model: whose graph is rewritten, by `finish`.
        constants: initializers by name, the old ones and the new.
        nodes: the new ones, in order.

    Args:
        model: its graph is rewritten.
        folder: where the weights lie that the graph only refers to.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path | None = None) -> None:
        self.model = model
        self._folder = folder
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self._taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
        self._uses: defaultdict[str, int] = defaultdict(int)

    def array(self, name: str) -> np.ndarray:
        """The values of an initializer."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name], str(self._folder or ""))

    def emit(self, kind: str, inputs: list[str], result: str, **attributes: Any) -> str:
        """Add a node with one output, which is returned."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [result], f"{result}.node", **attributes))
        return result

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add an initializer."""
        from onnx import numpy_helper

        return self.tensor(numpy_helper.from_array(np.asarray(value, order="C"), name))

    def shape(self, name: str, *sizes: int) -> str:
        """Add an initializer that holds a shape."""
        return self.constant(self.fresh(name), np.asarray(sizes, np.int64))

    def tensor(self, tensor: onnx.TensorProto) -> str:
        """Add an initializer; one of 4 bits makes the graph one of the first opset that has them."""
        from onnx import TensorProto

        if tensor.data_type == TensorProto.FLOAT4E2M1:
            self._require(opset=23, ir=11)
        if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
            self._require(opset=21, ir=10)
        self._taken.add(tensor.name)
        self.constants[tensor.name] = tensor
        return str(tensor.name)

    def _require(self, opset: int, ir: int) -> None:
        """Raise the versions; nothing that the exporter writes means something else between 18 and 23."""
        for domain in self.model.opset_import:
            if domain.domain in ("", "ai.onnx"):
                domain.version = max(domain.version, opset)
        self.model.ir_version = max(self.model.ir_version, ir)

    def fresh(self, name: str) -> str:
        """A tensor name nobody has."""
        while name in self._taken or name in self.constants:
            self._uses[name] += 1
            name = f"{name}.{self._uses[name]}"
        self._taken.add(name)
        return name

    def finish(self) -> None:
        """Put the nodes and the initializers still read into the graph."""
        graph = self.model.graph
        read = {name for node in self.nodes for name in node.input} | {output.name for output in graph.output}
        del graph.node[:]
        graph.node.extend(self.nodes)
        del graph.initializer[:]
        graph.initializer.extend(tensor for name, tensor in self.constants.items() if name in read)
        values = [value for value in graph.value_info if value.name in read]
        del graph.value_info[:]
        graph.value_info.extend(values)
