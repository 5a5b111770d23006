"""Cuts and segments: exact on every cut of every family, named as torch.export needs them, priced right."""

from __future__ import annotations

import copy
import inspect
import itertools
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
from compress.families import FAMILIES, DenoiserSegment, Family, base
from compress.model.latent_diffusion import load
from export.step_plan import Segment, Slot, Step, StepPlan
from tests import tiny

MAKERS = {"unet": tiny.unet, "sd3": tiny.sd3, "dit": tiny.dit, "pixart": tiny.pixart}
CUTS = [("unet", cut) for cut in range(4)] + [("sd3", cut) for cut in range(4)]
CUTS += [(name, cut) for name in ("dit", "pixart") for cut in range(3)]
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
    monkeypatch.setattr(base, "PAIR_SHARE", share)
    family, denoiser = make(name)
    inputs = family.example_inputs(denoiser, batch=2, height=tiny.SIDE, width=tiny.SIDE, prompt_tokens=5)
    with torch.inference_mode():
        original = family.whole(denoiser, *inputs.values())
    segments, paths, slots = family.segments(denoiser, cut)
    assert [segment.name for segment in segments] == (
        ["full", "shallow"] if share == TWO else ["entry", "deep", "exit"]
    )
    full = run(segments, paths["full"], inputs)
    assert torch.equal(full[family.output], original)
    slot = slots["deep"]
    kept = full[slot.tensor] if slot.base is None else full[slot.tensor] - full[slot.base]
    shallow = run(segments, paths["shallow"], inputs, slot, kept)[family.output]
    assert (shallow - original).abs().max() <= (0.0 if name == "unet" else 1e-6)
    stale = run(segments, paths["shallow"], inputs, slot, kept.roll(1, -1))[family.output]
    assert (stale - original).abs().max() > 1e-4, "the slot has no effect, so the test above proves nothing"


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_other_sizes_are_exact(name: str) -> None:
    """The segments take any batch, height, width and prompt length, as the original does."""
    family, denoiser = make(name)
    height, width = (12, 8) if name == "unet" else (4, 8)
    inputs = family.example_inputs(denoiser, batch=3, height=height, width=width, prompt_tokens=9)
    segments, paths, _ = family.segments(denoiser, 1)
    with torch.inference_mode():
        assert torch.equal(
            run(segments, paths["full"], inputs)[family.output], family.whole(denoiser, *inputs.values())
        )


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("share", [THREE, TWO])
def test_names_are_explicit_and_make_a_valid_plan(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PAIR_SHARE", share)
    family, denoiser = make(name)
    assert list(family.example_inputs(denoiser, 1, 8, 8, 4)) == list(family.conditioning)
    assert set(family.dynamic_axes()) == set(family.conditioning)
    for cut in [None, *range(len(family.cut_names(denoiser)))]:
        segments, paths, slots = family.segments(denoiser, cut)
        for segment in segments:
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
        table = {segment.name: Segment(segment.inputs, segment.outputs) for segment in segments}
        plan = StepPlan(table, paths, slots, tuple(steps))
        plan.validate(family.conditioning)
        assert plan.output == family.output


@pytest.mark.parametrize("name", MAKERS)
def test_parameter_share(name: str) -> None:
    """It counts exactly the parameters that change a tensor of the shallow path, found by moving each in turn."""
    family, denoiser = make(name)
    sizes = {path: parameter.numel() for path, parameter in denoiser.named_parameters()}
    inputs = family.example_inputs(denoiser, 1, tiny.SIDE, tiny.SIDE, 4)
    generator = torch.Generator().manual_seed(0)
    for cut in (0, len(family.cut_names(denoiser)) - 1):
        segments = [piece.bind(denoiser) for piece in family.pieces(denoiser, cut)[:3]]
        kept = {"deep": run(segments, ("entry", "deep"), inputs)["deep"]}
        before = run(segments, ("entry", "exit"), inputs | kept)
        used = 0
        for path, parameter in denoiser.named_parameters():
            saved = parameter.data.clone()
            parameter.data.add_(torch.randn(saved.shape, generator=generator))
            after = run(segments, ("entry", "exit"), inputs | kept)
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
    if name != "unet":  # all blocks but the last are equal, so are the steps
        steps = [after - before for before, after in itertools.pairwise(shares)]
        assert steps == pytest.approx([steps[0]] * (blocks - 1))


def test_macs_of_known_operations() -> None:
    layers = torch.nn.ModuleDict({"linear": torch.nn.Linear(6, 5), "convolution": torch.nn.Conv2d(2, 3, 3, padding=1)})
    inputs = {"x": torch.ones(2, 4, 6), "image": torch.ones(2, 2, 8, 8), "q": torch.ones(2, 3, 7, 4)}
    pieces = [
        base.Piece("product", ("x",), ("y",), lambda model, x: (model["linear"](x),)),
        base.Piece("convolution", ("image",), ("z",), lambda model, image: (model["convolution"](image),)),
        base.Piece("attention", ("q",), ("a",), lambda _, q: (functional.scaled_dot_product_attention(q, q, q),)),
    ]
    expected = {"product": 2 * 4 * 6 * 5, "convolution": 2 * 64 * 9 * 2 * 3, "attention": 2 * (2 * 3 * 7 * 7 * 4)}
    assert base._macs(layers, pieces, inputs) == expected


def test_shares_of_stable_diffusion_1() -> None:
    """The full-size network, shapes only: the shares of its first three cuts as measured on the published model."""
    with FakeTensorMode():
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        cuts = [FAMILIES[type(unet).__name__].cut_info(unet, cut) for cut in range(3)]
    assert [round(cut.macs_share, 3) for cut in cuts] == [0.079, 0.224, 0.380]
    assert [round(cut.parameter_share, 3) for cut in cuts] == [0.009, 0.022, 0.035]


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_small_shallow_paths_become_a_pair(name: str) -> None:
    """The 5 % rule, on models whose first cut is below it."""
    denoiser = tiny.unet(block_out_channels=(16, 64)) if name == "unet" else tiny.sd3(num_layers=9)
    family = FAMILIES[type(denoiser).__name__]
    assert family.cut_info(denoiser, 0).parameter_share <= 0.05 < family.cut_info(denoiser, 3).parameter_share
    assert [segment.name for segment in family.segments(denoiser, 0)[0]] == ["full", "shallow"]
    assert [segment.name for segment in family.segments(denoiser, 3)[0]] == ["entry", "deep", "exit"]


def test_segments_take_only_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither attention nor the time embedding reads the prompt, the segment has no such input."""
    denoiser = tiny.unet(addition_embed_type=None)
    family = FAMILIES[type(denoiser).__name__]
    three = {segment.name: segment.inputs for segment in family.segments(denoiser, 0)[0]}
    assert three == {
        "entry": ("sample", "timestep"),
        "deep": ("skip_0", "emb", "encoder_hidden_states"),
        "exit": ("deep", "emb", "skip_0"),
    }
    monkeypatch.setattr(base, "PAIR_SHARE", TWO)
    pair = {segment.name: segment.inputs for segment in family.segments(denoiser, 0)[0]}
    assert pair == {"full": ("sample", "timestep", "encoder_hidden_states"), "shallow": ("sample", "timestep", "deep")}


@pytest.mark.parametrize("cut", [-1, 4, 99])
def test_unknown_cut_is_refused(cut: int) -> None:
    family, denoiser = make("unet")
    with pytest.raises(RefusedError, match=r"no cut .*: the cuts of this denoiser are 0 to 3"):
        family.segments(denoiser, cut)


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
    ],
)
def test_unsupported_variants_are_refused(maker: Callable[..., Any], overrides: dict[str, Any], reason: str) -> None:
    denoiser = maker(**overrides)
    with pytest.raises(RefusedError, match=reason):
        FAMILIES[type(denoiser).__name__].check(denoiser)


def test_names_in_a_traced_graph(tiny_folder: Callable[[str], Path]) -> None:
    """torch.export sees the input names, and every node's module path begins with `denoiser.`."""
    model = load(tiny_folder("unet"))
    model.cut = 1
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
