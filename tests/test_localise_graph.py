"""The localiser on lowered graphs: a layer lowered with a wrong scale is named, in the right segment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compress.errors import PassError
from compress.measure.localise import Recorder, Shadow
from compress.measure.localise_graph import compare_graph, quantized_outputs
from compress.model.latent_diffusion import LatentDiffusion
from export.engine import Engine
from export.manifest import read_manifest
from export.quant_plan import QuantPlan
from export.target import TARGETS
from tests.tiny_engine import SIDE, build, tiny_model

FAULT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v"
SEGMENT = "down_2-up_2"
Built = Callable[[bool], tuple[LatentDiffusion, Path]]


@pytest.fixture(scope="module")
def built(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A quantized, cut model, and its engine: lowered as it is, or with the scale of one layer wrong by forty."""
    model = tiny_model(tiny_folder("unet"))
    folders: dict[bool, Path] = {}

    def make(faulty: bool) -> tuple[LatentDiffusion, Path]:
        if faulty not in folders:
            lowered = model.clone()
            if faulty:
                plan = lowered.quant_plans["denoiser"]
                row = plan.layers[FAULT]
                wrong = replace(row, weight=replace(row.weight, scale=40 * row.weight.scale))
                lowered.quant_plans["denoiser"] = QuantPlan({**plan.layers, FAULT: wrong})
            folders[faulty] = tmp_path_factory.mktemp("engine") / "built"
            build(lowered, folders[faulty])
        return model, folders[faulty]

    return make


def recorded(model: LatentDiffusion, dialect: str) -> Recorder:
    stage = model.runtime(True, dialect)
    recorder = Recorder(stage.functions, limit=2)
    stage.altered(functions=recorder.functions).sample(["a red circle"], [0], SIDE, SIDE)
    return recorder


@pytest.mark.parametrize("target", ["openvino-cpu", "onnxruntime-cpu"])
def test_a_layer_lowered_with_a_wrong_scale_is_named(built: Built, target: str) -> None:
    model, folder = built(True)
    dialect = TARGETS[target].dialect
    inputs = recorded(model, dialect).inputs
    graphs = read_manifest(folder).targets[target].graphs
    found = {}
    for name, module in model.modules(True, dialect).items():
        if name in model.step_plan.segments:  # type: ignore[union-attr]
            errors = compare_graph(module, folder / graphs[name], inputs[name], f"{name}.")
            if errors is not None:
                found[name] = errors
    bad = found[SEGMENT].largest_drop()
    assert bad.name == f"{SEGMENT}.{FAULT}"
    assert bad.local_db < 25


@pytest.mark.parametrize("target", ["openvino-cpu", "onnxruntime-cpu"])
def test_a_healthy_graph_agrees_at_every_layer(built: Built, target: str) -> None:
    model, folder = built(False)
    dialect = TARGETS[target].dialect
    inputs = recorded(model, dialect).inputs
    graphs = read_manifest(folder).targets[target].graphs
    seen = []
    for name, module in model.modules(True, dialect).items():
        errors = compare_graph(module, folder / graphs[name], inputs[name]) if name in inputs else None
        if errors is not None:
            # The rare rounding tie that falls the other way, which ONNX Runtime's rounded convolutions have twice.
            assert min(layer.local_db for layer in errors.layers) > (15 if dialect == "onnxruntime" else 30)
            seen += [layer.name for layer in errors.layers]
    assert set(seen) == set(model.quant_plans["denoiser"].layers)


def test_a_shadow_run_names_the_segment_first(built: Built) -> None:
    model, folder = built(True)
    stage = model.runtime(True, "openvino")
    shadow = Shadow(stage.functions, Engine.open(folder, "openvino-cpu", 1).runtime.functions)
    stage.altered(functions=shadow.functions).sample(["a red circle"], [0], SIDE, SIDE)
    assert shadow.outputs[0].name.partition(":")[0] == SEGMENT


def test_a_float_graph_has_no_quantized_layer(built: Built) -> None:
    import onnx

    model, folder = built(False)
    graphs = read_manifest(folder).targets["openvino-cpu"].graphs
    assert quantized_outputs(onnx.load(folder / graphs["vae_decoder"])) == {}
    module = model.modules()["vae_decoder"]
    latents = np.zeros((1, 4, SIDE // 2, SIDE // 2), np.float32)
    assert compare_graph(module, folder / graphs["vae_decoder"], [{"latent_sample": latents}]) is None
    with pytest.raises(PassError, match="no quantized layer in common"):
        compare_graph(model.modules()["text_encoder"], folder / graphs[SEGMENT], [])
