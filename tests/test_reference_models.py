"""Tests of the shipped reference models: they open, generate, fit their size limits, and their training resumes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from recipes.reference.folders import open_pipeline
from recipes.reference.latents import cached_latents
from recipes.reference.objectives import LatentBatches, unet_objective
from recipes.reference.prompts import read_prompts
from recipes.reference.scenes import HEADS, attribute_ids, draw_scenes, named_attributes
from recipes.reference.score import generate, read_hits, summarise
from recipes.reference.text import TOKENS, build_text_encoder, caption_words, tokenise, write_tokenizer
from recipes.reference.trainer import Budget, train
from recipes.reference.vae import build_vae, reconstruction_psnr, whiten

REFERENCE = Path(__file__).resolve().parent.parent / "recipes" / "reference"
MODELS = ("unet", "mmdit")
LIMIT = 16 * 1024 * 1024


@pytest.mark.parametrize("name", MODELS)
def test_folder_fits_its_limit_and_holds_safetensors_only(name: str) -> None:
    files = [file for file in (REFERENCE / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= LIMIT
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".txt"}


@pytest.mark.parametrize(("name", "kind"), [("unet", StableDiffusionPipeline), ("mmdit", StableDiffusion3Pipeline)])
def test_folder_opens_and_follows_its_prompts(name: str, kind: type) -> None:
    pipeline, _ = open_pipeline(REFERENCE / name)
    assert isinstance(pipeline, kind)
    rows = read_prompts(REFERENCE / "prompts" / "heldout.jsonl", 6)
    pictures = generate(REFERENCE / name, [prompt for prompt, _ in rows], 12, 3.0)
    assert pictures.shape == (6, 3, 64, 64)
    hits = read_hits(REFERENCE / "recogniser", pictures, [wanted for _, wanted in rows])
    assert summarise(hits, list(HEADS)).accuracy >= 0.8
    again = generate(REFERENCE / name, [rows[0][0]], 12, 3.0)
    assert np.abs(again[0] - pictures[0]).max() < 1e-2


def test_both_folders_share_vae_tokenizer_and_text_encoder() -> None:
    first, second = (open_pipeline(REFERENCE / name)[0] for name in MODELS)
    for key, value in first.vae.state_dict().items():
        assert torch.equal(value, second.vae.state_dict()[key])
    theirs = second.text_encoder.state_dict()
    for key, value in first.text_encoder.state_dict().items():
        name = key if key in theirs else f"text_model.{key}"
        assert torch.equal(value, theirs[name])
        assert torch.equal(value, second.text_encoder_2.state_dict()[name])
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab() == second.tokenizer_2.get_vocab()


def test_autoencoder_restores_held_out_scenes() -> None:
    vae = open_pipeline(REFERENCE / "unet")[0].vae
    assert reconstruction_psnr(vae, 32, torch.device("cpu")) >= 32.0
    with torch.no_grad():
        latents = vae.encode(draw_scenes("heldout", 5000, 128).images * 2.0 - 1.0).latent_dist.mean
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=0.15)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=0.25)


def test_recogniser_reads_fresh_scenes() -> None:
    scenes = draw_scenes("heldout", 1 << 35, 256)
    wanted = [named_attributes(row) for row in attribute_ids("heldout", 1 << 35, 256)]
    hits = read_hits(REFERENCE / "recogniser", scenes.images.numpy(), wanted)
    assert summarise(hits, list(HEADS)).accuracy >= 0.99
    shuffled = read_hits(REFERENCE / "recogniser", scenes.images.numpy(), wanted[1:] + wanted[:1])
    assert summarise(shuffled, list(HEADS)).accuracy < 0.6


def test_scorer_folder_describes_its_model() -> None:
    folder = REFERENCE / "recogniser"
    card = json.loads((folder / "scorer.json").read_text())
    assert card["schema_version"] == 1
    assert card["image_size"] == [64, 64]
    assert card["sha256"] == hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    assert {head: tuple(classes) for head, classes in card["heads"].items()} == HEADS
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_inputs()] == [card["input"]]
    shapes = {item.name: item.shape for item in session.get_outputs()}
    assert list(shapes) == [card["features"], *card["heads"]]
    for head, classes in card["heads"].items():
        assert shapes[head][1] == len(classes)


def test_every_caption_word_is_one_token(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    for word in caption_words():
        assert tokenizer.convert_ids_to_tokens(tokenizer(word).input_ids)[1:-1] == [f"{word}</w>"]
    ids = tokenise(tokenizer, [max(draw_scenes("check", 0, 200).captions, key=len)])
    assert ids.shape == (1, TOKENS)
    assert int(ids[0, -1]) == tokenizer.eos_token_id


def test_whitening_is_exact() -> None:
    torch.manual_seed(0)
    vae = build_vae().eval().requires_grad_(False)
    pictures = draw_scenes("train", 0, 8).images * 2.0 - 1.0
    before = vae.encode(pictures).latent_dist
    picture = vae.decode(before.mean).sample
    whiten(vae, torch.device("cpu"), 128)
    after = vae.encode(pictures).latent_dist
    assert torch.allclose(vae.decode(after.mean).sample, picture, atol=1e-4)
    ratio = (before.mean.std((0, 2, 3)) / after.mean.std((0, 2, 3)))[:, None, None]
    assert torch.allclose(after.std * ratio, before.std, rtol=1e-3)


def _tiny_run(folder: Path, stop_after: int | None) -> dict[str, torch.Tensor]:
    """Train a toy UNet for 6 steps from cached latents; `stop_after` raises KeyboardInterrupt before that step."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    tokenizer = write_tokenizer(folder / "tokenizer")
    encoder = build_text_encoder(tokenizer).eval()
    vae = build_vae().eval()
    latents, tokens = cached_latents(folder / "latents.pt", vae, tokenizer, torch.device("cpu"), 16, lambda line: None)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=128,
        norm_num_groups=4,
    )
    batches = LatentBatches(latents, tokens, tokenise(tokenizer, [""])[0], torch.device("cpu"), 4)
    objective = unet_objective(unet, encoder, batches)

    def loss_at(step: int) -> torch.Tensor:
        if step == stop_after:
            raise KeyboardInterrupt
        return objective(step)

    budget = Budget(steps=6, rate=1e-3, warmup=2, decay=3, save_seconds=0.0)
    return train("toy", unet, loss_at, budget, folder / "unet.pt", lambda line: None)


def test_interrupted_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = _tiny_run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        _tiny_run(tmp_path / "cut", 4)
    resumed = _tiny_run(tmp_path / "cut", None)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert not list((tmp_path / "cut").glob(".*"))
