"""Turns queries, keys and values of attention into 8-bit codes with scales, int8 or e4m3.

Queries and keys get one scale for each group of consecutive tokens of a head: the largest magnitude becomes 127 in
int8, 448 in e4m3. Keys are first smoothed: their mean over tokens is subtracted, which changes the scores of a query by
one number for all keys, so that the softmax is the same, and takes away what keys have in common (Zhang et al. 2024,
arXiv 2410.02367). Values get one scale a channel and are stored (channels, tokens), since products of 8-bit numbers
want the axis that is summed innermost.

Codes are padded with zeros: tokens to whole groups, channels to a power of two.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.heads import aligned, load_tile, power_of_2
from kernels.language import ceiling, jit, tl
from kernels.launch import Configuration, Launch
from kernels.machine_code import Case
from kernels.quantize import DTYPES, LIMITS, NEEDS, Kind, codes, quantize_reference, scale_of


@jit
def _quantize_groups(
    source: tl.tensor,
    source_strides: tl.tensor,
    mean: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    heads: tl.tensor,
    tokens: tl.tensor,
    factor: tl.tensor,
    LIMIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> None:
    group, row = tl.program_id(0), tl.program_id(1)
    first = group * GROUP
    token, channel = tl.arange(0, GROUP), tl.arange(0, BLOCK_CHANNELS)
    tile = load_tile(
        source, source_strides, row // heads, row % heads, first, tokens, CHANNELS, GROUP, BLOCK_CHANNELS, False
    ).to(tl.float32)
    if mean is not None:
        centre = tl.load(mean + row * CHANNELS + channel, mask=channel < CHANNELS, other=0.0)
        tile = tl.where(first + token[:, None] < tokens, tile - centre[None, :], 0.0)
    tile *= factor
    scale = scale_of(tl.max(tl.max(tl.abs(tile), 0), 0), LIMIT)
    index = row.to(tl.int64) * tl.num_programs(0) + group
    tl.store(scales + index, scale)
    offsets = token[:, None] * BLOCK_CHANNELS + channel[None, :]
    tl.store(out + index * GROUP * BLOCK_CHANNELS + offsets, codes(tile, 1.0 / scale, out.dtype.element_ty))


@jit
def _quantize_channels(
    source: tl.tensor,
    source_strides: tl.tensor,
    peaks: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    tokens: tl.tensor,
    LIMIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> None:
    row, first = tl.program_id(1), tl.program_id(0) * GROUP
    token, channel = tl.arange(0, GROUP), tl.arange(0, BLOCK_CHANNELS)
    tile = load_tile(
        source, source_strides, row // heads, row % heads, first, tokens, CHANNELS, GROUP, BLOCK_CHANNELS, False
    ).to(tl.float32)
    peak = tl.load(peaks + row * CHANNELS + channel, mask=channel < CHANNELS, other=0.0)
    scale = scale_of(peak, LIMIT)
    coded = codes(tl.trans(tile), (1.0 / scale)[:, None], out.dtype.element_ty)
    padded = tl.num_programs(0) * GROUP
    out += row.to(tl.int64) * BLOCK_CHANNELS * padded + first
    tl.store(out + channel[:, None] * padded + token[None, :], coded)


def smoothing(key: Tensor) -> Tensor:
    """The mean over tokens of keys (batch, heads, tokens, channels): float32 (batch, heads, channels)."""
    return key.mean(2, dtype=torch.float32)


def peaks_of(value: Tensor) -> Tensor:
    """The largest magnitude of every channel of values (batch, heads, tokens, channels): float32 without tokens."""
    return torch.linalg.vector_norm(value, torch.inf, 2, dtype=torch.float32)


def group_reference(source: Tensor, kind: Kind, group: int, mean: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """What is left of (batch, heads, tokens, channels) after grouped codes and back, float32."""
    smooth = (source.float() if mean is None else source.float() - mean[:, :, None]) * factor
    tokens, channels = smooth.shape[2:]
    groups = functional.pad(smooth, (0, 0, 0, -tokens % group)).unflatten(2, (-1, group)).flatten(3)
    return quantize_reference(groups, kind).dequantized().unflatten(3, (group, channels)).flatten(2, 3)[:, :, :tokens]


def channel_reference(value: Tensor, kind: Kind) -> Tensor:
    """What is left of (batch, heads, tokens, channels) after codes with a scale a channel and back, float32."""
    return quantize_reference(value.mT, kind).dequantized().mT


def prepare_groups(
    source: Tensor, kind: Kind, group: int, mean: Tensor | None = None, factor: float = 1.0
) -> tuple[Launch, Tensor, Tensor]:
    """The launch that codes (batch, heads, tokens, channels) in groups of tokens.

    Args:
        source: what is coded.
        kind: of the codes.
        group: tokens that share a scale, a power of two.
        mean: float32 (batch, heads, channels), subtracted first; None for none.
        factor: multiplies everything first.

    Returns:
        The launch; the codes (batch, heads, padded tokens, padded channels); the scales, float32 (batch, heads,
        groups).
    """
    source = aligned(source)
    batch, heads, tokens, channels = source.shape
    groups, width = ceiling(tokens, group), width_of(channels)
    out = source.new_empty(batch, heads, groups * group, width, dtype=DTYPES[kind])
    scales = source.new_empty(batch, heads, groups, dtype=torch.float32)
    arguments = {
        "source": source,
        "source_strides": source.stride()[:3],
        "mean": mean,
        "out": out,
        "scales": scales,
        "heads": heads,
        "tokens": tokens,
        "factor": factor,
        "LIMIT": LIMITS[kind],
        "CHANNELS": channels,
        "GROUP": group,
        "BLOCK_CHANNELS": width,
    }
    launch = Launch(_quantize_groups, (groups, batch * heads), arguments, Configuration(warps=group // 16))
    return launch, out, scales


def prepare_channels(value: Tensor, kind: Kind, group: int, peaks: Tensor) -> tuple[Launch, Tensor]:
    """The launch that codes values (batch, heads, tokens, channels) with a scale a channel.

    Args:
        value: what is coded.
        kind: of the codes.
        group: the number of tokens is padded to a multiple of it, a power of two.
        peaks: see `peaks_of`.

    Returns:
        The launch; the codes (batch, heads, padded channels, padded tokens).
    """
    value = aligned(value)
    batch, heads, tokens, channels = value.shape
    groups, width = ceiling(tokens, group), width_of(channels)
    out = value.new_empty(batch, heads, width, groups * group, dtype=DTYPES[kind])
    arguments = {
        "source": value,
        "source_strides": value.stride()[:3],
        "peaks": peaks,
        "out": out,
        "heads": heads,
        "tokens": tokens,
        "LIMIT": LIMITS[kind],
        "CHANNELS": channels,
        "GROUP": group,
        "BLOCK_CHANNELS": width,
    }
    return Launch(_quantize_channels, (groups, batch * heads), arguments, Configuration(warps=group // 16)), out


def width_of(channels: int) -> int:
    """The padded number of channels: tensor cores sum over at least 32 8-bit products."""
    return max(32, power_of_2(channels))


def _heads() -> Tensor:
    return torch.empty(2, 4096, 10, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)


def _groups(kind: Kind, group: int) -> Case:
    return Case(lambda _: prepare_groups(_heads(), kind, group, smoothing(_heads()))[0], needs=NEEDS[kind])


CASES = {
    "quantize_heads-int8-groups-64": _groups("int8", 64),
    "quantize_heads-int8-groups-128": _groups("int8", 128),
    "quantize_heads-fp8-groups-128": _groups("fp8", 128),
    "quantize_heads-fp8-channels": Case(
        lambda _: prepare_channels(_heads(), "fp8", 128, peaks_of(_heads()))[0], needs=NEEDS["fp8"]
    ),
}
