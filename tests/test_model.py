"""Loading and saving: what loads is exact, what is damaged is refused with one sentence."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from compress.errors import RefusedError
from compress.model.latent_diffusion import ARRAYS_FILE, STATE_FILE, LatentDiffusion, load
from export.quant_plan import Affine, LayerQuant, QuantPlan, WeightGrid
from tests import tiny

FAMILIES = ["unet", "sd3", "dit", "pixart", "flux", "sdxl"]
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
UNKNOWN_LAYOUT = json.dumps(
    {
        "schema_version": 4,
        "layout": {
            "slots": {"deep": {"tensor": "nowhere"}},
            "paths": {"full": {"read": [], "write": ["deep"]}, "shallow": {"read": ["deep"], "write": []}},
            "watch": [],
        },
    }
)
Folder = Callable[[str], Path]


@pytest.fixture
def copied(tiny_folder: Folder, tmp_path: Path) -> Folder:
    """Family name -> a copy of its toy pipeline that may be damaged."""
    return lambda family: Path(shutil.copytree(tiny_folder(family), tmp_path / family))


# What loads


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_equal_the_pipeline(tiny_folder: Folder, family: str) -> None:
    """Every function gives what the component of the diffusers pipeline gives, bit for bit."""
    model = load(tiny_folder(family))
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder(family), **absent)
    functions, parts = model.functions(), model.parts()
    assert set(functions) == set(parts)
    for name, part in parts.items():
        sizes = (2, tiny.SIDE, tiny.SIDE, tiny.PROMPT_TOKENS)
        inputs = (
            model.family.example_inputs(model.denoiser, *sizes) if name == "denoiser" else part.example_inputs(*sizes)
        )
        outputs = functions[name]({key: value.numpy() for key, value in inputs.items()} | {"unused": np.zeros(1)})
        assert tuple(outputs) == part.outputs
        for key, expected in theirs(pipeline, name, inputs).items():
            np.testing.assert_array_equal(outputs[key], expected.numpy(), err_msg=f"{name}.{key}")


def theirs(pipeline: Any, name: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        match name:
            case "denoiser" if hasattr(pipeline, "unet"):
                added = {key: inputs[key] for key in ("text_embeds", "time_ids") if key in inputs}
                taken = {key: value for key, value in inputs.items() if key not in added}
                return {"out_sample": pipeline.unet(**taken, added_cond_kwargs=added).sample}
            case "denoiser" if "Flux" in type(pipeline).__name__:
                return {"out_hidden_states": flux_output(pipeline, inputs)}
            case "denoiser":
                extra = (
                    {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if "Pix" in str(pipeline) else {}
                )
                return {"out_hidden_states": pipeline.transformer(**inputs, **extra).sample[:, :4]}
            case "vae_decoder":
                return {"sample": pipeline.vae.decode(inputs["latent_sample"]).sample}
            case "vae_encoder":
                return {"latent_parameters": pipeline.vae.encode(inputs["sample"]).latent_dist.parameters}
        encoded = getattr(pipeline, name)(**inputs, output_hidden_states=True)
        hidden = {f"hidden_states.{i}": state for i, state in enumerate(encoded.hidden_states)}
        return {
            "StableDiffusionPipeline": lambda: {
                "last_hidden_state": encoded.last_hidden_state,
                "pooler_output": encoded.pooler_output,
            },
            "StableDiffusionXLPipeline": lambda: (
                {"last_hidden_state": encoded.last_hidden_state}
                | (
                    {"pooler_output": encoded.pooler_output, "hidden_states.1": encoded.hidden_states[-2]}
                    if name == "text_encoder"
                    else hidden | {"text_embeds": encoded.text_embeds}
                )
            ),
            "FluxPipeline": lambda: (
                {"last_hidden_state": encoded.last_hidden_state}
                | ({"pooler_output": encoded.pooler_output} if name == "text_encoder" else {})
            ),
            "StableDiffusion3Pipeline": lambda: (
                hidden | {"text_embeds": encoded.text_embeds, "last_hidden_state": encoded.last_hidden_state}
            ),
            "PixArtAlphaPipeline": lambda: {"last_hidden_state": encoded.last_hidden_state},
        }[type(pipeline).__name__]()


def flux_output(pipeline: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The transformer called as the pipeline calls it."""
    latent, states = inputs["hidden_states"], inputs["encoder_hidden_states"]
    n, c, h, w = latent.shape
    packed = pipeline.transformer(
        hidden_states=pipeline._pack_latents(latent, n, c, h, w),
        timestep=inputs["timestep"] / 1000,
        guidance=inputs["guidance"],
        pooled_projections=inputs["pooled_projections"],
        encoder_hidden_states=states,
        txt_ids=torch.zeros(states.shape[1], 3),
        img_ids=pipeline._prepare_latent_image_ids(n, h // 2, w // 2, "cpu", torch.float32),
    ).sample
    scale = pipeline.vae_scale_factor
    return pipeline._unpack_latents(packed, h * scale, w * scale, scale)


def test_facts(tiny_folder: Folder) -> None:
    """Latents, conditioning and scheduler of each family, as the runtime is told."""
    models = {family: load(tiny_folder(family)) for family in FAMILIES}
    for model in models.values():
        assert model.latent == {
            "channels": 4,
            "downscale": 2,
            "scaling_factor": 0.18215,
            "shift_factor": 0.0,
            "multiple": 2,
        }
        assert (model.step_plan, model.layout, model.quant_plans) == (None, None, {})
    clip = {"part": "text_encoder", "tokenizer": "tokenizer", "max_length": tiny.PROMPT_TOKENS}
    second = {"part": "text_encoder_2", "tokenizer": "tokenizer_2", "max_length": tiny.PROMPT_TOKENS}
    used = {"hidden": "hidden_states.1", "pooled": "text_embeds"}
    assert models["unet"].conditioning == {"kind": "stable-diffusion", "encoders": [clip]}
    assert models["sdxl"].conditioning == {
        "kind": "stable-diffusion-xl",
        "encoders": [clip | used, second | used],
        "unconditional_zeros": True,
    }
    assert models["sd3"].conditioning == {
        "kind": "stable-diffusion-3",
        "encoders": [clip | used, second | used],
        "joint_attention_dim": 2 * tiny.TEXT_WIDTH,
        "max_sequence_length": 256,
    }
    assert models["flux"].conditioning == {
        "kind": "flux",
        "encoders": [clip | {"pooled": "pooler_output"}, second | {"max_length": tiny.PROMPT_TOKENS + 4}],
        "max_sequence_length": tiny.PROMPT_TOKENS + 4,
        "guidance": 3.5,
    }
    assert models["pixart"].conditioning == {"kind": "pixart", "encoders": [clip]}
    assert models["dit"].conditioning == {"kind": "class", "encoders": [], "classes": 10, "labels": {}}
    assert models["unet"].scheduler_config["_class_name"] == "DDIMScheduler"


def test_folder_may_say_more(copied: Folder) -> None:
    """The T5 tokens an MMDiT was trained with, and the names of classes, are read from model_index.json."""
    folder = copied("sd3")
    edit(folder, "model_index.json", max_sequence_length=1)
    assert load(folder).conditioning["max_sequence_length"] == 1
    folder = copied("dit")
    edit(folder, "model_index.json", id2label={str(i): f"class {i}, {i}th" for i in range(10)})
    labels = load(folder).conditioning["labels"]
    assert (labels["class 7"], labels["9th"], len(labels)) == (7, 9, 20)


def test_what_no_prompt_means_is_read_from_the_folder(copied: Folder) -> None:
    folder = copied("sdxl")
    edit(folder, "model_index.json", force_zeros_for_empty_prompt=False)
    assert load(folder).conditioning["unconditional_zeros"] is False


def test_functions_simulate_quantization(tiny_folder: Folder) -> None:
    """Planned layers of any part round their numbers, in every segment, unless simulation is off; weights stay."""
    model = load(tiny_folder("unet"))
    before, exact = model.hash(), run_all(model)
    model.layout = model.family.cut_layout(model.denoiser, 1)
    grid = Affine.of_range(-4.0, 4.0)
    for part, name in [
        ("denoiser", "mid_block.resnets.0.conv1"),
        ("vae_decoder", "decoder.conv_in"),
        ("text_encoder", next(n for n, m in model.text_encoders["text_encoder"].named_modules() if "fc1" in n)),
    ]:
        layer = model.parts()[part].component.get_submodule(name)
        op = "conv" if layer.weight.ndim == 4 else "linear"
        scales = tuple((layer.weight.flatten(1).abs().amax(1) / 127).tolist())
        model.quant_plans[part] = QuantPlan({name: LayerQuant(op, "int8-w8a8", WeightGrid.per_channel(scales), grid)})
    off, on = run_all(model, simulate=False), run_all(model)
    for part, output in exact.items():
        np.testing.assert_array_equal(off[part], output)
        assert (part == "vae_encoder") == np.array_equal(on[part], output)
        np.testing.assert_allclose(on[part], output, atol=0.2)
    assert model.hash() == before


def run_all(model: LatentDiffusion, simulate: bool = True) -> dict[str, np.ndarray]:
    """The last output of every part on its example inputs, the denoiser through its segments."""
    functions, sizes = model.functions(simulate), (2, tiny.SIDE, tiny.SIDE, tiny.PROMPT_TOKENS)
    known = {key: value.numpy() for key, value in model.family.example_inputs(model.denoiser, *sizes).items()}
    for segment in model.segments():
        known |= functions[segment.name](known)
    outputs = {"denoiser": known[model.family.output]}
    for name, part in model.parts().items():
        if name != "denoiser":
            inputs = {key: value.numpy() for key, value in part.example_inputs(*sizes).items()}
            outputs[name] = functions[name](inputs)[part.outputs[-1]]
    return outputs


def test_half_precision_is_widened(copied: Folder) -> None:
    """float16 files, also under a variant name, load as the float32 of the same numbers."""
    folder = copied("unet")
    tensors = {key: tensor.half() for key, tensor in load_file(folder / UNET_WEIGHTS).items()}
    (folder / UNET_WEIGHTS).unlink()
    save_file(tensors, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    model = load(folder)
    for key, tensor in model.denoiser.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors[key].float())


def test_shards_are_joined(copied: Folder, tiny_folder: Folder) -> None:
    folder = copied("unet")
    shard(folder)
    assert load(folder).hash() == load(tiny_folder("unet")).hash()


def shard(folder: Path) -> dict[str, Any]:
    """Split the UNet's weights over two files with an index."""
    tensors = load_file(folder / UNET_WEIGHTS)
    (folder / UNET_WEIGHTS).unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    keys = sorted(tensors)
    for i, name in enumerate(names):
        save_file({key: tensors[key] for key in keys[i::2]}, folder / "unet" / name)
    index = {"metadata": {"total_size": 1}, "weight_map": {key: names[i % 2] for i, key in enumerate(keys)}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return index


# Saving, cloning, hashing


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(tiny_folder: Folder, tmp_path: Path, family: str) -> None:
    """What was saved loads bit for bit, here and in diffusers; saving again writes the same files."""
    model = load(tiny_folder(family))
    grid = Affine.of_range(-1.0, 2.0)
    plan = QuantPlan(
        {"proj_out": LayerQuant("linear", "int8-w8a8", WeightGrid.per_channel((0.1, 0.3)), grid)},
        {"pos_embed": "sensitive"},
    )
    model.quant_plans["denoiser"] = plan
    model.layout = model.family.cut_layout(model.denoiser, 1)
    model.conditioning["max_sequence_length"] = 1
    model.save(tmp_path / "one")
    again = load(tmp_path / "one")
    again.save(tmp_path / "two")
    assert (again.hash(), again.state_hash()) == (model.hash(), model.state_hash())
    assert (again.layout, again.quant_plans, again.conditioning) == (
        model.layout,
        model.quant_plans,
        model.conditioning,
    )
    assert again.provenance == model.provenance
    for network, twin in zip(networks(model), networks(again), strict=True):
        for (key, tensor), (other, copy) in zip(network.state_dict().items(), twin.state_dict().items(), strict=True):
            assert (key, tensor.dtype) == (other, copy.dtype)
            assert torch.equal(tensor, copy)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*") if path.is_file()
    )
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".safetensors":
            assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
    DiffusionPipeline.from_pretrained(tmp_path / "one", **absent)


def networks(model: LatentDiffusion) -> list[Any]:
    return [model.denoiser, model.vae, *model.text_encoders.values()]


def test_unused_components_are_left_out(copied: Folder, tmp_path: Path) -> None:
    """A safety checker is not read; the saved folder says so, and opens in diffusers."""
    folder = copied("unet")
    edit(folder, "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    model = load(folder)
    assert model.provenance == [{"loaded": "unet", "ignored": ["safety_checker"]}]
    model.save(tmp_path / "saved")
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "saved").safety_checker is None


@pytest.mark.parametrize("family", FAMILIES)
def test_clone_is_independent(tiny_folder: Folder, family: str) -> None:
    model = load(tiny_folder(family))
    before, state = model.hash(), model.state_hash()
    twin = model.clone()
    assert (twin.hash(), twin.state_hash()) == (before, state)
    for network in networks(twin):
        next(network.parameters()).data.add_(1.0)
    twin.layout = twin.family.cut_layout(twin.denoiser, 0)
    twin.conditioning["kind"] = "other"
    twin.provenance.append({"changed": True})
    assert (model.hash(), model.state_hash(), model.layout) == (before, state, None)
    assert len(model.provenance) == 1
    assert twin.hash() != before


def test_plans_are_saved_without_the_networks(tiny_folder: Folder, tmp_path: Path) -> None:
    model = load(tiny_folder("unet"))
    weight = model.denoiser.conv_out.weight
    numbers = np.zeros((len(weight), weight[0].numel()), np.int8)
    grid = WeightGrid("int4", np.full((len(weight), 1), 0.1, np.float32), numbers=numbers)
    planned = model.clone(networks=False)
    planned.quant_plans["denoiser"] = QuantPlan({"conv_out": LayerQuant("conv", "int4-w4a32", grid, None)})
    planned.save_plans(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < numbers.nbytes + 4000
    again = model.with_plans(tmp_path)
    assert again.quant_plans == planned.quant_plans
    assert again.state_hash() == planned.state_hash() != model.state_hash()
    assert again.denoiser is model.denoiser
    numbers[0, 0] = 1
    assert planned.state_hash() != again.state_hash()
    (tmp_path / ARRAYS_FILE).unlink()
    with pytest.raises(RefusedError, match="cannot be read"):
        model.with_plans(tmp_path)


def test_what_pytorch_computes_alike_is_known(tiny_folder: Folder) -> None:
    model = load(tiny_folder("unet"))
    other = model.clone()
    assert model.computes_like(other)
    other.fusions = {"conv_in": "nothing"}
    other.quant_plans["denoiser"] = QuantPlan({}, storage="float16", inference_precision="bfloat16")
    assert model.computes_like(other)
    grid = WeightGrid.per_channel(np.ones(len(model.denoiser.conv_out.weight)))
    other.quant_plans["denoiser"] = QuantPlan({"conv_out": LayerQuant("conv", "int8-w8a32", grid, None)})
    assert not model.computes_like(other)
    changed = model.clone()
    with torch.no_grad():
        changed.denoiser.conv_out.bias += 1.0
    assert not model.computes_like(changed)


def test_a_plan_without_arrays_is_saved_too(tiny_folder: Folder, tmp_path: Path) -> None:
    """Weights that are only stored in 16 bits have no scales and no numbers."""
    model = load(tiny_folder("unet"))
    planned = model.clone(networks=False)
    planned.quant_plans["denoiser"] = QuantPlan({}, storage="float16", inference_precision="bfloat16")
    planned.save_plans(tmp_path)
    assert model.with_plans(tmp_path).quant_plans == planned.quant_plans


def test_hash_sees_everything(tiny_folder: Folder) -> None:
    """One changed weight of any component, one changed option, one changed plan: another hash. Use changes nothing."""
    model = load(tiny_folder("sd3"))
    seen = {model.hash()}
    assert load(tiny_folder("sd3")).hash() in seen
    model.tokenizers["tokenizer"](["a red circle"], padding="max_length", max_length=7, truncation=True)
    assert model.hash() in seen
    for network in networks(model):
        list(network.parameters())[-1].data.view(-1)[-1].add_(1e-3)
        assert model.hash() not in seen
        seen.add(model.hash())
    model.scheduler_config["shift"] = 3.5
    assert model.hash() not in seen
    state = model.state_hash()
    model.layout = model.family.cut_layout(model.denoiser, 2)
    assert model.hash() == load_hash(model)
    assert model.state_hash() != state


def load_hash(model: LatentDiffusion) -> str:
    model.layout = None
    uncut = model.hash()
    model.layout = model.family.cut_layout(model.denoiser, 2)
    return uncut


# What is refused


def edit(folder: Path, name: str, **changes: Any) -> None:
    """Change keys of a JSON file; `...` removes one."""
    content = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def weights(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def gone(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def cut_off(name: str, share: float) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def filled(name: str, key: str, value: float) -> Callable[[Path], object]:
    return lambda folder: weights(folder, name, lambda tensors: tensors[key].view(-1)[0].fill_(value))


def edited(name: str, **changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder, name, **changes)


def pickled(folder: Path) -> None:
    (folder / UNET_WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def linked_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / UNET_WEIGHTS).rename(outside)
    (folder / UNET_WEIGHTS).symlink_to(outside)


def dangling(folder: Path) -> None:
    (folder / UNET_WEIGHTS).unlink()
    (folder / UNET_WEIGHTS).symlink_to(folder / "unet" / "nowhere")


def folder_linked_out(folder: Path) -> None:
    (folder / "tokenizer").rename(folder.parent / "elsewhere")
    (folder / "tokenizer").symlink_to(folder.parent / "elsewhere")


def shard_outside(folder: Path) -> None:
    index = shard(folder)
    first = sorted(index["weight_map"])[0]
    index["weight_map"][first] = "../../../etc/hostname"
    path = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))


def shard_missing(folder: Path) -> None:
    shard(folder)
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def two_variants(folder: Path) -> None:
    path = folder / UNET_WEIGHTS
    shutil.copy(path, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    path.rename(path.with_name("diffusion_pytorch_model.bf16.safetensors"))


def lying_header(folder: Path) -> None:
    path = folder / UNET_WEIGHTS
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def other_part(source: str, part: str, **options: Any) -> Callable[[Path], object]:
    """Replace a component by one of the same class but another width."""

    def damage(folder: Path) -> None:
        torch.manual_seed(0)
        component: Any = getattr(tiny, source)(**options)
        component.save_pretrained(folder / part)

    return damage


def wide_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {f"extra{i}": 200 + i for i in range(50)}
    path.write_text(json.dumps(content))


def other_vae(folder: Path) -> None:
    vae = tiny.vae()
    type(vae).from_config(dict(vae.config) | {"latent_channels": 8}).save_pretrained(folder / "vae")


def wide_text_encoder(folder: Path) -> None:
    tokenizer = tiny.clip_tokenizer()
    config = tiny.clip_config(tokenizer)
    config.hidden_size, config.num_attention_heads = 24, 2
    tiny.CLIPTextModel(config).save_pretrained(folder / "text_encoder")


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    # model_index.json
    "no folder": ("unet", shutil.rmtree, "is not a folder"),
    "no index": ("unet", gone("model_index.json"), "model_index.json is missing"),
    "index is no JSON": ("unet", text("model_index.json", "{"), "not valid JSON"),
    "index is binary": ("unet", lambda f: (f / "model_index.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "index is a list": ("unet", text("model_index.json", "[1]"), "must hold a JSON object, not a list"),
    "index nests too deep": ("unet", text("model_index.json", "[" * 100_000), "not valid JSON"),
    "unknown pipeline": ("unet", edited("model_index.json", _class_name="StableDiffusionPipelin"), "did you mean"),
    "no pipeline": ("unet", edited("model_index.json", _class_name=["x"]), "not a supported pipeline"),
    "another pipeline": ("unet", edited("model_index.json", _class_name="KolorsPipeline"), "not a supported pipeline"),
    "one text encoder": (
        "unet",
        edited("model_index.json", _class_name="StableDiffusionXLPipeline"),
        "has no 'text_encoder_2'",
    ),
    "unknown class": (
        "unet",
        edited("model_index.json", unet=["diffusers", "UNet3D"]),
        "not a supported class of 'unet'",
    ),
    "malformed entry": ("unet", edited("model_index.json", vae=["diffusers", 3]), "must be .library, class."),
    "missing component": ("unet", edited("model_index.json", vae=...), "has no 'vae'"),
    "missing tokenizer": ("sd3", edited("model_index.json", tokenizer_2=[None, None]), "has no 'tokenizer_2'"),
    "extra component": (
        "unet",
        edited("model_index.json", controlnet=["diffusers", "X"]),
        "'controlnet' is not a comp",
    ),
    # config.json
    "no config": ("unet", gone("unet/config.json"), "config.json is missing"),
    "config is no JSON": ("unet", cut_off("unet/config.json", 0.5), "config.json is not valid JSON"),
    "config of another class": ("unet", edited("vae/config.json", _class_name="VQModel"), "describes 'VQModel'"),
    "quantized": ("unet", edited("unet/config.json", quantization_config={"load_in_8bit": True}), "quantized weights"),
    "impossible config": ("unet", edited("unet/config.json", norm_num_groups=7), "does not describe a UNet2DCondition"),
    "config of wrong types": ("unet", edited("unet/config.json", block_out_channels="abc"), "does not describe"),
    "endless config": ("sd3", edited("transformer/config.json", num_layers=10**9), "at most 512"),
    "huge config": ("sd3", edited("transformer/config.json", num_attention_heads=10**5), "not of the same model"),
    "no sample size": ("unet", edited("unet/config.json", sample_size=None), "sample_size is None"),
    "scaling factor": (
        "unet",
        edited("vae/config.json", scaling_factor=float("nan")),
        "scaling_factor of the VAE is nan",
    ),
    # weights
    "no weights": ("unet", gone(UNET_WEIGHTS), "diffusion_pytorch_model.safetensors is missing"),
    "no part": ("unet", lambda folder: shutil.rmtree(folder / "vae"), "config.json is missing"),
    "truncated": ("unet", cut_off(UNET_WEIGHTS, 0.7), "truncated or no safetensors"),
    "header truncated": ("unet", cut_off("text_encoder/model.safetensors", 0.01), "truncated or no safetensors"),
    "empty file": ("unet", cut_off(UNET_WEIGHTS, 0.0), "truncated or no safetensors"),
    "lying header": ("unet", lying_header, "truncated or no safetensors"),
    "no safetensors": ("unet", text(UNET_WEIGHTS, "<html>not found</html>"), "truncated or no safetensors"),
    "NaN": ("unet", filled(UNET_WEIGHTS, "conv_in.weight", float("nan")), "holds NaN or Inf in 'conv_in.weight'"),
    "Inf": (
        "sd3",
        filled("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.bias", float("inf")),
        "NaN or Inf",
    ),
    "pickle": ("unet", pickled, "is a pickle, which can run code"),
    "missing tensor": (
        "unet",
        lambda f: weights(f, UNET_WEIGHTS, lambda t: t.pop("conv_out.bias")),
        "lacks tensor 'conv_out",
    ),
    "unexpected tensor": (
        "unet",
        lambda f: weights(f, UNET_WEIGHTS, lambda t: t.update(extra=torch.ones(3))),
        "has the unexpected tensor 'extra'",
    ),
    "missing text tensor": (
        "unet",
        lambda f: weights(f, "text_encoder/model.safetensors", lambda t: t.pop(sorted(t)[-1])),
        "lacks tensor",
    ),
    "shape": (
        "unet",
        lambda f: weights(f, UNET_WEIGHTS, lambda t: t.update({"conv_out.bias": torch.ones(5)})),
        r"'conv_out.bias' with shape \(5,\), but config.json describes \(4,\)",
    ),
    "two variants": ("unet", two_variants, "several variants of its weights .bf16, fp16."),
    "shard missing": ("unet", shard_missing, "00002-of-00002.safetensors is missing"),
    "shard outside": ("unet", shard_outside, "leads out of the model folder|is missing"),
    "weights linked out": ("unet", linked_out, "leads out of the model folder"),
    "folder linked out": ("unet", folder_linked_out, "leads out of the model folder"),
    "dangling link": ("unet", dangling, "is missing|leads out|link to nothing"),
    # tokenizers and scheduler
    "no tokenizer": ("unet", lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer is missing"),
    "damaged tokenizer": ("unet", cut_off("tokenizer/tokenizer.json", 0.5), "cannot be loaded as a fast tokenizer"),
    "no scheduler": ("unet", gone("scheduler/scheduler_config.json"), "scheduler_config.json is missing"),
    "scheduler of no class": ("unet", edited("scheduler/scheduler_config.json", _class_name=3), "_class_name must be"),
    # components of different models
    "tokenizer too large": ("unet", wide_tokenizer, "tokens, but text_encoder embeds"),
    "tokenizer too long": ("unet", edited("tokenizer/tokenizer_config.json", model_max_length=77), "has 12 positions"),
    "end of text": ("unet", edited("text_encoder/config.json", eos_token_id=5), "ends a text at token 5"),
    "latent channels": ("unet", other_vae, "latent_channels of the VAE is 8, but in_channels of the denoiser is 4"),
    "text width": ("unet", wide_text_encoder, "hidden_size of the text encoder is 24, but cross_attention_dim"),
    "joint width": (
        "sd3",
        other_part("sd3", "transformer", joint_attention_dim=24),
        "both text encoders is 32, but joint_attention",
    ),
    "pooled width": (
        "sd3",
        other_part("sd3", "transformer", pooled_projection_dim=48),
        "both text encoders is 32, but pooled_projection",
    ),
    "caption width": (
        "pixart",
        other_part("pixart", "transformer", caption_channels=24),
        "d_model of the text encoder is 16, but caption",
    ),
    "both text widths": (
        "sdxl",
        other_part("sdxl", "unet", cross_attention_dim=24),
        "hidden_size of both text encoders is 32, but cross_attention_dim",
    ),
    "pooled text width": (
        "sdxl",
        other_part("sdxl", "unet", projection_class_embeddings_input_dim=60),
        "projection_dim of text_encoder_2 is 16, but text_embeds of the UNet is 12",
    ),
    "no sizes": (
        "sdxl",
        other_part("sdxl", "unet", addition_embed_type=None),
        "addition_embed_type of the UNet is None, but that of a StableDiffusionXLPipeline is 'text_time'",
    ),
    "unwanted sizes": (
        "unet",
        other_part("sdxl", "unet", cross_attention_dim=16),
        "'text_time', but that of a StableDiffusionPipeline is not 'text_time'",
    ),
    "aesthetics": (
        "sdxl",
        edited("model_index.json", requires_aesthetics_score=True),
        "a score among its sizes .requires_aesthetics_score",
    ),
    "latent means": ("sdxl", edited("vae/config.json", latents_mean=[0.0] * 4), "channel by channel .latents_mean"),
    "flux latent channels": (
        "flux",
        other_part("flux", "transformer", in_channels=32),
        "latent_channels of the VAE is 4, but in_channels / 4 of the denoiser is 8",
    ),
    "flux pooled width": (
        "flux",
        other_part("flux", "transformer", pooled_projection_dim=24),
        "hidden_size of the CLIP is 16, but pooled_projection",
    ),
    "flux joint width": (
        "flux",
        other_part("flux", "transformer", joint_attention_dim=24),
        "d_model of the T5 is 16, but joint_attention",
    ),
    "no room for a prompt": ("unet", edited("tokenizer/tokenizer_config.json", model_max_length=0), "no prompt fits"),
    "class count": (
        "dit",
        edited("model_index.json", id2label={"0": "one"}),
        "number of labels in model_index.json is 1",
    ),
    "labels": ("dit", edited("model_index.json", id2label=3), "model_index.json cannot be followed"),
    "T5 tokens": ("sd3", edited("model_index.json", max_sequence_length="many"), "max_sequence_length in model_index"),
    "inpainting": ("unet", other_part("unet", "unet", in_channels=9), "takes 9 channels and gives 4"),
    # our own state
    "state is no JSON": ("unet", text(STATE_FILE, "nonsense"), "not valid JSON"),
    "state of the future": ("unet", text(STATE_FILE, '{"schema_version": 99}'), "schema version 99"),
    "state without plans": ("unet", text(STATE_FILE, '{"schema_version": 4, "layout": null}'), "cannot be read"),
    "state of an unknown layout": ("unet", text(STATE_FILE, UNKNOWN_LAYOUT), "which no unit of the denoiser computes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused(copied: Folder, damage: str) -> None:
    """One sentence that names the cause, whatever is wrong."""
    family, spoil, reason = DAMAGES[damage]
    folder = copied(family)
    spoil(folder)
    with pytest.raises(RefusedError, match=reason) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_code == 3


VALUES = [None, -1, 0, 3, "x", [], {}, [1, 2], True, 1e9, 10**12, 0.5, float("nan"), ...]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_option_may_be_wrong(copied: Folder, family: str) -> None:
    """Options of any file, changed at random, either load or are refused; nothing else is ever raised."""
    folder, dice = copied(family), random.Random(family)
    files = sorted(path for path in folder.rglob("*.json") if path.name != "tokenizer.json")
    refused = []
    for _ in range(12):
        path = dice.choice(files)
        before = path.read_text()
        key, value = dice.choice(sorted(json.loads(before))), dice.choice(VALUES)
        edit(folder, str(path.relative_to(folder)), **{key: value})
        try:
            load(folder)
        except RefusedError as refusal:
            refused.append(str(refusal))
        path.write_text(before)
    assert refused
    assert not [sentence for sentence in refused if "\n" in sentence]
    load(folder)
