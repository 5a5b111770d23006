"""Cuts and segments: exact on every cut of every family, named as torch.export needs them, priced right."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from compress.errors import RefusedError
from compress.families import FAMILIES, DenoiserSegment, Family, Layout, segments
from compress.families.costs import run_counted
from compress.families.segments import Unit
from compress.model.latent_diffusion import load
from export.step_plan import Segment, Slot, Step, StepPlan
from tests import tiny

MAKERS = {
    "unet": tiny.unet,
    "sd3": tiny.sd3,
    "dit": tiny.dit,
    "pixart": tiny.pixart,
    "flux": tiny.flux,
    "sdxl": tiny.sdxl,
}
CUTS = [(name, cut) for name in ("unet", "sdxl", "sd3", "flux") for cut in range(4)]
CUTS += [(name, cut) for name in ("dit", "pixart") for cut in range(3)]
UNETS = ("unet", "sdxl")
THREE, TWO = 0.0, 1.0  # PAIR_SHARE that forces three disjoint segments, or the pair


def make(name: str) -> tuple[Family, Any]:
    torch.manual_seed(0)
    denoiser = MAKERS[name]()
    tiny.shake(denoiser)
    return FAMILIES[type(denoiser).__name__], denoiser


def run(
    segments: list[DenoiserSegment],
    path: tuple[str, ...],
    known: dict[str, Tensor],
    slot: Slot | None = None,
    kept: Tensor | None = None,
) -> dict[str, Tensor]:
    """Run a path as a runtime does: tensors by name, the slot read where its tensor is first needed."""
    by_name, known = {segment.name: segment for segment in segments}, dict(known)
    for name in path:
        segment = by_name[name]
        if slot is not None and kept is not None and slot.tensor in segment.inputs:
            known[slot.tensor] = kept if slot.base is None else known[slot.base] + kept
        with torch.inference_mode():
            outputs = segment.module(**{key: known[key] for key in segment.inputs})
        known |= zip(segment.outputs, outputs, strict=True)
    return known


@pytest.mark.parametrize("share", [THREE, TWO])
@pytest.mark.parametrize(("name", "cut"), CUTS)
def test_paths_are_exact(name: str, cut: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full path equals the original bit for bit; the shallow path with a fresh slot to 0.0 or, residual, 1e-6."""
    monkeypatch.setattr(segments, "PAIR_SHARE", share)
    family, denoiser = make(name)
    inputs = family.example_inputs(denoiser, batch=2, height=tiny.SIDE, width=tiny.SIDE, prompt_tokens=5)
    with torch.inference_mode():
        original = family.whole(denoiser, *inputs.values())
    found, paths, slots = family.segments(denoiser, family.cut_layout(denoiser, cut))
    assert len(found) == (2 if share == TWO else 3)
    full = run(found, paths["full"], inputs)
    assert torch.equal(full[family.output], original)
    slot = slots["deep"]
    kept = full[slot.tensor] if slot.base is None else full[slot.tensor] - full[slot.base]
    shallow = run(found, paths["shallow"], inputs, slot, kept)[family.output]
    assert (shallow - original).abs().max() <= (0.0 if name in UNETS else 1e-6)
    stale = run(found, paths["shallow"], inputs, slot, kept.roll(1, -1))[family.output]
    assert (stale - original).abs().max() > 1e-4, "the slot has no effect, so the test above proves nothing"


@pytest.mark.parametrize("cut", range(4))
def test_a_unet_without_a_middle_block_is_cut_too(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAKERS, "unet", lambda: tiny.unet(mid_block_type=None))
    test_paths_are_exact("unet", cut, THREE, monkeypatch)


@pytest.mark.parametrize("name", ["unet", "sdxl", "sd3", "flux"])
def test_other_sizes_are_exact(name: str) -> None:
    """The segments take any batch, height, width and prompt length, as the original does."""
    family, denoiser = make(name)
    height, width = (12, 8) if name in UNETS else (4, 8)
    inputs = family.example_inputs(denoiser, batch=3, height=height, width=width, prompt_tokens=9)
    found, paths, _ = family.segments(denoiser, family.cut_layout(denoiser, 1))
    with torch.inference_mode():
        assert torch.equal(run(found, paths["full"], inputs)[family.output], family.whole(denoiser, *inputs.values()))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("share", [THREE, TWO])
def test_names_are_explicit_and_make_a_valid_plan(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "PAIR_SHARE", share)
    family, denoiser = make(name)
    assert list(family.example_inputs(denoiser, 1, 8, 8, 4)) == list(family.inputs(denoiser))
    assert set(family.dynamic_axes()) == set(family.conditioning)
    for cut in [None, *range(len(family.cut_names(denoiser)))]:
        found, paths, slots = family.segments(denoiser, None if cut is None else family.cut_layout(denoiser, cut))
        for segment in found:
            assert tuple(inspect.signature(segment.module.forward).parameters) == segment.inputs
            assert segment.module.component is denoiser
        step = Step(t=1.0, x={0: 1.0}, m={0: 1.0})
        steps = (
            [step]
            if cut is None
            else [
                Step(t=1.0, x={0: 1.0}, m={0: 1.0}, write=("deep",)),
                Step(t=0.5, x={0: 1.0}, m={0: 1.0}, path="shallow", read={"deep": (1.0,)}),
            ]
        )
        table = {segment.name: Segment(segment.inputs, segment.outputs) for segment in found}
        plan = StepPlan(table, paths, slots, tuple(steps))
        plan.validate(family.inputs(denoiser))
        assert plan.output == family.output


@pytest.mark.parametrize("name", MAKERS)
def test_parameter_share(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts exactly the parameters that change a tensor of the shallow path, found by moving each in turn."""
    monkeypatch.setattr(segments, "PAIR_SHARE", THREE)
    family, denoiser = make(name)
    sizes = {path: parameter.numel() for path, parameter in denoiser.named_parameters()}
    inputs = family.example_inputs(denoiser, 1, tiny.SIDE, tiny.SIDE, 4)
    generator = torch.Generator().manual_seed(0)
    for cut in (0, len(family.cut_names(denoiser)) - 1):
        found, paths, slots = family.segments(denoiser, family.cut_layout(denoiser, cut))
        kept = {slots["deep"].tensor: run(found, paths["full"], inputs)[slots["deep"].tensor]}
        before = run(found, paths["shallow"], inputs | kept)
        used = 0
        for path, parameter in denoiser.named_parameters():
            saved = parameter.data.clone()
            parameter.data.add_(torch.randn(saved.shape, generator=generator))
            after = run(found, paths["shallow"], inputs | kept)
            used += 0 if all(torch.equal(after[key], before[key]) for key in before) else sizes[path]
            parameter.data.copy_(saved)
        assert family.cut_info(denoiser, cut).parameter_share == pytest.approx(used / sum(sizes.values()), abs=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_macs_share(name: str) -> None:
    """It rises with the cut; and a matrix product, a convolution and attention count what they cost."""
    family, denoiser = make(name)
    shares = [cut.macs_share for cut in family.cuts(denoiser)]
    assert shares == sorted(shares)
    assert 0.0 < shares[0] < shares[-1] < 1.0
    blocks = len(shares)
    if name not in (*UNETS, "flux"):
        # All blocks but the last are equal, so are the steps; the first may begin to read the prompt.
        steps = [after - before for before, after in itertools.pairwise(shares)]
        assert steps[1:] == pytest.approx([steps[1]] * (blocks - 2))
        assert steps[0] >= steps[1] * (1 - 1e-9)


def test_macs_of_known_operations() -> None:
    layers = torch.nn.ModuleDict({"linear": torch.nn.Linear(6, 5), "convolution": torch.nn.Conv2d(2, 3, 3, padding=1)})
    inputs = {"x": torch.ones(2, 4, 6), "image": torch.ones(2, 2, 8, 8), "q": torch.ones(2, 3, 7, 4)}
    pieces = [
        Unit("product", ("x",), ("y",), lambda model, x: (model["linear"](x),)),
        Unit("convolution", ("image",), ("z",), lambda model, image: (model["convolution"](image),)),
        Unit("attention", ("q",), ("a",), lambda _, q: (functional.scaled_dot_product_attention(q, q, q),)),
    ]
    expected = {"product": 2 * 4 * 6 * 5, "convolution": 2 * 64 * 9 * 2 * 3, "attention": 2 * (2 * 3 * 7 * 7 * 4)}
    assert {piece.name: run_counted(layers, piece, inputs)[1] for piece in pieces} == expected


def test_shares_of_stable_diffusion_1() -> None:
    """The full-size network, shapes only: the shares of its first three cuts as measured on the published model."""
    with FakeTensorMode():
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        cuts = [FAMILIES[type(unet).__name__].cut_info(unet, cut) for cut in range(3)]
    assert [round(cut.macs_share, 3) for cut in cuts] == [0.079, 0.224, 0.380]
    assert [round(cut.parameter_share, 3) for cut in cuts] == [0.009, 0.022, 0.035]


def test_shares_of_stable_diffusion_xl() -> None:
    """Likewise at 1024 pixels; the added embedding of sizes and pooled text runs at every call, and is counted."""
    with FakeTensorMode():
        unet = UNet2DConditionModel(
            sample_size=128,
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        family = FAMILIES[type(unet).__name__]
        slots = {f"deep_{cut}": family.deep_slot(unet, cut) for cut in range(4)}
        costs = family.path_costs(unet, Layout.of(slots, {name: (name,) for name in slots}))
        cuts = [costs[name] for name in slots]
        added = sum(p.numel() for p in unet.add_embedding.parameters()) / sum(p.numel() for p in unet.parameters())
    assert [round(cut.macs_share, 4) for cut in cuts] == [0.0145, 0.0378, 0.0661, 0.1289]
    assert [round(cut.parameter_share - added, 3) for cut in cuts] == [0.002, 0.004, 0.007, 0.021]


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_small_shallow_paths_become_a_pair(name: str) -> None:
    """The 5 % rule, on models whose first cut is below it."""
    denoiser = tiny.unet(block_out_channels=(16, 64)) if name == "unet" else tiny.sd3(num_layers=9)
    family = FAMILIES[type(denoiser).__name__]
    assert family.cut_info(denoiser, 0).parameter_share <= 0.05 < family.cut_info(denoiser, 3).parameter_share
    shallow, deep = (family.segments(denoiser, family.cut_layout(denoiser, cut)).segments for cut in (0, 3))
    assert [segment.name for segment in shallow] == ["full", "shallow"]
    names = ["time-down_3", "mid", "up_3-head"] if name == "unet" else ["time-block_2", "block_3-block_8", "head"]
    assert [segment.name for segment in deep] == names


def test_segments_take_only_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither attention nor the time embedding reads the prompt, the segment has no such input."""
    denoiser = tiny.unet(addition_embed_type=None)
    family = FAMILIES[type(denoiser).__name__]
    layout = family.cut_layout(denoiser, 0)
    three = {segment.name: segment.inputs for segment in family.segments(denoiser, layout).segments}
    assert three == {
        "time-down_0": ("timestep", "sample"),
        "down_1-up_1": ("skip_0", "emb", "encoder_hidden_states"),
        "up_0-head": ("up_1", "skip_0", "emb"),
    }
    monkeypatch.setattr(segments, "PAIR_SHARE", TWO)
    pair = {segment.name: segment.inputs for segment in family.segments(denoiser, layout).segments}
    assert pair == {"full": ("timestep", "sample", "encoder_hidden_states"), "shallow": ("timestep", "sample", "up_1")}


@pytest.mark.parametrize("cut", [-1, 4, 99])
def test_unknown_cut_is_refused(cut: int) -> None:
    family, denoiser = make("unet")
    with pytest.raises(RefusedError, match=r"no cut .*: the cuts of this denoiser are 0 to 3"):
        family.cut_layout(denoiser, cut)


@pytest.mark.parametrize("name", MAKERS)
def test_segments_share_weights_and_survive_a_copy(name: str) -> None:
    family, denoiser = make(name)
    inputs = family.example_inputs(denoiser, 1, tiny.SIDE, tiny.SIDE, 4)
    (whole,), _, _ = family.segments(denoiser, None)
    twin = copy.deepcopy(whole.module)
    with torch.inference_mode():
        before = whole.module(**inputs)[0]
        for parameter in denoiser.parameters():
            parameter.data.mul_(1.1)
        assert not torch.equal(whole.module(**inputs)[0], before)
        assert torch.equal(twin(**inputs)[0], before)


@pytest.mark.parametrize("name", MAKERS)
def test_sensitive_layers_are_the_thin_ends(name: str) -> None:
    """Every entry is a linear or convolution layer; attention and feed-forward layers of blocks are not among them."""
    family, denoiser = make(name)
    layers = {path for path, module in denoiser.named_modules() if type(module).__name__ in ("Linear", "Conv2d")}
    sensitive, modulation = set(family.sensitive(denoiser)), set(family.modulation(denoiser))
    assert sensitive
    assert modulation
    assert not sensitive & modulation
    assert sensitive | modulation < layers
    assert not [
        path
        for path in sensitive | modulation
        if ".attn" in path or ".ff" in path or ".conv1" in path or ".conv2" in path
    ]


@pytest.mark.parametrize(
    ("maker", "overrides", "reason"),
    [
        (tiny.unet, {"in_channels": 9}, "takes 9 channels and gives 4"),
        (tiny.unet, {"num_class_embeds": 10}, "class embeddings"),
        (tiny.unet, {"time_cond_proj_dim": 8}, "guidance embedding"),
        (tiny.unet, {"center_input_sample": True}, "centred inputs"),
        (tiny.unet, {"cross_attention_dim": (16, 16), "addition_embed_type": None}, "for every block"),
        (tiny.unet, {"down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D")}, "ResnetDownsample"),
        (tiny.unet, {"mid_block_type": "UNetMidBlock2D"}, "middle block"),
        (tiny.sd3, {"in_channels": 33}, "takes 33 channels and gives 4"),
        (tiny.dit, {"out_channels": 5}, "takes 4 channels and gives 5"),
        (tiny.pixart, {"use_additional_conditions": True}, "aspect ratio"),
        (tiny.pixart, {"caption_channels": None}, "no caption projection"),
        (tiny.flux, {"out_channels": 8}, "takes 16 channels and gives 8"),
        (tiny.flux, {"in_channels": 18}, "takes 18 channels, which are no packed 2 x 2 latent"),
        (tiny.flux, {"patch_size": 2}, "patch_size 2; only 1"),
        (tiny.flux, {"num_single_layers": 0}, "no transformer_blocks or no single_transformer_blocks"),
        (tiny.flux, {"axes_dims_rope": (2, 2, 2)}, "three even numbers that add up to attention_head_dim .8."),
        (tiny.flux, {"axes_dims_rope": (1, 3, 4)}, "three even numbers"),
    ],
)
def test_unsupported_variants_are_refused(maker: Callable[..., Any], overrides: dict[str, Any], reason: str) -> None:
    denoiser = maker(**overrides)
    with pytest.raises(RefusedError, match=reason):
        FAMILIES[type(denoiser).__name__].check(denoiser)


def test_names_in_a_traced_graph(tiny_folder: Callable[[str], Path]) -> None:
    """torch.export sees the input names, and every node's module path begins with `denoiser.`."""
    model = load(tiny_folder("unet"))
    model.layout = model.family.cut_layout(model.denoiser, 1)
    entry = model.segments()[0]
    inputs = model.family.example_inputs(model.denoiser, 2, 8, 8, 5)
    program = torch.export.export(
        entry.module,
        (),
        {name: inputs[name] for name in entry.inputs},
        strict=False,
        dynamic_shapes={
            name: {axis: torch.export.Dim.DYNAMIC for axis in model.family.dynamic_axes()[name]}
            for name in entry.inputs
        },
    )
    given = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    assert tuple(given) == entry.inputs
    scopes = {path for node in program.graph.nodes for path, _ in (node.meta.get("nn_module_stack") or {}).values()}
    assert "denoiser.conv_in" in scopes
    modules = {path for path in scopes if path and "_empty_nn_module_stack" not in path}  # assertions have no module
    assert all(path.startswith("denoiser.") for path in modules)


def keeping(family: Family, denoiser: Any, layout: Layout, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cached path of a layout, given fresh slots, ends where the original does; stale slots matter."""
    monkeypatch.setattr(segments, "PAIR_SHARE", share)
    inputs = family.example_inputs(denoiser, batch=2, height=tiny.SIDE, width=tiny.SIDE, prompt_tokens=5)
    with torch.inference_mode():
        original = family.whole(denoiser, *inputs.values())
    found, paths, slots = family.segments(denoiser, layout)
    by_name = {segment.name: segment for segment in found}
    known = run(found, paths["full"], inputs)
    assert torch.equal(known[family.output], original)
    kept = {
        name: known[slot.tensor] if slot.base is None else known[slot.tensor] - known[slot.base]
        for name, slot in slots.items()
    }

    def cached(path: str, values: dict[str, Tensor]) -> Tensor:
        known, waiting = dict(inputs), {name: slots[name] for name in layout.paths[path].read}
        for segment in paths[path]:
            for name in [name for name, slot in waiting.items() if slot.tensor in by_name[segment].inputs]:
                slot = waiting.pop(name)
                known[slot.tensor] = values[name] if slot.base is None else known[slot.base] + values[name]
            known = run(found, (segment,), known)
        return known[family.output]

    for path in paths:
        assert (cached(path, kept) - original).abs().max() <= 2e-6
        for name in layout.paths[path].read:
            stale = cached(path, kept | {name: kept[name].roll(1, -1)})
            assert (stale - original).abs().max() > 1e-5, f"{path} does not read {name}"


@pytest.mark.parametrize("share", [THREE, TWO])
@pytest.mark.parametrize("name", ["sd3", "dit", "pixart", "flux"])
@pytest.mark.parametrize(("first", "last"), [(0, 2), (1, 2), (0, 3), (1, 3)])
def test_any_range_of_blocks(name: str, first: int, last: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A range of blocks is skipped, both streams of an MMDiT included; two ranges give two paths."""
    family, denoiser = make(name)
    slots = family.block_slots(denoiser, first, last)
    keeping(family, denoiser, Layout.of(slots, {"cached": tuple(slots)}), share, monkeypatch)
    if first:
        front = family.block_slots(denoiser, 0, first)
        both = Layout.of(slots | front, {"rear": tuple(slots), "front": tuple(front)})
        keeping(family, denoiser, both, share, monkeypatch)


@pytest.mark.parametrize("share", [THREE, TWO])
@pytest.mark.parametrize("name", UNETS)
def test_encoder_propagation(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder of a UNet runs on skips and middle block alone: it takes no latent."""
    family, denoiser = make(name)
    layout = family.encoder_layout(denoiser)
    keeping(family, denoiser, layout, share, monkeypatch)
    found, paths, _ = family.segments(denoiser, layout)
    taken = {tensor for segment in found if segment.name in paths["decoder"] for tensor in segment.inputs}
    assert "sample" not in taken, "the decoders of several network calls could not run as one batch"


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kinds", [("self_attention",), ("mlp",), ("self_attention", "cross_attention", "mlp")])
def test_sublayers(name: str, kinds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and MLP outputs are kept and given back; the modules that are skipped compute nothing."""
    family, denoiser = make(name)
    slots = family.sublayer_slots(denoiser, kinds)
    layout = Layout.of(slots, {"cached": tuple(slots)})
    keeping(family, denoiser, layout, THREE, monkeypatch)
    costs = family.path_costs(denoiser, layout)
    assert costs["cached"].macs_share < costs["full"].macs_share == 1.0
    assert costs["cached"].parameter_share < 1.0
    assert not [module for module in denoiser.modules() if "forward" in vars(module)], "an intercepted module stayed so"


def test_layouts_survive_json_and_are_checked() -> None:
    family, denoiser = make("unet")
    layout = family.encoder_layout(denoiser)
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    for slots, reason in [({"a": Slot("nowhere")}, "no unit"), ({"a": Slot("up_1", "residual", "nowhere")}, "no unit")]:
        with pytest.raises(RefusedError, match=reason):
            family.segments(denoiser, Layout.of(slots, {"cached": ("a",)}))
    family, denoiser = make("sd3")
    with pytest.raises(RefusedError, match="reads 'tokens_1', but its unit 'block_0' must run"):
        family.segments(denoiser, Layout.of({"a": Slot("tokens_1")}, {"cached": ("a",)}))
