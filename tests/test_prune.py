"""The pass `prune`: costs, budgets, importance, what is refused, and the other passes after it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compress import compiler
from compress.denoising import Noising
from compress.errors import PassError, RecipeError, RefusedError
from compress.families.costs import _UNCOUNTED
from compress.importance import losses, taylor, without
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.fuse import Fuse
from compress.passes.prune import KeepRule, Prune
from compress.pruning.axes import axes_of
from compress.pruning.axis import KINDS
from compress.pruning.costs import costs_of
from compress.pruning.knapsack import Item, least_loss
from compress.pruning.structure import STRUCTURE_FILE
from compress.pruning.units import chunks, cuts_of
from compress.recipe.schema import Recipe
from compress.store import Store
from export.engine import Engine
from export.manifest import read_manifest
from export.target import built_anywhere, target
from export.to_onnx import export_module
from tests import tiny, tiny_engine

CPU = built_anywhere()
PROMPTS = ["a large red circle", "small blue square"]
Folder = Callable[[str], Path]


def context(model: LatentDiffusion, **options: Any) -> PassContext:
    prompts = PROMPTS if model.text_encoders else ["1", "7"]
    return PassContext(prompts, seed=0, height=2 * tiny.SIDE, width=2 * tiny.SIDE, targets=CPU, **options)


def sampled(folder: Path) -> LatentDiffusion:
    """With a plan of three steps."""
    return tiny_engine.sampled(load(folder), steps=3)


def applied(model: LatentDiffusion, step: Prune) -> LatentDiffusion:
    edits = step.plan(model, CPU)
    step.apply(model, edits, context(model))
    step.check(model, edits)
    return model


def numbers(network: Any) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# Costs


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_costs_are_those_counted_and_add_up(family: str, tiny_folder: Folder) -> None:
    """Of the whole as PyTorch counts them; of units as what is really saved without them."""
    model = load(tiny_folder(family))
    inputs = model.family.example_inputs(model.denoiser, batch=1, height=8, width=8, prompt_tokens=5)
    part = model.parts()["denoiser"]

    def price(network: Any) -> Any:
        whole = model.family.segments(network, None).segments[0].module
        return costs_of(network, lambda: whole(**inputs))

    costs = price(model.denoiser)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        part(**inputs)
    # The positions of Flux are a product of matrices that holds no weights.
    assert costs.macs == pytest.approx(counter.get_total_flops() // 2, rel=0.02 if family == "sdxl" else 1e-3)
    assert costs.parameters == numbers(model.denoiser)
    for kind in KINDS:
        for axis in [axis for axis in axes_of(model.denoiser, (kind,)) if axis.removable][:2]:
            one = chunks(axis, torch.rand(axis.size), 1)[0]
            after = price(without(model.denoiser, one))
            units = list(one.units)
            assert costs.parameters - after.parameters == costs.parameters_of(axis)[units].sum()
            assert costs.macs - after.macs == costs.macs_of(axis)[units].sum()


def test_units_add_up_across_axes(tiny_folder: Folder) -> None:
    model = load(tiny_folder("flux"))
    costs = Prune(size_ratio=0.5)._costs(model)
    saved = 0.0
    removed = []
    for axis in axes_of(model.denoiser, ("heads", "ffn")):
        found = chunks(axis, torch.rand(axis.size), 1)[:2]
        removed += found
        saved += sum(float(costs.macs_of(axis)[list(one.units)].sum()) for one in found)
    for cut in cuts_of(removed):
        cut.make(model.denoiser)
    assert costs.macs - Prune(size_ratio=0.5)._costs(model).macs == saved > 0.0


# The knapsack


@pytest.mark.parametrize("seed", range(20))
def test_the_knapsack_finds_the_least_loss(seed: int) -> None:
    """Against all ways there are."""
    draw = random.Random(seed)

    def leaf(name: str) -> Item[str]:
        return Item(name, draw.random(), draw.random())

    items = [leaf(f"{i}") for i in range(draw.randint(1, 5))]
    for group in range(draw.randint(0, 2)):
        inside = tuple(leaf(f"{group}.{i}") for i in range(draw.randint(1, 3)))
        whole = sum(item.saving for item in inside) + draw.random()
        items.append(Item(f"block {group}", whole, 1.5 * draw.random(), inside))
    wanted = draw.random() * sum(item.saving for item in items)

    def ways(item: Item[str]) -> list[tuple[Item[str], ...]]:
        inner = [tuple(itertools.chain(*way)) for way in itertools.product(*map(ways, item.inside))]
        return [*inner, (item,)]

    every = [tuple(itertools.chain(*way)) for way in itertools.product(*map(ways, items))]
    best = min(sum(one.loss for one in way) for way in every if sum(one.saving for one in way) >= wanted)
    found = least_loss(items, wanted)
    assert found is not None
    assert sum(item.saving for item in found) >= wanted * (1 - 1e-9)
    assert sum(item.loss for item in found) == pytest.approx(best, rel=0.02)


def test_a_knapsack_that_is_too_large_is_noticed() -> None:
    items = [Item("a", 1.0, 1.0), Item("b", 2.0, 1.0)]
    assert least_loss(items, 3.1) is None
    assert least_loss(items, 0.0) == []
    everything = least_loss(items, 3.0)
    assert everything is not None
    assert {item.what for item in everything} == {"a", "b"}


# Importance


@pytest.mark.parametrize(
    ("config", "prediction"),
    [
        ({"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}, "epsilon"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "v_prediction"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "sample"}, "sample"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow"),
    ],
)
def test_noised_latents_and_targets_fit(config: dict[str, Any], prediction: str) -> None:
    """From both, the latent comes back, as the scheduler's own mathematics says."""
    noising = Noising.of(config)
    assert noising.prediction == prediction
    latent, noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for timestep in noising.timesteps(4):
        noised, target = noising.at(timestep, latent, noise)
        if prediction == "flow":
            back = noised - timestep / noising.steps * target
        else:
            alpha = float(noising.alphas[int(timestep)].sqrt())
            sigma = (1 - alpha**2) ** 0.5
            back = {
                "epsilon": (noised - sigma * target) / alpha,
                "v_prediction": alpha * noised - sigma * target,
                "sample": target,
            }[prediction]
        assert torch.allclose(back, latent, atol=2e-3)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(RefusedError, match="take importance magnitude or additive"):
        Noising.of({"_class_name": "EDMEulerScheduler"})


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_taylor_is_the_slope_of_the_loss(family: str, tiny_folder: Folder) -> None:
    """Finite for every weight, zero for few, and the network is left as it was."""
    model = sampled(tiny_folder(family))
    before = model.hash()
    elements = taylor(model, 0.0, context(model))
    assert model.hash() == before
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.denoiser.parameters())
    used = [path for path, element in elements.items() if float(element.sum()) > 0.0]
    assert len(used) > 0.9 * len(elements)
    assert all(torch.isfinite(element).all() for element in elements.values())


def test_the_cut_off_leaves_noisy_timesteps_out(tiny_folder: Folder) -> None:
    model = sampled(tiny_folder("dit"))
    heard = list[int]()
    few = context(model, progress=lambda what, done, total: heard.append(done) if "differentiate" in what else None)
    taylor(model, 0.0, few)
    whole = len(heard)
    heard.clear()
    taylor(model, 0.99, few)
    assert 0 < len(heard) < whole == 20


@pytest.mark.parametrize("importance", ["taylor", "magnitude", "additive", "random"])
def test_dead_units_go_first(importance: Any, tiny_folder: Folder) -> None:
    """Units whose weights are zero cost nothing, by every estimate that looks at the model."""
    model = sampled(tiny_folder("sd3"))
    path, dead = "transformer_blocks.1.ff", list(range(0, 128, 8)) + list(range(1, 128, 8))
    mlp = model.denoiser.get_submodule(path)
    with torch.no_grad():
        mlp.net[0].proj.weight[dead] = 0.0
        mlp.net[0].proj.bias[dead] = 0.0
        mlp.net[2].weight[:, dead] = 0.0
    (axis,) = [one for one in axes_of(model.denoiser, ("ffn",)) if one.module == path]
    found = losses(model, "denoiser", [axis], 8, importance, 0.0, context(model))
    first = sorted(found, key=lambda one: found[one])[: 32 // 8]
    lost = {unit for one in first for unit in one.units}
    assert (lost == set(dead)) == (importance != "random")


# The pass


BUDGETS = [(family, "size_ratio") for family in tiny.PIPELINES] + [("unet", "macs_ratio"), ("flux", "macs_ratio")]


@pytest.mark.parametrize(("family", "budget"), BUDGETS)
def test_budgets_are_kept(family: str, budget: str, tiny_folder: Folder) -> None:
    model = sampled(tiny_folder(family))
    step = Prune(**{budget: 0.9}, importance="magnitude", axes=("heads", "ffn", "resnet", "depth"), multiple=2)
    before = step._costs(model)
    counted = {"size_ratio": before.parameters, "macs_ratio": before.macs}[budget]
    applied(model, step)
    after = step._costs(model)
    left = {"size_ratio": after.parameters, "macs_ratio": after.macs}[budget] / counted
    assert 0.8 < left <= 0.9
    assert model.provenance[-1]["units_removed"]


@pytest.mark.parametrize("importance", ["taylor", "random"])
def test_scores_choose_otherwise(importance: Any, tiny_folder: Folder) -> None:
    step = Prune(size_ratio=0.9, importance=importance)
    model = applied(sampled(tiny_folder("sd3")), step)
    other = applied(sampled(tiny_folder("sd3")), Prune(size_ratio=0.9, importance="magnitude"))
    assert model.structures != other.structures


def test_shares_are_kept(tiny_folder: Folder) -> None:
    step = Prune(
        keep={"heads": 0.5, "ffn": 0.75},
        layers=(KeepRule(match="denoiser.transformer_blocks.0.*", keep=1.0), KeepRule(match="*.1.ff", keep=0.25)),
        importance="magnitude",
    )
    model = applied(sampled(tiny_folder("sd3")), step)
    blocks = model.denoiser.transformer_blocks
    assert [block.attn.heads for block in blocks] == [4, 2, 2, 2]
    assert [block.ff.net[2].in_features for block in blocks] == [128, 32, 96, 96]
    assert {cut.axis for cut in model.structures["transformer"].cuts} == {"heads", "ffn"}


def test_sizes_are_what_targets_compute_fast(tiny_folder: Folder) -> None:
    for targets, multiple in ((CPU, 8), ([target("torch-cuda"), *CPU], 16)):
        model = sampled(tiny_folder("unet"))
        step = Prune(size_ratio=0.8, importance="magnitude")
        edits = step.plan(model, targets)
        step.apply(model, edits, PassContext(PROMPTS, 0, 16, 16, targets=targets))
        for module in model.denoiser.modules():
            if type(module).__name__ == "FeedForward":
                assert module.net[2].in_features % multiple == 0
            if type(module).__name__ == "ResnetBlock2D":
                assert module.conv2.in_channels % multiple == 0


def test_blocks_leave_and_the_folder_stays_standard(tiny_folder: Folder, tmp_path: Path) -> None:
    model = applied(sampled(tiny_folder("pixart")), Prune(keep={"depth": 0.7}, importance="magnitude"))
    assert model.structures == {}
    assert model.denoiser.config.num_layers == len(model.denoiser.transformer_blocks) == 2
    model.save(tmp_path)
    assert not list(tmp_path.rglob(STRUCTURE_FILE))
    assert type(model.denoiser).from_pretrained(tmp_path / "transformer").config.num_layers == 2


def test_the_decoder_of_a_vae_is_pruned_and_its_encoder_is_not(tiny_folder: Folder) -> None:
    model = sampled(tiny_folder("unet"))
    denoiser, encoder = numbers(model.denoiser), numbers(model.vae.encoder)
    decoder = numbers(model.vae.decoder)
    applied(model, Prune(part="vae_decoder", size_ratio=0.8, importance="additive", multiple=2))
    assert (numbers(model.denoiser), numbers(model.vae.encoder)) == (denoiser, encoder)
    assert numbers(model.vae.decoder) <= 0.8 * decoder


# What is refused


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "one of size_ratio, macs_ratio, latency_ratio and shares .keep, layers., and there is none"),
        ({"size_ratio": 0.5, "macs_ratio": 0.5}, "not size_ratio and macs_ratio"),
        ({"macs_ratio": 0.5, "latency_ratio": 0.5}, "not macs_ratio and latency_ratio"),
        ({"size_ratio": 0.5, "keep": {"ffn": 0.5}}, "not size_ratio and shares"),
        ({"size_ratio": 0.5, "axes": ()}, "axes: must not be empty"),
        ({"keep": {"ffn": 0.5}, "axes": ("ffn",)}, "axes: are for a budget"),
        ({"latency_ratio": 0.5, "part": "vae_decoder", "importance": "magnitude"}, "latency_ratio: times the denoiser"),
        ({"size_ratio": 0.5, "part": "vae_decoder"}, "importance: taylor differentiates the denoising loss"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Prune(**fields)


@pytest.mark.parametrize(
    ("family", "step", "said"),
    [
        ("sd3", Prune(size_ratio=0.05), "prune.size_ratio: 0.05 of the denoiser cannot be reached by heads, ffn"),
        ("sd3", Prune(macs_ratio=0.05), "prune.macs_ratio: 0.05 .* raise it, or add axes"),
        ("sd3", Prune(keep={"resnet": 0.5}), "prune.keep: the denoiser has no axis resnet"),
        ("sd3", Prune(keep={"ffn": 1.0}), "would change nothing"),
        ("sd3", Prune(layers=(KeepRule(match="*.nowhere", keep=0.5),)), r"prune.layers\[0\] matches nothing"),
        ("unet", Prune(part="vae_decoder", keep={"heads": 0.5}, importance="magnitude"), "would change nothing"),
    ],
)
def test_what_cannot_be_done_is_refused(family: str, step: Prune, said: str, tiny_folder: Folder) -> None:
    with pytest.raises(RefusedError, match=said):
        step.plan(load(tiny_folder(family)), CPU)


def test_a_broken_promise_is_noticed(tiny_folder: Folder) -> None:
    step = Prune(size_ratio=0.9, importance="magnitude")
    model = sampled(tiny_folder("sd3"))
    edits = step.plan(model, CPU)
    with pytest.raises(PassError, match="removed nothing"):
        step.check(model, edits)
    step.apply(model, edits, context(model))
    model.denoiser = load(tiny_folder("sd3")).denoiser
    with pytest.raises(PassError, match="but wrote down"):
        step.check(model, edits)


def test_the_stage_is_stored_and_comes_back(tiny_folder: Folder, tmp_path: Path) -> None:
    model = sampled(tiny_folder("unet"))
    step = Prune(size_ratio=0.8, importance="magnitude")
    stages = [
        compiler.apply(model, [step], CPU, context(model), Store(tmp_path))["prune"].state_hash() for _ in range(2)
    ]
    assert stages[0] == stages[1] != model.state_hash()


# With the other passes

RECIPE = """
schema_version: 1
model: {model}
sampler: {{scheduler: {scheduler}, steps: 4, guidance_scale: 2.0}}
passes:
  - prune: {{size_ratio: 0.85, importance: taylor}}
  - quantize: {{scheme: int8-w8a8}}
  - {last}
targets: [onnxruntime-cpu, openvino-cpu]
shapes: {{batch: [1, 1, 4], height: 16, width: 16}}
calibration: {{prompts: {prompts}, samples: 2}}
out: {out}
"""
EXAMINED = "evaluate: {{samples: 2, prompts: {held}, batch: 2, allow_slower: true}}\n"


def recipe(tiny_folder: Folder, tmp_path: Path, family: str, text: str, **names: str) -> Recipe:
    prompts, held, file = tmp_path / "calibration.txt", tmp_path / "held.txt", tmp_path / "recipe.yaml"
    prompts.write_text("a red circle\na blue square\n")
    held.write_text("a green triangle\na yellow ring\n")
    out = tmp_path / "out" / "engine"
    file.write_text(text.format(model=tiny_folder(family), prompts=prompts, held=held, out=out, **names))
    return Recipe.load(file)


def test_a_recipe_becomes_an_examined_engine(tiny_folder: Folder, tmp_path: Path) -> None:
    """Pruned, quantized and cached, for both CPU targets; each pass has its row."""
    names = {"scheduler": "DDIMScheduler", "last": "cache: {cut: 1, interval: 2}"}
    made = recipe(tiny_folder, tmp_path, "unet", RECIPE + EXAMINED, **names)
    outcome = compiler.run(made, work_dir=tmp_path / "work")
    assert outcome.engine is not None
    assert outcome.report is not None
    assert {"prune", "quantize"} < outcome.report.edits.keys()
    row = outcome.report.row("latent_psnr_db")
    assert row is not None
    assert row.engine is not None
    assert set(row.per_pass) == {"prune", "quantize", "cache"}
    (said,) = [entry for entry in read_manifest(outcome.engine).provenance["passes"] if "units_removed" in entry]
    assert said["parameters"][1] <= 0.85 * said["parameters"][0]


def test_fewer_calls_are_fitted_to_what_is_left(tiny_folder: Folder, tmp_path: Path) -> None:
    names = {"scheduler": "FlowMatchEulerDiscreteScheduler", "last": "solver: {calls: 3}"}
    outcome = compiler.run(recipe(tiny_folder, tmp_path, "sd3", RECIPE, **names), work_dir=tmp_path / "work")
    assert outcome.engine is not None
    for name in ("onnxruntime-cpu", "openvino-cpu"):
        pictures = Engine.open(outcome.engine, target=name).generate(prompts=["a red circle"], seeds=[1])
        assert pictures.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_fused_modules_are_exact_after_it(family: str, tiny_folder: Folder) -> None:
    model = applied(sampled(tiny_folder(family)), Prune(size_ratio=0.9, importance="magnitude", multiple=2))
    step = Fuse()
    edits = step.plan(model, [target("torch-cuda")])
    step.apply(model, edits, context(model))
    step.check(model, edits)


@pytest.mark.parametrize("family", ["unet", "sd3", "flux"])
def test_graphs_compute_what_pytorch_does(family: str, tiny_folder: Folder) -> None:
    model = applied(sampled(tiny_folder(family)), Prune(size_ratio=0.9, importance="magnitude", multiple=2))
    (segment,) = model.segments()
    family, axes = model.family, model.family.dynamic_axes()
    example = family.example_inputs(model.denoiser, 2, tiny.SIDE, tiny.SIDE, 5)
    check = family.example_inputs(model.denoiser, 3, tiny.SIDE + 4, tiny.SIDE + 4, 7)
    own = {name: axes[name] for name in example}
    export_module(segment.module, example, own, segment.outputs, check, name="denoiser")
