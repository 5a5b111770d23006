"""Tests of the Q/DQ lowering: integer kernels really run, and compute what fake-quantize computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.quantize import Quantize
from compress.quantization.fake_quantize import fake_quantized
from export.backends import backend
from export.qdq import DIALECTS, LoweringError, lower, require_all
from export.quant_plan import QuantPlan, WeightGrid
from export.to_onnx import export_module, strip_metadata
from tests.tiny_engine import sampled

PARTS = ("unet/denoiser", "sd3/denoiser", "unet/vae_decoder", "unet/text_encoder")
RUNTIMES = {"onnxruntime": "onnxruntime", "openvino": "openvino"}
"""Dialect -> backend."""

INTEGER = {
    "onnxruntime": {"QLinearConv", "MatMulIntegerToFloat", "QGemm"},
    "openvino": {"Convolution", "FullyConnected", "MatMul"},
}


@dataclass(frozen=True)
class Exported:
    """A part, its plan, and its float graph."""

    module: Any
    plan: QuantPlan
    graph: onnx.ModelProto
    inputs: Mapping[str, torch.Tensor]

    def lowered(self, dialect: str, folder: Path, plan: QuantPlan | None = None) -> tuple[Path, Counter[str]]:
        graph = onnx.ModelProto()
        graph.CopyFrom(self.graph)
        result = lower(graph, plan or self.plan, dialect, prefix=f"{self.module.prefix}.")
        strip_metadata(graph)
        onnx.checker.check_model(graph, full_check=True)
        path = folder / f"{dialect}.onnx"
        onnx.save(graph, path)
        return path, result.nodes

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in self.inputs.items()}

    def torch_output(self, plan: QuantPlan | None, dialect: str | None = None) -> np.ndarray:
        module = self.module
        if plan is not None:
            component = fake_quantized(module.component, plan, dialect=dialect)
            rebuilt = type(module)
            module = rebuilt(component)
        with torch.inference_mode():
            return np.asarray(module(**self.inputs)[0])


@pytest.fixture(scope="module")
def exported(tiny_folder: Callable[[str], Path]) -> Callable[[str], Exported]:
    """`family/part` -> the part quantized with the pass and exported, once."""
    models: dict[str, LatentDiffusion] = {}
    parts: dict[str, Exported] = {}

    def get(key: str) -> Exported:
        family, part = key.split("/")
        if family not in models:
            models[family] = _quantized(load(tiny_folder(family)))
        if key not in parts:
            parts[key] = _export(models[family], part)
        return parts[key]

    return get


def _quantized(model: LatentDiffusion) -> LatentDiffusion:
    sampled(model, steps=2)
    step = Quantize("int8-w8a8", bias_correction=False)
    step.apply(model, step.plan(model, []), PassContext(("a red circle", "a ring"), 0, 16, 16))
    return model


def _export(model: LatentDiffusion, part: str) -> Exported:
    module: Any = model.parts()[part]
    examples = []
    for batch in (2, 3):
        if part == "denoiser":
            examples.append(model.family.example_inputs(model.denoiser, batch, 8, 8, 12))
        else:
            examples.append(module.example_inputs(batch, 8, 8, 12))
    axes = {name: {0: "batch"} for name in examples[0]}
    graph = export_module(module, examples[0], axes, module.outputs, examples[1])
    return Exported(module, model.quant_plans[part], graph, examples[0])


def rms(x: np.ndarray) -> float:
    return float(np.sqrt((x.astype(np.float64) ** 2).mean()))


@pytest.mark.parametrize("dialect", RUNTIMES)
@pytest.mark.parametrize("key", PARTS)
def test_integer_kernels_run_and_compute_what_fake_quantize_computes(
    key: str, dialect: str, exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    part = exported(key)
    path, nodes = part.lowered(dialect, tmp_path)
    runtime = backend(RUNTIMES[dialect])
    kernels = runtime.executed_kernels(path, part.arrays(), {})
    ran = Counter(kernel.operation for kernel in kernels.values() if kernel.precision == "int8")
    integer = sum(count for kind, count in ran.items() if kind in INTEGER[dialect])
    assert integer == nodes["Conv"] + nodes["MatMul"] + nodes["Gemm"] + nodes["gate"] > 0
    if dialect == "onnxruntime":
        assert ran["QLinearConv"] == nodes["Conv"]
        assert ran["MatMulIntegerToFloat"] == nodes["MatMul"]
        assert ran["QGemm"] == nodes["Gemm"]

    exact = part.torch_output(None)
    few = replace(part.plan, layers=dict(list(part.plan.layers.items())[::16]))
    # A rounding tie that falls the other way costs a whole step, and the output grids of ONNX Runtime's convolutions
    # round twice per layer: over a deep network that adds up, over few layers it must not.
    for plan, allowed in ((few, 0.15), (part.plan, {"onnxruntime": 0.8, "openvino": 0.6}[dialect])):
        path, _ = part.lowered(dialect, tmp_path, plan)
        computed = next(iter(runtime.load(path, 1, {})(part.arrays()).values()))
        simulated = part.torch_output(plan, dialect=dialect)
        assert rms(computed - simulated) < allowed * rms(simulated - exact)
        assert rms(simulated - exact) > 1e-5 * rms(exact)


def test_standard_operators_and_small_weights(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    part = exported("unet/denoiser")
    for dialect in RUNTIMES:
        path, _ = part.lowered(dialect, tmp_path)
        graph = onnx.load(path)
        assert {entry.domain for entry in graph.opset_import} == {""}
        stored = {t.name: t for t in graph.graph.initializer}
        assert sum(t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1 for t in stored.values()) == len(
            part.plan.layers
        )
        assert graph.ByteSize() < 0.5 * part.graph.ByteSize()


def test_a_tensor_that_feeds_several_layers_is_quantized_once(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    part = exported("sd3/denoiser")
    path, nodes = part.lowered("openvino", tmp_path)
    quantized = [node.input[0] for node in onnx.load(path).graph.node if node.op_type == "QuantizeLinear"]
    assert len(set(quantized)) == len(quantized) < 0.7 * nodes["MatMul"]


def test_without_output_grids_no_convolution_runs_in_integers(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    """The assertion on executed kernels can fail: ONNX Runtime computes the other dialect's convolutions in float."""
    part = exported("unet/vae_decoder")
    path, nodes = part.lowered("openvino", tmp_path)
    kernels = backend("onnxruntime").executed_kernels(path, part.arrays(), {})
    assert nodes["Conv"] > 0
    assert not any(kernel.operation == "QLinearConv" for kernel in kernels.values())


def test_weights_stored_in_8_bits_compute_in_float(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    part = exported("unet/text_encoder")
    layers = {name: replace(layer, scheme="int8-w8a32", input=None) for name, layer in part.plan.layers.items()}
    plan = replace(part.plan, layers=layers)
    assert not any(DIALECTS["onnxruntime"].computes(layer) for layer in plan.layers.values())
    for dialect, name in RUNTIMES.items():
        path, nodes = part.lowered(dialect, tmp_path, plan)
        assert nodes == {"weight only": len(layers)}
        computed = next(iter(backend(name).load(path, 1, {})(part.arrays()).values()))
        simulated = part.torch_output(plan)
        assert rms(computed - simulated) < 1e-5 * rms(simulated)
        assert rms(simulated - part.torch_output(None)) > 1e-4 * rms(simulated)


def test_what_is_left_in_float_is_stored_as_planned(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    part = exported("sd3/denoiser")
    wide = replace(part.plan, storage="float32")
    sizes = {}
    for plan in (part.plan, wide):
        path, _ = part.lowered("onnxruntime", tmp_path, plan)
        sizes[plan.storage] = path.stat().st_size
        halves = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
        assert bool(halves) == (plan.storage == "float16")
        scales = {n.input[1] for n in onnx.load(path).graph.node if n.op_type == "DequantizeLinear"}
        assert not scales & {t.name for t in halves}
    assert sizes["float16"] < sizes["float32"]


def test_a_plan_that_does_not_fit_is_an_error(exported: Callable[[str], Exported]) -> None:
    part = exported("unet/vae_decoder")
    name, layer = next((n, q) for n, q in part.plan.layers.items() if q.op == "conv")

    def attempt(plan: QuantPlan, dialect: str = "onnxruntime", strip: bool = False, partial: bool = False) -> Any:
        graph = onnx.ModelProto()
        graph.CopyFrom(part.graph)
        if strip:
            strip_metadata(graph)
        return lower(graph, plan, dialect, prefix="vae.", partial=partial)

    more = replace(part.plan, layers={**part.plan.layers, "decoder.nowhere": layer})
    with pytest.raises(LoweringError, match=r"1 of \d+ planned layers are in no graph: decoder\.nowhere"):
        attempt(more)
    with pytest.raises(LoweringError, match="planned layers are in no graph"):
        attempt(part.plan, strip=True)
    with pytest.raises(LoweringError, match="is planned as linear but is a Conv"):
        attempt(replace(part.plan, layers={name: replace(layer, op="linear", output=None)}))
    with pytest.raises(LoweringError, match="has 2 weight scales for"):
        attempt(replace(part.plan, layers={name: replace(layer, weight=WeightGrid.per_channel((1.0, 1.0)))}))
    with pytest.raises(LoweringError, match="the dialect 'onnx' is unknown"):
        attempt(part.plan, dialect="onnx")
    found = attempt(more, partial=True)
    assert found.layers == set(part.plan.layers)
    with pytest.raises(LoweringError, match=r"decoder\.nowhere"):
        require_all(more, [found], "onnxruntime")
    require_all(part.plan, [found], "onnxruntime")
