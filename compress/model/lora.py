"""LoRA: adds low-rank changes from a file to the weights of a model, before anything else is done to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor, nn

from compress.errors import RefusedError
from compress.model.checkpoint import check_file

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion

_TENSORS = re.compile(
    r"(?P<layer>.+?)(?:\.processor)?[._](?:lora[._])?"
    r"(?P<kind>lora_A|lora_B|down|up|lora_down|lora_up)(?:\.default)?\.weight|(?P<scaled>.+?)(?:\.lora)?\.alpha"
)
"""What the tensors of a layer are called by PEFT, diffusers and kohya-ss."""

_DOWN = ("lora_A", "down", "lora_down")

_PREFIXES = {
    "unet.": "denoiser",
    "transformer.": "denoiser",
    "lora_unet_": "denoiser",
    "lora_transformer_": "denoiser",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
"""How names begin -> the network they are of."""

_OTHERS = re.compile(r"dora_scale|hada_|lokr_|oft_|\.diff(_b)?$")
"""Parts of the names of changes that are not of low rank alone."""


@dataclass
class _Change:
    """What a file says of one layer."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None
    names: list[str] = field(default_factory=list)


def fuse_lora(model: LatentDiffusion, file: Path, strength: float = 1.0) -> int:
    """Add `strength * alpha / rank * up @ down` to the weights of every layer that a file names.

    The file may have the names of PEFT, of diffusers, or of kohya-ss over diffusers' module names; alpha is the rank
    unless it is given. The networks of the model are changed in place.

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.

    Args:
        model: float, not quantized.
        file: safetensors.
        strength: the weight of the change; 0 changes nothing.

    Returns:
        The number of changed layers.

    Raises:
        RefusedError: the file is damaged, is no LoRA, or names a layer that the model lacks or that has another shape.
    """
    if file.suffix != ".safetensors":
        raise RefusedError(f"{file} is not a safetensors file: a LoRA in another form can run code when it is read")
    check_file(file)
    layers = _layers(model)
    changes = {name: (change, _found(file, name, layers)) for name, change in _changes(file).items()}
    for name, (change, layer) in changes.items():
        weight: Any = layer.weight
        weight.data.add_(strength * _product(file, name, change, weight).to(weight))
    model.provenance.append({"lora": file.name, "strength": strength, "layers": len(changes)})
    return len(changes)


def _changes(file: Path) -> dict[str, _Change]:
    """Layer, as the file calls it -> what it says."""
    changes: dict[str, _Change] = {}
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():
            if _OTHERS.search(name):
                raise RefusedError(
                    f"{file}: {name!r} is no LoRA of two factors; merge it into the model where it is known"
                )
            found = _TENSORS.fullmatch(name)
            if found is None:
                raise RefusedError(f"{file}: {name!r} is not a tensor of a LoRA")
            change = changes.setdefault(found["layer"] or found["scaled"], _Change())
            change.names.append(name)
            if found["scaled"]:
                change.alpha = float(tensors.get_tensor(name))
            elif found["kind"] in _DOWN:
                change.down = tensors.get_tensor(name).float()
            else:
                change.up = tensors.get_tensor(name).float()
    if not changes:
        raise RefusedError(f"{file} holds no tensors")
    return changes


def _layers(model: LatentDiffusion) -> Mapping[tuple[str, str], nn.Module]:
    """(network, module path with underscores) -> linear or convolution layer."""
    networks = {"denoiser": model.denoiser, **model.text_encoders}
    return {
        (network, path.replace(".", "_").removeprefix("text_model_")): layer
        for network, module in networks.items()
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def _found(file: Path, name: str, layers: Mapping[tuple[str, str], nn.Module]) -> nn.Module:
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    network = _PREFIXES.get(prefix, "denoiser")
    path = name.removeprefix(prefix).replace(".", "_").removeprefix("text_model_")
    layer = layers.get((network, path))
    if layer is None:
        way = (
            "convert it with diffusers (load_lora_weights, save_lora_weights)"
            if re.search(r"(input|output|middle)_blocks?_\d", path)
            else "it is of another model"
        )
        raise RefusedError(f"{file} changes {name!r}, which is no layer of the {network}: {way}")
    return layer


def _product(file: Path, name: str, change: _Change, weight: Tensor) -> Tensor:
    """The change of a weight, at strength 1."""
    down, up = change.down, change.up
    if down is None or up is None:
        raise RefusedError(f"{file}: {name!r} has only one of its two factors ({', '.join(change.names)})")
    rank = len(down)
    fits = up.ndim >= 2 and up.shape[1] == rank and up[0].numel() == rank
    if not fits or up.shape[0] != len(weight) or down[0].numel() != weight[0].numel():
        raise RefusedError(
            f"{file}: the factors of {name!r} are {tuple(down.shape)} and {tuple(up.shape)}, but the weight is "
            f"{tuple(weight.shape)}: it is of another model"
        )
    scale = 1.0 if change.alpha is None else change.alpha / rank
    return (scale * (up.flatten(1) @ down.flatten(1))).reshape(weight.shape)
