"""LoRA files: fused weights compute what the two factors beside the layer do, whatever the file calls them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from compress.errors import RecipeError, RefusedError
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.model.lora import fuse_lora
from compress.passes.base import PassContext
from compress.passes.quantize import Quantize
from compress.recipe.schema import Recipe
from tests.tiny_engine import SIDE, sampled

PROMPTS = ("a red circle", "large blue square")
RANK = 2
UNET = ("down_blocks.0.resnets.0.conv1", "up_blocks.1.resnets.0.conv_shortcut", "mid_block.attentions.0.proj_in")
TEXT = "encoder.layers.0.self_attn.q_proj"


def factors(layer: torch.nn.Module, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    down = torch.randn(RANK, *weight.shape[1:], generator=random) * 0.1
    return down, torch.randn(weight.shape[0], RANK, *[1] * (weight.ndim - 2), generator=random) * 0.1


def text_path(model: LatentDiffusion) -> str:
    return next(name for name, _ in model.text_encoders["text_encoder"].named_modules() if name.endswith(TEXT))


def file_of(model: LatentDiffusion, folder: Path, style: str, alpha: float | None) -> Path:
    """A LoRA of three layers of the UNet and one of the text encoder."""
    tensors = {}
    for seed, path in enumerate((*UNET, TEXT)):
        own = path != TEXT
        network = model.denoiser if own else model.text_encoders["text_encoder"]
        down, up = factors(network.get_submodule(path if own else text_path(model)), seed)
        if style == "kohya":
            flat = ("lora_unet_" if own else "lora_te_text_model_") + path.replace(".", "_")
            tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        elif style == "peft":
            flat = ("unet." if own else "text_encoder.text_model.") + path
            tensors |= {f"{flat}.lora_A.weight": down, f"{flat}.lora_B.weight": up}
        else:
            flat = ("unet." if own else "text_encoder.text_model.") + path
            tensors |= {f"{flat}.lora.down.weight": down, f"{flat}.lora.up.weight": up}
        if alpha is not None:
            tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{style}.safetensors")
    return folder / f"{style}.safetensors"


def beside(model: LatentDiffusion, scale: float) -> LatentDiffusion:
    """The model with the factors beside its layers, as training has them."""
    made = model.clone()
    for seed, path in enumerate((*UNET, TEXT)):
        network = made.denoiser if path != TEXT else made.text_encoders["text_encoder"]
        layer = network.get_submodule(path if path != TEXT else text_path(made))
        down, up = factors(layer, seed)

        def hook(
            module: torch.nn.Module,
            args: tuple[torch.Tensor],
            y: torch.Tensor,
            down: torch.Tensor = down,
            up: torch.Tensor = up,
        ) -> torch.Tensor:
            x = args[0]
            if isinstance(module, torch.nn.Conv2d):
                few = torch.nn.functional.conv2d(x, down, None, module.stride, module.padding)
                return y + scale * torch.nn.functional.conv2d(few, up)
            return y + scale * (x @ down.T) @ up.T

        layer.register_forward_hook(hook)
    return made


def latents(model: LatentDiffusion) -> np.ndarray:
    return model.runtime().sample(list(PROMPTS), [1, 2], SIDE, SIDE)


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> LatentDiffusion:
    return sampled(load(tiny_folder("unet")), 3)


@pytest.mark.parametrize(("style", "alpha"), [("kohya", 4.0), ("peft", None), ("diffusers", 1.0)])
@pytest.mark.parametrize("strength", [0.8, -0.5])
def test_fused_is_what_the_factors_compute(
    style: str, alpha: float | None, strength: float, model: LatentDiffusion, tmp_path: Path
) -> None:
    fused = model.clone()
    assert fuse_lora(fused, file_of(model, tmp_path, style, alpha), strength) == 4
    exact = latents(beside(model, strength * (1.0 if alpha is None else alpha / RANK)))
    change = np.abs(exact - latents(model)).max()
    assert change > 0.05
    assert np.abs(latents(fused) - exact).max() < 1e-4 * max(1.0, change)
    assert fused.hash() != model.hash()
    assert fused.provenance[-1] == {"lora": f"{style}.safetensors", "strength": strength, "layers": 4}


def test_no_strength_changes_nothing(model: LatentDiffusion, tmp_path: Path) -> None:
    fused = model.clone()
    fuse_lora(fused, file_of(model, tmp_path, "peft", None), 0.0)
    assert fused.hash() == model.hash()


def test_files_of_diffusers_are_read(model: LatentDiffusion, tmp_path: Path) -> None:
    """Written by diffusers itself."""
    down, up = factors(model.denoiser.get_submodule(UNET[2]), 2)
    own = {f"{UNET[2]}.lora_A.weight": down, f"{UNET[2]}.lora_B.weight": up}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=own)
    (file,) = tmp_path.glob("*.safetensors")
    fused = model.clone()
    assert fuse_lora(fused, file, 0.5) == 1
    change = fused.denoiser.get_submodule(UNET[2]).weight - model.denoiser.get_submodule(UNET[2]).weight
    expected = 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(change.shape)
    assert torch.allclose(change, expected, atol=1e-6)


def test_a_quantized_model_follows_the_strength(model: LatentDiffusion, tmp_path: Path) -> None:
    """What a LoRA changes in the float model, it changes in the int8 one: rounding does not hide it."""
    file = file_of(model, tmp_path, "peft", None)
    moved = {}
    for strength in (0.0, 3.0, 6.0):
        fused = model.clone()
        fuse_lora(fused, file, strength)
        exact, step = latents(fused), Quantize("none", parts={"denoiser": "int8-w8a8"})
        context = PassContext(PROMPTS, seed=9, height=SIDE, width=SIDE)
        edits = step.plan(fused, [])
        step.apply(fused, edits, context)
        moved[strength] = exact, latents(fused)
    for strength in (3.0, 6.0):
        floats, rounded = (moved[strength][kind] - moved[0.0][kind] for kind in (0, 1))
        assert np.corrcoef(floats.ravel(), rounded.ravel())[0, 1] > 0.95
    first, second = (np.linalg.norm(moved[strength][1] - moved[0.0][1]) for strength in (3.0, 6.0))
    assert second > 1.3 * first


def test_what_is_no_lora_of_this_model_is_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    good = load_file(file_of(model, tmp_path, "peft", None))
    name = f"unet.{UNET[0]}"

    def refused(changes: dict[str, torch.Tensor | None], message: str) -> None:
        tensors = {key: value for key, value in {**good, **changes}.items() if value is not None}
        file = tmp_path / "bad.safetensors"
        save_file(tensors, file)
        with pytest.raises(RefusedError, match=message):
            fuse_lora(model.clone(), file)

    refused({f"{name}.lora_A.weight": torch.zeros(RANK, 3, 3, 3)}, "are .* but the weight is .* of another model")
    refused({f"{name}.lora_B.weight": None}, "only one of its two factors")
    refused({f"{name}.lora_A.weight": torch.full((2, 2), float("nan"))}, "holds NaN or Inf")
    refused({"unet.nowhere.lora_A.weight": torch.zeros(2, 2)}, "no layer of the denoiser: it is of another model")
    refused({"lora_unet_input_blocks_1_0.lora_up.weight": torch.zeros(2, 2)}, "convert it with diffusers")
    refused({f"{name}.dora_scale": torch.zeros(2)}, "no LoRA of two factors")
    refused({"anything": torch.zeros(2)}, "is not a tensor of a LoRA")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "peft.safetensors").read_bytes()[:200])
    with pytest.raises(RefusedError, match="truncated or no safetensors file"):
        fuse_lora(model.clone(), tmp_path / "cut.safetensors")
    with pytest.raises(RefusedError, match="can run code when it is read"):
        fuse_lora(model.clone(), tmp_path / "x.pt")


def test_a_recipe_names_its_loras(model: LatentDiffusion, tmp_path: Path) -> None:
    file_of(model, tmp_path, "peft", None)
    text = (
        "schema_version: 1\nmodel: m\nloras: [{file: peft.safetensors, strength: 0.7}]\nsampler: {steps: 4}\n"
        "targets: [onnxruntime-cpu]\nshapes: {height: 64, width: 64}\nout: build/x\n"
    )
    recipe = Recipe.parse(text, folder=tmp_path)
    assert [(lora.file, lora.strength) for lora in recipe.loras] == [("peft.safetensors", 0.7)]
    assert Recipe.parse(recipe.to_yaml(), folder=tmp_path) == recipe
    with pytest.raises(RecipeError, match=re.escape("recipe:3: loras[0].file: there is no file 'none.safetensors'")):
        Recipe.parse(text.replace("peft.", "none."), folder=tmp_path)
