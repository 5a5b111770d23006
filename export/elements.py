"""Elements: the sets of numbers that a few bits hold, integers or floats of a few exponent and mantissa bits."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

ScaleFormat = Literal["float32", "e8m0", "e4m3"]
"""How scales are stored: as they are; as powers of two (OCP MX); as e4m3 times a float of the tensor (NVFP4)."""


class ElementError(ValueError):
    """A number format that is unknown or has impossible bits."""


@dataclass(frozen=True)
class Element:
    """Signed numbers, symmetric about 0.

    Attributes:
        name: `int8`, `int4`, or e<exponent bits>m<mantissa bits>, as `e4m3`.
        bits: of one number, its sign counted.
        largest: the largest number.
        exponent, mantissa: bits of a float; both 0 for integers.
        bias: of the exponent.
    """

    name: str
    bits: int
    largest: float
    exponent: int = 0
    mantissa: int = 0
    bias: int = 0

    @property
    def is_integer(self) -> bool:
        """Whether all steps are 1."""
        return self.exponent == 0

    @property
    def largest_exponent(self) -> int:
        """Of two, in the largest number."""
        return int(np.floor(np.log2(self.largest)))

    def round(self, x: np.ndarray) -> np.ndarray:
        """The nearest numbers (ties to even), float32 of any shape; what is too large saturates."""
        x = np.asarray(x, np.float32)
        if self.is_integer:
            return np.clip(np.rint(x), -self.largest, self.largest)
        exponents = np.maximum(np.frexp(x)[1] - 1, 1 - self.bias) - self.mantissa
        steps = np.ldexp(np.float32(1.0), exponents)
        return np.clip(np.rint(x / steps) * steps, -self.largest, self.largest).astype(np.float32)

    @functools.cached_property
    def numbers(self) -> np.ndarray:
        """Every number by its bits, float32 (2^bits,): two's complement for integers, sign first for floats.

        Bits that mean no finite number here (the least integer, NaN, infinity) give the largest of their sign.
        """
        codes = np.arange(2**self.bits)
        if self.is_integer:
            signed = np.where(codes >= 2 ** (self.bits - 1), codes - 2**self.bits, codes)
            return np.clip(signed, -self.largest, self.largest).astype(np.float32)
        fraction = codes & (2**self.mantissa - 1)
        power = (codes >> self.mantissa) & (2**self.exponent - 1)
        normal = np.ldexp(1.0 + fraction / 2**self.mantissa, np.maximum(power, 1) - self.bias)
        small = np.ldexp(fraction / 2**self.mantissa, 1 - self.bias)
        found = np.minimum(np.where(power > 0, normal, small), self.largest)
        return np.where(codes >> (self.bits - 1), -found, found).astype(np.float32)

    def codes(self, numbers: np.ndarray) -> np.ndarray:
        """The bits, uint8, of numbers that `round` gave."""
        numbers = np.asarray(numbers, np.float32)
        if self.is_integer:
            return (numbers.astype(np.int16) & (2**self.bits - 1)).astype(np.uint8)
        half = 2 ** (self.bits - 1)
        positive = self.numbers[:half]
        found = np.searchsorted(positive, np.abs(numbers)).astype(np.uint8)
        return np.where(np.signbit(numbers), found | half, found).astype(np.uint8)


_SPECIAL = {"e4m3": 448.0, "e5m2": 57344.0}
"""8-bit floats of the OCP specification keep bits for NaN (e4m3), and for NaN and infinity (e5m2)."""


@functools.cache
def element(name: str) -> Element:
    """Look an element up, or make it: any e<E>m<M> of 3 to 8 bits, with the bias 2^(E-1) - 1.

    Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.3; all bits are finite numbers but where that
    says otherwise.

    Raises:
        ElementError: no such element.
    """
    integer = re.fullmatch(r"int([2-8])", name)
    if integer:
        bits = int(integer[1])
        return Element(name, bits, 2.0 ** (bits - 1) - 1)
    found = re.fullmatch(r"e([1-6])m([0-6])", name)
    bits = 1 + sum(map(int, found.groups())) if found else 0
    if found is None or not 3 <= bits <= 8:
        raise ElementError(f"the element {name!r} is unknown: give int2 to int8, or e<E>m<M> of 3 to 8 bits, as e4m3")
    exponent, mantissa = int(found[1]), int(found[2])
    bias = max(2 ** (exponent - 1) - 1, 0) if exponent > 1 else 0
    top = 2**exponent - 1 - bias
    largest = _SPECIAL.get(name, (2.0 - 2.0**-mantissa) * 2.0**top)
    return Element(name, bits, largest, exponent, mantissa, bias)
