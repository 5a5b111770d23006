"""Attention to keys so few that one tile holds them, the tokens of a prompt for instance, without a loop over keys.

Computes what `kernels.attention` does, `softmax(scale * query @ key^T + key_bias) @ value`. With up to 256 keys of 64
channels, or 128 of 128, there is no running softmax: its maximum and sum are found at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import attention_by_vendor, attention_reference, check_masks
from kernels.capability import INTERPRETER
from kernels.dispatch import Mode, choose
from kernels.heads import aligned, check_heads, load_tile, output_for, power_of_2, store_tile, strides, unfit
from kernels.language import ceiling, jit, tl
from kernels.launch import Configuration, Launch, configuration_for
from kernels.machine_code import Case
from kernels.softmax import base_2, normalised

_WIDE = Configuration(warps=8, blocks={"BLOCK_QUERIES": 128})
_NARROW = Configuration(warps=8, blocks={"BLOCK_QUERIES": 64})
_SMALL = Configuration(warps=4, blocks={"BLOCK_QUERIES": 32})

CONFIGURATIONS = {
    128: {"default": _NARROW, "sm_90": _WIDE, "sm_100": _WIDE, INTERPRETER: _SMALL},
    256: {
        "default": Configuration(warps=8, blocks={"BLOCK_QUERIES": 32}),
        "sm_90": _NARROW,
        "sm_100": _NARROW,
        INTERPRETER: _SMALL,
    },
}
"""Keys, padded, up to which a table serves -> configurations by architecture."""

_MOST_ELEMENTS = 128 * 128
"""Of a tile of keys, padded: a larger one, with the scores and the values, does not fit the registers."""


@jit
def _cross_attention(
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
) -> None:
    first = tl.program_id(0) * BLOCK_QUERIES
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    tokens = keys
    if lengths is not None:
        tokens = tl.minimum(tl.load(lengths + batch), keys)
    tile = load_tile(query, query_strides, batch, head, first, queries, CHANNELS, BLOCK_QUERIES, BLOCK_CHANNELS, False)
    all_keys = load_tile(key, key_strides, batch, head, 0, tokens, CHANNELS, BLOCK_KEYS, BLOCK_CHANNELS, False)
    scores = tl.dot(tile, tl.trans(all_keys)) * base_2(scale)
    position = tl.arange(0, BLOCK_KEYS)
    if bias is not None:
        scores += base_2(tl.load(bias + batch * keys + position, mask=position < tokens, other=0.0))[None, :]
    scores = tl.where(position[None, :] < tokens, scores, -float("inf"))
    maximum = tl.max(scores, 1)
    weights = tl.exp2(scores - tl.where(maximum == -float("inf"), 0.0, maximum)[:, None])
    all_values = load_tile(value, value_strides, batch, head, 0, tokens, CHANNELS, BLOCK_KEYS, BLOCK_CHANNELS, False)
    store_tile(
        output,
        output_strides,
        normalised(tl.dot(weights.to(all_values.dtype), all_values), tl.sum(weights, 1)),
        batch,
        head,
        first,
        queries,
        CHANNELS,
        BLOCK_QUERIES,
        BLOCK_CHANNELS,
        False,
    )


cross_attention_reference = attention_reference


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    mode: Mode | None = None,
) -> Tensor:
    """Attend to a few keys; arguments and result are those of `kernels.attention.attention`.

    Args:
        query: (batch, heads, queries, channels).
        key: (batch, heads, keys, channels), up to 256 keys of 64 channels or 128 of 128.
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
    most = min(256, _MOST_ELEMENTS // power_of_2(query.shape[3]))
    obstacle = unfit(query)
    if key.shape[2] > most:
        obstacle = f"a tile holds {most} keys of {query.shape[3]} channels, not {key.shape[2]}; use kernels.attention"
    choice = choose("cross_attention", query.device, query.dtype, query.shape, unfit=obstacle, vendor=True, mode=mode)
    if choice.implementation == "reference":
        return cross_attention_reference(query, key, value, key_bias=key_bias, key_lengths=key_lengths, scale=scale)
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
) -> tuple[Launch, Tensor]:
    """The launch and its output."""
    query, key, value = aligned(query), aligned(key), aligned(value)
    output = output_for(query)
    batch, heads, queries, channels = query.shape
    keys = key.shape[2]
    block_keys = power_of_2(keys)
    chosen = configuration_for(CONFIGURATIONS[128 if block_keys <= 128 else 256], architecture)
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "output": output,
        **strides(query=query, key=key, value=value, output=output),
        "bias": None if key_bias is None else key_bias.float().contiguous(),
        "lengths": None if key_lengths is None else key_lengths.int(),
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "scale": channels**-0.5 if scale is None else scale,
        "CHANNELS": channels,
        "BLOCK_CHANNELS": power_of_2(query.shape[3]),
        "BLOCK_KEYS": block_keys,
    }
    return Launch(
        _cross_attention, (ceiling(queries, chosen.blocks["BLOCK_QUERIES"]), batch * heads), arguments, chosen
    ), output


def _case(channels: int, keys: int, dtype: torch.dtype, *, lengths: bool = False) -> Case:
    def launch(architecture: str) -> Launch:
        query, key = (
            torch.empty(2, tokens, 10, channels, dtype=dtype, device="meta").transpose(1, 2) for tokens in (4096, keys)
        )
        key_bias = torch.empty(2, keys, device="meta") if lengths else None
        key_lengths = torch.empty(2, dtype=torch.int32, device="meta") if lengths else None
        return _prepare(query, key, key, key_bias, key_lengths, None, architecture)[0]

    return Case(launch, products=("float",))


CASES = {
    "cross_attention-fp16-d40-77": _case(40, 77, torch.float16),
    "cross_attention-fp16-d64-77": _case(64, 77, torch.float16),
    "cross_attention-bf16-d64-154": _case(64, 154, torch.bfloat16, lengths=True),
    "cross_attention-bf16-d128-77": _case(128, 77, torch.bfloat16, lengths=True),
}
