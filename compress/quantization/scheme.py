"""Number formats as rows of plain data: what a scheme stores, what it computes in, and how it is scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compress.errors import RecipeError
from compress.nearest import unknown

Granularity = Literal["tensor", "channel", "none"]


@dataclass(frozen=True)
class NumberFormat:
    """One side (weights or activations) of a scheme.

    Attributes:
        dtype: `int8`, `uint8`, `float32`, `float16`, `bfloat16`.
        bits: stored per number.
        granularity: what shares one scale; `none` for floating-point formats, which have no scale.
        symmetric: the zero point is 0.
    """

    dtype: str
    bits: int
    granularity: Granularity = "none"
    symmetric: bool = True

    @property
    def is_integer(self) -> bool:
        """Whether the format needs a scale."""
        return self.granularity != "none"


@dataclass(frozen=True)
class Scheme:
    """How a layer, or a whole part, stores its weights and computes.

    Attributes:
        weight, activation: the two sides.
        inference_precision: what a runtime that takes such a hint is asked to compute the float remainder in.
    """

    name: str
    weight: NumberFormat
    activation: NumberFormat
    inference_precision: Literal["float32", "bfloat16"] = "float32"

    @property
    def is_quantized(self) -> bool:
        """Whether the weights of layers under this scheme get scales."""
        return self.weight.is_integer

    @property
    def is_calibrated(self) -> bool:
        """Whether layers under this scheme need activation ranges, and compute in integers."""
        return self.weight.is_integer and self.activation.is_integer

    @property
    def weight_bytes(self) -> float:
        """Bytes stored per weight, scales not counted."""
        return self.weight.bits / 8


_F32 = NumberFormat("float32", 32)
_F16 = NumberFormat("float16", 16)
_BF16 = NumberFormat("bfloat16", 16)

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("none", _F32, _F32),
        Scheme("float32", _F32, _F32),
        # Stored as float16, widened to float32 when the graph is loaded: size halves, speed stays.
        Scheme("float16", _F16, _F32),
        # Stored as float16; a runtime with a precision hint (OpenVINO) computes in bfloat16, any other in float32.
        Scheme("bf16", _F16, _BF16, inference_precision="bfloat16"),
        # Stored as int8 with one scale per output channel, widened to float32 when the graph is loaded.
        Scheme("int8-w8a32", NumberFormat("int8", 8, "channel"), _F32),
        Scheme(
            "int8-w8a8",
            NumberFormat("int8", 8, "channel", symmetric=True),
            NumberFormat("uint8", 8, "tensor", symmetric=False),
        ),
    )
}


def scheme(name: str) -> Scheme:
    """Look a number format up.

    Raises:
        RecipeError: the name is unknown; gives the nearest one and all that exist.
    """
    if name not in SCHEMES:
        raise RecipeError(unknown(name, "a scheme", SCHEMES))
    return SCHEMES[name]
