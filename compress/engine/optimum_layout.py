"""The configuration files that let Optimum's ONNX diffusion pipelines open an engine folder with one path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion

PIPELINES = {"stable-diffusion": "StableDiffusionPipeline", "stable-diffusion-3": "StableDiffusion3Pipeline"}
"""Kinds of conditioning whose pipelines are written for Optimum -> the class named in model_index.json."""

_VOLATILE = ("_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype")
_FAST = {"CLIPTokenizer": "CLIPTokenizerFast", "T5Tokenizer": "T5TokenizerFast"}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def write_optimum_layout(model: LatentDiffusion, folder: Path) -> None:
    """Write model_index.json, the scheduler's configuration and one config.json per part beside the graphs.

    Models of other kinds get none of it.
    """
    if model.conditioning["kind"] not in PIPELINES:
        return
    part = model.family.part
    configs: dict[str, Any] = {part: model.denoiser, "vae_encoder": model.vae, "vae_decoder": model.vae}
    for name, network in {**configs, **model.text_encoders}.items():
        config = _config(network)
        if config.get("shift_factor", 0.0) is None:
            config["shift_factor"] = 0.0  # the pipeline of Stable Diffusion 3 adds it whether it is there or not
        _write(folder / name / "config.json", config)
    for name, tokenizer in model.tokenizers.items():
        special = {key: str(getattr(tokenizer, key)) for key in _SPECIAL if getattr(tokenizer, key, None)}
        length = int(tokenizer.model_max_length)
        _write(folder / name / "tokenizer_config.json", {**special, "model_max_length": length})
    _write(folder / "scheduler" / "scheduler_config.json", model.scheduler_config)
    _write(folder / "model_index.json", _index(model))


def _index(model: LatentDiffusion) -> dict[str, Any]:
    """model_index.json: the components there are, the others null."""
    index: dict[str, Any] = {
        "_class_name": PIPELINES[model.conditioning["kind"]],
        "_diffusers_version": model.index.get("_diffusers_version", "0.0.0"),
        "scheduler": ["diffusers", model.scheduler_config["_class_name"]],
        "vae": ["diffusers", type(model.vae).__name__],
        model.family.part: ["diffusers", type(model.denoiser).__name__],
    }
    for name, encoder in model.text_encoders.items():
        index[name] = ["transformers", type(encoder).__name__]
    for name, tokenizer in model.tokenizers.items():
        kind = type(tokenizer).__name__
        index[name] = ["transformers", _FAST.get(kind, kind)]
    absent = [key for key, value in model.index.items() if isinstance(value, list) and key not in index]
    index |= {key: [None, None] for key in absent}
    if model.family.name == "unet":
        index |= {
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
        }
    return index


def _config(network: Any) -> dict[str, Any]:
    """A configuration as JSON, without what depends on where the model came from."""
    config = network.config
    plain = config.to_dict() if hasattr(config, "to_dict") else {"_class_name": type(network).__name__, **config}
    return {key: value for key, value in plain.items() if key not in _VOLATILE}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
