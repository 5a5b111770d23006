"""Products of 8-bit and 4-bit weights against cuBLAS, with the dequantization that follows it there, and Inductor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.gemm_w4a16 import Int4Weights, gemm_w4a16
from kernels.gemm_w8a8 import LowRank, gemm_w8a8
from kernels.packing import pack_int4
from kernels.quantize import Quantized, quantize
from kernels.quantize_projected import quantize_projected
from recipes.benchmarks.gpu.bench import Bar, Bench, Row
from recipes.benchmarks.gpu.shapes import SEQUENCES, TINY_SEQUENCES, Tokens

RANK = 32
INT8_BAR = Bar(1.2, "_int_mm + dequantize")


def run(bench: Bench) -> Iterator[Row]:
    """Feed-forward layers: (tokens, channels) times (4 channels, channels)."""
    for shape in reversed(TINY_SEQUENCES if bench.tiny else SEQUENCES):
        yield from _eight_bits(bench, shape)
    yield from _four_bits(bench)


def _eight_bits(bench: Bench, which: Tokens) -> Iterator[Row]:
    model, batch, tokens, channels, _ = which
    rows, outputs = batch * tokens, 4 * channels
    shape, flops = f"{rows} x {channels} x {outputs}", 2.0 * rows * channels * outputs
    x, weight = bench.randn(rows, channels), bench.randn(outputs, channels, seed=1) / channels**0.5
    bias = bench.randn(outputs, seed=2)
    plain: dict[str, Callable[[], Any]] = {"bf16": lambda: functional.linear(x, weight, bias)}
    for kind, dtype in (("int8", "int8"), ("fp8", "float8_e4m3fn")):
        a, b = quantize(x, kind), quantize(weight, kind)
        peer = _int8 if kind == "int8" else _fp8
        contestants = {
            "ours": lambda a=a, b=b: gemm_w8a8(a, b, bias),
            "ours, activations rounded": lambda b=b, kind=kind: gemm_w8a8(quantize(x, kind), b, bias),
            **peer(bench, a, b, bias),
            **plain,
        }
        moved = rows * channels + outputs * channels + 2 * rows * outputs
        yield bench.contest(
            f"gemm_{kind}",
            model,
            shape,
            contestants,
            moved=moved,
            flops=flops,
            kind=dtype,
            bar=INT8_BAR if kind == "int8" else None,
            truth=torch.addmm(bias.float(), a.dequantized(), b.dequantized().t()),
        )
        down, up = bench.randn(RANK, channels, seed=3), bench.randn(outputs, RANK, seed=4)
        yield bench.contest(
            f"gemm_{kind} of unrounded inputs, rank {RANK}",
            model,
            shape,
            {
                "ours": lambda b=b, kind=kind, down=down, up=up: _fused(x, b, bias, down, up, kind),
                "ours, branch apart": lambda b=b, kind=kind, down=down, up=up: (
                    gemm_w8a8(quantize(x, kind), b, bias) + x @ down.t() @ up.t()
                ),
                **plain,
            },
            moved=moved + rows * channels,
            flops=flops,
            kind=dtype,
        )


def _fused(x: Tensor, b: Quantized, bias: Tensor, down: Tensor, up: Tensor, kind: Any) -> Tensor:
    a, projected = quantize_projected(x, down, kind)
    return gemm_w8a8(a, b, bias, LowRank(projected, up))


def _int8(bench: Bench, a: Quantized, b: Quantized, bias: Tensor) -> dict[str, Callable[[], Any]]:
    def dequantized(codes: Tensor, weights: Tensor) -> Tensor:
        product = torch._int_mm(codes, weights)
        return (product * (a.scale[:, None] * b.scale) + bias).to(torch.bfloat16)

    peers: dict[str, Callable[[], Any]] = {"_int_mm + dequantize": lambda: dequantized(a.codes, b.codes.t())}
    if bench.compile:
        tuned = bench.compiled(dequantized)
        peers["inductor"] = lambda: tuned(a.codes, b.codes.t())
    return peers


def _fp8(bench: Bench, a: Quantized, b: Quantized, bias: Tensor) -> dict[str, Callable[[], Any]]:
    def scaled(fast: bool) -> Tensor:
        return torch._scaled_mm(
            a.codes,
            b.codes.t(),
            scale_a=a.scale[:, None],
            scale_b=b.scale[None],
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )

    kernel = {"ours": lambda: gemm_w8a8(a, b, bias, mode="triton")} if bench.device.type == "cuda" else {}
    peers = {"_scaled_mm": lambda: scaled(False), "_scaled_mm, fast sums": lambda: scaled(True)}
    return {**peers, **{f"{name}, the kernel": call for name, call in kernel.items()}}


def _four_bits(bench: Bench) -> Iterator[Row]:
    outputs, inputs = (64, 128) if bench.tiny else (3072, 3072)
    codes = torch.randint(-8, 8, (outputs, inputs), device=bench.device)
    weights = Int4Weights(pack_int4(codes, 64), bench.randn(outputs, inputs // 64).abs() / 100)
    wide = (codes.float() * weights.scale.float().repeat_interleave(64, dim=1)).to(torch.bfloat16)
    for rows in (1, 16, 4096) if not bench.tiny else (1,):
        x = bench.randn(rows, inputs, seed=1)
        contestants = {"ours": lambda x=x: gemm_w4a16(x, weights), "bf16": lambda x=x: functional.linear(x, wide)}
        moved, flops = outputs * inputs / 2 + 2 * rows * (inputs + outputs), 2.0 * rows * inputs * outputs
        shape = f"{rows} x {inputs} x {outputs}"
        yield bench.contest("gemm_w4a16", "Flux", shape, contestants, moved=moved, flops=flops)
