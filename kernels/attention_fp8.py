"""Attention with both products of 8-bit floats, e4m3.

Queries, times the scale of the scores, and smoothed keys become e4m3 codes with one scale for 128 tokens, values with
one scale a channel (`kernels.quantize_heads`). The weights become e4m3 too, at most 256; their total is taken before
that. The keys of the values lie in the order in which the threads hold the weights, so that no weight changes its
thread. There is no mask: keys beyond the last are codes of zero, which add nothing to the values, and their weights are
taken out of the total at the end. They cannot raise a maximum, since smoothed keys have scores of mean zero.

The sums over all keys stay in the accumulator of the tensor cores, which on sm_89 and sm_90 is said to keep 13 binary
digits (Zhang et al. 2024, arXiv 2411.10958, who add every tile to a second accumulator; that costs the registers of
half a tile). Emulated with each 32 keys truncated to 13 digits, on normal values: the error over 4608 keys stays
5.7e-2, over 17536 it grows from 5.4e-2 to 5.6e-2; where values have a mean of about one deviation a channel, from
1.6e-3 to 1.3e-2.

Interpreted, on normal values in float16 with an offset of five deviations in the keys (133 queries, 150 keys of 64
channels), the relative error against attention in float64 is 5.3e-2. With 3 binary digits each, the scores alone give
3.8e-2, the weights 2.7e-2 and the values 2.6e-2 (in the reference); `kernels.attention_int8` is four times as near.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.attention import attention_by_vendor
from kernels.capability import INTERPRETER
from kernels.dispatch import Mode, choose
from kernels.heads import check_heads, output_for, score_count, store_tile, strides, unfit
from kernels.language import ceiling, jit, tl
from kernels.launch import Configuration, Launch, configuration_for
from kernels.machine_code import Case
from kernels.quantize import DTYPES
from kernels.quantize_heads import (
    channel_reference,
    group_reference,
    in_fragments,
    prepare_heads,
    smoothing,
    width_of,
)
from kernels.softmax import fold_patiently, normalised, without_zeros

GROUP = 128
"""Tokens that share a scale; the tiles of the kernel divide it."""

_SHIFT, _PATIENCE = 4, 4
"""A weight is at most two to the power of their sum, see `kernels.softmax.fold_patiently`."""

_DEFAULT = Configuration(warps=8, stages=3, blocks={"BLOCK_QUERIES": 128, "BLOCK_KEYS": 64})
_LARGER = Configuration(warps=8, stages=3, blocks={"BLOCK_QUERIES": 128, "BLOCK_KEYS": 128})
_NARROW = Configuration(warps=4, stages=3, blocks={"BLOCK_QUERIES": 64, "BLOCK_KEYS": 128})
_TALL = Configuration(warps=4, stages=3, blocks={"BLOCK_QUERIES": 128, "BLOCK_KEYS": 64})
_SMALL = Configuration(warps=4, blocks={"BLOCK_QUERIES": 64, "BLOCK_KEYS": 32})

CONFIGURATIONS = {
    64: {"default": _DEFAULT, "sm_90": _NARROW, "sm_100": _LARGER, INTERPRETER: _SMALL},
    128: {"default": _DEFAULT, "sm_90": _TALL, "sm_100": _LARGER, INTERPRETER: _SMALL},
}
"""Channels of a head, padded, up to which a table serves -> configurations by architecture."""


@jit
def _attention_fp8(
    query: tl.tensor,
    query_scales: tl.tensor,
    key: tl.tensor,
    key_scales: tl.tensor,
    value: tl.tensor,
    value_scales: tl.tensor,
    output: tl.tensor,
    output_strides: tl.tensor,
    heads: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    query_groups: tl.tensor,
    key_groups: tl.tensor,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
    PATIENCE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> None:
    start = tl.program_id(0) * BLOCK_QUERIES
    row = tl.program_id(1)
    token, channel = tl.arange(0, BLOCK_KEYS), tl.arange(0, BLOCK_CHANNELS)
    padded = key_groups * GROUP
    query += (row.to(tl.int64) * query_groups * GROUP + start) * BLOCK_CHANNELS
    tile = tl.load(query + tl.arange(0, BLOCK_QUERIES)[:, None] * BLOCK_CHANNELS + channel[None, :])
    query_scale = tl.load(query_scales + row * query_groups + start // GROUP)
    key += row.to(tl.int64) * padded * BLOCK_CHANNELS
    value += row.to(tl.int64) * padded * BLOCK_CHANNELS
    key_scales += row * key_groups
    accumulator = tl.zeros([BLOCK_QUERIES, BLOCK_CHANNELS], tl.float32)
    maximum = tl.full([BLOCK_QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    for first in range(0, keys, BLOCK_KEYS):
        codes = tl.load(key + (first + token)[:, None] * BLOCK_CHANNELS + channel[None, :])
        scores = tl.dot(tile, tl.trans(codes))
        scale = query_scale * tl.load(key_scales + first // GROUP)
        weights, accumulator, maximum, total = fold_patiently(
            scores, scale, accumulator, maximum, total, SHIFT, PATIENCE
        )
        values = tl.load(value + channel[:, None] * padded + (first + token)[None, :])
        weights = in_fragments(weights.to(values.dtype))
        accumulator = tl.dot(weights, tl.trans(values), accumulator)
    total = without_zeros(total, maximum, tl.cdiv(keys, BLOCK_KEYS) * BLOCK_KEYS - keys, SHIFT)
    value_scale = tl.load(value_scales + row * CHANNELS + channel, mask=channel < CHANNELS, other=0.0)
    averages = normalised(accumulator, total) * value_scale[None, :]
    store_tile(
        output,
        output_strides,
        averages,
        row // heads,
        row % heads,
        start,
        queries,
        CHANNELS,
        BLOCK_QUERIES,
        BLOCK_CHANNELS,
        False,
    )


def attention_fp8_reference(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
    """Compute `attention_fp8` in plain torch and float32: the same codes, multiplied out."""
    factor = (query.shape[-1] ** -0.5 if scale is None else scale) * math.log2(math.e)
    coded_query = group_reference(query, "fp8", GROUP, factor=factor)
    coded_key = group_reference(key, "fp8", GROUP, smoothing(key))
    scores = coded_query @ coded_key.mT
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True).ceil() + _SHIFT)
    sums = weights.to(DTYPES["fp8"]).float() @ channel_reference(value, "fp8")
    return (sums / weights.sum(-1, keepdim=True)).to(query.dtype)


def attention_fp8(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, mode: Mode | None = None
) -> Tensor:
    """Attend to all keys by products in e4m3; where a GPU cannot run the kernel, or is faster without, by the vendor's.

    Args:
        query: (batch, heads, queries, channels), float16 or bfloat16.
        key: (batch, heads, keys, channels).
        value: (batch, heads, keys, channels).
        scale: of the scores, above zero; 1 / sqrt(channels) if None.
        mode: which implementation, see `kernels.dispatch.choose`.

    Returns:
        (batch, heads, queries, channels), a view of (batch, queries, heads, channels) where our kernel ran.

    Raises:
        KernelError: the tensors do not fit each other, or the kernel was asked for and cannot run.
    """
    check_heads(query, key, value, scale)
    choice = choose(
        "attention_fp8",
        query.device,
        query.dtype,
        query.shape,
        needs=("fp8",),
        unfit=unfit(query),
        vendor=True,
        work=score_count(query, key),
        mode=mode,
    )
    if choice.implementation == "reference":
        return attention_fp8_reference(query, key, value, scale=scale)
    if choice.implementation == "vendor":
        return attention_by_vendor(query, key, value, scale=scale)
    launches, output = _prepare(query, key, value, scale, choice.architecture)
    for launch in launches:
        launch.run()
    return output


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, architecture: str
) -> tuple[list[Launch], Tensor]:
    """The launches, in order, and the output: two that code everything, attention."""
    factor = (query.shape[-1] ** -0.5 if scale is None else scale) * math.log2(math.e)
    launches, coded = prepare_heads(query, key, value, "fp8", GROUP, GROUP, factor)
    output = output_for(query)
    batch, heads, queries, channels = query.shape
    keys = key.shape[2]
    chosen = configuration_for(CONFIGURATIONS[max(64, width_of(channels))], architecture)
    arguments = {
        **coded._asdict(),
        "output": output,
        **strides(output=output),
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "query_groups": coded.query_scales.shape[2],
        "key_groups": coded.key_scales.shape[2],
        "GROUP": GROUP,
        "SHIFT": float(_SHIFT),
        "PATIENCE": float(_PATIENCE),
        "CHANNELS": channels,
        "BLOCK_CHANNELS": width_of(channels),
    }
    grid = (ceiling(queries, chosen.blocks["BLOCK_QUERIES"]), batch * heads)
    return [*launches, Launch(_attention_fp8, grid, arguments, chosen)], output


def _case(channels: int, tokens: int, dtype: torch.dtype) -> Case:
    def launch(architecture: str) -> Launch:
        heads = torch.empty(2, tokens, 10, channels, dtype=dtype, device="meta").transpose(1, 2)
        return _prepare(heads, heads, heads, None, architecture)[0][-1]

    return Case(launch, products=("fp8",))


CASES = {
    "attention_fp8-fp16-d64": _case(64, 4096, torch.float16),
    "attention_fp8-bf16-d128": _case(128, 4608, torch.bfloat16),
    "attention_fp8-bf16-d128-odd": _case(128, 4250, torch.bfloat16),
}
