"""A denoiser stored in few bits in a diffusers folder, as `compressed-tensors` has it: write it, and read it back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.errors import RefusedError
from compress.model.checkpoint import Weights, refusing
from compress.quantization import compressed_tensors as format_
from compress.quantization.rounding import round_weight
from compress.quantization.scheme import SCHEMES, Scheme
from compress.quantization.transforms import weight_of
from export.qdq import HALVED
from export.quant_plan import LayerQuant, QuantPlan

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
EXACT = "tensor_scales"
"""In the header of the weights: the scales whose inverses the format holds, layer -> weight, input."""


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


def read(
    described: Mapping[str, Tensor], config: Mapping[str, Any], weights: Weights, where: Path
) -> tuple[dict[str, Tensor], dict[str, LayerQuant]]:
    """The weights of a network, rounded ones where they are stored in few bits, and the layers in which they are.

    Args:
        described: the tensors that the configuration calls for; only their shapes are read.
        config: `quantization_config`.
        weights: the files that hold them.
        where: the configuration file, for messages.

    Returns:
        All tensors, in float32, by the names of `described`; and layer -> how it is quantized.

    Raises:
        RefusedError: one sentence with the file, the cause and the way out.
    """
    file = weights.files[0]
    tensors, exact = _tensors(weights)
    layers = {}
    for name, row in _schemes(config, where).items():
        own = [key for key in tensors if key.rpartition(".")[0] == name]
        given = {key.rpartition(".")[2]: tensors.pop(key) for key in own}
        with refusing(f"{file} does not hold the layer {name!r} as {where} says"):
            shape = described[f"{name}.weight"].shape
            layers[name] = format_.layer_of(row, shape, given, exact.get(name, {}))
            QuantPlan({name: layers[name]}).validate()
            tensors[f"{name}.weight"] = round_weight(torch.zeros(shape), layers[name].weight)
        if "bias" in given:
            tensors[f"{name}.bias"] = given["bias"]
    _check_tensors(tensors, described, file, where)
    return {name: tensor.float() for name, tensor in tensors.items()}, layers


def _schemes(config: Mapping[str, Any], where: Path) -> dict[str, Scheme]:
    """Layer -> its scheme."""
    if config.get("quant_method") != format_.METHOD:
        raise RefusedError(
            f"{where} describes quantized weights of the quant_method {config.get('quant_method')!r}, and only "
            f"{format_.METHOD} is read: start from the float checkpoint"
        )
    found = dict[str, Scheme]()
    with refusing(f"{where} has a quantization_config that cannot be followed"):
        for group in config["config_groups"].values():
            row = format_.scheme_of({"format": config["format"], **group})
            found |= dict.fromkeys(group["targets"], row)
    return found


def _tensors(weights: Weights) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    tensors, exact = dict[str, Tensor](), dict[str, dict[str, float]]()
    for path in weights.files:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
            with refusing(f"{path} has a damaged header"):
                raw = json.loads((file.metadata() or {}).get(EXACT, "{}"))
                exact |= {str(name): {key: float(one) for key, one in own.items()} for name, own in raw.items()}
    return tensors, exact


def _check_tensors(tensors: Mapping[str, Tensor], described: Mapping[str, Tensor], file: Path, where: Path) -> None:
    """Every tensor must be there, in float and of the right shape, and nothing else."""
    for meaning, names in (("lacks", described.keys() - tensors), ("has the unexpected", tensors.keys() - described)):
        if names:
            raise RefusedError(f"{file} {meaning} tensor {min(names)!r}: it is not of the model of {where}")
    for name, tensor in tensors.items():
        wanted = tuple(described[name].shape)
        if tuple(tensor.shape) != wanted or not tensor.is_floating_point():
            raise RefusedError(
                f"{file} holds {name!r} as {tensor.dtype} {tuple(tensor.shape)}, but {where} describes {wanted}"
            )
