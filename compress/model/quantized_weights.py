"""Reads the weights of a network that are stored in few bits, as `compressed-tensors` has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from compress.errors import RefusedError
from compress.model.checkpoint import Weights, refusing
from compress.quantization import compressed_tensors as format_
from compress.quantization.rounding import round_weight
from compress.quantization.scheme import Scheme
from export.quant_plan import LayerQuant, QuantPlan

EXACT = "tensor_scales"
"""In the header of the weights: the scales whose inverses the format holds, layer -> weight, input."""


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
