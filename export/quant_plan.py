"""The QuantPlan: which layers compute in integers, and with which scales; plain data, numpy only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np

SCHEMA_VERSION = 1

Op = Literal["linear", "conv"]
Storage = Literal["float32", "float16"]
Precision = Literal["float32", "bfloat16"]


class QuantPlanError(ValueError):
    """A quantization plan that cannot be read or contradicts itself; the message says which layer and why."""


@dataclass(frozen=True)
class Affine:
    """Unsigned 8-bit per-tensor quantization: `clip(round(x / scale) + zero_point, 0, 255)`, ties to even."""

    scale: float
    zero_point: int

    @classmethod
    def of_range(cls, low: float, high: float) -> Affine:
        """The grid that spans [low, high]; the range is widened to hold 0, so that 0 is exact (padding stays 0).

        Raises:
            QuantPlanError: a bound is not finite.
        """
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        if not math.isfinite(low) or not math.isfinite(high):
            raise QuantPlanError(f"an activation range is not finite: [{low}, {high}]")
        scale = float(np.float32(max((high - low) / 255.0, 1e-8)))
        return cls(scale, int(np.clip(np.round(-low / scale), 0, 255)))

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest number the grid holds."""
        return -self.zero_point * self.scale, (255 - self.zero_point) * self.scale


@dataclass(frozen=True)
class LayerQuant:
    """One layer with 8-bit weights.

    Attributes:
        op: `linear` or `conv`.
        scheme: the row of the number-format table this came from.
        weight_scale: (out_channels,) scales of the signed, symmetric weights: `q = clip(round(w / scale), -127, 127)`.
        input: the grid of the input activation; None stores the weights in 8 bits and computes in float.
        output: the grid of the output before it is read on; convolutions only, where a runtime needs it to
            run an integer kernel.
    """

    op: Op
    scheme: str
    weight_scale: tuple[float, ...]
    input: Affine | None
    output: Affine | None = None

    def quantize_weight(self, weight: np.ndarray) -> np.ndarray:
        """Round a float weight (out_channels, ...) to int8 of the same shape.

        Raises:
            QuantPlanError: the weight has another number of output channels.
        """
        if weight.shape[0] != len(self.weight_scale):
            raise QuantPlanError(f"{len(self.weight_scale)} weight scales for {weight.shape[0]} output channels")
        scale = np.asarray(self.weight_scale, np.float32).reshape(-1, *(1,) * (weight.ndim - 1))
        return np.clip(np.round(weight.astype(np.float32) / scale), -127, 127).astype(np.int8)


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

    @property
    def integer_layers(self) -> set[str]:
        """The layers that compute in integers, so not those whose weights are only stored in 8 bits."""
        return {name for name, layer in self.layers.items() if layer.input is not None}

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
            if layer.op not in get_args(Op):
                raise QuantPlanError(f"layer {name!r} has the unknown op {layer.op!r}")
            if name in self.skipped:
                raise QuantPlanError(f"layer {name!r} is both quantized and skipped")
            if layer.output is not None and (layer.op != "conv" or layer.input is None):
                raise QuantPlanError(f"layer {name!r} has an output grid but is no integer convolution")
            grids = [grid for grid in (layer.input, layer.output) if grid is not None]
            scales = [*layer.weight_scale, *(grid.scale for grid in grids)]
            if not layer.weight_scale or not all(math.isfinite(scale) and scale > 0 for scale in scales):
                raise QuantPlanError(f"layer {name!r} has a scale that is not positive and finite")
            for grid in grids:
                if not 0 <= grid.zero_point <= 255:
                    raise QuantPlanError(f"layer {name!r} has the zero point {grid.zero_point}, outside 0..255")

        for name, attention in self.attentions.items():
            if not all(math.isfinite(scale) and scale > 0 for scale in (attention.query, attention.key)):
                raise QuantPlanError(f"attention {name!r} has a scale that is not positive and finite")

    def to_json(self) -> str:
        """Serialise; floats keep all their digits, so a round trip is exact."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> QuantPlan:
        """Read and validate a plan.

        Raises:
            QuantPlanError: not JSON, another schema version, a missing or unknown key, or an impossible number.
        """
        try:
            raw = json.loads(text)
            version = raw.pop("schema_version")
            if version != SCHEMA_VERSION:
                raise QuantPlanError(f"the plan has schema version {version!r}, this reads {SCHEMA_VERSION}")
            layers = {name: _layer(layer) for name, layer in raw.pop("layers").items()}
            attentions = {name: AttentionQuant(**attention) for name, attention in raw.pop("attentions", {}).items()}
            plan = cls(layers=layers, attentions=attentions, **raw)
            plan.validate()
        except QuantPlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise QuantPlanError(f"the quantization plan cannot be read: {type(error).__name__}: {error}") from error
        return plan


def _layer(raw: dict[str, Any]) -> LayerQuant:
    raw = dict(raw)
    grids = {key: None if raw[key] is None else Affine(**raw[key]) for key in ("input", "output")}
    scales = tuple(float(scale) for scale in raw.pop("weight_scale"))
    return LayerQuant(weight_scale=scales, **(raw | grids))
