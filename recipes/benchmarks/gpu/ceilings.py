"""What the device reaches: copying, and products of large matrices in bf16, fp8 and int8."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from recipes.benchmarks.gpu.bench import Bench, Row


def run(bench: Bench) -> Iterator[Row]:
    """One row per ceiling: `value` in GB/s or TFLOP/s."""
    count = 1 << (16 if bench.tiny else 30)
    ms = _copying(bench, count)
    yield {"ceiling": "copy", "unit": "GB/s", "value": 2 * count / ms / 1e6, "ms": {"torch": ms}}
    side = 64 if bench.tiny else 8192
    for name, call in _products(bench, side).items():
        try:
            ms = bench.clock.milliseconds(call)
        except Exception as error:
            yield {"ceiling": name, "reason": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
            continue
        yield {"ceiling": name, "unit": "TFLOP/s", "value": 2 * side**3 / ms / 1e9, "ms": {"torch": ms}}


def _copying(bench: Bench, count: int) -> float:
    source = torch.randint(256, (count,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return bench.clock.milliseconds(lambda: target.copy_(source))


def _products(bench: Bench, side: int) -> dict[str, Callable[[], torch.Tensor]]:
    a, b = bench.randn(side, side), bench.randn(side, side, seed=1)
    codes_a, codes_b = ((10 * x).clamp(-127, 127).to(torch.int8) for x in (a, b))

    def fp8() -> torch.Tensor:
        return torch._scaled_mm(low_a, low_b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    low_a, low_b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=bench.device)
    return {
        "bfloat16": lambda: a @ b,
        "float8_e4m3fn": fp8,
        "int8": lambda: torch._int_mm(codes_a, codes_b.t()),
    }
