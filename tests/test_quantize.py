"""Tests of the quantize pass: what it plans, calibrates and promises, and that it agrees with Brevitas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from compress import calibrate
from compress.errors import PassError, RecipeError, RefusedError
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import Edit, PassContext
from compress.passes.quantize import LayerRule, Quantize
from compress.quantization.fake_quantize import fake_quantized
from compress.quantization.observers import HALF, Histogram
from compress.quantization.rounding import round_input
from export.quant_plan import Affine, LayerQuant, QuantPlan, WeightGrid
from tests.brevitas_layers import calibrated_grids, set_grids, weight_scales, with_brevitas_layers
from tests.tiny_engine import sampled

STEPS = 2
PROMPTS = ("a red circle", "large blue square")
CLASSES = (3, 7)
SIZE = 16


@pytest.fixture(scope="module")
def models(tiny_folder: Callable[[str], Path]) -> Callable[[str], LatentDiffusion]:
    """Family name -> a model with a step plan, loaded once; clone before changing it."""
    loaded: dict[str, LatentDiffusion] = {}

    def get(family: str) -> LatentDiffusion:
        if family not in loaded:
            loaded[family] = sampled(load(tiny_folder(family)), STEPS)
        return loaded[family]

    return get


def context(model: LatentDiffusion) -> PassContext:
    return PassContext(CLASSES if model.family.name == "dit" else PROMPTS, seed=0, height=SIZE, width=SIZE)


def quantized(model: LatentDiffusion, step: Quantize) -> tuple[LatentDiffusion, list[Edit]]:
    copy = model.clone()
    edits = step.plan(copy, [])
    step.apply(copy, edits, context(copy))
    step.check(copy, edits)
    return copy, edits


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10((reference**2).sum() / ((reference - other) ** 2).sum()))


@pytest.mark.parametrize("family", ["unet", "sd3", "dit", "pixart", "flux", "sdxl"])
def test_every_layer_is_quantized_or_skipped_with_a_reason(
    family: str, models: Callable[[str], LatentDiffusion]
) -> None:
    model = models(family)
    before = model.hash()
    copy, edits = quantized(model, Quantize("int8-w8a8", bias_correction=False))
    assert model.hash() == before
    for part, plan in copy.quant_plans.items():
        component = model.parts()[part].component
        linear = {n for n, m in component.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
        covered = set(plan.layers) | set(plan.skipped)
        assert covered == linear if not part.startswith("vae") else covered < linear
        assert all(plan.skipped.values())
        assert plan.storage == "float16"
    denoiser = copy.quant_plans["denoiser"]
    assert set(denoiser.skipped) == set(model.family.sensitive(model.denoiser))
    assert len(denoiser.layers) > len(denoiser.skipped)
    stored = {name for name, layer in denoiser.layers.items() if layer.input is None}
    floats = next(entry["computed_in_float"] for entry in copy.provenance if "computed_in_float" in entry)
    assert stored == {*model.family.modulation(model.denoiser), *floats}
    assert len(floats) < len(denoiser.layers) / 4
    assert not any(layer.input for layer in copy.quant_plans["vae_encoder"].layers.values())
    assert sum(layer.input is not None for layer in copy.quant_plans["vae_decoder"].layers.values()) > 10
    bytes_before, bytes_after = (sum(getattr(edit, key) for edit in edits) for key in ("bytes_before", "bytes_after"))
    weights = sum(p.numel() for part in model.parts().values() for p in part.component.parameters())
    vae = sum(p.numel() for p in model.vae.parameters())
    assert bytes_before == 4 * (weights - vae)  # the VAE is the component of two parts
    assert 0.25 < bytes_after / bytes_before < 0.45

    conditioning = CLASSES if family == "dit" else PROMPTS
    exact, simulated = (of.runtime(simulate=True).sample(conditioning, [5, 6], SIZE, SIZE) for of in (model, copy))
    assert 15 < sqnr(exact, simulated) < 80


def test_calibration_sees_every_network_call_and_both_halves(models: Callable[[str], LatentDiffusion]) -> None:
    model = models("unet")
    rows: Counter[str] = Counter()
    with calibrate.watching(
        model,
        {"denoiser": ["conv_in"], "vae_decoder": ["decoder.conv_in"], "text_encoder": ["final_layer_norm"]},
        lambda part, name, layer, x, y: rows.update({part: x.shape[0]}),
    ):
        calibrate.run(model.runtime(simulate=False), context(model), "test")
    assert rows["denoiser"] == 2 * len(PROMPTS) * model.step_plan.network_calls  # type: ignore[union-attr]
    assert rows["vae_decoder"] == len(PROMPTS)
    assert rows["text_encoder"] >= 2 * len(PROMPTS)


def test_layers_that_read_one_tensor_get_one_grid(models: Callable[[str], LatentDiffusion]) -> None:
    copy, _ = quantized(models("sd3"), Quantize("int8-w8a8", bias_correction=False))
    layers = copy.quant_plans["denoiser"].layers
    for names in (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")):
        assert len({layers[f"transformer_blocks.0.attn.{name}"].input for name in names}) == 1


def test_rules_choose_by_layer_and_the_last_one_wins(models: Callable[[str], LatentDiffusion]) -> None:
    rules = (
        LayerRule(match="denoiser.*.conv?", scheme="none"),
        LayerRule(match="denoiser.up_blocks.*.conv1", scheme="int8-w8a32"),
        LayerRule(match="denoiser.conv_in", scheme="int8-w8a8"),
    )
    step = Quantize("float32", parts={"denoiser": "int8-w8a8", "text_encoder": "bf16"}, layers=rules)
    copy, edits = quantized(models("unet"), step)
    assert set(copy.quant_plans) == {"denoiser", "text_encoder"}
    denoiser, text = copy.quant_plans["denoiser"], copy.quant_plans["text_encoder"]
    assert "down_blocks.0.resnets.0.conv1" in denoiser.skipped
    assert denoiser.layers["up_blocks.0.resnets.0.conv1"].input is None
    assert denoiser.layers["conv_in"].output is not None
    assert (len(text.layers), text.storage, text.inference_precision) == (0, "float16", "bfloat16")
    reasons = {edit.module: edit.reason for edit in edits}
    assert "layers[0]" in reasons["denoiser.down_blocks.0.resnets.0.conv1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int7"}, r"^scheme: 'int7' is not a scheme"),
        ({"scheme": "int8-w8a8", "parts": {"denoiser": "fp"}}, r"^parts\.denoiser: "),
        ({"scheme": "int8-w8a8", "layers": (LayerRule(match="*", scheme="bf16"),)}, r"^layers\.0\.scheme: 'bf16'"),
        ({"scheme": "int8-w8a8", "sensitive": "float16"}, r"^sensitive: "),
    ],
)
def test_a_wrong_scheme_names_its_field(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Quantize(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Quantize("float32"), "would change nothing"),
        (Quantize("int8-w8a8", parts={"unet": "float16"}), "'unet' is not a part of this model; known: denoiser"),
        (Quantize("int8-w8a8", layers=(LayerRule(match="conv_in", scheme="none"),)), r"layers\[0\] matches nothing"),
    ],
)
def test_what_cannot_be_done_is_refused_before_calibration(
    step: Quantize, message: str, models: Callable[[str], LatentDiffusion]
) -> None:
    with pytest.raises(RefusedError, match=message):
        step.plan(models("unet"), [])


def test_a_quantized_model_is_refused(models: Callable[[str], LatentDiffusion]) -> None:
    copy = models("unet").clone()
    copy.quant_plans["denoiser"] = QuantPlan({}, {}, "float16")
    with pytest.raises(RefusedError, match="already quantized"):
        Quantize("int8-w8a8").plan(copy, [])


def test_check_finds_a_missing_layer_and_foreign_weights(models: Callable[[str], LatentDiffusion]) -> None:
    step = Quantize("float32", parts={"text_encoder": "int8-w8a8"}, bias_correction=False)
    copy, edits = quantized(models("unet"), step)
    name, plan = next(iter(copy.quant_plans["text_encoder"].layers)), copy.quant_plans["text_encoder"]
    copy.quant_plans["text_encoder"] = QuantPlan({k: v for k, v in plan.layers.items() if k != name})
    with pytest.raises(PassError, match="planned 12 layers of text_encoder and left 11"):
        step.check(copy, edits)
    copy.quant_plans["text_encoder"] = plan
    with torch.no_grad():
        copy.text_encoders["text_encoder"].get_submodule(name).weight.mul_(3)  # type: ignore[operator, union-attr]
    with pytest.raises(PassError, match="do not fit the scales"):
        step.check(copy, edits)


def test_what_is_not_finite_names_the_layer(models: Callable[[str], LatentDiffusion]) -> None:
    model = models("unet").clone()
    with torch.no_grad():
        model.denoiser.mid_block.resnets[0].conv1.weight[0, 0] = float("nan")
    step = Quantize("none", parts={"denoiser": "int8-w8a32"})
    with pytest.raises(PassError, match=r"the weights of denoiser\.mid_block\.resnets\.0\.conv1 do not fit"):
        quantized(model, step)
    with pytest.raises(PassError, match=r"denoiser\.mid_block\.resnets\.0\.conv1: an activation is not finite"):
        quantized(model, Quantize("none", parts={"denoiser": "int8-w8a8"}))


def test_an_input_that_saturates_names_the_layer(
    models: Callable[[str], LatentDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An observer that clips: a tenth of the range, and then nearly all of it."""
    model, whole = models("unet"), Histogram.grid

    def clipped(share: float) -> None:
        def grid(self: Histogram, observer: str, bits: int = 8) -> Affine:
            found = whole(self, "minmax", bits)
            return Affine(found.scale * share, found.zero_point, bits)

        monkeypatch.setattr(Histogram, "grid", grid)

    clipped(0.9)
    quantized(model, Quantize("none", parts={"denoiser": "int8-w8a8"}))
    clipped(0.01)
    with pytest.raises(PassError, match=r"the input of denoiser\.\S+ saturates: its grid from \S+ to \S+ loses \d+ %"):
        quantized(model, Quantize("none", parts={"denoiser": "int8-w8a8"}))


def test_a_layer_that_never_runs_is_an_error(models: Callable[[str], LatentDiffusion]) -> None:
    model = models("unet").clone()
    model.denoiser.add_module("idle", torch.nn.Linear(2, 2))
    with pytest.raises(PassError, match=r"1 layers never ran in calibration, e\.g\. denoiser\.idle"):
        calibrate.observe(model, {"denoiser": ["idle", "conv_in"]}, context(model))


def test_bias_correction_removes_the_mean_error(models: Callable[[str], LatentDiffusion]) -> None:
    model, name = models("sd3"), "transformer_blocks.1.ff.net.2"
    errors = {}
    for corrected in (False, True):
        step = Quantize("float32", parts={"denoiser": "int8-w8a8"}, observer="minmax", bias_correction=corrected)
        copy, _ = quantized(model, step)
        # The layer alone, on the float inputs it was corrected for.
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        watching = calibrate.watching(model, {"denoiser": [name]}, lambda *call, seen=seen: seen.append(call[-2:]))
        with watching:
            calibrate.run(model.runtime(simulate=False), context(model), "test")
        layer = torch.nn.Sequential(copy.denoiser.get_submodule(name))
        simulated = fake_quantized(layer, QuantPlan({"0": copy.quant_plans["denoiser"].layers[name]}))
        with torch.no_grad():
            errors[corrected] = torch.cat([(y - simulated(x)).flatten(0, 1) for x, y in seen]).mean(0).abs().mean()
    assert errors[True] < 0.05 * errors[False]


@pytest.mark.filterwarnings("ignore:Computing zero point of output accumulator")
@pytest.mark.parametrize("op", ["linear", "conv"])
def test_fake_quantize_equals_brevitas(op: str) -> None:
    torch.manual_seed(0)
    layer: torch.nn.Module = torch.nn.Linear(24, 16) if op == "linear" else torch.nn.Conv2d(8, 16, 3, padding=1)
    x = torch.randn(3, 5, 24) if op == "linear" else torch.randn(3, 8, 6, 6)
    module = torch.nn.Sequential(layer)
    theirs = with_brevitas_layers(module, ["0"])
    scales = weight_scales(theirs[0])  # type: ignore[index]
    output = Affine.of_range(-2.0, 3.0) if op == "conv" else None
    quant = LayerQuant(op, "int8-w8a8", WeightGrid.per_channel(scales), Affine.of_range(-1.7, 2.1), output)  # type: ignore[arg-type]
    set_grids(theirs[0], quant)  # type: ignore[index]
    ours = fake_quantized(module, QuantPlan({"0": quant}))
    with torch.no_grad():
        assert torch.equal(theirs[0].quant_weight().value, ours[0].weight)  # type: ignore[index]
        difference = (theirs(x) - ours(x)).abs().max()
    assert calibrated_grids(theirs[0]) == (quant.input, output)  # type: ignore[index]
    # The same arithmetic; a tie at half a step may round either way after a last-bit difference of the scale.
    assert difference <= (output.scale if output else 1e-5) * 1.001
    assert (module(x) - ours(x)).abs().max() > 1e-3


def test_fake_quantize_shares_what_it_does_not_change(models: Callable[[str], LatentDiffusion]) -> None:
    denoiser = models("unet").denoiser
    quant = LayerQuant("conv", "int8-w8a32", WeightGrid.per_channel((1.0,) * 16), None)
    copy = fake_quantized(denoiser, QuantPlan({"conv_in": quant}))
    mine, theirs = dict(copy.named_parameters()), dict(denoiser.named_parameters())
    assert [name for name in mine if mine[name] is not theirs[name]] == ["conv_in.weight"]
    with pytest.raises(PassError, match="'nowhere', which is not in the network"):
        fake_quantized(denoiser, QuantPlan({"nowhere": quant}))
    with pytest.raises(PassError, match="as conv, but it is a Linear"):
        fake_quantized(denoiser, QuantPlan({"time_embedding.linear_1": quant}))


def test_a_histogram_streams_and_widens_exactly() -> None:
    torch.manual_seed(0)
    calls = [torch.randn(1000) * scale for scale in (0.1, 5.0, 0.3, 40.0)]
    streamed, whole = Histogram(), Histogram()
    for call in calls:
        streamed.update(call)
    whole.update(torch.cat(calls))
    assert (streamed.low, streamed.high, streamed.limit) == (whole.low, whole.high, whole.limit)
    assert streamed.counts.sum() == whole.counts.sum() == 4000
    # Bins only ever merge in pairs, so a number can end up one bin off, no more.
    assert (streamed.counts.cumsum(0) - whole.counts.cumsum(0)).abs().max() <= 40
    assert len(streamed.counts) == 2 * HALF
    with pytest.raises(PassError, match="not finite"):
        streamed.update(torch.tensor([float("nan")]))


def test_observers_clip_outliers_in_the_order_of_their_kind() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(200_000), torch.tensor([60.0, -0.001])])
    seen = Histogram()
    seen.update(x)
    grids = {observer: seen.grid(observer) for observer in ("minmax", "percentile", "mse")}
    assert abs(grids["minmax"].range[1] - 60.0) < grids["minmax"].scale
    assert grids["percentile"].range[1] < 6.0
    errors = {name: float(((round_input(x, grid) - x) ** 2).mean()) for name, grid in grids.items()}
    assert errors["mse"] < 0.9 * errors["minmax"]
    assert errors["mse"] < 0.9 * errors["percentile"]
