"""Loads the components of a diffusers folder, and refuses with one sentence what is damaged, unknown or mismatched."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from compress.errors import RefusedError
from compress.families import CONTROLLED_UNET, FAMILIES, Family, Network
from compress.model.checkpoint import Weights, inside, read_json, read_weights, refusing
from compress.model.parts import TEXT_ENCODERS
from compress.model.quantized_weights import read
from compress.nearest import unknown
from compress.pruning.structure import STRUCTURE_FILE, Structure
from export.quant_plan import LayerQuant


@dataclass(frozen=True)
class Pipeline:
    """What a diffusers pipeline consists of, beside VAE, scheduler and one tokenizer per text encoder.

    Attributes:
        denoiser: its class.
        encoders: text encoder -> class.
        optional: text encoders the pipeline also runs without.
        family: of the denoiser, where its class does not tell.
        unread: components that are the caller's to run.
    """

    denoiser: str
    encoders: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)
    family: Family | None = None
    unread: tuple[str, ...] = ()


_STABLE_DIFFUSION = Pipeline("UNet2DConditionModel", {"text_encoder": "CLIPTextModel"})
_STABLE_DIFFUSION_XL = Pipeline(
    "UNet2DConditionModel", {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
)
_STABLE_DIFFUSION_3 = Pipeline(
    "SD3Transformer2DModel",
    {"text_encoder": "CLIPTextModelWithProjection", "text_encoder_2": "CLIPTextModelWithProjection"},
    optional={"text_encoder_3": "T5EncoderModel"},
)
_FLUX = Pipeline("FluxTransformer2DModel", {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"})
_PIXART = Pipeline("PixArtTransformer2DModel", {"text_encoder": "T5EncoderModel"})

PIPELINES: dict[str, Pipeline] = {
    "StableDiffusionPipeline": _STABLE_DIFFUSION,
    "StableDiffusionImg2ImgPipeline": _STABLE_DIFFUSION,
    "StableDiffusionInpaintPipeline": _STABLE_DIFFUSION,
    "StableDiffusionControlNetPipeline": replace(_STABLE_DIFFUSION, family=CONTROLLED_UNET, unread=("controlnet",)),
    "StableDiffusionXLControlNetPipeline": replace(
        _STABLE_DIFFUSION_XL, family=CONTROLLED_UNET, unread=("controlnet",)
    ),
    "StableDiffusionXLPipeline": _STABLE_DIFFUSION_XL,
    "StableDiffusionXLImg2ImgPipeline": _STABLE_DIFFUSION_XL,
    "StableDiffusionXLInpaintPipeline": _STABLE_DIFFUSION_XL,
    "StableDiffusion3Pipeline": _STABLE_DIFFUSION_3,
    "StableDiffusion3Img2ImgPipeline": _STABLE_DIFFUSION_3,
    "StableDiffusion3InpaintPipeline": _STABLE_DIFFUSION_3,
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "FluxPipeline": _FLUX,
    "FluxImg2ImgPipeline": _FLUX,
    "FluxInpaintPipeline": _FLUX,
    "DiTPipeline": Pipeline("DiTTransformer2DModel"),
}
"""diffusers pipeline class -> what it consists of."""

_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
_LIMITS = {
    "sample_size": 2048,
    "pos_embed_max_size": 512,
    "num_layers": 512,
    "num_single_layers": 512,
    "num_hidden_layers": 512,
}
_MAX_RATIO = 2.0
_MAX_CUT = 64.0
"""Of a pruned network, parameters before for each one left: memory is taken for all of them."""


@dataclass
class Components:
    """What a folder holds, in float32 and in evaluation mode; `structures` of those that are pruned."""

    index: dict[str, Any]
    family: Family
    denoiser: Network
    vae: Network
    text_encoders: dict[str, Network]
    tokenizers: dict[str, Any]
    scheduler_config: dict[str, Any]
    ignored: list[str] = field(default_factory=list)
    layers: Mapping[str, LayerQuant] = field(default_factory=dict)
    """Of the denoiser, those that are stored in few bits."""
    structures: dict[str, Structure] = field(default_factory=dict)


def load_components(root: Path) -> Components:
    """Read every component of a diffusers folder. Nothing in the folder is executed.

    Raises:
        RefusedError: one sentence with the file, the cause and the way out.
    """
    if not root.is_dir():
        raise RefusedError(f"{root} is not a folder: give the path of a diffusers model folder")
    index = read_json(root, "model_index.json")
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in PIPELINES:
        raise RefusedError(f"{root / 'model_index.json'}: {unknown(name, 'a supported pipeline', PIPELINES)}")
    pipeline, classes = PIPELINES[name], _classes(root, index)
    family = pipeline.family or FAMILIES[pipeline.denoiser]
    encoders = dict(pipeline.encoders) | {key: value for key, value in pipeline.optional.items() if key in classes}
    tokenizers = [encoder.replace("text_encoder", "tokenizer") for encoder in encoders]
    read = [family.part, "vae", "scheduler", *encoders, *tokenizers]
    if lacking := [component for component in read if component not in classes]:
        raise RefusedError(f"{root / 'model_index.json'} has no {lacking[0]!r}: the pipeline cannot run without it")
    unused = (*_UNUSED, *pipeline.unread)
    if left := sorted(set(classes) - {*read, *unused}):
        raise RefusedError(f"{root / 'model_index.json'}: {unknown(left[0], f'a component of {name}', read)}")
    structures = {name: found for name in (family.part, "vae") if (found := _structure(root, name)) is not None}
    denoiser, layers = _denoiser(root, classes, family.part, pipeline.denoiser, structures.get(family.part))
    family.check(denoiser)
    return Components(
        index=index,
        family=family,
        denoiser=denoiser,
        vae=_network(root, classes, "vae", "AutoencoderKL", structures.get("vae")),
        text_encoders={encoder: _network(root, classes, encoder, known) for encoder, known in encoders.items()},
        tokenizers={tokenizer: _tokenizer(root, tokenizer) for tokenizer in tokenizers},
        scheduler_config=_scheduler_config(root, classes),
        ignored=[component for component in unused if component in classes],
        layers=layers,
        structures=structures,
    )


def _classes(root: Path, index: dict[str, Any]) -> dict[str, str]:
    """Component -> class name, for the components there are."""
    classes = {}
    for name, entry in index.items():
        if isinstance(entry, list) and entry != [None, None]:
            if len(entry) != 2 or not all(isinstance(word, str) for word in entry):
                raise RefusedError(f"{root / 'model_index.json'}: {name!r} must be [library, class], not {entry!r}")
            classes[name] = entry[1]
    return classes


def _structure(root: Path, name: str) -> Structure | None:
    """What was cut out of a network, where its configuration does not say it all."""
    file = root / name / STRUCTURE_FILE
    if not file.exists() and not file.is_symlink():
        return None
    content = read_json(root, f"{name}/{STRUCTURE_FILE}")
    with refusing(f"{file} is no record of cuts"):
        return Structure.from_dict(content)


def _denoiser(
    root: Path, classes: Mapping[str, str], name: str, class_name: str, structure: Structure | None
) -> tuple[Network, Mapping[str, LayerQuant]]:
    """Load the denoiser, and those of its layers that are stored in few bits."""
    config, where = read_json(root, f"{name}/config.json"), root / name / "config.json"
    quantization = config.pop("quantization_config", None)
    if quantization is None:
        return _network(root, classes, name, class_name, structure), {}
    _check_class(root, classes, name, class_name)
    _check_config(config, where, class_name)
    weights = read_weights(root, name, "diffusion_pytorch_model")
    cls: Any = getattr(diffusers, class_name)
    described = _described(root, name, cls, config, structure)
    tensors, layers = read(described, quantization, weights, where)
    with quiet():
        network: Network = cls.from_config(config)
    if structure is not None:
        structure.apply(network)
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False), layers


def _described(
    root: Path, name: str, cls: Any, config: dict[str, Any], structure: Structure | None
) -> dict[str, Tensor]:
    """The tensors, without memory, of the network that a configuration and a record of cuts describe."""
    where, cuts = root / name / "config.json", root / name / STRUCTURE_FILE
    with quiet(), refusing(f"{where} does not describe a {cls.__name__}"), torch.device("meta"):
        empty = cls(cls.config_class.from_dict(config)) if cls.__name__ in TEXT_ENCODERS else cls.from_config(config)
    whole = _parameters(empty.state_dict())
    if structure is not None:
        with refusing(f"{cuts} does not fit {where}"):
            structure.apply(empty)
    described: dict[str, Tensor] = empty.state_dict()
    if whole > _MAX_CUT * max(1, _parameters(described)):
        raise RefusedError(
            f"{cuts} leaves {_parameters(described)} of the {whole} parameters that {where} describes; at least one in "
            f"{_MAX_CUT:g} must be left"
        )
    return described


def _parameters(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _check_class(root: Path, classes: Mapping[str, str], name: str, class_name: str) -> None:
    if classes[name] != class_name:
        raise RefusedError(
            f"{root / 'model_index.json'}: {unknown(classes[name], f'a supported class of {name!r}', [class_name])}"
        )


def _network(
    root: Path, classes: Mapping[str, str], name: str, class_name: str, structure: Structure | None = None
) -> Network:
    """Load one network: its class must be the one that is known, its weights those its configuration describes."""
    _check_class(root, classes, name, class_name)
    config, where = read_json(root, f"{name}/config.json"), root / name / "config.json"
    _check_config(config, where, class_name)
    ours = class_name not in TEXT_ENCODERS
    cls: Any = getattr(diffusers if ours else transformers, class_name)
    weights = read_weights(root, name, "diffusion_pytorch_model" if ours else "model")
    described = _parameters(_described(root, name, cls, config, structure))
    if not 1 / _MAX_RATIO <= described / max(1, weights.parameters) <= _MAX_RATIO:
        raise RefusedError(
            f"{where} describes {described} parameters, but {weights.files[0].name} holds {weights.parameters}: "
            "they are not of the same model"
        )
    with quiet(), refusing(f"{root / name} cannot be loaded as {class_name}"):
        if structure is None:
            network, info = _read(cls, root / name, ours, weights)
        else:
            network, info = _read_pruned(cls, config, structure, weights)
    _check_keys(weights.files[0], class_name, info)
    return network.float().eval().requires_grad_(False)


def _check_config(config: dict[str, Any], where: Path, class_name: str) -> None:
    declared = config.get("_class_name") or config.get("architectures") or class_name
    if declared not in (class_name, [class_name]):
        raise RefusedError(f"{where} describes {declared!r}, but model_index.json says {class_name}: one is wrong")
    if config.get("quantization_config") is not None:
        raise RefusedError(f"{where} describes quantized weights: start from the float checkpoint")
    if "sample_size" in config and not isinstance(config["sample_size"], int):
        raise RefusedError(f"{where}: sample_size is {config['sample_size']!r}; it must be one whole number")
    for key, limit in _LIMITS.items():
        if isinstance(value := config.get(key), int) and value > limit:
            raise RefusedError(f"{where}: {key} is {value}; at most {limit} is supported")


def _read(cls: Any, folder: Path, ours: bool, weights: Weights) -> tuple[Network, Mapping[str, Any]]:
    options: dict[str, Any] = {
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        "variant": weights.variant,
    }
    if ours:
        return cls.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False, **options)
    return cls.from_pretrained(folder, dtype=torch.float32, **options)


def _read_pruned(
    cls: Any, config: Mapping[str, Any], structure: Structure, weights: Weights
) -> tuple[Network, Mapping[str, Any]]:
    """Build what the configuration describes, cut it, and give it its weights; the findings are those of `_read`."""
    network = cls.from_config(config)
    structure.apply(network)
    stored = {key: tensor for file in weights.files for key, tensor in load_file(file).items()}
    own = network.state_dict()
    common = own.keys() & stored.keys()
    info = {
        "missing_keys": own.keys() - common,
        "unexpected_keys": stored.keys() - common,
        "mismatched_keys": {
            (key, stored[key].shape, own[key].shape) for key in common if stored[key].shape != own[key].shape
        },
    }
    if not any(info.values()):
        network.load_state_dict(stored, strict=True)
    return network, info


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
    with quiet(), refusing(f"{folder} cannot be loaded as a fast tokenizer (a tokenizer.json is the surest form)"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise RefusedError(f"{folder} holds no fast tokenizer: save one with a tokenizer.json")
    return tokenizer


def _scheduler_config(root: Path, classes: Mapping[str, str]) -> dict[str, Any]:
    config = read_json(root, "scheduler/scheduler_config.json")
    if not isinstance(config.setdefault("_class_name", classes["scheduler"]), str):
        raise RefusedError(f"{root / 'scheduler' / 'scheduler_config.json'}: _class_name must be a class of diffusers")
    return config


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries from printing while they load; what matters is raised as an error."""
    bars, level = transformers.utils.logging.is_progress_bar_enabled(), logging.root.manager.disable
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
