"""Writing and opening the shipped diffusers folders: half-precision safetensors, all components included."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from recipes.reference.denoisers import mmdit_scheduler, unet_scheduler


def plain_text_encoder(encoder: CLIPTextModelWithProjection) -> CLIPTextModel:
    """The same weights as a CLIPTextModel (no projection), as the SD1-type pipeline wants."""
    plain = CLIPTextModel(encoder.config)
    source = {key: value for key, value in encoder.state_dict().items() if not key.startswith("text_projection")}
    if not any(key.startswith("text_model.") for key in plain.state_dict()):
        source = {key.removeprefix("text_model."): value for key, value in source.items()}
    plain.load_state_dict(source)
    return plain.eval()


def _save(pipeline: DiffusionPipeline, folder: Path, tokenizer: Path, index: dict[str, Any] | None = None) -> None:
    """Save in float16 beside `folder`, then swap, so that a reader sees the old folder or the new one.

    The classic vocab.json and merges.txt of the folder `tokenizer` are laid beside each tokenizer.json, and `index` is
    added to model_index.json.
    """
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(fresh, safe_serialization=True)
    for target in fresh.glob("tokenizer*"):
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(tokenizer / name, target / name)
    card = fresh / "model_index.json"
    entries = json.loads(card.read_text()) | (index or {})
    card.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_unet_folder(
    folder: Path,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    encoder: CLIPTextModelWithProjection,
    tokenizer: Path,
) -> None:
    """Write the StableDiffusionPipeline folder; `tokenizer` is the tokenizer's folder.

    The modules given are left in float16.
    """
    words = CLIPTokenizer.from_pretrained(tokenizer)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=plain_text_encoder(encoder),
        tokenizer=words,
        unet=unet,
        scheduler=unet_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _save(pipeline, folder, tokenizer)


def write_mmdit_folder(
    folder: Path,
    mmdit: SD3Transformer2DModel,
    vae: AutoencoderKL,
    encoder: CLIPTextModelWithProjection,
    tokenizer: Path,
) -> None:
    """Write the StableDiffusion3Pipeline folder (one encoder in both CLIP places, no T5).

    `tokenizer` is the tokenizer's folder; the modules given are left in float16.
    """
    words = CLIPTokenizer.from_pretrained(tokenizer)
    pipeline = StableDiffusion3Pipeline(
        transformer=mmdit,
        scheduler=mmdit_scheduler(),
        vae=vae,
        text_encoder=encoder,
        tokenizer=words,
        text_encoder_2=encoder,
        tokenizer_2=words,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    _save(pipeline, folder, tokenizer, {"max_sequence_length": 1})


def read_text_encoder(folder: Path, device: torch.device) -> CLIPTextModelWithProjection:
    """The frozen text encoder of a shipped MMDiT folder, float32, in evaluation mode."""
    encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    return encoder.to(device).eval().requires_grad_(False)


def read_vae(folder: Path, device: torch.device) -> AutoencoderKL:
    """The frozen autoencoder of a shipped folder, float32, in evaluation mode."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    return vae.to(device).eval().requires_grad_(False)


def open_pipeline(folder: Path) -> tuple[DiffusionPipeline, dict[str, int]]:
    """Open a shipped folder in float32 and return it with the extra arguments its calls need.

    The SD3 pipeline must be told that there is no T5, and be called with max_sequence_length=1 as it was trained.
    """
    if (folder / "transformer").is_dir():
        pipeline = DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
        return pipeline, {"max_sequence_length": 1}
    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32), {}
