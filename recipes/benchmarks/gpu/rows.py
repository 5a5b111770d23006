"""Norms, activations and residuals, with and without rounding to 8 bits, against eager and Inductor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.adaln import adaln, adaln_quantized
from kernels.gated_residual import gated_residual
from kernels.gelu import gelu, gelu_quantized
from kernels.group_norm_silu import GroupNorm, group_norm_silu, group_norm_silu_quantized
from kernels.quantize import DTYPES, LIMITS, quantize
from recipes.benchmarks.gpu.bench import Bench, Row
from recipes.benchmarks.gpu.shapes import MAPS, SEQUENCES, TINY_MAPS, TINY_SEQUENCES, Tokens

TUNED = ("SDXL 1024", "Flux 1024")
"""Where Inductor takes part: tuning takes it seconds for every shape."""

COPY, HALF = 0.8, 0.5
"""Share of the measured bandwidth of copying that is promised; GroupNorm reads twice."""


def run(bench: Bench) -> Iterator[Row]:
    """One contest per operation and shape; those that round come first, they are what the kernels are for."""
    for shape in TINY_SEQUENCES if bench.tiny else SEQUENCES:
        yield from _sequences(bench, shape)
    for model, samples, channels, side in TINY_MAPS if bench.tiny else MAPS:
        yield from _maps(bench, model, samples, channels, side)


def _sequences(bench: Bench, which: Tokens) -> Iterator[Row]:
    model, batch, tokens, channels, _ = which
    shape, count = f"{batch} x {tokens} x {channels}", batch * tokens * channels
    x, y = bench.randn(batch, tokens, channels), bench.randn(batch, tokens, channels, seed=1)
    shift, scale = bench.randn(batch, channels, seed=2), bench.randn(batch, channels, seed=3)
    for kind in ("fp8", "int8"):
        ours = {"ours": lambda kind=kind: adaln_quantized(x, shift, scale, kind)}
        peers = _peers(bench, model, lambda x, s, t, kind=kind: rounded(_adaln(x, s, t), kind), x, shift, scale)
        yield _contest(bench, f"adaln {kind}", model, shape, ours | peers, 3 * count, COPY)
        ours = {"ours": lambda kind=kind: quantize(x, kind)}
        peers = _peers(bench, model, lambda x, kind=kind: rounded(x, kind), x)
        yield _contest(bench, f"quantize {kind}", model, shape, ours | peers, 3 * count, COPY)
    wide = bench.randn(batch, tokens, 8 * channels, seed=4)
    ours = {"ours": lambda: gelu_quantized(wide, "fp8", gated=True)}
    peers = _peers(bench, model, lambda x: rounded(_geglu(x), "fp8"), wide)
    yield _contest(bench, "geglu fp8", model, shape, ours | peers, 20 * count, COPY)
    peers = _peers(bench, model, _geglu, wide)
    yield _contest(bench, "geglu", model, shape, {"ours": lambda: gelu(wide, gated=True)} | peers, 24 * count, COPY)
    ours = {"ours": lambda: adaln(x, shift, scale)}
    peers = _peers(bench, model, _adaln, x, shift, scale)
    yield _contest(bench, "adaln", model, shape, ours | peers, 4 * count, COPY)
    ours = {"ours": lambda: gated_residual(x, scale, y)}
    peers = _peers(bench, model, lambda x, g, y: x + g[:, None] * y, x, scale, y)
    yield _contest(bench, "gated_residual", model, shape, ours | peers, 6 * count, COPY)


def _maps(bench: Bench, model: str, samples: int, channels: int, side: int) -> Iterator[Row]:
    shape, count = f"{samples} x {channels} x {side} x {side}", samples * channels * side * side
    norm = GroupNorm(bench.randn(channels), bench.randn(channels, seed=1), 32)
    one = torch.full((1,), 0.05, device=bench.device)
    x = bench.randn(samples, channels, side, side, seed=2).contiguous(memory_format=torch.channels_last)

    def normed(x: Tensor) -> Tensor:
        return functional.silu(functional.group_norm(x, norm.groups, norm.weight, norm.bias, norm.eps))

    peers = _peers(bench, model, lambda x: codes(normed(x), one, "fp8"), x)
    ours = {"ours": lambda: group_norm_silu_quantized(x, norm, one, "fp8")}
    yield _contest(bench, "group_norm_silu fp8", model, shape, ours | peers, 5 * count, HALF)
    peers = _peers(bench, model, normed, x)
    ours = {"ours": lambda: group_norm_silu(x, norm)}
    yield _contest(bench, "group_norm_silu", model, shape, ours | peers, 6 * count, HALF)


def _contest(
    bench: Bench,
    operation: str,
    model: str,
    shape: str,
    contestants: Mapping[str, Callable[[], Any]],
    moved: float,
    share: float,
) -> Row:
    return bench.beside_a_copy(bench.contest(operation, model, shape, contestants, moved=moved), moved, share)


def _peers(
    bench: Bench, model: str, function: Callable[..., Any], *arguments: Tensor
) -> Mapping[str, Callable[[], Any]]:
    peers: dict[str, Callable[[], Any]] = {"eager": lambda: function(*arguments)}
    if bench.compile and model in TUNED:
        tuned = bench.compiled(function)
        peers["inductor"] = lambda: tuned(*arguments)
    return peers


def _adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def _geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * functional.gelu(gate)


def rounded(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows, as anyone would write it in torch."""
    scale = x.float().abs().amax(dim=-1).clamp_min(1e-12) / LIMITS[kind]  # type: ignore[index]
    return codes(x, scale[..., None], kind), scale


def codes(x: Tensor, scale: Tensor, kind: str) -> Tensor:
    """Values by a scale, in 8 bits."""
    limit = LIMITS[kind]  # type: ignore[index]
    value = (x.float() / scale).clamp(-limit, limit)
    return (value.round() if kind == "int8" else value).to(DTYPES[kind])  # type: ignore[index]
