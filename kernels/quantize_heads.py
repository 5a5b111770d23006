"""Turns queries, keys and values of attention into 8-bit codes with scales, int8 or e4m3.

Queries and keys get one scale for each group of consecutive tokens of a head: the largest magnitude becomes 127 in
int8, 448 in e4m3. Keys are first smoothed: their mean over tokens is subtracted, which changes the scores of a query by
one number for all keys, so that the softmax is the same, and takes away what keys have in common (Zhang et al. 2024,
arXiv 2410.02367). Values get one scale a channel and are stored (channels, tokens), since products of 8-bit numbers
want the axis that is summed innermost, and each 16 tokens in the order of `in_fragments`.

Codes are padded with zeros: tokens to whole groups, channels to a power of two. Two launches make all of them: the
first finds the sums of keys and the peaks of values in pieces of the tokens, the second joins the pieces and codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kernels.heads import aligned, load_tile, power_of_2
from kernels.language import ceiling, jit, tl
from kernels.launch import Argument, Configuration, Launch
from kernels.machine_code import Case
from kernels.quantize import DTYPES, LIMITS, NEEDS, Kind, codes, quantize_reference, scale_of

PIECES = 16
"""Into so many stretches the tokens of a head are cut for its statistics; each program sums its own, in order."""

_TOGETHER = 32
"""Tokens that a program of the statistics takes at once."""


class Coded(NamedTuple):
    """Memory for the codes of one attention; `heads` stands for batch x heads, groups have `group` tokens.

    Attributes:
        query: (batch, heads, padded queries, padded channels).
        query_scales: float32 (batch, heads, groups).
        key: (batch, heads, padded keys, padded channels), smoothed.
        key_scales: float32 (batch, heads, groups).
        value: (batch, heads, padded channels, padded keys), in the order of `in_fragments`; None if they stay.
        value_scales: float32 (batch, heads, channels); likewise.
    """

    query: Tensor
    query_scales: Tensor
    key: Tensor
    key_scales: Tensor
    value: Tensor | None
    value_scales: Tensor | None


@jit
def in_fragments(tile: tl.tensor) -> tl.tensor:
    """Put the columns of a tile (rows, tokens) in the order in which threads hold an operand of 8 bits.

    A thread that has numbers 2 and 2 of 16 columns in the result of one product holds 4 in a row of the operand of the
    next. With the tokens of the values in the same order the sum is the same, and no number changes its thread.
    """
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    return tile.reshape(ROWS, COLUMNS // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, COLUMNS)


@jit
def _statistics(
    key: tl.tensor,
    key_strides: tl.tensor,
    value: tl.tensor,
    value_strides: tl.tensor,
    sums: tl.tensor,
    peaks: tl.tensor,
    heads: tl.tensor,
    tokens: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    TOGETHER: tl.constexpr,
) -> None:
    row = tl.program_id(1)
    batch, head = row // heads, row % heads
    length = tl.cdiv(tl.cdiv(tokens, TOGETHER), tl.num_programs(0)) * TOGETHER
    start = tl.program_id(0) * length
    end = tl.minimum(start + length, tokens)
    found = tl.zeros([TOGETHER, BLOCK_CHANNELS], tl.float32)
    channel = tl.arange(0, BLOCK_CHANNELS)
    at = (row * tl.num_programs(0) + tl.program_id(0)) * CHANNELS + channel
    if tl.program_id(2) == 0:
        for first in range(start, end, TOGETHER):
            tile = load_tile(key, key_strides, batch, head, first, end, CHANNELS, TOGETHER, BLOCK_CHANNELS, False)
            found += tile.to(tl.float32)
        tl.store(sums + at, tl.sum(found, 0), mask=channel < CHANNELS)
    elif value is not None:
        for first in range(start, end, TOGETHER):
            tile = load_tile(value, value_strides, batch, head, first, end, CHANNELS, TOGETHER, BLOCK_CHANNELS, False)
            found = tl.maximum(found, tl.abs(tile.to(tl.float32)))
        tl.store(peaks + at, tl.max(found, 0), mask=channel < CHANNELS)


@jit
def pieces_of(
    found: tl.tensor, row: tl.tensor, PIECES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """What `_statistics` found in each piece of a head, (PIECES, BLOCK); zero where there is no channel."""
    channel = tl.arange(0, BLOCK)[None, :]
    at = (row * PIECES + tl.arange(0, PIECES))[:, None] * CHANNELS + channel
    return tl.load(found + at, mask=channel < CHANNELS, other=0.0)


@jit
def code_group(
    tile: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    index: tl.tensor,
    LIMIT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> None:
    """Store a tile (GROUP, BLOCK_CHANNELS) of float32 as the group `index` of codes, with one scale."""
    scale = scale_of(tl.max(tl.max(tl.abs(tile), 0), 0), LIMIT)
    tl.store(scales + index, scale)
    coded = codes(tile, 1.0 / scale, out.dtype.element_ty)
    offsets = tl.arange(0, GROUP)[:, None] * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    tl.store(out + index.to(tl.int64) * GROUP * BLOCK_CHANNELS + offsets, coded)


@jit
def _code_heads(
    query: tl.tensor,
    query_strides: tl.tensor,
    key: tl.tensor,
    key_strides: tl.tensor,
    value: tl.tensor,
    value_strides: tl.tensor,
    sums: tl.tensor,
    peaks: tl.tensor,
    query_codes: tl.tensor,
    query_scales: tl.tensor,
    key_codes: tl.tensor,
    key_scales: tl.tensor,
    value_codes: tl.tensor,
    value_scales: tl.tensor,
    heads: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    query_groups: tl.tensor,
    key_groups: tl.tensor,
    factor: tl.tensor,
    LIMIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIECES: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> None:
    group, row = tl.program_id(0), tl.program_id(1)
    batch, head = row // heads, row % heads
    if tl.program_id(2) == 0:
        if group < query_groups:
            asked = load_tile(
                query,
                query_strides,
                batch,
                head,
                group * QUERY_GROUP,
                queries,
                CHANNELS,
                QUERY_GROUP,
                BLOCK_CHANNELS,
                False,
            )
            at = row * query_groups + group
            code_group(asked.to(tl.float32) * factor, query_codes, query_scales, at, LIMIT, QUERY_GROUP, BLOCK_CHANNELS)
    elif group < key_groups:
        first = group * KEY_GROUP
        channel, token = tl.arange(0, BLOCK_CHANNELS), first + tl.arange(0, KEY_GROUP)
        if tl.program_id(2) == 1:
            tile = load_tile(key, key_strides, batch, head, first, keys, CHANNELS, KEY_GROUP, BLOCK_CHANNELS, False)
            mean = tl.sum(pieces_of(sums, row, PIECES, CHANNELS, BLOCK_CHANNELS), 0) / keys
            smooth = tl.where(token[:, None] < keys, tile.to(tl.float32) - mean[None, :], 0.0)
            code_group(smooth, key_codes, key_scales, row * key_groups + group, LIMIT, KEY_GROUP, BLOCK_CHANNELS)
        elif value is not None:
            given = load_tile(
                value, value_strides, batch, head, first, keys, CHANNELS, KEY_GROUP, BLOCK_CHANNELS, False
            )
            peak = tl.max(pieces_of(peaks, row, PIECES, CHANNELS, BLOCK_CHANNELS), 0)
            scale = scale_of(peak, LIMIT)
            tl.store(value_scales + row * CHANNELS + channel, scale, mask=(channel < CHANNELS) & (group == 0))
            coded = codes(tl.trans(given.to(tl.float32)), (1.0 / scale)[:, None], value_codes.dtype.element_ty)
            padded = key_groups * KEY_GROUP
            value_codes += row.to(tl.int64) * BLOCK_CHANNELS * padded
            tl.store(value_codes + channel[:, None] * padded + token[None, :], in_fragments(coded))


def smoothing(key: Tensor) -> Tensor:
    """The mean over tokens of keys (batch, heads, tokens, channels): float32 (batch, heads, channels)."""
    return key.mean(2, dtype=torch.float32)


def group_reference(source: Tensor, kind: Kind, group: int, mean: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """What is left of (batch, heads, tokens, channels) after grouped codes and back, float32."""
    smooth = (source.float() if mean is None else source.float() - mean[:, :, None]) * factor
    tokens, channels = smooth.shape[2:]
    groups = functional.pad(smooth, (0, 0, 0, -tokens % group)).unflatten(2, (-1, group)).flatten(3)
    return quantize_reference(groups, kind).dequantized().unflatten(3, (group, channels)).flatten(2, 3)[:, :, :tokens]


def channel_reference(value: Tensor, kind: Kind) -> Tensor:
    """What is left of (batch, heads, tokens, channels) after codes with a scale a channel and back, float32."""
    return quantize_reference(value.mT, kind).dequantized().mT


def prepare_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    kind: Kind,
    query_group: int,
    key_group: int,
    factor: float,
) -> tuple[list[Launch], Coded]:
    """The two launches that code the tensors of one attention: what all keys and values have, then all codes.

    Args:
        query: (batch, heads, queries, channels), times `factor` before it is coded.
        key: (batch, heads, keys, channels).
        value: like the key; None if it is not coded.
        kind: of the codes.
        query_group: tokens that share a scale, a power of two.
        key_group: the same for keys.
        factor: see the query.
    """
    query, key = aligned(query), aligned(key)
    value = None if value is None else aligned(value)
    batch, heads, queries, channels = query.shape
    keys, width, rows = key.shape[2], width_of(channels), (batch, heads)
    query_groups, key_groups = ceiling(queries, query_group), ceiling(keys, key_group)

    def codes_of(*shape: int) -> Tensor:
        return query.new_empty(*rows, *shape, dtype=DTYPES[kind])

    def floats(*shape: int) -> Tensor:
        return query.new_empty(*rows, *shape, dtype=torch.float32)

    coded = Coded(
        codes_of(query_groups * query_group, width),
        floats(query_groups),
        codes_of(key_groups * key_group, width),
        floats(key_groups),
        None if value is None else codes_of(width, key_groups * key_group),
        None if value is None else floats(channels),
    )
    shared: dict[str, Argument] = {
        "key": key,
        "value": value,
        "key_strides": key.stride()[:3],
        "value_strides": None if value is None else value.stride()[:3],
        "sums": floats(PIECES, channels),
        "peaks": None if value is None else floats(PIECES, channels),
        "heads": heads,
        "CHANNELS": channels,
        "BLOCK_CHANNELS": width,
    }
    of_codes: dict[str, Argument] = {
        "query": query,
        "query_strides": query.stride()[:3],
        "query_codes": coded.query,
        "query_scales": coded.query_scales,
        "key_codes": coded.key,
        "key_scales": coded.key_scales,
        "value_codes": coded.value,
        "value_scales": coded.value_scales,
        "queries": queries,
        "keys": keys,
        "query_groups": query_groups,
        "key_groups": key_groups,
        "factor": factor,
        "LIMIT": LIMITS[kind],
        "PIECES": PIECES,
        "QUERY_GROUP": query_group,
        "KEY_GROUP": key_group,
    }
    sources = 1 if value is None else 2
    statistics = Launch(
        _statistics,
        (PIECES, batch * heads, sources),
        {**shared, "tokens": keys, "TOGETHER": _TOGETHER},
        Configuration(warps=8),
    )
    grid = (max(query_groups, key_groups), batch * heads, 1 + sources)
    return [statistics, Launch(_code_heads, grid, {**shared, **of_codes}, Configuration(warps=8))], coded


def width_of(channels: int) -> int:
    """The padded number of channels: tensor cores sum over at least 32 8-bit products."""
    return max(32, power_of_2(channels))


def _heads() -> Tensor:
    return torch.empty(2, 4096, 10, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)


def _case(kind: Kind, key_group: int, values: bool, index: int) -> Case:
    def launch(_: str) -> Launch:
        value = _heads() if values else None
        return prepare_heads(_heads(), _heads(), value, kind, 128, key_group, 1.0)[0][index]

    return Case(launch, needs=NEEDS[kind] if index else ())


CASES = {
    "quantize_heads-int8-statistics": _case("int8", 64, False, 0),
    "quantize_heads-int8-codes": _case("int8", 64, False, 1),
    "quantize_heads-fp8-statistics": _case("fp8", 128, True, 0),
    "quantize_heads-fp8-codes": _case("fp8", 128, True, 1),
}
