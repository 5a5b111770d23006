"""Layers that are computed in float: the one whose input is hard to round is found, and calls count by their errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from compress import calibrate
from compress.errors import RecipeError
from compress.float_layers import call_weights
from compress.measure.metrics import latent_peak, psnr_per_sample
from compress.mixed_precision import Budget
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.quantize import LayerRule, Quantize
from compress.quantization.observers import Histogram
from compress.quantization.scheme import SCHEMES, computed_in_float
from compress.recipe.schema import Recipe
from tests.tiny_engine import SIDE, sampled

PROMPTS = ("a red circle", "large blue square", "a small green triangle", "yellow star")
CONTEXT = PassContext(PROMPTS, seed=0, height=SIDE, width=SIDE)
HARD = "up_blocks.1.resnets.0.conv_shortcut"


def quantized(model: LatentDiffusion, **options: object) -> LatentDiffusion:
    step, made = Quantize("none", parts={"denoiser": "int8-w8a8"}, **options), model.clone()  # type: ignore[arg-type]
    edits = step.plan(made, [])
    step.apply(made, edits, CONTEXT)
    step.check(made, edits)
    return made


def psnr(model: LatentDiffusion, made: LatentDiffusion) -> float:
    exact, found = (one.runtime().sample(list(PROMPTS), [9, 8, 7, 6], SIDE, SIDE) for one in (model, made))
    return float(psnr_per_sample(exact, found, latent_peak(exact)).mean())


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> LatentDiffusion:
    """A UNet in which one cheap layer reads an input with an outlier that its weights take no notice of."""
    found = sampled(load(tiny_folder("unet")), 4)
    hard = found.denoiser.get_submodule(HARD)
    with torch.no_grad():
        hard.weight[:, 0] /= 300.0
        hard.register_forward_pre_hook(
            lambda _, args: (args[0] * torch.tensor([300.0] + [1.0] * (args[0].shape[1] - 1))[:, None, None],)
        )
    return found


def test_the_layer_that_is_hard_to_round_stays_in_float(model: LatentDiffusion) -> None:
    free, none = quantized(model, float_share=0.05), quantized(model, float_share=0.0)
    (said,) = (entry["computed_in_float"] for entry in free.provenance if "computed_in_float" in entry)
    plan = free.quant_plans["denoiser"].layers
    assert HARD in said
    assert plan[HARD].scheme == "int8-w8a32"
    assert plan[HARD].input is None
    assert {name for name in none.quant_plans["denoiser"].layers if plan[name].scheme != "int8-w8a8"} == {
        *said,
        *model.family.modulation(model.denoiser),
    }
    assert none.quant_plans["denoiser"].layers[HARD].input is not None
    assert psnr(model, free) > psnr(model, none) + 3.0


def test_a_rule_is_kept_and_the_share_too(model: LatentDiffusion) -> None:
    ruled = quantized(model, float_share=0.05, layers=(LayerRule(match=f"denoiser.{HARD}", scheme="int8-w8a8"),))
    assert ruled.quant_plans["denoiser"].layers[HARD].input is not None
    tiny = quantized(model, float_share=1e-6)
    (said,) = (entry["computed_in_float"] for entry in tiny.provenance if "computed_in_float" in entry)
    assert said == []
    assert all(
        layer.input is not None or name in model.family.modulation(model.denoiser)
        for name, layer in tiny.quant_plans["denoiser"].layers.items()
    )


def test_bits_and_floats_are_chosen_together(model: LatentDiffusion) -> None:
    made = quantized(model, float_share=0.05, budget=Budget(size_ratio=0.2))
    layer = made.quant_plans["denoiser"].layers[HARD]
    assert layer.input is None
    assert layer.scheme.endswith("a32")
    assert {one.scheme for one in made.quant_plans["denoiser"].layers.values()} - {"int8-w8a8", "int8-w8a32"}


def test_scheme_in_float_keeps_the_weights_where_it_can() -> None:
    assert computed_in_float(SCHEMES["int8-w8a8"]).name == "int8-w8a32"
    assert computed_in_float(SCHEMES["int4-w4a8"]).name == "int4-w4a32"
    assert computed_in_float(SCHEMES["nvfp4-w4a8"]).name == "nvfp4-w4a32"
    assert computed_in_float(SCHEMES["fp8-w8a8"]).name == "int8-w8a32"
    assert all(not computed_in_float(row).is_calibrated for row in SCHEMES.values() if row.is_static)


@pytest.mark.parametrize("batch", [1, 4])
def test_weights_belong_to_their_calls(batch: int, tiny_folder: Callable[[str], Path]) -> None:
    """A call that alone counts gives the range and the rows, in every batch."""
    model = sampled(load(tiny_folder("unet")), 4)
    name, inputs = "conv_in", list[torch.Tensor]()
    context = replace(CONTEXT, batch=batch)
    with calibrate.watching(model, {"denoiser": [name]}, lambda *told: inputs.append(told[3].clone())):
        calibrate.run(model.runtime(simulate=False), context, "watch")
    for call in range(4):
        weights = [4.0 if at == call else 0.0 for at in range(4)]
        seen = calibrate.observe(model, {"denoiser": [name]}, context, rows=64, weights={name: weights})
        counted = seen["denoiser", name]
        own = torch.cat(inputs[call::4])
        assert counted.input.counts.sum() == 4.0 * own.numel()
        rows = counted.calls_of_rows(4, -(-len(PROMPTS) // batch))
        assert float(counted.row_weights[rows == call].sum()) == pytest.approx(len(rows))
        assert float(counted.row_weights[rows != call].sum()) == 0.0
        assert (rows == call).sum() > len(rows) / 4


def test_calls_count_by_their_errors() -> None:
    weights = call_weights({"a": torch.tensor([[1.0, 1.0], [3.0, 3.0]]), "idle": torch.zeros(2, 2)})
    assert weights["a"] == pytest.approx([2 / (1 + 3**0.5), 2 * 3**0.5 / (1 + 3**0.5)])
    assert weights["idle"] == [1.0, 1.0]
    wide, narrow = torch.linspace(-1, 1, 5001), torch.linspace(-0.1, 0.1, 5001)
    grids = []
    for weight in (1.0, 1e6):
        seen = Histogram()
        seen.update(wide)
        seen.update(narrow, weight)
        grids.append(seen.grid("mse"))
    assert grids[1].scale < 0.6 * grids[0].scale
    assert np.isclose(grids[0].scale, 2 / 255, rtol=0.1)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_a_share(share: float, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "schema_version: 1\nmodel: m\nsampler: {steps: 4}\npasses:\n"
        f"  - quantize: {{scheme: int8-w8a8, float_share: {share}}}\n"
        "targets: [onnxruntime-cpu]\nshapes: {batch: 1, height: 64, width: 64}\nout: build/x\n"
    )
    with pytest.raises(RecipeError, match="float_share"):
        Recipe.load(file, ())
