"""The runtimes behind one call: equal results, clear errors, and integer kernels where the graph asks for them."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.backends import BACKENDS, BUILT_ONLY, available, backend, holds_machine_code
from export.errors import EngineError
from export.target import TARGETS, target

WIDTH = 32
WEIGHT = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
BIAS = np.random.default_rng(1).standard_normal(WIDTH).astype(np.float32)

here = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(not available(name), reason="not installed"))
        for name in BACKENDS
        if not holds_machine_code(name)
    ],
)


def save(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> Path:
    """A graph from x (n, WIDTH) to y (n, WIDTH)."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in "xy"]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def affine(folder: Path) -> Path:
    """The graph of x @ WEIGHT + BIAS in float."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"], "product"), helper.make_node("Add", ["p", "b"], ["y"])]
    return save(folder / "affine.onnx", nodes, {"w": WEIGHT, "b": BIAS})


def quantized(folder: Path) -> Path:
    """The same with u8 activations and per-channel s8 weights."""
    scale = np.abs(WEIGHT).max(axis=0) / 127
    constants = {
        "w": np.round(WEIGHT / scale).astype(np.int8),
        "ws": scale.astype(np.float32),
        "wz": np.zeros(WIDTH, np.int8),
        "xs": np.float32(6 / 255),
        "xz": np.uint8(128),
        "b": BIAS,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["p"], "product"),
        helper.make_node("Add", ["p", "b"], ["y"]),
    ]
    return save(folder / "quantized.onnx", nodes, {key: np.asarray(value) for key, value in constants.items()})


def inputs(rows: int = 3, seed: int = 2) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).uniform(-3, 3, (rows, WIDTH)).astype(np.float32)}


@here
def test_computes_and_says_what_it_takes(name: str, tmp_path: Path) -> None:
    function = backend(name).load(affine(tmp_path), 1, {})
    assert {key: (spec.dtype, spec.shape) for key, spec in function.inputs.items()} == {"x": ("float32", (None, WIDTH))}
    assert list(function.outputs) == ["y"]
    for rows in (1, 3):
        given = inputs(rows)
        got = function({**given, "unused": np.zeros(1)})["y"]
        np.testing.assert_allclose(got, given["x"] @ WEIGHT + BIAS, rtol=1e-4, atol=1e-4)


@here
def test_is_deterministic_and_takes_arrays_in_any_memory_order(name: str, tmp_path: Path) -> None:
    path, given = affine(tmp_path), inputs()
    first = backend(name).load(path, 1, {})(given)["y"]
    again = backend(name).load(path, 1, {})({"x": np.asfortranarray(given["x"])})["y"]
    np.testing.assert_array_equal(first, again)


@here
def test_outputs_belong_to_the_caller(name: str, tmp_path: Path) -> None:
    function = backend(name).load(affine(tmp_path), 1, {})
    first = function(inputs(seed=3))["y"]
    kept = first.copy()
    function(inputs(seed=4))
    np.testing.assert_array_equal(first, kept)
    first += 1


@here
def test_threads_may_share_a_function(name: str, tmp_path: Path) -> None:
    function = backend(name).load(affine(tmp_path), 1, {})
    given = [inputs(rows=1 + seed % 3, seed=seed) for seed in range(24)]
    with ThreadPoolExecutor(4) as pool:
        computed = list(pool.map(function, given))
    for arrays, got in zip(given, computed, strict=True):
        np.testing.assert_allclose(got["y"], arrays["x"] @ WEIGHT + BIAS, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not available("onnxruntime"), reason="not installed")
def test_onnxruntime_sessions_that_run_in_turn_share_their_memory(tmp_path: Path) -> None:
    script = """
import sys, numpy, onnxruntime
from pathlib import Path
from export.backends import backend
pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])
x = numpy.ones((400_000, 32), numpy.float32)
functions = [backend("onnxruntime").load(Path(sys.argv[1]), 1, {}) for _ in range(4)]
functions[0]({"x": x})
before = pages()
for function in functions[1:]:
    function({"x": x})
print((pages() - before) * 4096 / x.nbytes)
"""
    words = [sys.executable, "-c", script, str(affine(tmp_path))]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert float(done.stdout) < 1, "in tensors as large as what passes through each of the three"


@pytest.mark.skipif(not available("openvino"), reason="not installed")
def test_openvino_compiles_for_the_shapes_it_meets_and_forgets_the_oldest(tmp_path: Path) -> None:
    from export.backends import openvino

    function = openvino.load(quantized(tmp_path), 1, {})
    first = function(inputs(rows=1))["y"]
    one = function.form({"x": (1, WIDTH)})
    assert function.form({"x": (1, WIDTH)}) is one, "a shape met before is not compiled again"
    for rows in range(2, openvino.FORMS + 1):
        function(inputs(rows))
    assert function.form({"x": (1, WIDTH)}) is one, "there is room for it"
    function(inputs(openvino.FORMS + 1))
    assert function.form({"x": (1, WIDTH)}) is one, "others were used longer ago"
    for rows in range(2, openvino.FORMS + 2):
        function(inputs(rows))
    assert function.form({"x": (1, WIDTH)}) is not one, "it was used longest ago"
    np.testing.assert_array_equal(function(inputs(rows=1))["y"], first)


@here
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "'x', which was not given"),
        ({"x": np.zeros((2, WIDTH))}, "'x' is float64, but the graph takes float32"),
        ({"x": np.zeros((2, WIDTH + 1), np.float32)}, r"shape \(2, 33\), but the graph takes \(any, 32\)"),
        ({"x": np.zeros(WIDTH, np.float32)}, "has the shape"),
    ],
)
def test_inputs_are_checked(name: str, arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=message):
        backend(name).load(affine(tmp_path), 1, {})(arrays)


@here
def test_a_damaged_graph_is_one_sentence(name: str, tmp_path: Path) -> None:
    path = affine(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(EngineError, match=r"cannot load affine\.onnx") as caught:
        backend(name).load(path, 1, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there_is_refused(provider: str, tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has it")
    with pytest.raises(EngineError, match=r"has no \w+ExecutionProvider, .* pip install onnxruntime-gpu"):
        backend("onnxruntime").load(affine(tmp_path), 1, {"provider": provider})


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself would go on without it, on the CPU."""
    import onnxruntime

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(EngineError, match="could not start CUDAExecutionProvider"):
        backend("onnxruntime").load(affine(tmp_path), 1, {"provider": "cuda"})


@here
def test_options_are_checked(name: str, tmp_path: Path) -> None:
    path = affine(tmp_path)
    with pytest.raises(EngineError, match="has no option 'precision'; its options: inference_precision"):
        backend(name).load(path, 1, {"precision": "float32"})
    with pytest.raises(EngineError, match="not 'int3'"):
        backend(name).load(path, 1, {"inference_precision": "int3"})


@here
def test_bfloat16_is_a_hint(name: str, tmp_path: Path) -> None:
    given = inputs()
    got = backend(name).load(affine(tmp_path), 1, {"inference_precision": "bfloat16"})(given)["y"]
    np.testing.assert_allclose(got, given["x"] @ WEIGHT + BIAS, rtol=0.1, atol=0.5)


@here
def test_integer_kernels_run_where_the_graph_is_quantized(name: str, tmp_path: Path) -> None:
    records = backend(name).executed_kernels(quantized(tmp_path), inputs(), {})
    integer = [kernel.operation for kernel in records.values() if kernel.precision == "int8"]
    assert {"MatMulIntegerToFloat", "FullyConnected", "MatMul"} & set(integer), records
    records = backend(name).executed_kernels(affine(tmp_path), inputs(), {})
    assert records
    assert not [kernel for kernel in records.values() if kernel.precision == "int8"]


@here
def test_quantized_results_are_those_of_integer_arithmetic(name: str, tmp_path: Path) -> None:
    given = inputs()
    codes = np.clip(np.round(given["x"] / np.float32(6 / 255)) + 128, 0, 255) - 128
    scale = np.abs(WEIGHT).max(axis=0) / 127
    expected = (codes @ np.round(WEIGHT / scale)) * np.float32(6 / 255) * scale + BIAS
    got = backend(name).load(quantized(tmp_path), 1, {})(given)["y"]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


def test_unknown_backends_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        EngineError, match="'tensorflow' is unknown; known backends: onnxruntime, openvino, aotinductor"
    ):
        backend("tensorflow")
    for name, row in BACKENDS.items():
        monkeypatch.setitem(sys.modules, row.package, None)  # what Python does for a package that cannot be imported
        monkeypatch.delitem(sys.modules, row.module, raising=False)
        with pytest.raises(EngineError, match="pip install"):
            backend(name)


def test_targets() -> None:
    assert {row.backend for row in TARGETS.values()} <= {*BACKENDS, *BUILT_ONLY}
    assert "int8-w8a8" in target("openvino-cpu").fast_formats
    assert target("onnxruntime-cpu").formats["bf16"] == "storage only"
    with pytest.raises(EngineError, match=r"did you mean 'openvino-cpu'.*known targets: openvino-cpu, onnxruntime-cpu"):
        target("openvino-gpu")
