"""Turns a float32 ONNX graph into a strongly typed float16 one; its inputs and outputs stay float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from export.dialect import LoweringError
from export.emitter import Emitter

if TYPE_CHECKING:
    import onnx

WIDE = frozenset({"InstanceNormalization", "Pow", "ReduceMean", "ReduceSum", "Sqrt", "Reciprocal", "Exp", "Sin", "Cos"})
"""Operators computed in float32: squares and sums leave the range of float16, angles lose their fraction in it."""

_ANGLES = frozenset({"Sin", "Cos"})


def halve(model: onnx.ModelProto) -> None:
    """Retype a graph in place: every node computes in float16, but for three kinds that compute in float32.

    These are the operators in `WIDE`, all that leads to a sine or cosine (the phases of a timestep), and what is
    computed from constants alone. A Cast stands wherever the type changes. Values beyond the range of float16 become
    its largest. What reads numbers of few bits keeps the type of its scales.

    Raises:
        LoweringError: an operator holds a graph of its own.
    """
    _Halver(model).run()


class _Halver(Emitter):
    """The types of all tensors so far, and the graph as it is written anew."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import TensorProto

        super().__init__(model)
        self.float, self.half = TensorProto.FLOAT, TensorProto.FLOAT16
        self.types: dict[str, int] = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
        self.types |= {name: tensor.data_type for name, tensor in self.constants.items()}
        self.fixed = set(self.constants)
        self.versions = {entry.domain: entry.version for entry in model.opset_import}
        self._made: dict[tuple[str, int], str] = {}

    def run(self) -> None:
        graph = self.model.graph
        angles = _leading_to(graph.node, _ANGLES)
        for node in list(graph.node):
            self._retype(node, angles)
        self._restore_outputs()
        self.finish()
        del graph.value_info[:]

    def _retype(self, node: onnx.NodeProto, angles: set[str]) -> None:
        import onnx

        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise LoweringError(f"the node {node.name!r} holds a graph of its own ({node.op_type})")
        out = onnx.NodeProto()
        out.CopyFrom(node)
        constant = all(name in self.fixed for name in node.input if name)
        wide = constant or node.op_type in WIDE or not angles.isdisjoint(node.output)
        kinds = self._kinds(node)
        for at, name in enumerate(node.input):
            wanted = self._wanted(node, kinds[at], wide)
            if name and wanted is not None and self.types.get(name) in (self.float, self.half):
                out.input[at] = self._as(name, wanted)
        self.nodes.append(out)
        self._type_outputs(out, kinds)
        if constant:
            self.fixed.update(node.output)

    def _wanted(self, node: onnx.NodeProto, kind: str, wide: bool) -> int | None:
        """The float type that an input of some kind must have; None leaves it as it is."""
        if node.op_type == "DequantizeLinear":
            return None
        if node.op_type == "QuantizeLinear":
            return self.types[node.input[1]] if kind == "T1" else None
        if node.domain:
            return self.half if kind == "x" else None
        if kind == "tensor(float)":
            return self.float
        return None if kind.startswith("tensor(") else self.float if wide else self.half

    def _kinds(self, node: onnx.NodeProto) -> list[str]:
        """The type variable, or the type, of each input."""
        import onnx

        if node.domain:
            return ["x", *("" for _ in node.input[1:])]
        schema = onnx.defs.get_schema(node.op_type, self.versions[""])
        return [_kind(schema, schema.inputs, at) for at in range(len(node.input))]

    def _type_outputs(self, node: onnx.NodeProto, kinds: Sequence[str]) -> None:
        import onnx

        if node.domain:
            numbers, scales = node.output
            self.types |= {numbers: onnx.TensorProto.FLOAT4E2M1, scales: onnx.TensorProto.FLOAT8E4M3FN}
            return
        schema = onnx.defs.get_schema(node.op_type, self.versions[""])
        for at, name in enumerate(node.output):
            self.types[name] = self._type(node, _kind(schema, schema.outputs, at), kinds)

    def _type(self, node: onnx.NodeProto, kind: str, kinds: Sequence[str]) -> int:
        import onnx

        given: dict[str, Any] = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Cast":
            return int(given["to"])
        if node.op_type == "DequantizeLinear":
            return self.types[node.input[1]]
        if kind in kinds:
            return self.types[node.input[kinds.index(kind)]]
        if node.op_type in ("Constant", "ConstantOfShape") and "value" in given:
            return int(given["value"].data_type)
        if kind.startswith("tensor("):
            return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(_DTYPES.get(kind[7:-1], kind[7:-1]))))
        return self.float

    def _as(self, name: str, wanted: int) -> str:
        """A tensor in another float type, cast once."""
        if self.types[name] == wanted:
            return name
        if (name, wanted) not in self._made:
            result = self.fresh(f"{name}.{'half' if wanted == self.half else 'float'}")
            if name in self.constants:
                values = self.array(name)
                limits = np.finfo(np.float16)
                if wanted == self.half:
                    values = np.where(np.isfinite(values), np.clip(values, limits.min, limits.max), values)
                self.constant(result, values.astype(np.float16 if wanted == self.half else np.float32))
                self.fixed.add(result)
            else:
                self.emit("Cast", [name], result, to=wanted)
            self.types[result] = wanted
            self._made[name, wanted] = result
        return self._made[name, wanted]

    def _restore_outputs(self) -> None:
        """The outputs keep their names and are float32."""
        from onnx import helper

        for output in self.model.graph.output:
            if self.types.get(output.name) != self.half:
                continue
            inner = self.fresh(f"{output.name}.half")
            for node in self.nodes:
                for names in (node.input, node.output):
                    for at, name in enumerate(names):
                        if name == output.name:
                            names[at] = inner
            self.nodes.append(helper.make_node("Cast", [inner], [output.name], f"{inner}.widen", to=self.float))


_DTYPES = {"float": "float32", "double": "float64"}


def _kind(schema: Any, formal: Sequence[Any], at: int) -> str:
    """The type variable of an operand, or its type where it can have but one; the last operand may repeat."""
    kind = str(formal[min(at, len(formal) - 1)].type_str)
    allowed = [text for one in schema.type_constraints if one.type_param_str == kind for text in one.allowed_type_strs]
    return str(allowed[0]) if len(allowed) == 1 else kind


def _leading_to(nodes: Sequence[onnx.NodeProto], kinds: frozenset[str]) -> set[str]:
    """The tensors that nodes of some kinds are computed from."""
    found: set[str] = set()
    for node in reversed(nodes):
        if node.op_type in kinds or not found.isdisjoint(node.output):
            found.update(node.input)
    return found
