"""Conditioning tensors against `encode_prompt` of the diffusers pipelines, and tokens against transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import T5Config, T5EncoderModel

from compress.errors import RefusedError
from compress.model import latent_diffusion as models
from compress.model.tokenizers import portable, save_tokenizer
from export.conditioning import PromptError, encode, of_size, unconditional
from export.tokenizer import Tokenizer, TokenizerError
from tests import tiny

PROMPTS = ["", "a large red circle", "Small BLUE ring, left of the yellow square", " a " + "green triangle above " * 30]
Folder = Callable[[str], Path]


def ours(folder: Path, prompts: list[Any]) -> dict[str, np.ndarray]:
    model = models.load(folder)
    tokenizers = {name: portable(tokenizer) for name, tokenizer in model.tokenizers.items()}
    return encode(model.conditioning, tokenizers, model.functions(), prompts)


def close(got: np.ndarray, expected: torch.Tensor) -> None:
    assert got.shape == tuple(expected.shape)
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=0, atol=1e-6)


def test_stable_diffusion(tiny_folder: Folder) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder("unet"))
    cond, uncond = pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=True)
    got = ours(tiny_folder("unet"), PROMPTS)
    assert set(got) == {"encoder_hidden_states"}
    close(got["encoder_hidden_states"], cond)
    close(ours(tiny_folder("unet"), unconditional(4))["encoder_hidden_states"], uncond)


@pytest.mark.parametrize("zeros", [True, False])
def test_stable_diffusion_xl(tiny_folder: Folder, tmp_path: Path, zeros: bool) -> None:
    """No prompt is all zeros, or the empty prompt; a negative prompt that is given, be it empty, is read."""
    folder = shutil.copytree(tiny_folder("sdxl"), tmp_path / "sdxl")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    cond, uncond, pooled, unpooled = pipeline.encode_prompt(PROMPTS)
    got = ours(folder, PROMPTS)
    assert set(got) == {"encoder_hidden_states", "text_embeds"}
    close(got["encoder_hidden_states"], cond)
    close(got["text_embeds"], pooled)
    got = ours(folder, unconditional(4))
    close(got["encoder_hidden_states"], uncond)
    close(got["text_embeds"], unpooled)
    assert (np.abs(got["text_embeds"]).max() == 0) == zeros
    _, uncond, _, unpooled = pipeline.encode_prompt(PROMPTS, negative_prompt=[""] * 4)
    got = ours(folder, [""] * 4)
    close(got["encoder_hidden_states"], uncond)
    close(got["text_embeds"], unpooled)
    mixed = ours(folder, ["", None, "a ring"])["text_embeds"]
    assert np.abs(mixed[0]).max() > 0
    assert (np.abs(mixed[1]).max() == 0) == zeros


def test_sizes_are_those_of_the_pipeline(tiny_folder: Folder) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder("sdxl"))
    size = (24, 16)
    expected = pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, tiny.TEXT_WIDTH)
    spec = models.load(tiny_folder("sdxl")).conditioning
    got = of_size(spec, {}, 3, *size)["time_ids"]
    assert got.dtype == np.float32
    close(got, expected.repeat(3, 1))
    assert of_size(spec, {"time_ids": got}, 3, *size) == {}
    assert of_size(models.load(tiny_folder("unet")).conditioning, {}, 3, *size) == {}


def test_stable_diffusion_3(tiny_folder: Folder) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder("sd3"), text_encoder_3=None, tokenizer_3=None)
    length = models.load(tiny_folder("sd3")).conditioning["max_sequence_length"]
    cond, uncond, pooled, unpooled = pipeline.encode_prompt(PROMPTS, PROMPTS, PROMPTS, max_sequence_length=length)
    got = ours(tiny_folder("sd3"), PROMPTS)
    assert set(got) == {"encoder_hidden_states", "pooled_projections"}
    close(got["encoder_hidden_states"], cond)
    close(got["pooled_projections"], pooled)
    got = ours(tiny_folder("sd3"), unconditional(4))
    close(got["encoder_hidden_states"], uncond)
    close(got["pooled_projections"], unpooled)


def test_stable_diffusion_3_with_t5(tmp_path: Path) -> None:
    torch.manual_seed(1)
    pipeline = tiny.stable_diffusion_3()
    tokenizer = tiny.t5_tokenizer()
    width = pipeline.transformer.config.joint_attention_dim
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipeline.register_modules(text_encoder_3=T5EncoderModel(config).eval(), tokenizer_3=tokenizer)
    pipeline.save_pretrained(tmp_path)
    length = tokenizer.model_max_length
    cond, _, pooled, _ = pipeline.encode_prompt(PROMPTS, PROMPTS, PROMPTS, max_sequence_length=length)
    got = ours(tmp_path, PROMPTS)
    close(got["encoder_hidden_states"], cond)
    close(got["pooled_projections"], pooled)


def test_pixart(tiny_folder: Folder) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder("pixart"))
    length = pipeline.tokenizer.model_max_length
    cond, mask, uncond, unmask = pipeline.encode_prompt(
        PROMPTS, device="cpu", max_sequence_length=length, clean_caption=False
    )
    got = ours(tiny_folder("pixart"), PROMPTS)
    assert set(got) == {"encoder_hidden_states", "encoder_attention_mask"}
    close(got["encoder_hidden_states"], cond)
    close(got["encoder_attention_mask"], mask.float())
    assert got["encoder_attention_mask"].dtype == np.float32
    got = ours(tiny_folder("pixart"), unconditional(4))
    close(got["encoder_hidden_states"], uncond)
    close(got["encoder_attention_mask"], unmask.float())


def test_flux(tiny_folder: Folder) -> None:
    pipeline, model = DiffusionPipeline.from_pretrained(tiny_folder("flux")), models.load(tiny_folder("flux"))
    length = model.conditioning["max_sequence_length"]
    cond, pooled, _ = pipeline.encode_prompt(PROMPTS, max_sequence_length=length)
    got = ours(tiny_folder("flux"), PROMPTS)
    assert set(got) == {"encoder_hidden_states", "pooled_projections", "guidance"}
    close(got["encoder_hidden_states"], cond)
    close(got["pooled_projections"], pooled)
    np.testing.assert_array_equal(got["guidance"], np.full(4, 3.5, np.float32))
    assert got["guidance"].dtype == np.float32
    close(ours(tiny_folder("flux"), unconditional(4))["encoder_hidden_states"][:1], cond[:1])


def test_classes(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("dit"), tmp_path / "named")
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {**{str(i): f"shape {i}" for i in range(9)}, "0": "ring, annulus", "9": "square"}
    (folder / "model_index.json").write_text(json.dumps(index))
    got = ours(folder, [3, "7", "square", "", " 0 ", np.int64(2), "annulus "])
    assert got["class_labels"].dtype == np.int64
    assert got["class_labels"].tolist() == [3, 7, 9, 10, 0, 2, 0]
    for prompt in ("ring, annulus", 10, -1, 1.5, "red", "²"):
        with pytest.raises(PromptError, match=r"there is no class .*0 to 9"):
            ours(folder, [prompt])


def test_what_cannot_be_followed_is_refused(tiny_folder: Folder) -> None:
    model = models.load(tiny_folder("unet"))
    tokenizers = {name: portable(tokenizer) for name, tokenizer in model.tokenizers.items()}
    with pytest.raises(PromptError, match="a prompt must be text, not 3"):
        encode(model.conditioning, tokenizers, model.functions(), ["a ring", 3])
    with pytest.raises(PromptError, match="kind 'video' is none of stable-diffusion"):
        encode({"kind": "video"}, tokenizers, model.functions(), ["a ring"])
    with pytest.raises(PromptError, match="the model has no 'tokenizer'"):
        encode(model.conditioning, {}, model.functions(), ["a ring"])
    with pytest.raises(PromptError, match="the model has no 'text_encoder'"):
        encode(model.conditioning, tokenizers, {}, ["a ring"])


@pytest.mark.parametrize("make", [tiny.clip_tokenizer, tiny.t5_tokenizer])
@pytest.mark.parametrize("max_length", [4, 12])
def test_tokens_are_those_of_transformers(make: Callable[[], Any], max_length: int, tmp_path: Path) -> None:
    theirs = make()
    path = save_tokenizer(theirs, tmp_path / "tokenizer")
    assert save_tokenizer(theirs, tmp_path / "again").read_bytes() == path.read_bytes()
    prompts = [*PROMPTS, "\n\ttabs  and   blanks ", "punctuation!? (50%) #1", "émigré naïve", "😀 漢字", "x" * 500]
    expected = theirs(prompts, padding="max_length", max_length=max_length, truncation=True, return_attention_mask=True)
    for tokenizer in (Tokenizer.open(path), Tokenizer.open(path.parent), portable(theirs)):
        ids, mask = tokenizer.encode(prompts, max_length)
        assert ids.dtype == mask.dtype == np.int64
        assert ids.tolist() == expected["input_ids"]
        assert mask.tolist() == expected["attention_mask"]
        assert tokenizer.encode([], max_length)[0].shape == (0, max_length)


def test_tokenizers_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny.clip_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(RefusedError, match="has no padding token"):
        save_tokenizer(tokenizer, tmp_path)
    with pytest.raises(RefusedError, match="is a Python tokenizer"):
        save_tokenizer(object(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_tokenizers_are_refused(tmp_path: Path) -> None:
    path = save_tokenizer(tiny.clip_tokenizer(), tmp_path)
    good = path.read_text()
    raw = json.loads(good)
    no_padding, no_model = {**raw, "padding": None}, {**raw, "model": {"type": "Unknown"}}
    for text in (good[: len(good) // 2], "", "{}", "[]", json.dumps(no_padding), json.dumps(no_model)):
        path.write_text(text)
        with pytest.raises(TokenizerError) as caught:
            Tokenizer.open(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.open(path)
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.open(tmp_path / "absent.json")


def test_running_needs_neither_torch_nor_transformers() -> None:
    """What an engine runs imports numpy, and `tokenizers` only once a tokenizer is read."""
    heavy = ("torch", "diffusers", "transformers", "compress", "onnx", "tokenizers")
    code = (
        "import sys; import export.runtime, export.conditioning, export.tokenizer, export.start, export.loop; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
