"""Writes a diffusers folder whose denoiser is stored in few bits, as `compressed-tensors` has it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.errors import RefusedError
from compress.model.quantized_weights import EXACT
from compress.quantization import compressed_tensors as format_
from compress.quantization.rounding import round_weight
from compress.quantization.scheme import SCHEMES
from compress.quantization.transforms import weight_of
from export.qdq import HALVED
from export.quant_plan import LayerQuant

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Written:
    """What became of a model.

    Attributes:
        stored: layer of the denoiser -> the scheme it is stored in.
        left: layer of the denoiser -> why it is stored in float.
        bytes: of the denoiser's weights.
    """

    stored: Mapping[str, str]
    left: Mapping[str, str]
    bytes: int


def write(model: LatentDiffusion, folder: Path) -> Written:
    """Write a diffusers folder whose denoiser is stored in few bits as far as the format goes.

    `compress.model.latent_diffusion.load` gives the model back: the same rounded weights, bit for bit, and the same
    grids of activations. What the format has no name for is stored in float, and its numbers beside it, in
    `compress.safetensors`, which only this project reads.

    Args:
        model: with a quantization plan of the denoiser.
        folder: new.

    Raises:
        RefusedError: the denoiser is not quantized, or no layer has a name in the format.
    """
    plan = model.quant_plans.get("denoiser")
    if plan is None or not plan.layers:
        raise RefusedError("the denoiser is not quantized: add the pass quantize to the recipe")
    layers = {name: _exact(model.denoiser.get_submodule(name), quant) for name, quant in plan.layers.items()}
    tensors, targets, left = dict[str, Tensor](), dict[str, list[str]](), dict(plan.skipped)
    exact = dict[str, dict[str, float]]()
    for name, quant in layers.items():
        stored, scales, reason = _stored(model.denoiser.get_submodule(name), quant)
        if reason is not None:
            left[name] = reason
            continue
        targets.setdefault(quant.scheme, []).append(name)
        tensors |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
        if scales:
            exact[name] = scales
    if not targets:
        name, reason = next(iter(left.items()))
        raise RefusedError(f"no layer of the denoiser can be stored as {format_.METHOD}: of {name!r}, {reason}")
    stored_layers = {name: layers[name].scheme for names in targets.values() for name in names}
    half = plan.storage == "float16"
    tensors |= _floats(model.denoiser, stored_layers, half)
    rest = replace(plan, layers={name: quant for name, quant in layers.items() if name not in stored_layers})
    other = model.clone(networks=False)
    other.quant_plans["denoiser"] = rest
    other.provenance.append({"checkpoint": format_.METHOD, "stored": dict(Counter(stored_layers.values()))})
    other.save(folder, without=(model.family.part,))
    _write_network(model.denoiser, folder / model.family.part, tensors, targets, left, exact)
    return Written(stored_layers, left, (folder / model.family.part / WEIGHTS).stat().st_size)


def _exact(layer: nn.Module, quant: LayerQuant) -> LayerQuant:
    weight: Any = layer.weight
    return format_.exact_numbers(quant, weight)


def _stored(layer: nn.Module, quant: LayerQuant) -> tuple[dict[str, Tensor], dict[str, float], str | None]:
    """The tensors of a layer, its exact scales, and why it has none."""
    weight: Any = layer.weight
    reason = format_.unnamed(quant, weight[0].numel())
    if reason is not None:
        return {}, {}, reason
    tensors, scales = format_.tensors_of(quant), format_.exact_scales(quant)
    found = format_.layer_of(SCHEMES[quant.scheme], weight.shape, tensors, scales)
    rows = weight_of(weight, quant)
    if not torch.equal(round_weight(rows, found.weight), round_weight(rows, quant.weight)):
        return {}, {}, f"{format_.METHOD} does not hold its weights exactly"
    bias: Any = layer.bias
    if bias is not None:
        tensors["bias"] = bias.detach().float().clone() if quant.bias is None else torch.from_numpy(quant.bias)
    return tensors, scales, None


def _floats(network: nn.Module, stored: Mapping[str, str], half: bool) -> dict[str, Tensor]:
    """All other tensors; where the plan stores them in 16 bits, so does the file."""
    own = {f"{name}.{key}" for name in stored for key in ("weight", "bias")}
    parameters, made = dict(network.named_parameters()), {}
    for name, tensor in network.state_dict().items():
        if name not in own:
            narrow = tensor.half()
            wide = half and name in parameters and tensor.ndim > 1 and tensor.numel() >= HALVED
            halved = wide and bool(narrow.isfinite().all())
            made[name] = narrow if halved else tensor.clone()
    return made


def _write_network(
    network: Any,
    folder: Path,
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, list[str]],
    left: Mapping[str, str],
    exact: Mapping[str, Mapping[str, float]],
) -> None:
    groups = {}
    for i, (scheme, names) in enumerate(targets.items()):
        groups[f"group_{i}"] = {"targets": names, **(format_.group_of(SCHEMES[scheme]) or {})}
    forms = {group["format"] for group in groups.values()}
    linear = [name for name in left if isinstance(network.get_submodule(name), nn.Linear)]
    network.save_config(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": format_.METHOD,
        "format": forms.pop() if len(forms) == 1 else format_.MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": linear,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt", EXACT: json.dumps(exact)})
