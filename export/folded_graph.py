"""Writes the parts of a divided graph: what runs before the loop, with its tables, and what is left in the loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from export.float_graph import FloatGraph

if TYPE_CHECKING:
    import onnx

Written = tuple["onnx.ModelProto", dict[str, np.ndarray]]
"""A graph, and arrays of its inputs."""


@dataclass(frozen=True)
class Pack:
    """Tensors side by side.

    Attributes:
        name: of the tensor that holds them.
        axis: along which they follow each other.
        members: their names.
    """

    name: str
    axis: int
    members: tuple[str, ...]


class Draft:
    """Writes the parts of one graph."""

    def __init__(
        self,
        graph: FloatGraph,
        seen: Sequence[Mapping[str, np.ndarray]],
        shown: Mapping[str, str],
        packs: Sequence[Pack],
    ) -> None:
        """Say how the parts hand tensors to each other.

        Args:
            graph: that is divided.
            seen: arrays, at two sizes, of the inputs and of what is handed over.
            shown: tensors that are handed over -> the names they have outside.
            packs: those of them that go to the loop side by side.
        """
        packed = {key for pack in packs for key in pack.members}
        self._graph, self._seen, self._packs = graph, seen, packs
        self._names = {key: name for key, name in shown.items() if key not in packed}
        self._keys = {name: key for key, name in self._names.items()}

    def for_prompt(self, nodes: Sequence[onnx.NodeProto], gives: Sequence[str]) -> Written:
        """What runs once per run."""
        return self._written(self._renamed(nodes), [self._value(self._names[key]) for key in gives])

    def for_calls(
        self,
        nodes: Sequence[onnx.NodeProto],
        gives: Sequence[str],
        tables: Mapping[str, np.ndarray],
        times: np.ndarray,
    ) -> Written:
        """What runs for all network calls as one batch.

        Args:
            nodes: of the graph.
            gives: what is handed over.
            tables: tensor -> (timesteps, ...), what it is at each timestep.
            times: those timesteps.
        """
        from onnx import helper, numpy_helper

        weights, looked_up = [], []
        if tables:
            weights.append(numpy_helper.from_array(times, "plan_times"))
            weights.append(numpy_helper.from_array(np.array([1], np.int64), "plan_axis"))
            looked_up += [
                helper.make_node("Unsqueeze", ["timestep", "plan_axis"], ["plan_asked"]),
                helper.make_node("Sub", ["plan_asked", "plan_times"], ["plan_apart"]),
                helper.make_node("Abs", ["plan_apart"], ["plan_distance"]),
                helper.make_node("ArgMin", ["plan_distance"], ["plan_row"], axis=1, keepdims=0),
            ]
        for key, table in tables.items():
            weights.append(numpy_helper.from_array(table, f"{key}.table"))
            looked_up.append(helper.make_node("Gather", [f"{key}.table", "plan_row"], [self._names.get(key, key)]))
        joined = [helper.make_node("Concat", pack.members, [pack.name], axis=pack.axis) for pack in self._packs]
        outputs = [self._value(pack.name) for pack in self._packs]
        outputs += [self._value(self._names[key]) for key in gives if key in self._names]
        return self._written([*looked_up, *self._renamed(nodes), *joined], outputs, weights)

    def loop(self, nodes: Sequence[onnx.NodeProto], gives: Sequence[str]) -> Written:
        """What is left of the segment."""
        from onnx import helper, numpy_helper

        weights, taken = [], []
        for pack in self._packs:
            sizes = np.array([self._seen[0][key].shape[pack.axis] for key in pack.members], np.int64)
            weights.append(numpy_helper.from_array(sizes, f"{pack.name}.sizes"))
            last = self._seen[0][pack.members[0]].ndim == pack.axis + 1
            axis = -1 if last else pack.axis
            taken.append(helper.make_node("Split", [pack.name, f"{pack.name}.sizes"], pack.members, axis=axis))
        return self._written([*taken, *self._renamed(nodes)], [self._graph.outputs[key] for key in gives], weights)

    def _written(
        self,
        nodes: Sequence[onnx.NodeProto],
        outputs: Sequence[onnx.ValueInfoProto],
        weights: Sequence[onnx.TensorProto] = (),
    ) -> Written:
        reads = self._graph.reads(nodes) - {tensor.name for tensor in weights}
        own = [key for key in self._graph.inputs if key in reads]
        others = sorted(reads.difference(own))
        inputs = [*(self._graph.inputs[key] for key in own), *map(self._value, others)]
        graph = self._graph.written(nodes, inputs, outputs, weights)
        return graph, {key: self._arrays(key)[1] for key in (*own, *others)}

    def _renamed(self, nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
        from onnx import NodeProto

        copies = []
        for node in nodes:
            copy: Any = NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [self._names.get(key, key) for key in node.input]
            copy.output[:] = [self._names.get(key, key) for key in node.output]
            copies.append(copy)
        return copies

    def _value(self, name: str) -> onnx.ValueInfoProto:
        """A tensor as an input or output: a batch, and what differs between the two sizes, are dynamic."""
        from onnx import TensorProto, helper

        first, second = (array.shape for array in self._arrays(name))
        sizes = [n if n == other else f"{name}_{d}" for d, (n, other) in enumerate(zip(first, second, strict=True))]
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *sizes[1:]])

    def _arrays(self, name: str) -> list[np.ndarray]:
        """An array of a tensor, by the name it has outside, at both sizes."""
        pack = next((pack for pack in self._packs if pack.name == name), None)
        if pack is not None:
            return [np.concatenate([one[key] for key in pack.members], axis=pack.axis) for one in self._seen]
        return [one[self._keys.get(name, name)] for one in self._seen]
