"""Graphs for TensorRT: they compute what PyTorch predicts, and TensorRT for RTX builds them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import nn

from compress.quantization.fake_quantize import fake_quantized
from export.dialect import DIALECTS
from export.elements import element
from export.errors import EngineError, ExportError
from export.half_graph import halve
from export.qdq import LoweringError, lower
from export.quant_plan import Affine, Dynamic, QuantPlan, Scaled
from export.tensorrt_rewriter import DOMAIN, DYNAMIC_QUANTIZE
from export.to_onnx import strip_metadata
from export.to_tensorrt import BuildOptions, build
from tests.small_net import ALL, SHAPE, Plan, float_graph, planner, seeded

TOKENS = (2, 5, 64)
WIDTH = 64
"""Of the network, so that blocks of 64 weights fill its rows."""

NARROW = ("int8-w8a8", "int8-w8a8-tensor", "int4-w4a8", "fp8-w8a8", "nvfp4")
STORED = ("int8-w8a32", "int4-w4a32-g64", "int4-w4a32-g128", "int4-w4a32-g32", "nvfp4-w4a32")
PROFILE = {"x": ((1, *SHAPE[1:]), (2, *SHAPE[1:]), (8, *SHAPE[1:]))}


class Fp4DynamicQuantize(OpRun):
    """What TensorRT documents for the operator, in NumPy."""

    op_domain = DOMAIN

    def _run(self, x: np.ndarray, whole: np.ndarray, axis: int, block_size: int, scale_type: int) -> Any:
        assert axis == -1
        assert scale_type == onnx.TensorProto.FLOAT8E4M3FN
        blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, block_size)
        scales = element("e4m3").round(np.abs(blocks).max(-1) / np.float32(6) / whole)
        acting = np.where(scales > 0, scales * whole, np.float32(1))
        numbers = element("e2m1").round(blocks / acting[..., None]).reshape(x.shape)
        return numbers.astype(ml_dtypes.float4_e2m1fn), scales.astype(ml_dtypes.float8_e4m3fn)


Fp4DynamicQuantize.__name__ = DYNAMIC_QUANTIZE


def lowered(graph: onnx.ModelProto, plan: QuantPlan) -> tuple[onnx.ModelProto, set[str]]:
    """The graph for TensorRT, and the layers whose weights are float16 in it."""
    made = copy.deepcopy(graph)
    widened = lower(made, plan, "tensorrt", prefix="net.").widened
    strip_metadata(made)
    return made, widened


def computed(graph: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """By ONNX Runtime node by node; by ONNX's own evaluator where the graph holds 4-bit floats."""
    if any(tensor.data_type == onnx.TensorProto.FLOAT4E2M1 for tensor in graph.graph.initializer):
        return np.asarray(ReferenceEvaluator(graph, new_ops=[Fp4DynamicQuantize]).run(None, {"x": x})[0])
    onnx.checker.check_model(graph, full_check=True)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def predicted(net: nn.Module, plan: QuantPlan | None, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        network = net if plan is None else fake_quantized(net, plan, dialect="tensorrt")
        return np.asarray(network(torch.from_numpy(x)))


def given(shape: Sequence[int]) -> np.ndarray:
    """Random numbers that float16 holds, so that none of them rounds the other way."""
    return np.random.default_rng(3).standard_normal(shape).astype(np.float16).astype(np.float32)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return seeded(WIDTH)


@pytest.fixture(scope="module")
def graph(net: nn.Module) -> onnx.ModelProto:
    return float_graph(net)


@pytest.fixture(scope="module")
def plan(net: nn.Module) -> Plan:
    return planner(net)


class Tokens(nn.Module):
    """One layer on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(TOKENS[-1], 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Picture(nn.Module):
    """One convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(SHAPE[1], 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("scheme", [*NARROW, *STORED])
@pytest.mark.parametrize(("kind", "shape"), [(Tokens, TOKENS), (Picture, SHAPE)], ids=["linear", "conv"])
def test_one_layer_computes_what_pytorch_predicts(
    scheme: str, kind: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """Nothing rounds before it, so the difference is that of float16 alone."""
    torch.manual_seed(0)
    alone = kind().eval()
    x = given((8, *shape[1:])) * 1.3
    x = x.astype(np.float16).astype(np.float32)
    made = planner(alone, shape)(scheme)
    found = computed(lowered(float_graph(alone, shape), made)[0], x)
    expected = predicted(alone, made, x)
    lost = np.linalg.norm(expected - predicted(alone, None, x))
    assert lost > 1e-3 * np.linalg.norm(expected)
    assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)
    assert np.linalg.norm(found - expected) < 0.25 * lost


@pytest.mark.parametrize("scheme", [*NARROW, *STORED])
@pytest.mark.parametrize("methods", [{}, ALL], ids=["plain", "all"])
def test_a_network_computes_what_pytorch_predicts(
    scheme: str, methods: dict[str, Any], net: nn.Module, graph: onnx.ModelProto, plan: Plan
) -> None:
    """Smoothing, rotation, the low-rank branch and corrected biases are lowered too.

    float16 before a rounding makes a few numbers round the other way, which costs each of them a whole step.
    """
    made, x = plan(scheme, **methods), given((32, *SHAPE[1:]))
    found = computed(lowered(graph, made)[0], x)
    expected = predicted(net, made, x)
    lost = np.linalg.norm(expected - predicted(net, None, x))
    assert np.linalg.norm(found - expected) < (0.9 if scheme in NARROW else 0.2) * lost


def test_activations_are_symmetric_and_scales_float16(graph: onnx.ModelProto, plan: Plan) -> None:
    made = plan("int8-w8a8")
    layer = DIALECTS["tensorrt"].settled(made.layers["first"])
    before = made.layers["first"].input
    assert isinstance(before, Affine)
    assert isinstance(layer.input, Affine)
    assert layer.input.zero_point == 128
    reach = max(before.range[1] / 127, -before.range[0] / 128)
    assert abs(layer.input.scale - reach) <= 2**-11 * reach, "no wider than the numbers need"
    low, high = layer.input.range
    assert low <= before.range[0] + layer.input.scale
    assert high >= before.range[1] * (1 - 2**-10)
    assert np.float16(layer.input.scale) == np.float32(layer.input.scale)
    stored, _ = lowered(graph, made)
    for tensor in stored.graph.initializer:
        if tensor.name.endswith(".zero_point"):
            assert tensor.data_type == onnx.TensorProto.INT8
            assert not any(tensor.raw_data)


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("int8-w8a8", Affine),
        ("fp8-w8a8", Scaled),
        ("nvfp4", Dynamic),
        ("int8-w8a32", None),
        ("int4-w4a32-g64", None),
        ("nvfp4-w4a32", None),
    ],
)
def test_numbers_are_stored_in_their_own_type(
    scheme: str, kind: type | None, graph: onnx.ModelProto, plan: Plan
) -> None:
    made = plan(scheme)
    assert kind is None or isinstance(made.layers["first"].input, kind)
    found, widened = lowered(graph, made)
    types = {"int8": "INT8", "fp8": "FLOAT8E4M3FN", "int4": "INT4", "nvfp4": "FLOAT4E2M1"}
    wanted = getattr(onnx.TensorProto, types[scheme.partition("-")[0]])
    stored = [tensor for tensor in found.graph.initializer if tensor.data_type == wanted and len(tensor.dims) > 1]
    assert len(stored) == len(made.layers) - len(widened)
    assert widened == ({"conv"} if scheme.startswith(("int4", "nvfp4")) else set())
    quantizes = [node for node in found.graph.node if node.op_type in ("QuantizeLinear", DYNAMIC_QUANTIZE)]
    assert len(quantizes) == (0 if kind is None else len(made.layers) - len(widened))
    assert not any(node.op_type == "Sigmoid" and "float" in node.input[0] for node in found.graph.node)


def test_blocks_that_do_not_fill_a_row_are_told(plan: Plan, graph: onnx.ModelProto) -> None:
    _, widened = lowered(graph, plan("int4-w4a32-g128"))
    assert widened == {"conv", "first"}, "of 64 inputs"
    narrow = seeded(24)
    with pytest.raises(LoweringError, match=r"layer 'first' has 24 inputs, which blocks of 16 do not fill"):
        lower(float_graph(narrow), planner(narrow)("nvfp4"), "tensorrt", prefix="net.")


def test_sums_and_angles_stay_float32_and_borders_too() -> None:
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            node("Mul", ["t", "rate"], ["phase"]),
            node("Sin", ["phase"], ["wave"]),
            node("MatMul", ["wave", "w"], ["mixed"]),
            node("ReduceMean", ["mixed"], ["mean"], keepdims=1),
            node("Add", ["mean", "low"], ["y"]),
            node("Identity", ["y"], ["z"]),
        ],
        "g",
        [value("t", 1, [2, 4])],
        [value("y", 1, [1, 1]), value("z", 1, [1, 1])],
        [
            onnx.numpy_helper.from_array(np.asarray(array, np.float32), name)
            for name, array in {"rate": 0.3, "w": np.ones((4, 3)), "low": -3e38}.items()
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    halve(model)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    types = {one.name: one.type.tensor_type.elem_type for one in inferred.graph.value_info}
    assert {types[name] for name in ("phase", "wave", "mean")} == {onnx.TensorProto.FLOAT}
    assert types["mixed"] == onnx.TensorProto.FLOAT16
    assert [one.type.tensor_type.elem_type for one in model.graph.output] == [1, 1]
    low = next(tensor for tensor in model.graph.initializer if tensor.name == "low.half")
    assert onnx.numpy_helper.to_array(low) == np.finfo(np.float16).min
    times = np.full((2, 4), 999.0, np.float32)
    settings = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    y, z = session.run(None, {"t": times})
    np.testing.assert_array_equal(y, z)


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")


def engine(trt: Any, model: onnx.ModelProto, folder: Path, *architectures: str, **options: Any) -> bytes:
    path = folder / "net.onnx"
    onnx.save(model, path)
    return build(trt, path, [PROFILE], BuildOptions(architectures, **options)).engine


FROM = {"float16": "sm_86", "int8-w8a8": "sm_86", "int8-w8a32": "sm_86", "int4-w4a32-g64": "sm_86"}
FROM |= {"fp8-w8a8": "sm_89", "nvfp4": "sm_120", "nvfp4-w4a32": "sm_120"}
"""Format -> the oldest of three architectures that has it."""


@pytest.mark.parametrize("architecture", ["sm_86", "sm_89", "sm_120"])
@pytest.mark.parametrize("scheme", FROM)
def test_engines_are_built_for_what_has_the_format(
    scheme: str, architecture: str, trt: Any, graph: onnx.ModelProto, plan: Plan, tmp_path: Path
) -> None:
    made = QuantPlan({}) if scheme == "float16" else plan(scheme, **ALL)
    model, _ = lowered(graph, made)
    if int(architecture[3:]) < int(FROM[scheme][3:]):
        with pytest.raises(ExportError, match="Cannot compile for target"):
            engine(trt, model, tmp_path, architecture)
        return
    assert len(engine(trt, model, tmp_path, architecture)) > model.ByteSize()


def test_equal_graphs_give_equal_engines(trt: Any, graph: onnx.ModelProto, plan: Plan, tmp_path: Path) -> None:
    """Byte for byte where sizes are fixed; else but for the numbers in names that the builder gives."""
    model, _ = lowered(graph, plan("int8-w8a8"))
    both = [engine(trt, model, tmp_path, "sm_89", "sm_120") for _ in range(2)]
    nameless = [re.sub(rb"__mye\d+", b"", one) for one in both]
    assert nameless[0] == nameless[1]
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    fixed = [build(trt, path, options=BuildOptions(("sm_89", "sm_120"))).engine for _ in range(2)]
    assert fixed[0] == fixed[1]
    assert fixed[0] != build(trt, path, options=BuildOptions(("sm_89",))).engine


def test_what_the_parser_refuses_is_told_with_its_node(trt: Any, tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Unheard", ["x"], ["y"], "lonely", domain="nobody")
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, SHAPE)], [value("y", 1, SHAPE)])
    imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("nobody", 1)]
    with pytest.raises(ExportError, match=r"parser refuses net: node 'lonely' \(Unheard\)"):
        engine(trt, onnx.helper.make_model(graph, opset_imports=imports, ir_version=10), tmp_path)


def test_what_a_library_does_not_offer_is_refused(trt: Any, graph: onnx.ModelProto, tmp_path: Path) -> None:
    model, _ = lowered(graph, QuantPlan({}))
    with pytest.raises(EngineError, match=r"TensorRT for RTX .* does not build for 'sm_90'; it builds for sm_75"):
        engine(trt, model, tmp_path, "sm_90")
    path = tmp_path / "net.onnx"
    with pytest.raises(EngineError, match="give no timing cache"):
        build(trt, path, [PROFILE], timing_cache=b"kept")
    streamed = engine(trt, model, tmp_path, "sm_89", weight_streaming=True)
    assert streamed != engine(trt, model, tmp_path, "sm_89")
