"""Attention of every query to all keys, in float16 and bfloat16.

`softmax(scale * query @ key^T + key_bias) @ value` for tensors (batch, heads, tokens, channels), without a causal mask.
One pass over the keys with a running softmax: Dao et al. 2022, arXiv 2205.14135. A query that sees no key gets zeros.
Heads have 16 to 128 channels, a multiple of 8; others, 160 say, go to the vendor's library.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.capability import INTERPRETER
from kernels.dispatch import Mode, choose
from kernels.errors import KernelError
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
from kernels.softmax import base_2, fold, normalised

_SMALL = Configuration(warps=4, blocks={"BLOCK_QUERIES": 32, "BLOCK_KEYS": 16})

CONFIGURATIONS = {
    64: {
        "default": Configuration(warps=8, stages=2, blocks={"BLOCK_QUERIES": 128, "BLOCK_KEYS": 64}),
        "sm_90": Configuration(warps=4, stages=3, blocks={"BLOCK_QUERIES": 64, "BLOCK_KEYS": 128}),
        "sm_120": Configuration(warps=4, stages=2, blocks={"BLOCK_QUERIES": 64, "BLOCK_KEYS": 64}),
        INTERPRETER: _SMALL,
    },
    128: {
        "default": Configuration(warps=8, stages=2, blocks={"BLOCK_QUERIES": 128, "BLOCK_KEYS": 64}),
        "sm_90": Configuration(warps=4, stages=3, blocks={"BLOCK_QUERIES": 64, "BLOCK_KEYS": 64}),
        INTERPRETER: _SMALL,
    },
}
"""Channels of a head, padded, up to which a table serves -> configurations by architecture."""


@jit
def attend(
    tile: tl.tensor,
    scale: tl.tensor,
    accumulator: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    batch: tl.tensor,
    head: tl.tensor,
    key: tl.tensor,
    key_strides: tl.tensor,
    value: tl.tensor,
    value_strides: tl.tensor,
    bias: tl.tensor,
    weight: tl.tensor,
    visible: tl.tensor,
    tokens: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Let a tile of queries attend to a stretch of keys, of which there are `tokens`.

    Added to the score of a key is its `bias`, its `weight` (at least 0) multiplies the exponential of the score, and
    only what is `visible` counts; each is None or the address of one number a token. `scale` makes exponents of 2.
    Carried along are the accumulator of weighted values (queries, channels), the maximum of the scores and the total of
    the weights (queries). WHOLE says that no tile of keys reaches beyond the last.
    """
    for first in range(0, tokens, BLOCK_KEYS):
        position = first + tl.arange(0, BLOCK_KEYS)
        keys = load_tile(
            key, key_strides, batch, head, first, tokens, CHANNELS, BLOCK_KEYS, BLOCK_CHANNELS, DESCRIPTORS
        )
        scores = tl.dot(tile, tl.trans(keys))
        factor = scale
        if bias is not None:
            offset = base_2(tl.load(bias + position, mask=position < tokens, other=0.0))
            scores, factor = scores * factor + offset[None, :], 1.0
        if weight is not None:
            offset = tl.log2(tl.load(weight + position, mask=position < tokens, other=0.0))
            scores, factor = scores * factor + offset[None, :], 1.0
        if visible is not None:
            seen = tl.load(visible + position, mask=position < tokens, other=0)
            scores = tl.where(seen[None, :] != 0, scores, -float("inf"))
        elif not WHOLE:
            scores = tl.where(position[None, :] < tokens, scores, -float("inf"))
        weights, correction, maximum, total = fold(scores, factor, maximum, total, 0.0)
        values = load_tile(
            value, value_strides, batch, head, first, tokens, CHANNELS, BLOCK_KEYS, BLOCK_CHANNELS, DESCRIPTORS
        )
        accumulator = tl.dot(weights.to(values.dtype), values, accumulator * correction[:, None])
    return accumulator, maximum, total


@jit
def _attention(
    query: tl.tensor,
    query_strides: tl.tensor,
    key: tl.tensor,
    key_strides: tl.tensor,
    value: tl.tensor,
    value_strides: tl.tensor,
    output: tl.tensor,
    output_strides: tl.tensor,
    bias: tl.tensor,
    lengths: tl.tensor,
    heads: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    scale: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
) -> None:
    first = tl.program_id(0) * BLOCK_QUERIES
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    tokens = keys
    if lengths is not None:
        tokens = tl.minimum(tl.load(lengths + batch), keys)
    if bias is not None:
        bias += batch * keys
    tile = load_tile(
        query, query_strides, batch, head, first, queries, CHANNELS, BLOCK_QUERIES, BLOCK_CHANNELS, DESCRIPTORS
    )
    accumulator, _, total = attend(
        tile,
        base_2(scale),
        tl.zeros([BLOCK_QUERIES, BLOCK_CHANNELS], tl.float32),
        tl.full([BLOCK_QUERIES], -float("inf"), tl.float32),
        tl.zeros([BLOCK_QUERIES], tl.float32),
        batch,
        head,
        key,
        key_strides,
        value,
        value_strides,
        bias,
        None,
        None,
        tokens,
        CHANNELS,
        BLOCK_KEYS,
        BLOCK_CHANNELS,
        WHOLE,
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


def check_masks(query: Tensor, key: Tensor, key_bias: Tensor | None, key_lengths: Tensor | None) -> None:
    """Refuse a bias or lengths that are not those of the keys.

    Raises:
        KernelError: a shape, a type or a device is another.
    """
    check_per_key(query, key.shape[2], key_bias=key_bias)
    if key_lengths is not None:
        integers = not key_lengths.dtype.is_floating_point
        if key_lengths.shape != query.shape[:1] or not integers or key_lengths.device != query.device:
            there = f"{tuple(key_lengths.shape)} of {key_lengths.dtype} on {key_lengths.device}"
            raise KernelError(f"key_lengths must be {query.shape[0]} integers on {query.device}, not {there}")


def key_offsets(query: Tensor, keys: int, key_bias: Tensor | None, key_lengths: Tensor | None) -> Tensor | None:
    """What is added to the scores of every key, float32 (batch, 1, 1, keys); None where nothing is.

    Args:
        query: (batch, heads, queries, channels).
        keys: how many there are.
        key_bias: (batch, keys), or None.
        key_lengths: integers (batch): the keys from there on are not seen; or None.
    """
    offsets = None if key_bias is None else key_bias.float()
    if key_lengths is not None:
        position = torch.arange(keys, device=query.device)
        hidden = torch.zeros(query.shape[0], keys, device=query.device)
        hidden.masked_fill_(position >= key_lengths[:, None], -torch.inf)
        offsets = hidden if offsets is None else offsets + hidden
    return None if offsets is None else offsets[:, None, None]


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute `attention` in plain torch and float32."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.float() @ key.float().mT * scale
    offsets = key_offsets(query, key.shape[2], key_bias, key_lengths)
    if offsets is None:
        weights = torch.softmax(scores, -1)
    else:
        weights = torch.softmax(scores + offsets, -1).masked_fill(offsets.isneginf().all(-1, keepdim=True), 0.0)
    return (weights @ value.float()).to(query.dtype)


def attention_by_vendor(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute `attention` by the library that torch calls for it."""
    offsets = key_offsets(query, key.shape[2], key_bias, key_lengths)
    mask = None if offsets is None else offsets.to(query.dtype)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    mode: Mode | None = None,
) -> Tensor:
    """Attend to all keys.

    Args:
        query: (batch, heads, queries, channels).
        key: (batch, heads, keys, channels).
        value: (batch, heads, keys, channels).
        key_bias: (batch, keys), added to the scores of every query; -inf hides a key.
        key_lengths: integers (batch); keys from there on are not seen.
        scale: of the scores, above zero; 1 / sqrt(channels) if None.
        mode: which implementation, see `kernels.dispatch.choose`.

    Returns:
        (batch, heads, queries, channels), a view of (batch, queries, heads, channels) where our kernel ran.

    Raises:
        KernelError: the tensors do not fit each other, or the kernel was asked for and cannot run.
    """
    check_heads(query, key, value, scale)
    check_masks(query, key, key_bias, key_lengths)
    choice = choose("attention", query.device, query.dtype, query.shape, unfit=unfit(query), vendor=True, mode=mode)
    if choice.implementation == "reference":
        return attention_reference(query, key, value, key_bias=key_bias, key_lengths=key_lengths, scale=scale)
    if choice.implementation == "vendor":
        return attention_by_vendor(query, key, value, key_bias=key_bias, key_lengths=key_lengths, scale=scale)
    launch, output = _prepare(query, key, value, key_bias, key_lengths, scale, choice.architecture)
    launch.run()
    return output


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float | None,
    architecture: str,
    descriptors: bool | None = None,
) -> tuple[Launch, Tensor]:
    """The launch and its output; by descriptors where the architecture copies tiles, unless told."""
    query, key, value = aligned(query), aligned(key), aligned(value)
    output = output_for(query)
    batch, heads, queries, channels = query.shape
    keys = key.shape[2]
    chosen = configuration_for(CONFIGURATIONS[max(64, power_of_2(channels))], architecture)
    block_queries, block_keys = chosen.blocks["BLOCK_QUERIES"], chosen.blocks["BLOCK_KEYS"]
    if descriptors is None:
        descriptors = architecture in COPIES_TILES and key_lengths is None
    tensors = {"query": query, "key": key, "value": value, "output": output}
    arguments = {
        **(described(tensors, block_queries, block_keys) if descriptors else tensors),
        **strides(**tensors),
        "bias": None if key_bias is None else key_bias.float().contiguous(),
        "lengths": None if key_lengths is None else key_lengths.int(),
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "scale": channels**-0.5 if scale is None else scale,
        "CHANNELS": channels,
        "BLOCK_CHANNELS": power_of_2(query.shape[3]),
        "WHOLE": keys % block_keys == 0 and key_lengths is None,
        "DESCRIPTORS": descriptors,
    }
    return Launch(_attention, (ceiling(queries, block_queries), batch * heads), arguments, chosen), output


def _case(channels: int, keys: int, dtype: torch.dtype, *, bias: bool = False, lengths: bool = False) -> Case:
    def launch(architecture: str) -> Launch:
        query, key = (
            torch.empty(2, tokens, 10, channels, dtype=dtype, device="meta").transpose(1, 2) for tokens in (4096, keys)
        )
        key_bias = torch.empty(2, keys, device="meta") if bias else None
        key_lengths = torch.empty(2, dtype=torch.int32, device="meta") if lengths else None
        return _prepare(query, key, key, key_bias, key_lengths, None, architecture)[0]

    return Case(launch, products=("float",))


CASES = {
    "attention-fp16-d40": _case(40, 4096, torch.float16),
    "attention-fp16-d64": _case(64, 4096, torch.float16),
    "attention-bf16-d128": _case(128, 4608, torch.bfloat16),
    "attention-bf16-d64-bias": _case(64, 4090, torch.bfloat16, bias=True),
    "attention-bf16-d128-bias": _case(128, 4090, torch.bfloat16, bias=True),
    "attention-bf16-d128-bias-lengths": _case(128, 4090, torch.bfloat16, bias=True, lengths=True),
}
