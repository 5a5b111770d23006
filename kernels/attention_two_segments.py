"""Attention to cached and fresh keys where they lie, without joining them first.

A region of an image is computed anew, `fresh`; of the rest, keys and values are `cached` from an earlier step. Query i
gets

    sum_j w[j] exp(scale * q[i] . k[j]) v[j]  /  sum_j w[j] exp(scale * q[i] . k[j])

with j over the visible tokens of both segments. `cached_visible` is the region mask: false where a cached token lies in
the region, since its fresh one replaces it. The weight w[j], at least 0, stands for how many tokens a merged one is
(Bolya et al. 2022, arXiv 2210.09461, proportional attention), or for how far a stale one is trusted; log w[j] is added
to its score, and 0 hides it. A query that sees no key gets zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import attention as one_segment
from kernels.attention import attend, attention_by_vendor, attention_reference
from kernels.capability import INTERPRETER
from kernels.dispatch import Mode, choose
from kernels.heads import (
    COPIES_TILES,
    aligned,
    check_heads,
    check_per_key,
    described,
    load_tile,
    output_for,
    power_of_2,
    store_tile,
    strides,
    unfit,
)
from kernels.language import ceiling, jit, tl
from kernels.launch import Configuration, Launch, configuration_for
from kernels.machine_code import Case
from kernels.softmax import base_2, normalised

_LARGER = Configuration(warps=8, stages=2, blocks={"BLOCK_QUERIES": 128, "BLOCK_KEYS": 64})

CONFIGURATIONS = {
    64: one_segment.CONFIGURATIONS[64],
    128: {
        "default": Configuration(warps=8, stages=2, blocks={"BLOCK_QUERIES": 128, "BLOCK_KEYS": 32}),
        "sm_90": _LARGER,
        "sm_100": _LARGER,
        INTERPRETER: one_segment.CONFIGURATIONS[128][INTERPRETER],
    },
}
"""As in `kernels.attention`; two loops need more registers, so tiles of wide heads are smaller."""


@jit
def _attention_two_segments(
    query: tl.tensor,
    query_strides: tl.tensor,
    cached_key: tl.tensor,
    cached_key_strides: tl.tensor,
    cached_value: tl.tensor,
    cached_value_strides: tl.tensor,
    fresh_key: tl.tensor,
    fresh_key_strides: tl.tensor,
    fresh_value: tl.tensor,
    fresh_value_strides: tl.tensor,
    output: tl.tensor,
    output_strides: tl.tensor,
    cached_visible: tl.tensor,
    cached_weight: tl.tensor,
    fresh_weight: tl.tensor,
    heads: tl.tensor,
    queries: tl.tensor,
    cached: tl.tensor,
    fresh: tl.tensor,
    scale: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    WHOLE_CACHED: tl.constexpr,
    WHOLE_FRESH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
) -> None:
    first = tl.program_id(0) * BLOCK_QUERIES
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    if cached_visible is not None:
        cached_visible += batch * cached
    if cached_weight is not None:
        cached_weight += batch * cached
    if fresh_weight is not None:
        fresh_weight += batch * fresh
    tile = load_tile(
        query, query_strides, batch, head, first, queries, CHANNELS, BLOCK_QUERIES, BLOCK_CHANNELS, DESCRIPTORS
    )
    exponent = base_2(scale)
    accumulator, maximum, total = attend(
        tile,
        exponent,
        tl.zeros([BLOCK_QUERIES, BLOCK_CHANNELS], tl.float32),
        tl.full([BLOCK_QUERIES], -float("inf"), tl.float32),
        tl.zeros([BLOCK_QUERIES], tl.float32),
        batch,
        head,
        cached_key,
        cached_key_strides,
        cached_value,
        cached_value_strides,
        None,
        cached_weight,
        cached_visible,
        cached,
        CHANNELS,
        BLOCK_KEYS,
        BLOCK_CHANNELS,
        WHOLE_CACHED,
        DESCRIPTORS,
    )
    accumulator, maximum, total = attend(
        tile,
        exponent,
        accumulator,
        maximum,
        total,
        batch,
        head,
        fresh_key,
        fresh_key_strides,
        fresh_value,
        fresh_value_strides,
        None,
        fresh_weight,
        None,
        fresh,
        CHANNELS,
        BLOCK_KEYS,
        BLOCK_CHANNELS,
        WHOLE_FRESH,
        DESCRIPTORS,
    )
    store_tile(
        output,
        output_strides,
        normalised(accumulator, total),
        batch,
        head,
        first,
        queries,
        CHANNELS,
        BLOCK_QUERIES,
        BLOCK_CHANNELS,
        DESCRIPTORS,
    )


def _join(
    cached_key: Tensor,
    cached_value: Tensor,
    fresh_key: Tensor,
    fresh_value: Tensor,
    cached_visible: Tensor | None,
    cached_weight: Tensor | None,
    fresh_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of both segments, one after the other, and what is added to the scores of the keys."""
    key, value = torch.cat([cached_key, fresh_key], 2), torch.cat([cached_value, fresh_value], 2)
    if cached_visible is None and cached_weight is None and fresh_weight is None:
        return key, value, None
    of_cached, of_fresh = (
        torch.ones(part.shape[0], part.shape[2], device=part.device) if weight is None else weight.float()
        for part, weight in ((cached_key, cached_weight), (fresh_key, fresh_weight))
    )
    if cached_visible is not None:
        of_cached = of_cached.masked_fill(~cached_visible, 0.0)
    return key, value, torch.cat([of_cached, of_fresh], 1).log()


def attention_two_segments_reference(
    query: Tensor,
    cached_key: Tensor,
    cached_value: Tensor,
    fresh_key: Tensor,
    fresh_value: Tensor,
    *,
    cached_visible: Tensor | None = None,
    cached_weight: Tensor | None = None,
    fresh_weight: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute `attention_two_segments` in plain torch and float32, on joined segments."""
    key, value, bias = _join(
        cached_key, cached_value, fresh_key, fresh_value, cached_visible, cached_weight, fresh_weight
    )
    return attention_reference(query, key, value, key_bias=bias, scale=scale)


def attention_two_segments(
    query: Tensor,
    cached_key: Tensor,
    cached_value: Tensor,
    fresh_key: Tensor,
    fresh_value: Tensor,
    *,
    cached_visible: Tensor | None = None,
    cached_weight: Tensor | None = None,
    fresh_weight: Tensor | None = None,
    scale: float | None = None,
    mode: Mode | None = None,
) -> Tensor:
    """Attend to two segments of keys.

    Args:
        query: (batch, heads, queries, channels).
        cached_key: (batch, heads, cached, channels).
        cached_value: (batch, heads, cached, channels).
        fresh_key: (batch, heads, fresh, channels).
        fresh_value: (batch, heads, fresh, channels).
        cached_visible: bool (batch, cached), false for what the fresh segment replaces.
        cached_weight: (batch, cached), at least 0, multiplies the exponential of a token's score.
        fresh_weight: (batch, fresh), the same.
        scale: of the scores, above zero; 1 / sqrt(channels) if None.
        mode: which implementation, see `kernels.dispatch.choose`.

    Returns:
        (batch, heads, queries, channels), a view of (batch, queries, heads, channels) where our kernel ran.

    Raises:
        KernelError: the tensors do not fit each other, or the kernel was asked for and cannot run.
    """
    check_heads(query, cached_key, cached_value, scale)
    check_heads(query, fresh_key, fresh_value, scale)
    check_per_key(query, cached_key.shape[2], cached_visible=cached_visible, cached_weight=cached_weight)
    check_per_key(query, fresh_key.shape[2], fresh_weight=fresh_weight)
    choice = choose(
        "attention_two_segments", query.device, query.dtype, query.shape, unfit=unfit(query), vendor=True, mode=mode
    )
    segments = (cached_key, cached_value, fresh_key, fresh_value)
    marks = (cached_visible, cached_weight, fresh_weight)
    if choice.implementation == "reference":
        key, value, bias = _join(*segments, *marks)
        return attention_reference(query, key, value, key_bias=bias, scale=scale)
    if choice.implementation == "vendor":
        key, value, bias = _join(*segments, *marks)
        return attention_by_vendor(query, key, value, key_bias=bias, scale=scale)
    launch, output = _prepare(query, *segments, *marks, scale, choice.architecture)
    launch.run()
    return output


def _prepare(
    query: Tensor,
    cached_key: Tensor,
    cached_value: Tensor,
    fresh_key: Tensor,
    fresh_value: Tensor,
    cached_visible: Tensor | None,
    cached_weight: Tensor | None,
    fresh_weight: Tensor | None,
    scale: float | None,
    architecture: str,
    descriptors: bool | None = None,
) -> tuple[Launch, Tensor]:
    """The launch and its output; by descriptors where the architecture copies tiles, unless told."""
    tensors = {
        "query": aligned(query),
        "cached_key": aligned(cached_key),
        "cached_value": aligned(cached_value),
        "fresh_key": aligned(fresh_key),
        "fresh_value": aligned(fresh_value),
        "output": output_for(query),
    }
    batch, heads, queries, channels = query.shape
    cached, fresh = cached_key.shape[2], fresh_key.shape[2]
    chosen = configuration_for(CONFIGURATIONS[max(64, power_of_2(channels))], architecture)
    block_queries, block_keys = chosen.blocks["BLOCK_QUERIES"], chosen.blocks["BLOCK_KEYS"]
    if descriptors is None:
        descriptors = architecture in COPIES_TILES
    arguments = {
        **(described(tensors, block_queries, block_keys) if descriptors else tensors),
        **strides(**tensors),
        "cached_visible": None if cached_visible is None else cached_visible.contiguous().view(torch.uint8),
        "cached_weight": None if cached_weight is None else cached_weight.float().contiguous(),
        "fresh_weight": None if fresh_weight is None else fresh_weight.float().contiguous(),
        "heads": heads,
        "queries": queries,
        "cached": cached,
        "fresh": fresh,
        "scale": channels**-0.5 if scale is None else scale,
        "CHANNELS": channels,
        "BLOCK_CHANNELS": power_of_2(channels),
        "WHOLE_CACHED": cached % block_keys == 0,
        "WHOLE_FRESH": fresh % block_keys == 0,
        "DESCRIPTORS": descriptors,
    }
    launch = Launch(_attention_two_segments, (ceiling(queries, block_queries), batch * heads), arguments, chosen)
    return launch, tensors["output"]


def _case(channels: int, fresh: int) -> Case:
    def launch(architecture: str) -> Launch:
        query, cached = (
            torch.empty(2, tokens, 10, channels, dtype=torch.bfloat16, device="meta").transpose(1, 2)
            for tokens in (fresh, 4096)
        )
        visible = torch.empty(2, 4096, dtype=torch.bool, device="meta")
        of_cached, of_fresh = (torch.empty(2, tokens, device="meta") for tokens in (4096, fresh))
        return _prepare(query, cached, cached, query, query, visible, of_cached, of_fresh, None, architecture)[0]

    return Case(launch, products=("float",))


CASES = {
    "attention_two_segments-bf16-d64": _case(64, 1024),
    "attention_two_segments-bf16-d128": _case(128, 1000),
}
