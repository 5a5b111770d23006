"""Grids: the elements and scales that weights and activations of a layer are rounded to; plain data, numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import numpy as np

from export.elements import ScaleFormat, element


class QuantPlanError(ValueError):
    """A quantization plan that cannot be read or contradicts itself; the message says which layer and why."""


@dataclass(frozen=True)
class Affine:
    """Unsigned per-tensor quantization: `clip(round(x / scale) + zero_point, 0, 2^bits - 1)`, ties to even."""

    scale: float
    zero_point: int
    bits: int = 8

    @classmethod
    def of_range(cls, low: float, high: float, bits: int = 8) -> Affine:
        """The grid that spans [low, high]; the range is widened to hold 0, so that 0 is exact (padding stays 0).

        Raises:
            QuantPlanError: a bound is not finite.
        """
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        if not math.isfinite(low) or not math.isfinite(high):
            raise QuantPlanError(f"an activation range is not finite: [{low}, {high}]")
        levels = 2**bits - 1
        scale = float(np.float32(max((high - low) / levels, 1e-8)))
        return cls(scale, int(np.clip(np.round(-low / scale), 0, levels)), bits)

    @property
    def levels(self) -> int:
        """The greatest code."""
        return int(2**self.bits) - 1

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest number the grid holds."""
        return -self.zero_point * self.scale, (self.levels - self.zero_point) * self.scale

    def fault(self) -> str | None:
        """What is impossible about the numbers."""
        if not (math.isfinite(self.scale) and self.scale > 0):
            return "has a scale that is not positive and finite"
        if not 2 <= self.bits <= 8:
            return f"has activations of {self.bits} bits, outside 2..8"
        if not 0 <= self.zero_point <= self.levels:
            return f"has the zero point {self.zero_point}, outside 0..{self.levels}"
        return None


@dataclass(frozen=True)
class Scaled:
    """Signed per-tensor quantization with a calibrated scale: `scale * element.round(x / scale)`."""

    element: str
    scale: float

    def fault(self) -> str | None:
        """What is impossible about the numbers."""
        element(self.element)
        return None if math.isfinite(self.scale) and self.scale > 0 else "has a scale that is not positive and finite"


@dataclass(frozen=True)
class Dynamic:
    """Signed quantization with scales taken from the numbers themselves, at run time.

    Attributes:
        element: what numbers are rounded to.
        group: as many numbers along the channels share a scale; 0 means all channels of a token (or pixel).
        stored: how scales are stored.
        tensor_scale: of `e4m3` scales, calibrated: what they are multiplied by.
    """

    element: str
    group: int = 0
    stored: ScaleFormat = "float32"
    tensor_scale: float = 1.0

    def fault(self) -> str | None:
        """What is impossible about the numbers."""
        element(self.element)
        fine = math.isfinite(self.tensor_scale) and self.tensor_scale > 0
        if self.group < 0:
            return f"has groups of {self.group}"
        if self.stored not in get_args(ScaleFormat):
            return f"has scales stored as {self.stored!r}"
        return None if fine else "has a scale that is not positive and finite"


Input = Affine | Scaled | Dynamic
"""How the input activation of a layer is quantized."""


@dataclass(frozen=True, eq=False)
class WeightGrid:
    """How the weights of a layer are stored: `scale * numbers`, where the numbers are those of an element.

    Attributes:
        element: what the numbers are.
        scale: float32 (out_channels or 1, groups); as they act, so including the tensor scale of `e4m3` ones.
        group: as many numbers of a row (in_channels x kernel) share a scale; 0 means all of them.
        stored: how scales are stored.
        tensor_scale: of `e4m3` scales.
        numbers: (out_channels, in_channels x kernel), int8 of an integer element and float16 of a float; None rounds
            each weight to the nearest.
    """

    element: str
    scale: np.ndarray
    group: int = 0
    stored: ScaleFormat = "float32"
    tensor_scale: float = 1.0
    numbers: np.ndarray | None = None

    @classmethod
    def per_channel(cls, scales: object, name: str = "int8") -> WeightGrid:
        """A scale for each output channel."""
        return cls(name, np.asarray(scales, np.float32).reshape(-1, 1))

    @property
    def is_int8(self) -> bool:
        """Whether the weights are integers of at most 8 bits with a scale for each output channel, or one in all."""
        return self.group == 0 and element(self.element).is_integer

    def scales(self, columns: int) -> np.ndarray:
        """The scale of every number of a row, float32 (out_channels or 1, 1 or columns)."""
        return self.scale if not self.group else np.repeat(self.scale, self.group, axis=1)[:, :columns]

    def rounded(self, weight: np.ndarray) -> np.ndarray:
        """The numbers of a float weight (out_channels, ...), of the same shape: int8, or float16 of a float element.

        Raises:
            QuantPlanError: the weight has another number of output channels, or of columns.
        """
        rows = weight.reshape(weight.shape[0], -1)
        if self.scale.shape[0] not in (1, rows.shape[0]):
            raise QuantPlanError(f"{self.scale.shape[0]} weight scales for {rows.shape[0]} output channels")
        groups = -(-rows.shape[1] // self.group) if self.group else 1
        if self.scale.shape[1] != groups:
            raise QuantPlanError(f"{self.scale.shape[1]} groups of weights where there are {groups}")
        kind = element(self.element)
        if self.numbers is not None:
            if self.numbers.shape != rows.shape:
                raise QuantPlanError(f"weights of the shape {self.numbers.shape} where there are {rows.shape}")
            numbers = self.numbers
        else:
            numbers = kind.round(rows.astype(np.float32) / self.scales(rows.shape[1]))
        return numbers.astype(np.int8 if kind.is_integer else np.float16).reshape(weight.shape)

    def dequantized(self, numbers: np.ndarray) -> np.ndarray:
        """Float32 weights (out_channels, ...) of what `rounded` gave."""
        rows = numbers.reshape(numbers.shape[0], -1).astype(np.float32)
        return (rows * self.scales(rows.shape[1])).reshape(numbers.shape)

    def fault(self) -> str | None:
        """What is impossible about the numbers."""
        kind = element(self.element)
        if self.scale.ndim != 2 or not self.scale.size or not np.isfinite(self.scale).all() or (self.scale <= 0).any():
            return "has a scale that is not positive and finite"
        if self.stored not in get_args(ScaleFormat):
            return f"has scales stored as {self.stored!r}"
        if self.group < 0 or not math.isfinite(self.tensor_scale) or self.tensor_scale <= 0:
            return f"has groups of {self.group} weights times {self.tensor_scale}"
        if self.numbers is not None and not (np.abs(self.numbers.astype(np.float32)) <= kind.largest).all():
            return f"has weights that {self.element} does not hold"
        return None
