"""The pass `fuse`: exact on every family, its rows, cuts and quantization on top of it, and graphs with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from compress import compiler
from compress.errors import PassError, RefusedError
from compress.families import CONTROLLED_UNET, Layout
from compress.fusion import blocks, layers
from compress.fusion.compare import difference, in_type, relative, run, small_inputs
from compress.fusion.fused import fused
from compress.fusion.launches import launches
from compress.fusion.patterns import PATTERNS, pattern_of
from compress.model.latent_diffusion import STATE_FILE, LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.fuse import TOLERANCE, Fuse
from compress.quantization.attention import attentions
from compress.store import Store
from export.quant_plan import AttentionQuant
from export.target import built_anywhere, target
from export.to_onnx import export_module
from recipes.benchmarks.launches import MODELS, REFERENCE, table
from tests import tiny
from tests.tiny_engine import quantized

CONTEXT = PassContext([], seed=0, height=16, width=16)
CPU = built_anywhere()
GPU = target("torch-cuda")
Folder = Callable[[str], Path]


def applied(model: LatentDiffusion, *leave: str) -> LatentDiffusion:
    step = Fuse(leave)
    edits = step.plan(model, [])
    step.apply(model, edits, CONTEXT)
    step.check(model, edits)
    return model


@pytest.fixture
def model(request: pytest.FixtureRequest, tiny_folder: Folder) -> LatentDiffusion:
    """The toy model of a family, a UNet unless the test names one."""
    return load(tiny_folder(getattr(request, "param", "unet")))


FAMILIES = pytest.mark.parametrize("model", tiny.PIPELINES, indirect=True)


# Rows


@FAMILIES
def test_every_module_has_a_row_and_no_layer_moves(model: LatentDiffusion) -> None:
    edits = Fuse().plan(model, [GPU, *CPU])
    assert model.fusions == {}
    patterns = {path: pattern_of(module) for path, module in model.denoiser.named_modules()}
    wanted = {f"denoiser.{path}".rstrip(".") for path, pattern in patterns.items() if pattern is not None}
    assert {edit.module for edit in edits} == wanted
    assert all(edit.reason and edit.bytes_before == edit.bytes_after for edit in edits)
    before = [
        (path, type(layer))
        for path, layer in model.denoiser.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    applied(model)
    made = fused(model.denoiser, model.fusions)
    after = [(path, type(layer)) for path, layer in made.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert after == before
    assert all(one is other for one, other in zip(made.parameters(), model.denoiser.parameters(), strict=True))
    assert model.denoiser.state_dict().keys() == made.state_dict().keys()


@FAMILIES
def test_the_fused_denoiser_launches_less_and_is_exact(model: LatentDiffusion) -> None:
    applied(model)
    inputs = small_inputs(model.family, model.denoiser)
    made = fused(model.denoiser, model.fusions)
    plain, fewer = (launches(partial(run, model.family, net, inputs)) for net in (model.denoiser, made))
    assert fewer.total() < plain.total()
    assert any(name.startswith("latent::") for name in fewer)
    assert not any(name.startswith("latent::") for name in plain)
    assert 0.0 < difference(model.family, model.denoiser, model.fusions) <= TOLERANCE


def test_every_pattern_is_met(tiny_folder: Folder) -> None:
    networks = [load(tiny_folder(name)).denoiser for name in tiny.PIPELINES] + [dual()]
    met = {pattern for net in networks for module in net.modules() if (pattern := pattern_of(module)) is not None}
    assert met == set(PATTERNS)


def dual() -> Any:
    """An SD3.5 with a second attention in some blocks."""
    torch.manual_seed(0)
    denoiser = tiny.sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm")
    tiny.shake(denoiser)
    return denoiser


@pytest.mark.parametrize("model", ["sd3"], indirect=True)
def test_two_attentions_in_a_block(model: LatentDiffusion) -> None:
    model.denoiser = dual()
    applied(model)
    assert "transformer_blocks.0.attn2" in model.fusions


def test_unets_with_residuals_of_a_controlnet(model: LatentDiffusion) -> None:
    model.family = CONTROLLED_UNET
    assert "residual_mid" in small_inputs(model.family, model.denoiser)
    applied(model)


def test_what_does_not_fit_is_skipped_with_a_reason(model: LatentDiffusion) -> None:
    first, second = (model.denoiser.get_submodule(f"up_blocks.0.{name}.0") for name in ("resnets", "attentions"))
    first.nonlinearity = nn.ReLU()
    second.transformer_blocks[0].attn1.processor = lambda *_: None
    rows = {edit.module.removeprefix("denoiser."): edit for edit in Fuse().plan(model, [])}
    assert rows["up_blocks.0.resnets.0"].action == "skip"
    assert "its activation is ReLU, not SiLU" in rows["up_blocks.0.resnets.0"].reason
    assert "its processor is function" in rows["up_blocks.0.attentions.0.transformer_blocks.0.attn1"].reason


def test_modules_can_be_left(model: LatentDiffusion) -> None:
    applied(model, "denoiser.*.attn?", "denoiser")
    assert set(model.fusions.values()) == {"group norm and SiLU", "GEGLU"}
    assert "" not in model.fusions


# What is refused


def test_what_gains_nothing_is_refused(model: LatentDiffusion) -> None:
    with pytest.raises(RefusedError, match="fuse gains nothing on openvino-cpu, onnxruntime-cpu"):
        Fuse().plan(model, CPU)
    with pytest.raises(RefusedError, match="would change nothing"):
        Fuse(("*",)).plan(model, [])
    with pytest.raises(RefusedError, match=r"fuse.leave\[0\] matches nothing.*'denoiser"):
        Fuse(("nowhere",)).plan(model, [])
    with pytest.raises(RefusedError, match="use one fuse pass"):
        Fuse().plan(applied(model), [])


def test_a_state_that_does_not_fit_is_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    applied(model).save_plans(tmp_path)
    text = (tmp_path / STATE_FILE).read_text()
    assert model.with_plans(tmp_path).fusions == model.fusions
    for was, becomes in (("GEGLU", "geglu"), ("up_blocks.0.resnets.0", "up_blocks.7.resnets.0")):
        (tmp_path / STATE_FILE).write_text(text.replace(f'"{was}"', f'"{becomes}"'))
        with pytest.raises(RefusedError, match="which the network has not"):
            model.with_plans(tmp_path)


def test_a_broken_promise_is_noticed(model: LatentDiffusion) -> None:
    step = Fuse()
    edits = step.plan(model, [])
    step.apply(model, edits, CONTEXT)
    del model.fusions["up_blocks.0.resnets.0"]
    with pytest.raises(PassError, match=r"left \d+; 'up_blocks.0.resnets.0' differs"):
        step.check(model, edits)


def swapped(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.ops.latent.adaln(x, scale, shift, eps)


def ungated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return x + y


BREAKS: dict[str, tuple[Any, str, Any, str]] = {
    "shift and scale of a norm": (layers, "adaln", swapped, "sd3"),
    "shift and scale of a block": (blocks, "adaln", swapped, "dit"),
    "shift and scale of PixArt": (blocks, "adaln", swapped, "pixart"),
    "the gates of a joint block": (blocks, "gated_residual", ungated, "sd3"),
    "the gates of Flux": (blocks, "gated_residual", ungated, "flux"),
    "values and gates": (
        layers,
        "gelu",
        lambda x, gated: torch.ops.latent.gelu(x.roll(x.shape[-1] // 2, -1), gated),
        "unet",
    ),
    "the groups": (
        layers,
        "group_norm_silu",
        lambda x, w, b, n, e: torch.ops.latent.group_norm_silu(x, w, b, n // 2, e),
        "unet",
    ),
    "a mask": (layers, "attention", lambda q, k, v, bias, scale: torch.ops.latent.attention(q, k, v), "pixart"),
    "the scores": (
        layers,
        "attention",
        lambda q, k, v, bias, scale: torch.ops.latent.attention(q, k, v, bias, 1.0),
        "flux",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_wrong_form_is_noticed(name: str, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    place, function, wrong, family = BREAKS[name]
    monkeypatch.setattr(place, function, wrong)
    with pytest.raises(PassError, match="differs by"):
        applied(load(tiny_folder(family)))


# With the other passes


@FAMILIES
def test_fused_denoisers_are_cut_as_ever(model: LatentDiffusion) -> None:
    family, denoiser = applied(model).family, model.denoiser
    kept = tuple(family.sublayer_slots(denoiser))
    inside = Layout.of(family.sublayer_slots(denoiser), {"cached": kept})
    for layout in (family.cut_layout(denoiser, 1), inside):
        model.layout = layout
        known = small_inputs(family, denoiser)
        for plain, made in zip(model.segments(), model.segments(fused=True), strict=True):
            given = {name: known[name] for name in plain.inputs}
            with torch.no_grad():
                outputs, others = plain.module(**given), made.module(**given)
            for one, other in zip(outputs, others, strict=True):
                assert relative(other, one) <= TOLERANCE
            known.update(zip(plain.outputs, outputs, strict=True))


def test_quantization_goes_on_top(model: LatentDiffusion) -> None:
    """Layers and attention round the same numbers in the fused denoiser."""
    found = [
        name for name, module in model.denoiser.named_modules() if isinstance(module, nn.Linear) and ".ff." in name
    ]
    plan = quantized(model, "denoiser", [*found, "up_blocks.0.resnets.0.conv1"]).quant_plans["denoiser"]
    names = attentions(model.denoiser)
    plan = replace(plan, attentions={name: AttentionQuant("int8-qk", 0.02, 0.02) for name in names})
    model.quant_plans["denoiser"] = plan
    inputs = small_inputs(model.family, applied(model).denoiser)
    denoisers = [
        model.modules(simulate, fused=fused)["denoiser"]
        for simulate, fused in ((False, False), (True, False), (True, True))
    ]
    exact, wanted, got = (run(model.family, one.component, inputs) for one in denoisers)
    assert attentions(denoisers[2].component) == names
    assert relative(wanted, exact) > 1e-3
    assert relative(got, wanted) <= 0.01 * relative(wanted, exact)


def test_the_stage_is_stored_and_shares_the_networks(model: LatentDiffusion, tmp_path: Path) -> None:
    for _ in range(2):
        stage = compiler.apply(model, [Fuse()], [GPU, *CPU], CONTEXT, Store(tmp_path))["fuse"]
        assert stage.denoiser is model.denoiser
        assert stage.fusions == applied(model.clone(networks=False)).fusions
        assert stage.state_hash() != model.state_hash()


# Graphs


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch uses what it deprecates itself
@pytest.mark.parametrize("model", ["unet", "sd3", "flux"], indirect=True)
def test_exported_programs_keep_the_operators_at_any_batch(model: LatentDiffusion) -> None:
    (segment,) = applied(model).segments(fused=True)
    inputs = small_inputs(model.family, model.denoiser)
    sizes = {name: {0: Dim.DYNAMIC} for name in inputs}
    with torch.no_grad():
        program = export(segment.module, (), inputs, dynamic_shapes=sizes, strict=False)
        kept = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("latent.")]
        counted = launches(lambda: segment.module(**inputs))
        assert len(kept) == sum(count for name, count in counted.items() if name.startswith("latent::"))
        other = small_inputs(model.family, model.denoiser, batch=3)
        assert relative(program.module()(**other)[0], segment.module(**other)[0]) <= TOLERANCE


@pytest.mark.parametrize("model", ["dit"], indirect=True)
def test_onnx_graphs_are_those_of_the_plain_denoiser(model: LatentDiffusion) -> None:
    """What targets without our operators get: the same bytes, which ONNX Runtime computes as PyTorch does."""

    def graph() -> bytes:
        (segment,) = model.segments()
        example, check = (small_inputs(model.family, model.denoiser, batch) for batch in (2, 3))
        made = export_module(
            segment.module, example, model.family.dynamic_axes(), segment.outputs, check, name="denoiser"
        )
        assert {node.domain for node in made.graph.node} == {""}
        return made.SerializeToString(deterministic=True)

    before = graph()
    applied(model)
    assert graph() == before


# The reference models


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_models_in_bfloat16(name: str) -> None:
    """Fusing rounds less often, so that it is nearer to float32; 16 bits themselves are 5e-3 away or more."""
    model = applied(load(REFERENCE / name))
    inputs, half = small_inputs(model.family, model.denoiser), in_type(model.denoiser, torch.bfloat16)
    exact = run(model.family, model.denoiser, inputs)
    plain, made = (relative(run(model.family, net, inputs), exact) for net in (half, fused(half, model.fusions)))
    assert made <= plain + 1e-3


def test_the_launches_that_are_told_are_those_counted() -> None:
    assert table() in (REFERENCE.parent.parent / "kernels" / "README.md").read_text(encoding="utf-8")
