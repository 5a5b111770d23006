"""What each GPU architecture can do: one row of plain data per architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Format = Literal["float", "int8", "fp8"]
"""Operands of a tensor-core product: 16-bit floats, signed 8-bit integers, or e4m3."""

INTERPRETER = "interpreter"
"""Stands for an architecture where kernels run on the CPU in Triton's interpreter; it has no row and lacks nothing."""

_KIB = 1024


@dataclass(frozen=True)
class Capability:
    """One architecture.

    Attributes:
        architecture: `sm_90` for compute capability 9.0.
        shared_memory: the most that one program may use, bytes (CUDA C++ Programming Guide, technical
            specifications per compute capability, "maximum amount of shared memory per thread block").
        products: operand format -> the instruction that the tensor cores run for it; a format that is absent has
            none. 8-bit floats are converted by the hardware exactly where they can be multiplied.
        warp_specialization: whether splitting a kernel's warps into loading and computing ones compiles without
            spilling; elsewhere Triton 3.9 spills hundreds of values.
        vendor: operation -> why the vendor's library is taken for it.
        vendor_below: operation -> the amount of work below which the vendor's library is taken, and why; of attention
            the scores, batch x heads x queries x keys.
    """

    architecture: str
    shared_memory: int
    products: Mapping[Format, str]
    warp_specialization: bool = False
    vendor: Mapping[str, str] = field(default_factory=dict)
    vendor_below: Mapping[str, tuple[int, str]] = field(default_factory=dict)


_AMPERE: dict[Format, str] = {"float": "HMMA", "int8": "IMMA"}
_ADA: dict[Format, str] = {**_AMPERE, "fp8": "QMMA"}

CAPABILITIES: dict[str, Capability] = {
    row.architecture: row
    for row in (
        Capability("sm_80", 163 * _KIB, _AMPERE),
        Capability("sm_86", 99 * _KIB, _AMPERE),
        Capability("sm_89", 99 * _KIB, _ADA),
        Capability(
            "sm_90",
            227 * _KIB,
            {"float": "HGMMA", "int8": "IGMMA", "fp8": "QGMMA"},
            warp_specialization=True,
            vendor={
                "attention": "on an H200 cuDNN's bf16 attention took 0.75 to 0.9 of the time of our kernel",
                "cross_attention": "on an H200 cuDNN's attention took as long as our kernel at 64 channels, and 0.55 "
                "of its time at 128",
                "attention_int8": "on an H200 cuDNN's bf16 attention took 0.61 to 0.92 of the time of int8 scores",
                "gemm_fp8": "on an H200 torch._scaled_mm (cuBLASLt) took 0.6 of the time of our product",
            },
            vendor_below={
                "attention_fp8": (
                    2**29,
                    "on an H200 cuDNN's bf16 attention took 0.68 to 0.96 of the time of fp8 with up to 5.1e8 scores, "
                    "and 1.14 and 1.41 times as long with 8.7e8 and 7.4e9",
                ),
            },
        ),
        # Without an instruction for int8, Triton widens the operands: it compiles, and is slow.
        Capability("sm_100", 227 * _KIB, {"float": "UTCHMMA", "fp8": "UTCQMMA"}),
        Capability("sm_120", 99 * _KIB, _ADA),
    )
}

ARCHITECTURES = tuple(CAPABILITIES)


def architecture_of(major: int, minor: int) -> str | None:
    """The newest row that a GPU of this compute capability can run, or None.

    Machine code of one major version runs on later minor ones: 8.7 takes that of sm_86.
    """
    fitting = [
        name
        for name in ARCHITECTURES
        if divmod(int(name.removeprefix("sm_")), 10) <= (major, minor) and int(name.removeprefix("sm_")) // 10 == major
    ]
    return fitting[-1] if fitting else None


def lacking(architecture: str, needs: Iterable[Format]) -> str | None:
    """Why an architecture cannot run a kernel that needs these formats; None where it can."""
    if architecture == INTERPRETER:
        return None
    for need in needs:
        if need not in CAPABILITIES[architecture].products:
            able = ", ".join(name for name, row in CAPABILITIES.items() if need in row.products)
            instead = "; use fp8" if need == "int8" and "fp8" in CAPABILITIES[architecture].products else ""
            return f"{architecture} has no {need} tensor-core instruction (only {able} have){instead}"
    return None
