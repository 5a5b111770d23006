"""The checkpoint format `compressed-tensors`: which schemes have a name there, and the tensors of a linear layer.

Names and packing are those of compressed-tensors 0.20 (vLLM project, Apache-2.0), which is the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import RefusedError
from compress.quantization.scheme import SCHEMES, NumberFormat, Scheme
from compress.quantization.transforms import weight_of
from compress.quantization.weights import numbers_of
from export.elements import Element, element
from export.grids import Affine, Dynamic, Input, Scaled, WeightGrid
from export.quant_plan import LayerQuant

METHOD = "compressed-tensors"
MIXED = "mixed-precision"
_SCALES = {"e8m0": "torch.uint8", "e4m3": "torch.float8_e4m3fn"}
_EXPONENT_BIAS = 127


def group_of(row: Scheme) -> dict[str, Any] | None:
    """The config group of a scheme, without its targets; None where the format has no name for it."""
    form = _format_of(row)
    weights = _arguments(row.weight)
    inputs = _arguments(row.activation) if row.is_calibrated else None
    if form is None or weights is None or (row.is_calibrated and inputs is None):
        return None
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": form}


def scheme_of(group: Mapping[str, Any]) -> Scheme:
    """The scheme whose config group this is; keys that only tell what made it are ignored.

    Raises:
        RefusedError: there is none.
    """
    wanted = {key: group.get(key) for key in ("weights", "input_activations", "output_activations", "format")}
    for side in ("weights", "input_activations"):
        if isinstance(given := wanted[side], Mapping):
            wanted[side] = {key: value for key, value in given.items() if value is not None and key not in _IGNORED}
    for row in SCHEMES.values():
        if group_of(row) == wanted:
            return row
    known = ", ".join(row.name for row in SCHEMES.values() if group_of(row) is not None)
    raise RefusedError(f"its quantization_config has a group that is no scheme known here ({known})")


_IGNORED = ("observer", "observer_kwargs", "actorder", "block_structure", "zp_dtype")


def unnamed(quant: LayerQuant, columns: int) -> str | None:
    """Why a layer with so many input channels cannot be stored in the format; None where it can."""
    row = SCHEMES[quant.scheme]
    if quant.op != "linear":
        return f"{METHOD} has linear layers only"
    if group_of(row) is None:
        return f"{METHOD} has no name for {row.name}"
    if quant.transforms:
        return f"{METHOD} has no smoothed, rotated or branched inputs"
    if quant.weight.group and columns % quant.weight.group:
        return f"its {columns} input channels do not fill groups of {quant.weight.group}"
    return None


def exact_numbers(quant: LayerQuant, weight: Tensor) -> LayerQuant:
    """The same layer, with the rounded weights written out."""
    if quant.weight.numbers is not None:
        return quant
    return replace(quant, weight=replace(quant.weight, numbers=numbers_of(weight_of(weight, quant), quant.weight)))


def tensors_of(quant: LayerQuant) -> dict[str, Tensor]:
    """What a checkpoint holds of a layer beside its bias, by the names after the layer's own.

    Args:
        quant: that `unnamed` has nothing against, with its numbers (out_channels, in_channels).
    """
    grid, row = quant.weight, SCHEMES[quant.scheme]
    if grid.numbers is None:
        raise ValueError("the layer has no numbers")
    kind, form = element(grid.element), _format_of(row)
    made: dict[str, Tensor] = {}
    if form == "pack-quantized":
        made["weight_packed"] = torch.from_numpy(_packed_words(grid.numbers, kind.bits))
        made["weight_shape"] = torch.tensor(grid.numbers.shape)
    elif kind.is_integer:
        made["weight"] = torch.from_numpy(np.ascontiguousarray(grid.numbers))
    elif kind.bits == 8:
        made["weight"] = torch.from_numpy(np.ascontiguousarray(grid.numbers)).to(torch.float8_e4m3fn)
    else:
        codes = kind.codes(grid.numbers)
        made["weight_packed"] = torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4)
    made |= _scales(grid)
    match quant.input:
        case Affine(scale, zero_point, bits):
            made["input_scale"] = torch.tensor([scale], dtype=torch.float32)
            made["input_zero_point"] = torch.tensor([zero_point - 2 ** (bits - 1)], dtype=torch.int8)
        case Scaled(_, scale):
            made["input_scale"] = torch.tensor([scale], dtype=torch.float32)
        case Dynamic(stored="e4m3", tensor_scale=scale):
            made["input_global_scale"] = torch.tensor([1.0 / scale], dtype=torch.float32)
    return made


def exact_scales(quant: LayerQuant) -> dict[str, float]:
    """The tensor scales of two-level formats, of `weight` and `input`: the format holds their inverses, rounded."""
    grids = {"weight": quant.weight, "input": quant.input}
    return {name: grid.tensor_scale for name, grid in grids.items() if getattr(grid, "stored", "") == "e4m3"}  # type: ignore[union-attr]


def layer_of(
    row: Scheme, shape: Sequence[int], tensors: Mapping[str, Tensor], exact: Mapping[str, float]
) -> LayerQuant:
    """A layer, read back from what `tensors_of` made.

    Args:
        row: its scheme.
        shape: of its weight, (out_channels, in_channels).
        tensors: of the layer, by the names after the layer's own.
        exact: what `exact_scales` gave; without it, scales of two levels may differ in the last bit.

    Raises:
        KeyError: a tensor is missing.
        RefusedError: the weights have another shape.
    """
    out_channels, in_channels = shape
    form, kind = _format_of(row), element(row.weight.dtype)
    if form == "pack-quantized":
        words = -(-in_channels * kind.bits // 32)
        if tensors["weight_packed"].shape != (out_channels, words):
            raise RefusedError(f"its weights are no {out_channels} rows of {words} words")
        numbers = _unpacked_words(tensors["weight_packed"].numpy(), kind.bits, out_channels, in_channels)
    elif kind.is_integer:
        numbers = tensors["weight"].numpy()
    elif kind.bits == 8:
        numbers = tensors["weight"].half().numpy()
    else:
        numbers = _unpacked_floats(tensors["weight_packed"].numpy(), kind)
    if numbers.shape != (out_channels, in_channels):
        raise RefusedError(f"its weights are {numbers.shape}, not {(out_channels, in_channels)}")
    grid = _grid(row.weight, tensors, exact.get("weight"), numbers)
    return LayerQuant("linear", row.name, grid, _input(row, tensors, exact.get("input")))


def _format_of(row: Scheme) -> str | None:
    weight = row.weight
    match weight.dtype, weight.granularity, weight.group, weight.stored:
        case "int8", "channel" | "tensor", _, "float32" if row.is_calibrated:
            return "int-quantized"
        case str(name), "channel" | "tensor" | "group", _, "float32" if name.startswith("int"):
            return "pack-quantized"
        case "e4m3", "channel" | "tensor", _, "float32":
            return "float-quantized"
        case "e4m3", "group", 32, "e8m0":
            return "mxfp8-quantized"
        case "e2m1", "group", 32, "e8m0":
            return "mxfp4-pack-quantized"
        case "e2m1", "group", 16, "e4m3":
            return "nvfp4-pack-quantized"
    return None


def _arguments(form: NumberFormat) -> dict[str, Any] | None:
    """One side of a config group."""
    integer = form.dtype.startswith(("int", "uint"))
    if not integer and form.dtype not in ("e4m3", "e2m1"):
        return None
    made = {
        "num_bits": form.bits,
        "type": "int" if integer else "float",
        "symmetric": form.symmetric,
        "strategy": "tensor_group" if form.stored == "e4m3" else form.granularity,
        "dynamic": "local" if form.stored == "e4m3" and form.dynamic else form.dynamic,
    }
    if form.granularity == "group":
        made["group_size"] = form.group
    if form.stored in _SCALES:
        made["scale_dtype"] = _SCALES[form.stored]
    return made


def _scales(grid: WeightGrid) -> dict[str, Tensor]:
    scale = torch.from_numpy(np.ascontiguousarray(grid.scale))
    if grid.stored == "e8m0":
        return {"weight_scale": (torch.frexp(scale)[1] - 1 + _EXPONENT_BIAS).to(torch.uint8)}
    if grid.stored == "e4m3":
        return {
            "weight_scale": _in_units(scale, grid.tensor_scale).to(torch.float8_e4m3fn),
            "weight_global_scale": torch.tensor([1.0 / grid.tensor_scale], dtype=torch.float32),
        }
    return {"weight_scale": scale.reshape(-1) if scale.numel() == 1 and len(scale) == 1 else scale}


def _in_units(scale: Tensor, tensor_scale: float) -> Tensor:
    """The e4m3 numbers of two-level scales; of groups of zeros, whose scale means nothing, at most the largest."""
    return (scale / tensor_scale).clamp_max(element("e4m3").largest)


def _grid(form: NumberFormat, tensors: Mapping[str, Tensor], exact: float | None, numbers: np.ndarray) -> WeightGrid:
    scale = tensors["weight_scale"]
    group = form.group if form.granularity == "group" else 0
    tensor_scale = 1.0
    if form.stored == "e8m0":
        scale = torch.ldexp(torch.ones(scale.shape), scale.int() - _EXPONENT_BIAS)
    elif form.stored == "e4m3":
        tensor_scale = _tensor_scale(tensors["weight_global_scale"], exact)
        scale = scale.float() * tensor_scale
    elif form.granularity == "tensor":
        scale = scale.reshape(1, 1)
    return WeightGrid(form.dtype, scale.float().numpy(), group, form.stored, tensor_scale, numbers)


def _input(row: Scheme, tensors: Mapping[str, Tensor], exact: float | None) -> Input | None:
    form = row.activation
    if not row.is_calibrated:
        return None
    if form.dynamic:
        scale = _tensor_scale(tensors["input_global_scale"], exact) if form.stored == "e4m3" else 1.0
        return Dynamic(form.dtype, form.group, form.stored, scale)
    scale = float(tensors["input_scale"])
    if form.symmetric:
        return Scaled(form.dtype, scale)
    return Affine(scale, int(tensors["input_zero_point"]) + 2 ** (form.bits - 1), form.bits)


def _tensor_scale(inverse: Tensor, exact: float | None) -> float:
    """The scale that a checkpoint holds the inverse of; the exact one where it agrees."""
    found = 1.0 / float(inverse)
    return exact if exact is not None and abs(exact - found) <= 1e-6 * abs(found) else found


def _packed_words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Integers (rows, columns) as int32 (rows, words): offset binary, lowest bits first, no bits between them."""
    codes = (numbers.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    rows, columns = codes.shape
    stream = (codes[:, :, None] >> np.arange(bits, dtype=np.uint8) & 1).reshape(rows, columns * bits)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view("<i4").astype(np.int32)


def _unpacked_words(words: np.ndarray, bits: int, rows: int, columns: int) -> np.ndarray:
    """What `_packed_words` packed, int8."""
    octets = np.ascontiguousarray(words.astype("<i4")).view(np.uint8)
    stream = np.unpackbits(octets, axis=1, count=columns * bits, bitorder="little").reshape(rows, columns, bits)
    codes = (stream.astype(np.int16) << np.arange(bits, dtype=np.int16)).sum(2)
    return (codes - 2 ** (bits - 1)).astype(np.int8)


def _unpacked_floats(octets: np.ndarray, kind: Element) -> np.ndarray:
    """Two 4-bit floats a byte, the first one lowest, as float16."""
    codes = np.stack((octets & 15, octets >> 4), axis=2).reshape(len(octets), -1)
    return kind.numbers[codes].astype(np.float16)
