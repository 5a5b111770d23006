"""Tries launch configurations of kernels on the GPU at hand; the best ones become rows of their tables, by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch

import kernels.attention
import kernels.attention_fp8
import kernels.attention_int8
import kernels.denoise_step
import kernels.gemm_w4a16
import kernels.gemm_w8a8
import kernels.group_norm_silu
import kernels.quantize
from kernels.adaln import adaln_quantized
from kernels.gelu import gelu_quantized
from kernels.group_norm_silu import GroupNorm, group_norm_silu_quantized
from kernels.launch import Configuration
from kernels.packing import pack_int4
from kernels.quantize import quantize
from recipes.benchmarks.gpu.bench import Bench, Row
from recipes.benchmarks.gpu.clock import graphed
from recipes.benchmarks.gpu.shapes import MAPS, SEQUENCES, TINY_MAPS, TINY_SEQUENCES, Tokens

Tuned = MutableMapping[str, Configuration]


HEADS = {
    "attention_int8": (
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 4, 4),
        (64, 32, 4, 4),
        (128, 64, 4, 3),
        (128, 32, 4, 4),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
    ),
    "attention_fp8": (
        (128, 64, 4, 2),
        (128, 64, 4, 3),
        (128, 64, 4, 4),
        (64, 128, 4, 3),
        (64, 64, 4, 3),
        (64, 64, 4, 4),
        (128, 64, 8, 3),
        (128, 128, 8, 3),
    ),
    "attention": (
        (64, 128, 4, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (128, 64, 4, 2),
        (128, 64, 4, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
    ),
}
"""Operation -> queries and keys of a tile, warps, stages; 8-bit tiles have at most the tokens that share a scale."""


def heads(bench: Bench) -> Iterator[Row]:
    """Attention in 8 and 16 bits, by its tiles, warps and stages."""
    shapes = TINY_SEQUENCES if bench.tiny else [row for row in SEQUENCES if row.model in ("Flux 1024", "SDXL 1024")]
    for shape in shapes:
        q, k, v = (_heads(bench, shape, seed) for seed in range(3))
        wide = 64 if shape.head <= 64 else 128
        flops = 4.0 * shape.batch * shape.channels * shape.tokens**2
        for name, table, call in (
            ("attention_int8", kernels.attention_int8.CONFIGURATIONS, kernels.attention_int8.attention_int8),
            ("attention_fp8", kernels.attention_fp8.CONFIGURATIONS[wide], kernels.attention_fp8.attention_fp8),
            ("attention", kernels.attention.CONFIGURATIONS[wide], kernels.attention.attention),
        ):
            tried = [
                Configuration(warps, stages, {"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys})
                for queries, keys, warps, stages in HEADS[name]
            ]
            mode: Any = "triton" if q.is_cuda else None
            yield from _trials(
                bench,
                name,
                f"{shape.tokens} tokens of {shape.head}",
                table,
                tried[:2] if bench.tiny else tried,
                lambda call=call, q=q, k=k, v=v, mode=mode: call(q, k, v, mode=mode),
                bench.floor_ms(0.0, flops),
            )


def products(bench: Bench) -> Iterator[Row]:
    """8-bit and 4-bit products, by their tiles, warps and stages."""
    tiles = [
        (128, 128, 128, 8, 3),
        (128, 128, 128, 4, 4),
        (128, 128, 64, 8, 4),
        (128, 256, 128, 8, 3),
        (128, 256, 64, 8, 4),
        (256, 128, 128, 8, 3),
        (256, 128, 64, 8, 4),
        (64, 256, 128, 4, 3),
        (128, 256, 128, 8, 4),
        (64, 128, 128, 4, 4),
    ]
    for rows, inputs, outputs in ((70, 160, 96),) if bench.tiny else ((4608, 3072, 12288), (8192, 640, 2560)):
        for kind in ("int8", "fp8"):
            a, b = quantize(bench.randn(rows, inputs), kind), quantize(bench.randn(outputs, inputs, seed=1), kind)  # type: ignore[arg-type]
            bias = bench.randn(outputs, seed=2)
            tried = [
                Configuration(warps, stages, {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "BAND": 8})
                for m, n, k, warps, stages in tiles
            ]
            mode: Any = "triton" if a.codes.is_cuda else None
            yield from _trials(
                bench,
                f"gemm_{kind}",
                f"{rows} x {inputs} x {outputs}",
                kernels.gemm_w8a8.CONFIGURATIONS,
                tried[:2] if bench.tiny else tried,
                lambda a=a, b=b, bias=bias, mode=mode: kernels.gemm_w8a8.gemm_w8a8(a, b, bias, mode=mode),
                bench.floor_ms(0.0, 2.0 * rows * inputs * outputs, "int8" if kind == "int8" else "float8_e4m3fn"),
            )
    outputs, inputs = (64, 128) if bench.tiny else (3072, 3072)
    codes = torch.randint(-8, 8, (outputs, inputs), device=bench.device)
    scale = bench.randn(outputs, inputs // 64).abs() / 100
    weights = kernels.gemm_w4a16.Int4Weights(pack_int4(codes, 64), scale)
    for rows, table, tiles_of_w4 in (
        (4, kernels.gemm_w4a16.FEW_ROWS, [(16, 64, 4, 4), (16, 128, 4, 4), (16, 32, 4, 5), (16, 32, 2, 4)]),
        (4096, kernels.gemm_w4a16.MANY_ROWS, [(128, 128, 8, 3), (128, 64, 4, 3), (256, 64, 8, 3), (256, 128, 8, 3)]),
    ):
        x = bench.randn(rows, inputs, seed=1)
        tried = [Configuration(warps, stages, {"BLOCK_M": m, "BLOCK_N": n}) for m, n, warps, stages in tiles_of_w4]
        yield from _trials(
            bench,
            "gemm_w4a16",
            f"{rows} x {inputs} x {outputs}",
            table,  # type: ignore[arg-type]
            tried[:2] if bench.tiny else tried,
            lambda x=x: kernels.gemm_w4a16.gemm_w4a16(x, weights),
            bench.floor_ms(outputs * inputs / 2 + 2 * rows * (inputs + outputs), 2.0 * rows * inputs * outputs),
        )


def rows(bench: Bench) -> Iterator[Row]:
    """Operations on rows, by the elements a warp takes; GroupNorm and the denoising step by their blocks."""
    for shape in TINY_SEQUENCES if bench.tiny else [SEQUENCES[index] for index in (1, 3, 4)]:
        yield from _rows_of(bench, shape)
    for model, samples, channels, side in TINY_MAPS if bench.tiny else MAPS:
        norm = GroupNorm(bench.randn(channels), bench.randn(channels, seed=1), 32)
        one = torch.full((1,), 0.05, device=bench.device)
        x = bench.randn(samples, channels, side, side, seed=2).contiguous(memory_format=torch.channels_last)
        tried = [
            Configuration(
                warps,
                blocks={"STATISTICS": summed, "APPLY": applied, "WIDTH": 128, "PROGRAMS": programs, "JOIN": 2048},
            )
            for warps, summed, applied, programs in (
                (4, 2048, 4096, 1056),
                (4, 2048, 2048, 528),
                (4, 4096, 8192, 528),
                (8, 4096, 4096, 528),
                (8, 4096, 8192, 1056),
                (2, 1024, 2048, 2112),
            )
        ]
        yield from _trials(
            bench,
            "group_norm_silu fp8",
            f"{model} {samples} x {channels} x {side} x {side}",
            kernels.group_norm_silu.CONFIGURATIONS,
            tried[:2] if bench.tiny else tried,
            lambda x=x, norm=norm, one=one: group_norm_silu_quantized(x, norm, one, "fp8"),
            bench.floor_ms(5.0 * x.numel()),
        )


def _rows_of(bench: Bench, shape: Tokens) -> Iterator[Row]:
    x = bench.randn(shape.batch, shape.tokens, shape.channels)
    shift, scale = bench.randn(shape.batch, shape.channels, seed=2), bench.randn(shape.batch, shape.channels, seed=3)
    wide = bench.randn(shape.batch, shape.tokens, 8 * shape.channels, seed=4)
    calls: Sequence[tuple[str, Callable[[], Any], float]] = (
        ("quantize fp8", lambda: quantize(x, "fp8"), 3.0 * x.numel()),
        ("adaln fp8", lambda: adaln_quantized(x, shift, scale, "fp8"), 3.0 * x.numel()),
        ("geglu fp8", lambda: gelu_quantized(wide, "fp8", gated=True), 2.5 * wide.numel()),
    )
    before = kernels.quantize.PER_WARP
    for name, call, moved in calls:
        try:
            for per_warp in (256, 512, 1024, 2048):
                kernels.quantize.PER_WARP = per_warp
                said = f"{shape.batch} x {shape.tokens} x {shape.channels}"
                yield _timed(bench, name, said, {"PER_WARP": per_warp}, call, bench.floor_ms(moved))
        finally:
            kernels.quantize.PER_WARP = before


def _heads(bench: Bench, shape: Tokens, seed: int) -> torch.Tensor:
    of = (shape.batch, shape.tokens, shape.channels // shape.head, shape.head)
    return bench.randn(*of, seed=seed).transpose(1, 2)


def _trials(
    bench: Bench,
    operation: str,
    shape: str,
    table: Tuned,
    tried: Sequence[Configuration],
    call: Callable[[], Any],
    floor: float | None,
) -> Iterator[Row]:
    """One row per configuration, each as the only one of the architecture while it is timed."""
    key = "sm_{}{}".format(*torch.cuda.get_device_capability()) if bench.device.type == "cuda" else "sm_90"
    before = table.get(key)
    try:
        for one in tried:
            table[key] = one
            said = {**one.blocks, "warps": one.warps, "stages": one.stages}
            yield _timed(bench, operation, shape, said, call, floor)
    finally:
        table.pop(key)
        if before is not None:
            table[key] = before


def _timed(
    bench: Bench, operation: str, shape: str, tried: dict[str, int], call: Callable[[], Any], floor: float | None
) -> Row:
    row: Row = {"operation": operation, "shape": shape, "configuration": tried, "floor_ms": floor}
    try:
        ms = bench.clock.milliseconds(graphed(call) if bench.device.type == "cuda" else call)
    except Exception as error:
        return row | {"reason": " ".join(f"{type(error).__name__}: {error}".split())[:160]}
    return row | {"ms": ms}
