"""Attention with both products of 8-bit floats, e4m3.

Queries, times the scale of the scores, and smoothed keys become e4m3 codes with one scale for 128 tokens, values with
one scale a channel (`kernels.quantize_heads`). The weights become e4m3 too, at most 256 so that small ones
keep their digits; their total is taken before that. There is no mask.

The tensor cores of sm_89 and sm_90 keep fewer than 32 bits while they sum products of 8-bit floats. So the sum over one
tile of keys is added to a float32 accumulator outside of them: two levels, Zhang et al. 2024, arXiv 2411.10958.

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
from kernels.heads import check_heads, output_for, store_tile, strides, unfit
from kernels.language import ceiling, jit, tl
from kernels.launch import Configuration, Launch, configuration_for
from kernels.machine_code import Case
from kernels.quantize import DTYPES, LIMITS
from kernels.quantize_heads import (
    channel_reference,
    group_reference,
    peaks_of,
    prepare_channels,
    prepare_groups,
    smoothing,
    width_of,
)
from kernels.softmax import fold, normalised

GROUP = 128
"""Tokens that share a scale; the tiles of the kernel divide it."""

_SHIFT = 8
"""The largest weight is two to this power."""

_DEFAULT = Configuration(warps=8, stages=3, blocks={"BLOCK_QUERIES": 128, "BLOCK_KEYS": 64})
_LARGER = Configuration(warps=8, stages=3, blocks={"BLOCK_QUERIES": 128, "BLOCK_KEYS": 128})
_SMALL = Configuration(warps=4, blocks={"BLOCK_QUERIES": 64, "BLOCK_KEYS": 32})

CONFIGURATIONS = {
    64: {"default": _DEFAULT, "sm_90": _LARGER, "sm_100": _LARGER, INTERPRETER: _SMALL},
    128: {"default": _DEFAULT, "sm_100": _LARGER, INTERPRETER: _SMALL},
}
"""Channels of a head, padded, up to which a table serves -> configurations by architecture."""


@jit
def _attention_fp8(
    query: tl.tensor,
    query_scales: tl.tensor,
    key: tl.tensor,
    key_scales: tl.tensor,
    value: tl.tensor,
    value_peaks: tl.tensor,
    output: tl.tensor,
    output_strides: tl.tensor,
    heads: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    query_groups: tl.tensor,
    key_groups: tl.tensor,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
    LIMIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,
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
        if not WHOLE:
            scores = tl.where((first + token)[None, :] < keys, scores, -float("inf"))
        scale = query_scale * tl.load(key_scales + first // GROUP)
        weights, correction, maximum, total = fold(scores, scale, maximum, total, SHIFT)
        values = tl.load(value + channel[:, None] * padded + (first + token)[None, :])
        sums = tl.dot(weights.to(values.dtype), tl.trans(values))
        accumulator = accumulator * correction[:, None] + sums
    peak = tl.load(value_peaks + row * CHANNELS + channel, mask=channel < CHANNELS, other=0.0)
    averages = normalised(accumulator, total) * (peak / LIMIT)[None, :]
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
    """Attend to all keys by products in e4m3; where the kernel cannot run on a GPU, by the vendor's in full precision.

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
    """The launches, in order, and the output: queries, keys and values are coded, attention."""
    factor = (query.shape[-1] ** -0.5 if scale is None else scale) * math.log2(math.e)
    code_query, coded_query, query_scales = prepare_groups(query, "fp8", GROUP, factor=factor)
    code_key, coded_key, key_scales = prepare_groups(key, "fp8", GROUP, smoothing(key))
    peaks = peaks_of(value)
    code_value, coded_value = prepare_channels(value, "fp8", GROUP, peaks)
    output = output_for(query)
    batch, heads, queries, channels = query.shape
    keys = key.shape[2]
    chosen = configuration_for(CONFIGURATIONS[max(64, width_of(channels))], architecture)
    arguments = {
        "query": coded_query,
        "query_scales": query_scales,
        "key": coded_key,
        "key_scales": key_scales,
        "value": coded_value,
        "value_peaks": peaks,
        "output": output,
        **strides(output=output),
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "query_groups": query_scales.shape[2],
        "key_groups": key_scales.shape[2],
        "GROUP": GROUP,
        "SHIFT": float(_SHIFT),
        "LIMIT": LIMITS["fp8"],
        "CHANNELS": channels,
        "BLOCK_CHANNELS": width_of(channels),
        "WHOLE": keys % chosen.blocks["BLOCK_KEYS"] == 0,
    }
    grid = (ceiling(queries, chosen.blocks["BLOCK_QUERIES"]), batch * heads)
    return [code_query, code_key, code_value, Launch(_attention_fp8, grid, arguments, chosen)], output


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
