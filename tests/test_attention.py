"""Attention from 8-bit queries and keys: what is intercepted, what is simulated, what the lowered graph computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

from compress.calibrate import observe_attention
from compress.errors import PassError, RefusedError
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.quantize import Quantize
from compress.quantization.attention import attentions, intercept, rounding
from compress.quantization.fake_quantize import fake_quantized
from export.backends import available, backend
from export.qdq import LoweringError, lower
from export.quant_plan import AttentionQuant, QuantPlan, QuantPlanError
from export.target import TARGETS, built_anywhere
from export.to_onnx import export_module, strip_metadata
from tests.tiny_engine import sampled

FAMILIES = ("unet", "sd3", "dit", "pixart", "flux", "sdxl")
CONTEXT = PassContext(("a red circle", "a ring"), 0, 16, 16)


def denoiser(model: LatentDiffusion, component: Any, batch: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
    """The whole denoiser over `component`, and inputs."""
    inputs = model.family.example_inputs(model.denoiser, batch, 8, 8, 12)
    return model.family.segments(component, None)[0][0].module, inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_module_is_found_and_intercepted(family: str, tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder(family))
    names = attentions(model.denoiser)
    assert names
    module, inputs = denoiser(model, model.denoiser)
    seen: Counter[str] = Counter()
    undo = []
    for name in names:

        def change(query: torch.Tensor, key: torch.Tensor, name: str = name) -> tuple[torch.Tensor, torch.Tensor]:
            seen[name] += 1
            return query, key

        undo.append(intercept(model.denoiser.get_submodule(name), change))
    with torch.inference_mode():
        watched = module(**inputs)[0]
        assert seen == Counter(names), "once each"
        for end in undo:
            end()
        plain = module(**inputs)[0]
    assert seen == Counter(names), "nothing is seen afterwards"
    torch.testing.assert_close(watched, plain, rtol=0, atol=0)


def test_rounding_replaces_query_and_key_given_either_way() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, by_name: bool) -> torch.Tensor:
            if by_name:
                return functional.scaled_dot_product_attention(value=v, key=k, query=q)
            return functional.scaled_dot_product_attention(q, k, v, None, 0.0)

    q, k, v = (torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    rounded = [torch.clamp(torch.round(x / s), -128, 127) * s for x, s in ((q, 0.02), (k, 0.01))]
    expected = functional.scaled_dot_product_attention(*rounded, v)
    assert not torch.allclose(expected, functional.scaled_dot_product_attention(q, k, v))
    module = Attend()
    intercept(module, rounding(AttentionQuant("int8-qk", 0.02, 0.01)))
    for by_name in (False, True):
        torch.testing.assert_close(module(q, k, v, by_name), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["unet", "sd3"])
def test_the_lowered_graph_computes_what_is_simulated(
    family: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = sampled(load(tiny_folder(family)), steps=2)
    names = attentions(model.denoiser)
    quants = observe_attention(model, names, CONTEXT)
    # Coarse, so that what is tested is not lost in rounding noise.
    coarse = {name: replace(quant, query=quant.query * 8, key=quant.key * 8) for name, quant in quants.items()}
    plan = QuantPlan({}, attentions=coarse)
    module, inputs = denoiser(model, model.denoiser)
    check = denoiser(model, model.denoiser, 3)[1]
    with torch.inference_mode():
        exact = np.asarray(module(**inputs)[0])
        simulated = np.asarray(denoiser(model, fake_quantized(model.denoiser, plan))[0](**inputs)[0])
        float_here = np.asarray(
            denoiser(model, fake_quantized(model.denoiser, plan, dialect="onnxruntime"))[0](**inputs)[0]
        )
    np.testing.assert_array_equal(float_here, exact)
    effect = np.abs(simulated - exact).max()
    assert effect > 1e-3 * np.abs(exact).max()
    graph = export_module(module, inputs, {name: {0: "batch"} for name in inputs}, module.outputs, check)
    elsewhere = QuantPlan({}, attentions={"nowhere.attn1": next(iter(coarse.values()))})
    with pytest.raises(LoweringError, match=r"1 of 1 planned layers are in no graph: nowhere\.attn1"):
        lower(graph, elsewhere, "openvino")
    for dialect, count in (("openvino", len(names)), ("onnxruntime", 0)):
        lowered = onnx.ModelProto()
        lowered.CopyFrom(graph)
        result = lower(lowered, plan, dialect)
        assert result.nodes["attention"] == count == len(result.attentions)
        strip_metadata(lowered)
        path = tmp_path / f"{dialect}.onnx"
        onnx.save(lowered, path)
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        plain = next(iter(backend("onnxruntime").load(path, 1, {"optimization": "none"})(arrays).values()))
        assert np.abs(plain - (simulated if count else exact)).max() < 0.05 * effect
        if available(dialect) and count:
            runtime = backend(dialect)
            computed = next(iter(runtime.load(path, 1, {})(arrays).values()))
            assert np.abs(computed - simulated).max() < 0.3 * effect
            kernels = runtime.executed_kernels(path, arrays, {}).values()
            integer = [kernel for kernel in kernels if kernel.precision == "int8"]
            assert sum(kernel.operation in ("Subgraph", "MatMul") for kernel in integer) >= count


def test_the_pass_plans_calibrates_and_checks_attention(tiny_folder: Callable[[str], Path]) -> None:
    model = sampled(load(tiny_folder("sd3")), steps=2)
    step = Quantize("int8-w8a8", attention="int8-qk", bias_correction=False)
    edits = step.plan(model, [])
    names = attentions(model.denoiser)
    rows = {edit.module: edit for edit in edits if edit.action == "int8-qk"}
    assert set(rows) == {f"denoiser.{name}" for name in names}
    assert all(edit.bytes_before == edit.bytes_after == 0 for edit in rows.values())
    step.apply(model, edits, CONTEXT)
    step.check(model, edits)
    plan = model.quant_plans["denoiser"]
    assert set(plan.attentions) == set(names)
    assert QuantPlan.from_json(plan.to_json()) == plan
    assert not any(other.attentions for part, other in model.quant_plans.items() if part != "denoiser")
    model.quant_plans["denoiser"] = replace(plan, attentions={})
    with pytest.raises(PassError, match="differs"):
        step.check(model, edits)


def test_attention_wants_a_denoiser_that_computes_in_integers(tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder("unet"))
    with pytest.raises(RefusedError, match="need a denoiser that computes in 8 bits"):
        Quantize("int8-w8a32", attention="int8-qk").plan(model, [])


def test_attention_wants_a_target_that_gains_from_it(tiny_folder: Callable[[str], Path]) -> None:
    model, step = load(tiny_folder("unet")), Quantize("int8-w8a8", attention="int8-qk")
    with pytest.raises(RefusedError, match="gains nothing on onnxruntime-cpu"):
        step.plan(model, [TARGETS["onnxruntime-cpu"]])
    reasons = {edit.reason for edit in step.plan(model, built_anywhere()) if edit.action == "int8-qk"}
    assert reasons == {"attention is int8-qk (on openvino-cpu)"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_is_refused(bad: float, tiny_folder: Callable[[str], Path]) -> None:
    model = sampled(load(tiny_folder("sd3")), steps=2)
    names = attentions(model.denoiser)
    model.denoiser.get_submodule(f"{names[1]}.to_q").bias.data[0] = bad
    with pytest.raises(PassError, match="is not finite in the uncompressed model"):
        observe_attention(model, names, CONTEXT)


def test_attention_that_is_not_in_the_network_is_refused(tiny_folder: Callable[[str], Path]) -> None:
    plan = QuantPlan({}, attentions={"nowhere": AttentionQuant("int8-qk", 1.0, 1.0)})
    with pytest.raises(PassError, match="names 'nowhere', which is not in the network"):
        fake_quantized(load(tiny_folder("unet")).denoiser, plan)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_scales_are_refused(scale: float) -> None:
    with pytest.raises(QuantPlanError, match=r"attention 'a' has a scale"):
        QuantPlan({}, attentions={"a": AttentionQuant("int8-qk", scale, 1.0)}).validate()


def test_the_largest_number_seen_just_fits(tiny_folder: Callable[[str], Path]) -> None:
    model = sampled(load(tiny_folder("sd3")), steps=2)
    names = attentions(model.denoiser)
    largest = dict.fromkeys(names, (0.0, 0.0))
    undo = []
    for name in names:

        def watch(query: torch.Tensor, key: torch.Tensor, name: str = name) -> tuple[torch.Tensor, torch.Tensor]:
            before = largest[name]
            largest[name] = max(before[0], float(query.abs().max())), max(before[1], float(key.abs().max()))
            return query, key

        undo.append(intercept(model.denoiser.get_submodule(name), watch))
    found = observe_attention(model, names, CONTEXT)
    for end in undo:
        end()
    for name, (query, key) in largest.items():
        assert 127 * found[name].query == pytest.approx(query)
        assert 127 * found[name].key == pytest.approx(key)
    assert observe_attention(model, names, CONTEXT) == found, "nothing is left of the first time"
