"""A float ONNX graph looked at as tensors and the nodes that make them: parts of it are run, and written as graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.errors import ExportError
from export.tracing import in_one_line

if TYPE_CHECKING:
    import numpy as np
    import onnx


class FloatGraph:
    """Reads a graph, and changes nothing of it.

    Attributes:
        nodes: in running order.
        weights: its initializers by name.
        inputs, outputs: what its own inputs and outputs are, by name.
        makers: tensor -> the node that gives it.
    """

    def __init__(self, name: str, model: onnx.ModelProto, folder: Path) -> None:
        """Look a graph up.

        Args:
            name: in errors.
            model: the graph.
            folder: where the weights lie that it only refers to.
        """
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.inputs = {value.name: value for value in model.graph.input}
        self.outputs = {value.name: value for value in model.graph.output}
        self.makers = {key: node for node in self.nodes for key in node.output}
        self._name, self._model, self._folder = name, model, folder

    def closure(
        self, wanted: Iterable[str], given: Callable[[str], bool]
    ) -> tuple[list[onnx.NodeProto], dict[str, None]]:
        """What it takes to compute some tensors from others.

        Args:
            wanted: tensors.
            given: whether a tensor need not be computed.

        Returns:
            The nodes in running order, and the given tensors that they or the caller want.
        """
        made: set[str] = set()
        taken: dict[str, None] = {}
        waiting = [*wanted]
        while waiting:
            key = waiting.pop()
            if given(key):
                taken[key] = None
            elif key in self.makers and key not in made:
                made.update(self.makers[key].output)
                waiting += self.makers[key].input
        order = {key: at for at, key in enumerate(self.makers)}
        nodes = [node for node in self.nodes if made.intersection(node.output)]
        return nodes, dict.fromkeys(sorted(taken, key=lambda key: order.get(key, -1)))

    def reads(self, nodes: Iterable[onnx.NodeProto]) -> set[str]:
        """The tensors, weights left out, that some nodes take from elsewhere."""
        nodes = list(nodes)
        made = {key for node in nodes for key in node.output}
        return {key for node in nodes for key in node.input if key} - made - self.weights.keys()

    def weight_bytes(self, nodes: Iterable[onnx.NodeProto]) -> int:
        """Bytes of the float32 weights that some nodes read."""
        import math

        read = {key for node in nodes for key in node.input if key in self.weights}
        return sum(4 * math.prod(self.weights[key].dims) for key in read)

    def run(self, wanted: Sequence[str], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute some tensors with ONNX Runtime, each operation as it is written.

        Raises:
            ExportError: it refuses.
        """
        import onnxruntime
        from onnx import ValueInfoProto

        nodes, _ = self.closure(wanted, lambda key: False)
        reads = self.reads(nodes)
        model = self.written(
            nodes, [self.inputs[key] for key in self.inputs if key in reads], [ValueInfoProto(name=k) for k in wanted]
        )
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        try:
            session: Any = onnxruntime.InferenceSession(
                model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
            )
            computed = session.run(list(wanted), {key: arrays[key] for key in self.inputs if key in reads})
        except Exception as error:
            raise ExportError(f"a part of {self._name} does not run by itself: {in_one_line(error)}") from error
        return dict(zip(wanted, computed, strict=True))

    def written(
        self,
        nodes: Sequence[onnx.NodeProto],
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        weights: Sequence[onnx.TensorProto] = (),
    ) -> onnx.ModelProto:
        """Some nodes, perhaps with others that are not of this graph, as a graph by itself.

        Args:
            nodes: in running order.
            inputs: of the graph.
            outputs: likewise.
            weights: that are not of this graph either.
        """
        from onnx import ModelProto

        model = ModelProto(ir_version=self._model.ir_version, opset_import=self._model.opset_import)
        model.functions.extend(self._model.functions)
        model.producer_name = self._model.producer_name
        model.graph.name = self._name
        model.graph.node.extend(nodes)
        read = {key for node in nodes for key in node.input}
        model.graph.initializer.extend(tensor for key, tensor in self.weights.items() if key in read)
        model.graph.initializer.extend(weights)
        model.graph.input.extend(inputs)
        model.graph.output.extend(outputs)
        return model
