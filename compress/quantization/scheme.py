"""Number formats as rows of plain data: what a scheme stores, what it computes in, and how it is scaled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from compress.errors import RecipeError
from compress.nearest import unknown
from export.elements import ScaleFormat

Granularity = Literal["tensor", "channel", "token", "group", "none"]

_SCALE_BITS = {"float32": 32, "e8m0": 8, "e4m3": 8}


@dataclass(frozen=True)
class NumberFormat:
    """One side (weights or activations) of a scheme.

    Attributes:
        dtype: `float32`, `float16`, `bfloat16`; an element of `export.elements`; `uint8` or `uint4` of an asymmetric
            grid; `fp3` to `fp8` for whichever float of as many bits fits a tensor best.
        bits: stored per number.
        granularity: what shares one scale; `none` for floating-point formats, which have no scale.
        group: of `group`: as many numbers share a scale.
        stored: how scales are stored.
        dynamic: scales are taken from the numbers at run time.
        symmetric: the zero point is 0.
    """

    dtype: str
    bits: int
    granularity: Granularity = "none"
    group: int = 0
    stored: ScaleFormat = "float32"
    dynamic: bool = False
    symmetric: bool = True

    @property
    def is_scaled(self) -> bool:
        """Whether the format needs a scale."""
        return self.granularity != "none"

    @property
    def elements(self) -> tuple[str, ...]:
        """The elements to choose from."""
        if self.dtype.startswith("fp"):
            return tuple(f"e{power}m{self.bits - 1 - power}" for power in range(1, self.bits - 1))
        return (self.dtype,)

    def bytes_of(self, rows: int, columns: int) -> int:
        """Bytes of weights (rows, columns) with their scales."""
        if not self.is_scaled:
            return rows * columns * self.bits // 8
        scales = {"tensor": 1, "channel": rows}.get(self.granularity)
        if scales is None:
            scales = rows * -(-columns // self.group)
        return -(-rows * columns * self.bits // 8) + scales * _SCALE_BITS[self.stored] // 8


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
        return self.weight.is_scaled

    @property
    def is_static(self) -> bool:
        """Whether the scales of activations are constants."""
        return self.is_calibrated and not self.activation.dynamic

    @property
    def is_calibrated(self) -> bool:
        """Whether layers under this scheme round their activations."""
        return self.weight.is_scaled and self.activation.is_scaled


_F32 = NumberFormat("float32", 32)
_F16 = NumberFormat("float16", 16)
_BF16 = NumberFormat("bfloat16", 16)
_INT8 = NumberFormat("int8", 8, "channel")
_INT4 = NumberFormat("int4", 4, "channel")
_U8 = NumberFormat("uint8", 8, "tensor", symmetric=False)
_E4M3 = NumberFormat("e4m3", 8, "tensor")


def _integers(bits: int) -> NumberFormat:
    return NumberFormat(f"int{bits}", bits, "channel")


def _by_token(form: NumberFormat) -> NumberFormat:
    """Activations in which each token has its own scale, at run time."""
    return replace(form, granularity="token", dynamic=True)


def _grouped(dtype: str, bits: int, group: int, stored: ScaleFormat = "float32") -> tuple[NumberFormat, NumberFormat]:
    """Weights, and activations scaled at run time, whose groups share scales."""
    weight = NumberFormat(dtype, bits, "group", group, stored)
    return weight, replace(weight, dynamic=True)


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("none", _F32, _F32),
        Scheme("float32", _F32, _F32),
        # Stored as float16, widened to float32 when the graph is loaded: size halves, speed stays.
        Scheme("float16", _F16, _F32),
        # Stored as float16; a runtime with a precision hint (OpenVINO) computes in bfloat16, any other in float32.
        Scheme("bf16", _F16, _BF16, inference_precision="bfloat16"),
        # Stored in few bits, widened to float32 when the graph is loaded.
        Scheme("int8-w8a32", _INT8, _F32),
        *(Scheme(f"int4-w4a32-g{group}", _grouped("int4", 4, group)[0], _F32) for group in (32, 64, 128)),
        Scheme("nvfp4-w4a32", _grouped("e2m1", 4, 16, "e4m3")[0], _F32),
        *(Scheme(f"int{bits}-w{bits}a32", _integers(bits), _F32) for bits in (6, 5, 4, 3)),
        # Integers.
        Scheme("int8-w8a8", _INT8, _U8),
        Scheme("int8-w8a8-tensor", replace(_INT8, granularity="tensor"), _U8),
        *(Scheme(f"int{bits}-w{bits}a8-token", _integers(bits), _by_token(_INT8)) for bits in (8, 6, 5, 4, 3)),
        Scheme("int4-w4a8", _INT4, _U8),
        *(Scheme(f"int{bits}-w{bits}a8", _integers(bits), _U8) for bits in (6, 5, 3)),
        Scheme("int4-w4a8-g64", _grouped("int4", 4, 64)[0], _by_token(_INT8)),
        Scheme("int4-w4a4", _INT4, NumberFormat("uint4", 4, "tensor", symmetric=False)),
        Scheme("int4-w4a4-g64", *_grouped("int4", 4, 64)),
        # Floats of the OCP specifications, and NVIDIA's two-level one.
        Scheme("fp8-w8a8", replace(_E4M3, granularity="channel"), _E4M3),
        Scheme("fp8-w8a8-token", replace(_E4M3, granularity="channel"), _by_token(_E4M3)),
        Scheme("fp8-e5m2-w8a8", NumberFormat("e5m2", 8, "channel"), NumberFormat("e5m2", 8, "tensor")),
        Scheme("mxfp8", *_grouped("e4m3", 8, 32, "e8m0")),
        Scheme("mxfp4", *_grouped("e2m1", 4, 32, "e8m0")),
        Scheme("nvfp4", *_grouped("e2m1", 4, 16, "e4m3")),
        Scheme("nvfp4-w4a8", _grouped("e2m1", 4, 16, "e4m3")[0], _E4M3),
        Scheme("fp4-w4a8", NumberFormat("e2m1", 4, "channel"), _E4M3),
        *(Scheme(f"fp{bits}-w{bits}a8", NumberFormat(f"fp{bits}", bits, "channel"), _E4M3) for bits in (6, 5, 3)),
        # Any float of as many bits, chosen for each tensor: Chen et al. 2024, arXiv 2408.06995.
        Scheme("fp8-any-w8a8", NumberFormat("fp8", 8, "channel"), NumberFormat("fp8", 8, "tensor")),
        Scheme("fp4-any-w4a8", NumberFormat("fp4", 4, "channel"), NumberFormat("fp8", 8, "tensor")),
        Scheme("fp4-any-w4a4", NumberFormat("fp4", 4, "channel"), NumberFormat("fp4", 4, "tensor")),
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


def computed_in_float(row: Scheme) -> Scheme:
    """The scheme that stores weights as this one, or in 8 bits where there is none, and computes in float."""
    alike = (one for one in SCHEMES.values() if one.weight == row.weight and one.activation == _F32)
    return next(alike, SCHEMES["int8-w8a32"])
