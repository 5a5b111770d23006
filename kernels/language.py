"""Triton where it is installed, so that a file with a kernel can be imported where it is not."""

from __future__ import annotations

from typing import Any, TypeAlias

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["INSTALLED", "INTERPRETED", "Kernel", "ceiling", "jit", "tl", "triton"]

INSTALLED = triton is not None
"""Whether kernels can be compiled at all."""

INTERPRETED = INSTALLED and bool(triton.knobs.runtime.interpret)
"""Whether kernels run on the CPU, one operation after another: TRITON_INTERPRET=1 was set when Triton was imported."""

Kernel: TypeAlias = Any
"""What `jit` makes of a function; its parameters are of type `tl.tensor` (addresses, numbers) or `tl.constexpr`."""


def jit(function: Any) -> Kernel:
    """Mark a function as Triton source; without Triton it stays a function that nobody calls."""
    return triton.jit(function) if INSTALLED else function


def ceiling(dividend: int, divisor: int) -> int:
    """The quotient rounded up."""
    return -(-dividend // divisor)
