"""Axes: a network without units computes what it computes with those units masked, for every axis and family."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from compress.errors import RefusedError
from compress.families import FAMILIES
from compress.model import loader
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.pruning.axes import axes_of, axis_named
from compress.pruning.axis import Axis, CutError, DepthAxis, WidthAxis
from compress.pruning.structure import STRUCTURE_FILE, Cut, Structure, prune
from tests import tiny

TOLERANCE = 1e-5


def deep_unet() -> Any:
    """Three pairs of resnet and attention in a level, so that some can go."""
    return tiny.unet(layers_per_block=(2, 3))


def deep_vae() -> Any:
    """Two levels of unequal width, so that some resnets of the decoder can go and some cannot."""
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=2 * tiny.SIDE,
    )
    return vae.eval()


def scaled_unet() -> Any:
    """Its resnets take a scale and a shift from the timestep."""
    return tiny.unet(resnet_time_scale_shift="scale_shift")


MAKERS: dict[str, Callable[[], Any]] = {
    "unet": deep_unet,
    "unet, scale and shift": scaled_unet,
    "sdxl": tiny.sdxl,
    "vae": deep_vae,
    "dit": lambda: tiny.dit(num_layers=4),
    "pixart": tiny.pixart,
    "sd3": tiny.sd3,
    "sd3.5": lambda: tiny.sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm"),
    "flux": tiny.flux,
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    network = MAKERS[name]()
    tiny.shake(network)
    return network.requires_grad_(False)


def within(network: Any) -> str:
    return "decoder." if type(network).__name__ == "AutoencoderKL" else ""


def removable(network: Any) -> list[Axis]:
    return [axis for axis in axes_of(network, within=within(network)) if axis.removable]


def count(network: Any) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def output(network: Any) -> Tensor:
    with torch.inference_mode():
        if within(network):
            latent = torch.randn(2, 4, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(0))
            return network.decode(latent, return_dict=False)[0]
        family = FAMILIES[type(network).__name__]
        inputs = family.example_inputs(network, batch=2, height=tiny.SIDE, width=tiny.SIDE, prompt_tokens=5)
        return family.whole(network, *inputs.values())


def some(axis: Axis, draw: random.Random) -> list[int]:
    """Half to all of the units but one, drawn anew."""
    free = [unit for unit in range(axis.size) if unit not in axis.fixed]
    gone = draw.randint(1, max(1, min(axis.removable, len(free) // 2)))
    lost = set(draw.sample(free, gone))
    return [unit for unit in range(axis.size) if unit not in lost]


def mask(network: Any, axis: Axis, kept: list[int]) -> None:
    """Switch units off without cutting: zero columns where they are used, or blocks that pass their input on."""
    gone = [unit for unit in range(axis.size) if unit not in kept]
    if isinstance(axis, WidthAxis):
        for one in axis.slices:
            if one.dim == 1:
                for unit in gone:
                    start = one.first + unit * one.width
                    network.get_parameter(one.parameter)[:, start : start + one.width] = 0.0
        return
    assert isinstance(axis, DepthAxis)
    for unit in gone:
        for path in axis.units[unit]:
            bypass(network, path)


def bypass(network: Any, path: str) -> None:
    """Let a block give what it is given: of a resnet after a skip its first channels, of a joint block both streams."""
    module = network.get_submodule(path)
    name = type(module).__name__

    def joint(hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return encoder_hidden_states, hidden_states

    def first(hidden: Tensor, *_: Any, **__: Any) -> Any:
        if name == "ResnetBlock2D":
            return hidden[:, : module.out_channels]
        return (hidden,) if name == "Transformer2DModel" else hidden

    module.forward = joint if name in ("JointTransformerBlock", "FluxTransformerBlock") else first
    if name == "FluxSingleTransformerBlock":
        module.forward = joint


@pytest.mark.parametrize("name", MAKERS)
def test_every_axis_is_exact(name: str) -> None:
    """Each axis alone, and each really changes the output."""
    network = make(name)
    found = removable(network)
    assert {axis.kind for axis in found} >= ({"resnet", "depth"} if within(network) else {"heads", "ffn", "depth"})
    whole, parameters = output(network), count(network)
    for axis in found:
        kept = some(axis, random.Random(f"{axis.kind} {axis.module}"))
        masked, cut = copy.deepcopy(network), copy.deepcopy(network)
        mask(masked, axis, kept)
        axis_named(cut, axis.kind, axis.module).cut(cut, kept)
        assert count(cut) < parameters
        wanted = output(masked)
        assert (output(cut) - wanted).abs().max() <= TOLERANCE, axis
        assert (wanted - whole).abs().max() > 1e-6, axis


def everywhere(network: Any, seed: int) -> list[tuple[Axis, list[int]]]:
    """Units of every axis to keep."""
    draw = random.Random(seed)
    return [(axis, some(axis, draw)) for axis in removable(network)]


def cut_of(axis: Axis, kept: list[int]) -> Cut:
    return Cut(axis.kind, axis.module, axis.size, tuple(kept))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MAKERS)
def test_all_axes_at_once_are_exact_and_come_back(name: str, seed: int) -> None:
    """What is written down makes the same network again out of its configuration: strictly, and bit for bit."""
    network = make(name)
    chosen = everywhere(network, seed)
    masked = copy.deepcopy(network)
    for axis, kept in sorted(chosen, key=lambda one: one[0].kind == "depth"):
        mask(masked, axis, kept)
    structure = prune(network, [cut_of(axis, kept) for axis, kept in chosen], Structure())
    pruned = output(network)
    assert (pruned - output(masked)).abs().max() <= TOLERANCE
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    again = type(network).from_config(config).eval()
    Structure.from_dict(json.loads(structure.to_json())).apply(again)
    again.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(output(again), pruned)


@pytest.mark.parametrize("name", MAKERS)
def test_a_pruned_network_is_pruned_again(name: str) -> None:
    network = make(name)
    structure = Structure()
    for seed in (0, 1):
        structure = prune(network, [cut_of(axis, kept) for axis, kept in everywhere(network, seed)], structure)
    again = type(network).from_config({k: v for k, v in network.config.items() if not k.startswith("_")}).eval()
    structure.apply(again)
    again.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(output(again), output(network))


EXPRESSIBLE = {
    "unet": ["down_blocks.0", "down_blocks.1", "mid_block"],
    "dit": ["transformer_blocks"],
    "pixart": ["transformer_blocks"],
    "sd3": ["transformer_blocks"],
    "sd3.5": ["transformer_blocks"],
    "flux": ["transformer_blocks", "single_transformer_blocks"],
}


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_depth_that_a_configuration_expresses_is_left_to_it(name: str, tmp_path: Path) -> None:
    """The class of diffusers itself opens the folder."""
    network = make(name)
    chosen = [axis_named(network, "depth", module) for module in EXPRESSIBLE[name]]
    cuts = [cut_of(axis, some(axis, random.Random(1)) if axis.least else []) for axis in chosen]
    assert prune(network, cuts, Structure()) == Structure()
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    assert torch.equal(output(again), output(network))


def test_the_configuration_is_left_alone_once_something_else_was_cut() -> None:
    network = make("sd3")
    structure = prune(network, [cut_of(axis_named(network, "ffn", "transformer_blocks.2.ff"), [0, 1, 2])], Structure())
    structure = prune(network, [cut_of(axis_named(network, "depth", "transformer_blocks"), [0, 3])], structure)
    assert network.config.num_layers == 4
    assert [cut.axis for cut in structure.cuts] == ["ffn", "depth"]


# What is refused


@pytest.mark.parametrize(
    ("name", "kind", "module", "kept", "said"),
    [
        ("sd3", "heads", "transformer_blocks.0.attn", [], "1 at least must be kept, not 0"),
        ("sd3", "heads", "transformer_blocks.0.attn", [0, 4], "units 0 to 3; kept must be some of them"),
        ("sd3", "heads", "transformer_blocks.0.attn", [1, 0], "ascending and once each"),
        ("sd3", "heads", "transformer_blocks.0.attn", [1, 1], "ascending and once each"),
        ("sd3", "heads", "transformer_blocks.0.attn", [-1, 1], "ascending and once each"),
        ("unet", "resnet", "mid_block.resnets.0", [], "1 at least"),
        ("unet", "ffn", "mid_block.attentions.0.transformer_blocks.0.ff", [], "1 at least"),
        ("sd3", "depth", "transformer_blocks", [0, 1], "unit 3 cannot be removed"),
        ("dit", "depth", "transformer_blocks", [1, 2], "unit 0 cannot be removed"),
        ("unet", "depth", "down_blocks.1", [1, 2], "unit 0 cannot be removed"),
        ("flux", "depth", "single_transformer_blocks", [], "1 at least"),
        ("vae", "depth", "decoder.up_blocks.1.resnets", [1], "unit 0 cannot be removed"),
    ],
)
def test_over_pruning_is_refused(name: str, kind: str, module: str, kept: list[int], said: str) -> None:
    network = make(name)
    before = {path: tensor.clone() for path, tensor in network.state_dict().items()}
    with pytest.raises(CutError, match=said):
        axis_named(network, kind, module).cut(network, kept)
    assert all(torch.equal(before[path], tensor) for path, tensor in network.state_dict().items())


def test_what_is_no_axis_is_refused() -> None:
    """Channels of the residual stream, with the position buffers that follow them, are no axis."""
    network = make("dit")
    for kind, module in (("width", "pos_embed"), ("ffn", "pos_embed"), ("heads", "nowhere"), ("depth", "proj_out_1")):
        with pytest.raises(CutError, match="no axis"):
            axis_named(network, kind, module)


def test_position_buffers_stay_whole() -> None:
    for name in ("dit", "pixart", "sd3"):
        network = make(name)
        before = network.pos_embed.pos_embed.clone()
        prune(network, [cut_of(axis, kept) for axis, kept in everywhere(network, 0)], Structure())
        assert torch.equal(network.pos_embed.pos_embed, before)


def test_the_last_head_and_shared_groups_are_no_choice() -> None:
    """A decoder has one head; units of a resnet are groups, all channels of one at once."""
    vae = make("vae")
    heads = axis_named(vae, "heads", "decoder.mid_block.attentions.0")
    assert heads.removable == 0
    axis = axis_named(vae, "resnet", "decoder.mid_block.resnets.0")
    assert isinstance(axis, WidthAxis)
    assert (axis.size, axis.channels) == (4, 4)
    axis.cut(vae, [1, 3])
    resnet = vae.decoder.mid_block.resnets[0]
    assert (resnet.norm2.num_groups, resnet.norm2.num_channels, resnet.conv2.in_channels) == (2, 8, 8)


@pytest.mark.parametrize("norm", ["rms_norm_across_heads", "layer_norm_across_heads"])
def test_norms_across_heads_have_no_heads_to_remove(norm: str) -> None:
    attention = nn.Module()
    attention.attn = Attention(16, heads=2, kv_heads=2, dim_head=8, qk_norm=norm)
    assert axes_of(attention, ["heads"]) == []


def test_keys_shared_by_heads_have_no_heads_to_remove() -> None:
    attention = nn.Module()
    attention.attn = Attention(16, heads=2, kv_heads=1, dim_head=8)
    assert axes_of(attention, ["heads"]) == []


# What a folder may say

GOOD = {"axis": "ffn", "module": "transformer_blocks.0.ff", "size": 64, "kept": [0, 1]}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"format": 2, "cuts": [GOOD]}, "format 1"),
        ({"format": 1, "cuts": [GOOD], "code": "x"}, "nothing else"),
        ({"format": 1, "cuts": []}, "a list of 1 to"),
        ({"format": 1, "cuts": {}}, "a list of 1 to"),
        ({"format": 1, "cuts": [GOOD | {"path": "../x"}]}, "nothing else"),
        ({"format": 1, "cuts": [GOOD | {"module": 3}]}, "must be text"),
        ({"format": 1, "cuts": [GOOD | {"size": True}]}, "whole number"),
        ({"format": 1, "cuts": [GOOD | {"kept": [0.5]}]}, "whole number"),
        ({"format": 1, "cuts": [GOOD | {"kept": [-1]}]}, "whole number"),
        ({"format": 1, "cuts": [GOOD | {"kept": [10**12]}]}, "whole number"),
        ({"format": 1, "cuts": [GOOD | {"kept": "all"}]}, "a list of them"),
        ({"format": 1, "cuts": ["ffn"]}, "must have axis"),
    ],
)
def test_malformed_structures_are_refused(raw: Any, said: str) -> None:
    with pytest.raises(CutError, match=said):
        Structure.from_dict(raw)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"axis": "forward"}, "is no axis"),
        ({"module": "../../etc"}, "no axis ffn of a module"),
        ({"module": "transformer_blocks.9.ff"}, "no axis ffn of a module"),
        ({"module": ""}, "no axis ffn of a module"),
        ({"size": 32}, "has 64 units, but 32 are written down"),
        ({"kept": [0, 64]}, "units 0 to 63"),
    ],
)
def test_structures_that_do_not_fit_are_refused(change: dict[str, Any], said: str) -> None:
    network = make("dit")
    structure = Structure.from_dict({"format": 1, "cuts": [GOOD]})
    structure.apply(network)
    with pytest.raises(CutError, match=said):
        Structure.from_dict({"format": 1, "cuts": [GOOD | change]}).apply(make("dit"))


# As a folder


def pruned_model(folder: Path, part: str = "denoiser") -> LatentDiffusion:
    """A pipeline that has lost units of every axis of a part."""
    model = load(folder)
    network = model.denoiser if part == "denoiser" else model.vae
    chosen = [axis for axis in removable(network) if axis.kind != "depth"]
    cuts = [cut_of(axis, some(axis, random.Random(0))) for axis in chosen]
    name = model.family.part if part == "denoiser" else "vae"
    model.structures[name] = prune(network, cuts, Structure())
    return model


FOLDERS = [(family, "denoiser") for family in tiny.PIPELINES] + [("unet", "vae")]


@pytest.mark.parametrize(("family", "part"), FOLDERS)
def test_folders_come_back_bit_for_bit(
    family: str, part: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = pruned_model(tiny_folder(family), part)
    model.save(tmp_path)
    again = load(tmp_path)
    assert again.structures == model.structures
    assert again.state_hash() == model.state_hash()
    assert again.hash() != load(tiny_folder(family)).hash()
    for own, other in ((model.denoiser, again.denoiser), (model.vae, again.vae)):
        assert torch.equal(output(own), output(other))
    assert list(tmp_path.rglob("*.py")) == []


def test_the_hash_covers_what_was_kept(tiny_folder: Callable[[str], Path]) -> None:
    model = pruned_model(tiny_folder("dit"))
    before = model.hash()
    first, *others = model.structures["transformer"].cuts
    model.structures["transformer"] = Structure((Cut(first.axis, first.module, first.size + 1, first.kept), *others))
    assert model.hash() != before


def test_damaged_folders_are_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    pruned_model(tiny_folder("dit")).save(tmp_path)
    file = tmp_path / "transformer" / STRUCTURE_FILE
    good = file.read_text()

    def refused(text: str, said: str) -> None:
        file.write_text(text)
        with pytest.raises(RefusedError, match=said):
            load(tmp_path)

    refused("{", "structure.json is not valid JSON")
    refused("[]", "must hold a JSON object")
    refused('{"format": 1}', "structure.json is no record of cuts: it must have format 1")
    raw = json.loads(good)
    raw["cuts"][0]["module"] = "../vae"
    refused(json.dumps(raw), "structure.json does not fit .*config.json: the network has no axis")
    refused(json.dumps({"format": 1, "cuts": [json.loads(good)["cuts"][0]]}), "holds .* with shape")
    file.unlink()
    file.symlink_to(tiny_folder("dit") / "transformer" / "config.json")
    with pytest.raises(RefusedError, match="leads out of the model folder"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(RefusedError, match=r"with shape .* but config.json describes"):
        load(tmp_path)


def test_a_small_file_cannot_ask_for_much_memory(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned_model(tiny_folder("dit")).save(tmp_path)
    monkeypatch.setattr(loader, "_MAX_CUT", 1.0)
    with pytest.raises(RefusedError, match="at least one in 1 must be left"):
        load(tmp_path)
