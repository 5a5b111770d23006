"""Loads the components of a diffusers folder, and refuses with one sentence what is damaged, unknown or mismatched."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from compress.checkpoint import Weights, inside, read_json, read_weights, refusing
from compress.errors import RefusedError
from compress.families import FAMILIES, Family
from compress.nearest import unknown
from compress.parts import TEXT_ENCODERS

PIPELINES: dict[str, str] = {
    "StableDiffusionPipeline": "UNet2DConditionModel",
    "StableDiffusionImg2ImgPipeline": "UNet2DConditionModel",
    "StableDiffusionInpaintPipeline": "UNet2DConditionModel",
    "StableDiffusion3Pipeline": "SD3Transformer2DModel",
    "StableDiffusion3Img2ImgPipeline": "SD3Transformer2DModel",
    "StableDiffusion3InpaintPipeline": "SD3Transformer2DModel",
    "DiTPipeline": "DiTTransformer2DModel",
    "PixArtAlphaPipeline": "PixArtTransformer2DModel",
    "PixArtSigmaPipeline": "PixArtTransformer2DModel",
}
"""diffusers pipeline class -> the class of its denoiser."""

_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
_MAX_RATIO = 2.0


@dataclass
class Components:
    """What a folder holds, in float32 and in evaluation mode."""

    index: dict[str, Any]
    family: Family
    denoiser: nn.Module
    vae: nn.Module
    text_encoders: dict[str, nn.Module]
    tokenizers: dict[str, Any]
    scheduler_config: dict[str, Any]
    ignored: list[str] = field(default_factory=list)


def load_components(root: Path) -> Components:
    """Read every component of a diffusers folder. Nothing in the folder is executed.

    Raises:
        RefusedError: one sentence with the file, the cause and the way out.
    """
    if not root.is_dir():
        raise RefusedError(f"{root} is not a folder: give the path of a diffusers model folder")
    index = read_json(root, "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise RefusedError(f"{root / 'model_index.json'}: {unknown(pipeline, 'a known pipeline', PIPELINES)}")
    named = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry != [None, None]}
    family = FAMILIES[PIPELINES[pipeline]]
    denoiser = _module(root, named, family.part, {family.denoiser_class})
    family.check(denoiser)
    encoders = [name for name in named if name.startswith("text_encoder")]
    components = Components(
        index=index,
        family=family,
        denoiser=denoiser,
        vae=_module(root, named, "vae", {"AutoencoderKL"}),
        text_encoders={name: _module(root, named, name, set(TEXT_ENCODERS)) for name in sorted(encoders)},
        tokenizers={name: _tokenizer(root, name) for name in sorted(named) if name.startswith("tokenizer")},
        scheduler_config=_scheduler_config(root, named),
        ignored=[name for name in named if name in _UNUSED],
    )
    read = {family.part, "vae", "scheduler", *components.text_encoders, *components.tokenizers, *components.ignored}
    if left := sorted(set(named) - read):
        raise RefusedError(
            f"{root / 'model_index.json'}: {unknown(left[0], 'a component of ' + pipeline, sorted(read))}"
        )
    return components


def _module(root: Path, named: Mapping[str, Any], name: str, classes: set[str]) -> nn.Module:
    """Load one network: its class must be among `classes`, its weights exactly those its configuration describes."""
    if name not in named:
        raise RefusedError(f"{root / 'model_index.json'} has no {name!r}: the pipeline cannot run without it")
    library, class_name = (*named[name], None, None)[:2]
    if class_name not in classes:
        raise RefusedError(
            f"{root / 'model_index.json'}: {unknown(class_name, f'a known class of {name!r}', sorted(classes))}"
        )
    config = read_json(root, f"{name}/config.json")
    declared = config.get("_class_name", (config.get("architectures") or [class_name])[0])
    where = root / name / "config.json"
    if declared != class_name:
        raise RefusedError(f"{where} describes a {declared}, but model_index.json says {class_name}: one is wrong")
    if config.get("quantization_config") is not None:
        raise RefusedError(f"{where} describes quantized weights: start from the float checkpoint")
    ours = library == "diffusers"
    weights = read_weights(root, name, "diffusion_pytorch_model" if ours else "model")
    cls = getattr(diffusers if ours else transformers, class_name)
    with _quiet(), refusing(f"{where} does not describe a {class_name}"), torch.device("meta"):
        empty = cls.from_config(config) if ours else cls(cls.config_class.from_dict(config))
    expected = sum(tensor.numel() for tensor in empty.state_dict().values())
    if not 1 / _MAX_RATIO <= expected / max(1, weights.parameters) <= _MAX_RATIO:
        raise RefusedError(
            f"{where} describes {expected} parameters, but {weights.files[0].name} holds {weights.parameters}: "
            "they are not of the same model"
        )
    with _quiet(), refusing(f"{root / name} cannot be loaded as {class_name}"):
        module, info = _read(cls, root, name, ours, weights)
    _check_keys(weights.files[0], class_name, info)
    return module.float().eval().requires_grad_(False)


def _read(cls: Any, root: Path, name: str, ours: bool, weights: Weights) -> tuple[nn.Module, Mapping[str, Any]]:
    options: dict[str, Any] = {
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        "variant": weights.variant,
    }
    if ours:
        return cls.from_pretrained(root / name, torch_dtype=torch.float32, low_cpu_mem_usage=False, **options)
    return cls.from_pretrained(root / name, dtype=torch.float32, **options)


def _check_keys(file: Path, class_name: str, info: Mapping[str, Any]) -> None:
    for kind, meaning in (("missing_keys", "lacks"), ("unexpected_keys", "has the unexpected")):
        if keys := sorted(info.get(kind) or ()):
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise RefusedError(
                f"{file} {meaning} tensor {keys[0]!r}{more}: it is not the {class_name} of its config.json"
            )
    if mismatched := sorted(info.get("mismatched_keys") or ()):
        key, stored, described = mismatched[0][:3]
        raise RefusedError(
            f"{file} holds {key!r} with shape {tuple(stored)}, but config.json describes {tuple(described)}: "
            "they are not of the same model"
        )


def _tokenizer(root: Path, name: str) -> Any:
    folder = inside(root, name)
    for path in folder.rglob("*"):
        inside(root, str(path.relative_to(root)))
    read_json(root, f"{name}/tokenizer_config.json")
    with _quiet(), refusing(f"{folder} cannot be loaded as a fast tokenizer (a tokenizer.json is the surest form)"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise RefusedError(f"{folder} holds no fast tokenizer: save one with a tokenizer.json")
    return tokenizer


def _scheduler_config(root: Path, named: Mapping[str, Any]) -> dict[str, Any]:
    if "scheduler" not in named:
        raise RefusedError(f"{root / 'model_index.json'} has no 'scheduler': the pipeline cannot run without it")
    config = read_json(root, "scheduler/scheduler_config.json")
    if not isinstance(config.setdefault("_class_name", named["scheduler"][-1]), str):
        raise RefusedError(f"{root / 'scheduler' / 'scheduler_config.json'}: _class_name must be a class of diffusers")
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries from printing while they load; what matters is raised as an error."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        if bars:
            transformers.utils.logging.enable_progress_bar()
