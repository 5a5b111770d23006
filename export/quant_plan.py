"""The QuantPlan: which layers are stored and computed in few bits, and how; plain data, numpy only."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np

from export.elements import ElementError
from export.grids import Affine, Dynamic, Input, QuantPlanError, Scaled, WeightGrid

__all__ = [
    "Affine",
    "AttentionQuant",
    "Dynamic",
    "Input",
    "LayerQuant",
    "LowRank",
    "Op",
    "QuantPlan",
    "QuantPlanError",
    "Scaled",
    "Storage",
    "WeightGrid",
]

SCHEMA_VERSION = 2

Op = Literal["linear", "conv"]
Storage = Literal["float32", "float16"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """A branch beside the quantized weights, in 16 bits: `up @ (down @ x)` of the unquantized input.

    Attributes:
        down: float16 (rank, in_channels x kernel).
        up: float16 (out_channels, rank).
    """

    down: np.ndarray
    up: np.ndarray


@dataclass(frozen=True, eq=False)
class LayerQuant:
    """One layer with few-bit weights. Its input is smoothed, then rotated, then quantized; its weight is of that input.

    Attributes:
        op: `linear` or `conv`.
        scheme: the row of the number-format table this came from.
        weight: how the weights are stored.
        input: the grid of the input activation; None only stores the weights so, and computes in float.
        output: the grid of the output before it is read on; convolutions only, where a runtime needs it to
            run an integer kernel.
        smooth: float32 (in_channels,); the input is divided by it, channel by channel, and the weight multiplied.
        rotation: as many channels are rotated together, by a Hadamard matrix; 0 rotates none.
        low_rank: what the few bits leave out, as far as it has a low rank.
        bias: float32 (out_channels,) in place of the layer's own.
    """

    op: Op
    scheme: str
    weight: WeightGrid
    input: Input | None
    output: Affine | None = None
    smooth: np.ndarray | None = None
    rotation: int = 0
    low_rank: LowRank | None = None
    bias: np.ndarray | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerQuant) and _packed(self, None, "") == _packed(other, None, "")

    __hash__ = None  # type: ignore[assignment]

    @property
    def transforms(self) -> bool:
        """Whether the input is smoothed or rotated, or goes through a second branch."""
        return self.smooth is not None or bool(self.rotation) or self.low_rank is not None

    def fault(self) -> str | None:
        """What contradicts itself."""
        if self.op not in get_args(Op):
            return f"has the unknown op {self.op!r}"
        if self.output is not None and (self.op != "conv" or self.input is None):
            return "has an output grid but is no integer convolution"
        for grid in (self.weight, self.input, self.output):
            fault = None if grid is None else grid.fault()
            if fault is not None:
                return fault
        if self.rotation & (self.rotation - 1) or self.rotation < 0:
            return f"rotates {self.rotation} channels together, which is no power of two"
        arrays = [self.smooth, self.bias, *(() if self.low_rank is None else (self.low_rank.down, self.low_rank.up))]
        if not all(array is None or np.isfinite(array).all() for array in arrays):
            return "has a number that is not finite"
        if self.smooth is not None and (self.smooth <= 0).any():
            return "smooths by a number that is not positive"
        return None


@dataclass(frozen=True)
class AttentionQuant:
    """Attention whose scores are products of signed 8-bit queries and keys: `clip(round(x / scale), -128, 127)`.

    Softmax and the sum of the values stay in float: probabilities spread over many tokens vanish in 8 bits.

    Attributes:
        scheme: `int8-qk`.
        query, key: one scale for the tensor each that the scaled dot product reads.
    """

    scheme: str
    query: float
    key: float


@dataclass(frozen=True)
class QuantPlan:
    """How one part of a model (denoiser, text encoder, VAE decoder) is quantized.

    Attributes:
        layers: module name relative to the part -> its numbers.
        attentions: likewise, of attention modules; a runtime without a fast kernel for them computes them in float.
        skipped: module name -> why it stays in float.
        storage: how the weights of the layers left in float are stored: `float32`, or `float16` (widened on load).
        inference_precision: what a runtime that takes such a hint computes the float remainder in.
    """

    layers: Mapping[str, LayerQuant]
    skipped: Mapping[str, str] = field(default_factory=dict)
    storage: Storage = "float32"
    inference_precision: Precision = "float32"
    attentions: Mapping[str, AttentionQuant] = field(default_factory=dict)

    @property
    def schemes(self) -> dict[str, str]:
        """Layer or attention module -> the row of the number-format table it came from."""
        return {
            **{name: layer.scheme for name, layer in self.layers.items()},
            **{name: attention.scheme for name, attention in self.attentions.items()},
        }

    def validate(self) -> None:
        """Check every number.

        Raises:
            QuantPlanError: one sentence with the layer and the cause.
        """
        if self.storage not in get_args(Storage):
            raise QuantPlanError(f"the plan has the unknown storage {self.storage!r}")
        if self.inference_precision not in get_args(Precision):
            raise QuantPlanError(f"the plan has the unknown inference precision {self.inference_precision!r}")
        for name, layer in self.layers.items():
            if name in self.skipped:
                raise QuantPlanError(f"layer {name!r} is both quantized and skipped")
            try:
                fault = layer.fault()
            except ElementError as error:
                raise QuantPlanError(f"layer {name!r}: {error}") from None
            if fault is not None:
                raise QuantPlanError(f"layer {name!r} {fault}")
        for name, attention in self.attentions.items():
            if not all(math.isfinite(scale) and scale > 0 for scale in (attention.query, attention.key)):
                raise QuantPlanError(f"attention {name!r} has a scale that is not positive and finite")

    def to_json(self, arrays: dict[str, np.ndarray] | None = None, name: str = "plan") -> str:
        """Serialise; floats keep all their digits, arrays their bytes, so a round trip is exact.

        Args:
            arrays: takes the arrays, and the text refers to them by name; None writes them into the text.
            name: their names begin with.
        """
        return json.dumps({"schema_version": SCHEMA_VERSION, **_packed(self, arrays, name)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, arrays: Mapping[str, np.ndarray] | None = None) -> QuantPlan:
        """Read and validate a plan.

        Args:
            text: from `to_json`.
            arrays: that it refers to.

        Raises:
            QuantPlanError: not JSON, another schema version, a missing or unknown key, or an impossible number.
        """
        try:
            raw = json.loads(text)
            version = raw.pop("schema_version")
            if version != SCHEMA_VERSION:
                raise QuantPlanError(f"the plan has schema version {version!r}, this reads {SCHEMA_VERSION}")
            layers = {name: _layer(layer, arrays or {}) for name, layer in raw.pop("layers").items()}
            attentions = {name: AttentionQuant(**attention) for name, attention in raw.pop("attentions", {}).items()}
            plan = cls(layers=layers, attentions=attentions, **raw)
            plan.validate()
        except QuantPlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise QuantPlanError(f"the quantization plan cannot be read: {type(error).__name__}: {error}") from error
        return plan


_DTYPES = ("float32", "float16", "int8")
_INPUTS: dict[str, type[Affine] | type[Scaled] | type[Dynamic]] = {
    "affine": Affine,
    "scaled": Scaled,
    "dynamic": Dynamic,
}


def _packed(value: Any, arrays: dict[str, np.ndarray] | None, path: str) -> Any:
    """A dataclass as plain data; arrays by their bytes or names, kinds of input by their names."""
    if isinstance(value, np.ndarray):
        if arrays is not None:
            arrays[path] = value
            return {"array": path}
        data = np.ascontiguousarray(value)
        little = data.astype(data.dtype.newbyteorder("<"), copy=False)
        return {
            "dtype": data.dtype.name,
            "shape": list(data.shape),
            "base64": base64.b64encode(little.tobytes()).decode(),
        }
    if isinstance(value, Mapping):
        return {name: _packed(one, arrays, f"{path}.{name}") for name, one in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        kind = next((name for name, kind in _INPUTS.items() if type(value) is kind), None)
        plain = {one.name: _packed(getattr(value, one.name), arrays, f"{path}.{one.name}") for one in fields(value)}
        return plain if kind is None else {"kind": kind, **plain}
    return value


def _array(raw: Any, arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
    if raw is None:
        return None
    if "array" in raw:
        found = arrays[raw["array"]]
        if found.dtype.name not in _DTYPES:
            raise QuantPlanError(f"the plan refers to an array of {found.dtype.name!r}")
        return found
    dtype = raw["dtype"]
    if dtype not in _DTYPES:
        raise QuantPlanError(f"the plan holds an array of {dtype!r}")
    flat = np.frombuffer(base64.b64decode(raw["base64"], validate=True), np.dtype(dtype).newbyteorder("<"))
    return flat.astype(dtype).reshape(raw["shape"])


def _input(raw: Any) -> Any:
    if raw is None:
        return None
    raw = dict(raw)
    return _INPUTS[raw.pop("kind")](**raw)


def _layer(raw: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> LayerQuant:
    raw = dict(raw)
    weight = dict(raw.pop("weight"))
    grid = WeightGrid(**weight | {name: _array(weight.get(name), arrays) for name in ("scale", "numbers")})
    branch = raw.pop("low_rank")
    return LayerQuant(
        weight=grid,
        low_rank=None if branch is None else LowRank(**{name: _array(one, arrays) for name, one in branch.items()}),  # type: ignore[arg-type]
        **raw
        | {name: _input(raw[name]) for name in ("input", "output")}
        | {name: _array(raw[name], arrays) for name in ("smooth", "bias")},
    )
