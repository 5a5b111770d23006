"""Every scheme and method in ONNX graphs: what runtimes compute is what the fake-quantized network computes."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from compress.quantization.fake_quantize import fake_quantized
from compress.quantization.scheme import SCHEMES
from export.backends import backend as opened
from export.elements import element
from export.emitter import Emitter
from export.packed import PLANES, unpacked
from export.qdq import DIALECTS, lower
from export.quant_plan import QuantPlan
from export.target import TARGETS
from export.weights import FILE, write_pool
from tests.small_net import ALL, SHAPE, Plan, float_graph, planner, seeded


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return seeded()


@pytest.fixture(scope="module")
def graph(net: nn.Module) -> onnx.ModelProto:
    return float_graph(net)


@pytest.fixture(scope="module")
def plan(net: nn.Module) -> Plan:
    return planner(net)


def run(
    graph: onnx.ModelProto, plan: QuantPlan, backend: str, folder: Path, x: np.ndarray
) -> tuple[np.ndarray, int, Any]:
    """What a runtime computes, the bytes of its weights, and what was lowered."""
    lowered = copy.deepcopy(graph)
    result = lower(lowered, plan, backend, prefix="net.")
    onnx.checker.check_model(lowered)
    write_pool({"net": lowered}, folder)
    program = opened(backend).load(folder / "net.onnx", 1, {})
    weights = folder / FILE
    size = weights.stat().st_size if weights.exists() else 0
    return program({"x": x})["y"], size, result


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("scheme", [name for name, row in SCHEMES.items() if row.is_quantized])
@pytest.mark.parametrize("methods", [{}, ALL], ids=["plain", "all"])
def test_runtimes_compute_what_is_simulated(
    scheme: str,
    methods: dict[str, Any],
    backend: str,
    net: nn.Module,
    graph: onnx.ModelProto,
    plan: Plan,
    tmp_path: Path,
) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    made = plan(scheme, **methods)
    torch.manual_seed(2)
    x = torch.randn(32, *SHAPE[1:])
    with torch.no_grad():
        expected = fake_quantized(net, made, dialect=backend)(x).numpy()
        exact = net(x).numpy()
    found, _, result = run(graph, made, backend, tmp_path, x.numpy())
    native = DIALECTS[backend].computes(made.layers["first"])
    assert native == (scheme in TARGETS[f"{backend}-cpu"].fast_formats)
    assert result.nodes["weight only"] == (0 if native else 4)
    lost = float(np.linalg.norm(expected - exact))
    assert lost > 1e-3
    # A tie at half a step may round either way where activations are rounded: few samples meet one. Biases there
    # (ONNX Runtime) are integers in units of both scales' product: few bits make it coarse; it is not simulated.
    if not (native and SCHEMES[scheme].weight.bits < 8 and backend == "onnxruntime"):
        assert np.mean(np.abs(found - expected).max(1) < 2e-5) > (0.5 if native else 0.99)
    assert np.linalg.norm(found - expected) < (0.3 * lost if native else 1e-4)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("int4-w4a32-g32", 5.0),
        ("nvfp4", 4.5),
        ("mxfp4", 4.25),
        ("mxfp8", 8.25),
        ("int4-w4a8", 4.6),
        *((f"int{bits}-w{bits}a8", bits + 0.6) for bits in (3, 5, 6)),
        ("fp3-w3a8", 3.6),
    ],
)
def test_stored_weights_take_the_bits_they_should(
    scheme: str, bits: float, graph: onnx.ModelProto, plan: Plan, tmp_path: Path
) -> None:
    made = plan(scheme, weights="minmax")
    lowered = copy.deepcopy(graph)
    lower(lowered, made, "onnxruntime", prefix="net.")
    sizes = {tensor.name: len(tensor.raw_data) for tensor in lowered.graph.initializer}
    own = sum(size for name, size in sizes.items() if name.startswith("second.weight") and "table" not in name)
    assert 8 * own / 64**2 == pytest.approx(bits, rel=0.15)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", ["int2", "int3", "int5", "int6", "int7", "e1m1", "e2m2", "e3m2", "e4m2"])
def test_every_number_of_any_bits_comes_back(name: str, backend: str, tmp_path: Path) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    kind = element(name)
    numbers = np.resize(kind.round(kind.numbers), (3, 47))
    given = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [3, 47])
    made = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 47])
    graph = onnx.helper.make_graph([], "numbers", [given], [made])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    emitter = Emitter(model)
    floats = emitter.emit("Cast", [unpacked(emitter, "w", kind, numbers)], "floats", to=onnx.TensorProto.FLOAT)
    emitter.emit("Add", ["x", floats], "y")
    emitter.finish()
    stored = sum(len(t.raw_data) for t in model.graph.initializer if "table" not in t.name and t.data_type in (2, 3))
    assert stored <= -(-numbers.size * kind.bits // 8) + len(PLANES[kind.bits])
    write_pool({"net": model}, tmp_path)
    found = opened(backend).load(tmp_path / "net.onnx", 1, {})({"x": np.zeros((3, 47), np.float32)})["y"]
    np.testing.assert_array_equal(found, numbers)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_few_bits_run_on_the_kernels_of_eight(backend: str, graph: onnx.ModelProto, plan: Plan, tmp_path: Path) -> None:
    """What unpacks weights is folded when a graph is opened: nothing of it is left to run."""
    if backend == "openvino":
        pytest.importorskip("openvino")
    found = {}
    for scheme in ("int8-w8a8", "int6-w6a8", "int5-w5a8", "int4-w4a8", "int3-w3a8"):
        lowered = copy.deepcopy(graph)
        lower(lowered, plan(scheme), backend, prefix="net.")
        folder = tmp_path / scheme
        folder.mkdir()
        write_pool({"net": lowered}, folder)
        inputs = {"x": np.zeros(SHAPE, np.float32)}
        kernels = opened(backend).executed_kernels(folder / "net.onnx", inputs, {}).values()
        found[scheme] = Counter((kernel.operation, kernel.precision) for kernel in kernels)
    assert all(kernels == found["int8-w8a8"] for kernels in found.values())
