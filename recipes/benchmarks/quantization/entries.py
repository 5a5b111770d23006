"""What the quantization ladder measures: schemes and methods of the pass `quantize`, on the denoiser alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

NEAREST: dict[str, Any] = {"weights": "minmax", "observer": "minmax", "bias_correction": False}
"""Round to nearest: what every method is compared with."""

METHODS: dict[str, dict[str, Any]] = {
    "nearest": NEAREST,
    "ranges": {"bias_correction": False},
    "ranges, bias": {},
    "float layers": {"float_share": 0.02},
    "float layers, calls": {"float_share": 0.02, "calls": "search"},
    "float layers, calls, gptq": {"float_share": 0.02, "calls": "search", "rounding": "gptq"},
    "smooth": {"smooth": "search"},
    "rotate": {"rotate": True},
    "low rank": {"low_rank": 16},
    "gptq": {"rounding": "gptq"},
    "learned": {"rounding": "learned"},
    "smooth, gptq": {"smooth": "search", "rounding": "gptq"},
    "rotate, gptq": {"rotate": True, "rounding": "gptq"},
    "smooth, low rank": {"smooth": "search", "low_rank": 16},
    "smooth, low rank, gptq": {"smooth": "search", "low_rank": 16, "rounding": "gptq"},
    "rotate, low rank, gptq": {"rotate": True, "low_rank": 16, "rounding": "gptq"},
    "ranges, bias, finetune": {"finetune": 300},
    "smooth, low rank, gptq, finetune": {"smooth": "search", "low_rank": 16, "rounding": "gptq", "finetune": 300},
    "smooth, low rank, learned": {"smooth": "search", "low_rank": 16, "rounding": "learned"},
}
"""Name -> keys of the pass; those from `float layers` on also have fitted ranges and corrected biases."""

STORED = ("int8-w8a32", "int4-w4a32-g32", "int4-w4a32-g64", "int4-w4a32-g128", "nvfp4-w4a32")
EIGHT = (
    "int8-w8a8",
    "int8-w8a8-tensor",
    "int8-w8a8-token",
    "fp8-w8a8",
    "fp8-w8a8-token",
    "fp8-e5m2-w8a8",
    "mxfp8",
    "fp8-any-w8a8",
)
MIXED = ("int4-w4a8", "int4-w4a8-g64", "fp4-w4a8", "fp4-any-w4a8", "nvfp4-w4a8")
FOUR = ("int4-w4a4", "int4-w4a4-g64", "mxfp4", "nvfp4", "fp4-any-w4a4")

ABLATED = ("int4-w4a4-g64", "nvfp4", "int4-w4a8")
"""Schemes that are measured with every method."""

KEY = (
    *((scheme, method) for scheme in ("int8-w8a8", "fp8-w8a8") for method in ("float layers", "float layers, calls")),
    *((scheme, "float layers, calls, gptq") for scheme in ("int4-w4a8", "fp4-w4a8")),
    *((scheme, "ranges, bias") for scheme in ("int8-w8a8", "int8-w8a8-token", "fp8-w8a8", "mxfp8")),
    *((scheme, method) for scheme in ("int4-w4a8", "fp4-w4a8") for method in ("nearest", "gptq", "learned")),
    *(
        (scheme, method)
        for scheme in ("int4-w4a4-g64", "nvfp4", "int4-w4a4")
        for method in ("nearest", "smooth, low rank, gptq")
    ),
)
"""Rungs that are measured with every seed of calibration."""


@dataclass(frozen=True)
class Entry:
    """One rung: a scheme and a method."""

    scheme: str
    method: str

    def __str__(self) -> str:
        return f"{self.scheme}, {self.method}"

    @property
    def fields(self) -> dict[str, Any]:
        """Keys of the pass: the denoiser alone is quantized."""
        return {"scheme": "none", "parts": {"denoiser": self.scheme}, "float_share": 0.0, **METHODS[self.method]}


def tasks(seeds: Sequence[int], together: bool) -> Iterator[tuple[int, Entry]]:
    """Seeds of calibration and rungs, what matters most first; no rung twice with a seed.

    Args:
        seeds: the first one measures all rungs.
        together: many are measured at a time, so what takes longest comes first; otherwise it comes last.
    """
    first = seeds[0]
    key = [(seed, Entry(*one)) for seed in seeds for one in KEY]
    own = [(first, Entry(scheme, method)) for scheme in ABLATED for method in METHODS]
    slow = [(seed, entry) for seed, entry in own if "finetune" in entry.method]
    rest = [Entry(scheme, method) for scheme in EIGHT for method in ("nearest", "ranges, bias")]
    rest += [Entry(scheme, "gptq") for scheme in ("int8-w8a8", "fp8-w8a8")]
    some = ("nearest", "ranges, bias", "gptq", "learned", "smooth, low rank, gptq")
    rest += [Entry(scheme, method) for scheme in (*MIXED, *FOUR) for method in some]
    rest += [Entry(scheme, method) for scheme in STORED for method in ("nearest", "gptq")]
    quick = [one for one in own if one not in slow]
    ablation = [one for one in quick if one[1].scheme == ABLATED[0]]
    most = [*key[: len(KEY)], *ablation, *key, *((first, entry) for entry in rest), *quick]
    yield from dict.fromkeys([*slow, *most] if together else [*most, *slow])
