"""The product before a gate becomes two: the same numbers, the same stored weights, and integers still."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.backends import available, backend
from export.gates import split_gates

WIDTH, INNER = 16, 32
RANDOM = np.random.default_rng(0)
ARRAYS = {"x": RANDOM.uniform(-3, 3, (2, 5, WIDTH)).astype(np.float32)}


def graph(bias: bool, axis: int, also_read: bool = False) -> onnx.ModelProto:
    """Y = a * sigmoid(b) for a, b = split(x @ W + bias); `also_read` gives another reader to what is split."""
    constants = {
        "w": RANDOM.integers(-127, 128, (WIDTH, 2 * INNER)).astype(np.int8),
        "ws": RANDOM.uniform(0.001, 0.01, 2 * INNER).astype(np.float32),
        "wz": np.zeros(2 * INNER, np.int8),
        "xs": np.array(6 / 255, np.float32),
        "xz": np.array(128, np.uint8),
        "b": RANDOM.standard_normal(2 * INNER).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], "q"),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], "d"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["layer.weight.int8.dequantized"], "wd", axis=1),
        helper.make_node("MatMul", ["xd", "layer.weight.int8.dequantized"], ["p"], "product"),
        *([helper.make_node("Add", ["p", "b"], ["s"], "bias")] if bias else []),
        helper.make_node("Split", ["s" if bias else "p"], ["one", "two"], "split", axis=axis, num_outputs=2),
        helper.make_node("Sigmoid", ["two"], ["g"], "gate"),
        helper.make_node("Mul", ["one", "g"], ["y"], "gated"),
        *([helper.make_node("Relu", ["s" if bias else "p"], ["z"], "other")] if also_read else []),
    ]
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5, WIDTH])]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 5, None]) for name in ("y", "z")[: 1 + also_read]
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items() if bias or name != "b"]
    made = helper.make_graph(nodes, "graph", ends, outputs, initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def computed(model: onnx.ModelProto, path: Path, runtime: str, options: dict[str, str]) -> np.ndarray:
    onnx.save(model, path)
    return backend(runtime).load(path, 1, options)(ARRAYS)["y"]


@pytest.mark.parametrize("bias", [True, False])
def test_the_halves_compute_what_the_whole_did(bias: bool, tmp_path: Path) -> None:
    model = graph(bias, -1)
    expected = computed(model, tmp_path / "whole.onnx", "onnxruntime", {"optimization": "none"})
    stored = {tensor.name: tensor.raw_data for tensor in model.graph.initializer}
    assert split_gates(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert {tensor.name: tensor.raw_data for tensor in model.graph.initializer} == stored
    path = tmp_path / "halves.onnx"
    np.testing.assert_allclose(
        computed(model, path, "onnxruntime", {"optimization": "none"}), expected, rtol=1e-5, atol=1e-6
    )
    assert sum(node.op_type == "MatMul" for node in model.graph.node) == 2
    if available("openvino"):
        runtime = backend("openvino")
        np.testing.assert_allclose(computed(model, path, "openvino", {}), expected, rtol=1e-2, atol=1e-2)
        kernels = [kernel for kernel in runtime.executed_kernels(path, ARRAYS, {}).values()]
        assert sum(kernel.operation == "FullyConnected" and kernel.precision == "int8" for kernel in kernels) == 2
        assert not any(kernel.operation in ("Split", "VariadicSplit") for kernel in kernels)


@pytest.mark.parametrize(("axis", "also_read"), [(2, False), (-1, True)])
def test_what_is_not_known_to_be_a_gate_stays(axis: int, also_read: bool) -> None:
    model = graph(True, axis, also_read)
    before = model.SerializeToString()
    assert split_gates(model) == 0
    assert model.SerializeToString() == before
