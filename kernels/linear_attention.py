"""Linear attention with rectified features, as in Sana: its cost grows with the tokens, not with their square.

For one head, with r(x) = max(x, 0), over all tokens j (no causal mask):

    out[i] = gate[i] * (r(q[i]) @ state) / (r(q[i]) . total + epsilon)
    state  = sum_j r(k[j])^T v[j]      (channels, channels)
    total  = sum_j r(k[j])             (channels)

Sources: Katharopoulos et al. 2020, arXiv 2006.16236, for the form with any feature map; Xie et al. 2024, arXiv
2410.10629 (Sana), for r. The gate is optional and multiplies as it is given: its activation belongs to the projection
that makes it. A query all of whose features are zero gets zeros.

Two kernels: one sums the states of spans of tokens, so that few heads still fill the GPU; the other adds up the spans,
in order, and applies the result. Sums are float32; the state is rounded to TF32 and multiplied so. Its 11 binary digits
hold a feature of float16 or bfloat16 as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.capability import INTERPRETER
from kernels.dispatch import Mode, choose
from kernels.errors import KernelError
from kernels.heads import aligned, check_heads, load_tile, output_for, power_of_2, store_tile, strides, unfit
from kernels.language import ceiling, jit, tl
from kernels.launch import Configuration, Launch, configuration_for
from kernels.machine_code import Case

PROGRAMS = 256
"""Of both kernels, about: two for every multiprocessor of a large GPU. Each program of the second one joins all states
of its head, so neither spans nor programs may be many."""

_SMALL = Configuration(warps=4, blocks={"BLOCK_KEYS": 16})

STATE = {
    64: {
        "default": Configuration(warps=4, stages=3, blocks={"BLOCK_KEYS": 64}),
        "sm_100": Configuration(warps=4, stages=2, blocks={"BLOCK_KEYS": 64}),
        INTERPRETER: _SMALL,
    },
    128: {
        "default": Configuration(warps=8, stages=2, blocks={"BLOCK_KEYS": 64}),
        "sm_80": Configuration(warps=8, stages=2, blocks={"BLOCK_KEYS": 32}),
        "sm_86": Configuration(warps=8, stages=2, blocks={"BLOCK_KEYS": 32}),
        "sm_89": Configuration(warps=8, stages=2, blocks={"BLOCK_KEYS": 32}),
        INTERPRETER: _SMALL,
    },
}
"""Channels, padded, up to which a table serves -> configurations of the sums."""

APPLY = {
    64: {
        "default": Configuration(warps=4, blocks={"BLOCK_QUERIES": 64}),
        INTERPRETER: Configuration(warps=4, blocks={"BLOCK_QUERIES": 16}),
    },
    128: {
        "default": Configuration(warps=8, blocks={"BLOCK_QUERIES": 64}),
        INTERPRETER: Configuration(warps=4, blocks={"BLOCK_QUERIES": 16}),
    },
}
"""Channels, padded, up to which a table serves -> configurations of the application."""


@jit
def _linear_attention_state(
    key: tl.tensor,
    key_strides: tl.tensor,
    value: tl.tensor,
    value_strides: tl.tensor,
    states: tl.tensor,
    totals: tl.tensor,
    heads: tl.tensor,
    keys: tl.tensor,
    length: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> None:
    span, row = tl.program_id(0), tl.program_id(1)
    batch, head = row // heads, row % heads
    channel = tl.arange(0, BLOCK_CHANNELS)
    state = tl.zeros([BLOCK_CHANNELS, BLOCK_CHANNELS], tl.float32)
    total = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for first in range(span * length, tl.minimum((span + 1) * length, keys), BLOCK_KEYS):
        tile = load_tile(key, key_strides, batch, head, first, keys, CHANNELS, BLOCK_KEYS, BLOCK_CHANNELS, False)
        values = load_tile(value, value_strides, batch, head, first, keys, CHANNELS, BLOCK_KEYS, BLOCK_CHANNELS, False)
        features = tl.maximum(tile.to(tl.float32), 0.0)
        state = tl.dot(tl.trans(features.to(values.dtype)), values, state)
        total += tl.sum(features, 0)
    index = row.to(tl.int64) * tl.num_programs(0) + span
    tl.store(totals + index * BLOCK_CHANNELS + channel, total)
    square = channel[:, None] * BLOCK_CHANNELS + channel[None, :]
    tl.store(states + index * BLOCK_CHANNELS * BLOCK_CHANNELS + square, state)


@jit
def round_to_tf32(values: tl.tensor) -> tl.tensor:
    """Round float32 to the nearest number with 11 binary digits; the tensor cores would cut the others off."""
    bits = values.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@jit
def _linear_attention_apply(
    query: tl.tensor,
    query_strides: tl.tensor,
    gate: tl.tensor,
    gate_strides: tl.tensor,
    output: tl.tensor,
    output_strides: tl.tensor,
    states: tl.tensor,
    totals: tl.tensor,
    heads: tl.tensor,
    queries: tl.tensor,
    spans: tl.tensor,
    tiles: tl.tensor,
    epsilon: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> None:
    row = tl.program_id(1)
    batch, head = row // heads, row % heads
    channel = tl.arange(0, BLOCK_CHANNELS)
    square = channel[:, None] * BLOCK_CHANNELS + channel[None, :]
    state = tl.zeros([BLOCK_CHANNELS, BLOCK_CHANNELS], tl.float32)
    total = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for span in range(0, spans):
        index = row.to(tl.int64) * spans + span
        total += tl.load(totals + index * BLOCK_CHANNELS + channel)
        state += tl.load(states + index * BLOCK_CHANNELS * BLOCK_CHANNELS + square)
    rounded = round_to_tf32(state)
    for tile in range(tl.program_id(0) * tiles, (tl.program_id(0) + 1) * tiles):
        first = tile * BLOCK_QUERIES
        features = load_tile(
            query, query_strides, batch, head, first, queries, CHANNELS, BLOCK_QUERIES, BLOCK_CHANNELS, False
        ).to(tl.float32)
        features = tl.maximum(features, 0.0)
        normaliser = tl.sum(features * total[None, :], 1) + epsilon
        result = tl.dot(features, rounded, input_precision="tf32") / normaliser[:, None]
        if gate is not None:
            gates = load_tile(
                gate, gate_strides, batch, head, first, queries, CHANNELS, BLOCK_QUERIES, BLOCK_CHANNELS, False
            )
            result *= gates.to(tl.float32)
        store_tile(
            output, output_strides, result, batch, head, first, queries, CHANNELS, BLOCK_QUERIES, BLOCK_CHANNELS, False
        )


def linear_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, *, gate: Tensor | None = None, epsilon: float = 1e-15
) -> Tensor:
    """Compute `linear_attention` in plain torch and float32."""
    of_query, of_key = query.float().relu(), key.float().relu()
    result = of_query @ (of_key.mT @ value.float()) / (of_query @ of_key.sum(2)[..., None] + epsilon)
    return (result if gate is None else result * gate.float()).to(query.dtype)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gate: Tensor | None = None,
    epsilon: float = 1e-15,
    mode: Mode | None = None,
) -> Tensor:
    """Attend linearly to all keys.

    Args:
        query: (batch, heads, queries, channels), float16 or bfloat16, before rectification.
        key: (batch, heads, keys, channels), before rectification.
        value: (batch, heads, keys, channels).
        gate: (batch, heads, queries, channels), multiplies the result; None for none.
        epsilon: added to the normaliser, above zero; Sana's is 1e-15.
        mode: which implementation, see `kernels.dispatch.choose`.

    Returns:
        (batch, heads, queries, channels), a view of (batch, queries, heads, channels) where our kernel ran.

    Raises:
        KernelError: the tensors do not fit each other, or the kernel was asked for and cannot run.
    """
    check_heads(query, key, value, None)
    if gate is not None and (gate.shape, gate.dtype, gate.device) != (query.shape, query.dtype, query.device):
        raise KernelError(f"the gate must be like the query, {tuple(query.shape)} of {query.dtype}")
    if not epsilon > 0.0:
        raise KernelError(f"epsilon must be above zero, not {epsilon}")
    choice = choose("linear_attention", query.device, query.dtype, query.shape, unfit=unfit(query), mode=mode)
    if choice.implementation == "reference":
        return linear_attention_reference(query, key, value, gate=gate, epsilon=epsilon)
    launches, output = _prepare(query, key, value, gate, epsilon, choice.architecture)
    for launch in launches:
        launch.run()
    return output


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, epsilon: float, architecture: str
) -> tuple[list[Launch], Tensor]:
    """The launches, in order, and the output: states of spans, their application."""
    query, key, value, output = aligned(query), aligned(key), aligned(value), output_for(query)
    gate = None if gate is None else aligned(gate)
    batch, heads, queries, channels = query.shape
    keys, width = key.shape[2], power_of_2(channels)
    summing, applying = (configuration_for(table[max(64, width)], architecture) for table in (STATE, APPLY))
    most = 2 if architecture == INTERPRETER else ceiling(PROGRAMS, batch * heads)
    block_keys, block_queries = summing.blocks["BLOCK_KEYS"], applying.blocks["BLOCK_QUERIES"]
    length = block_keys * ceiling(keys, block_keys * most)
    spans = ceiling(keys, length)
    tiles = ceiling(queries, block_queries * most)
    states = query.new_empty(batch, heads, spans, width, width, dtype=torch.float32)
    totals = query.new_empty(batch, heads, spans, width, dtype=torch.float32)
    shared = {"states": states, "totals": totals, "heads": heads, "CHANNELS": channels, "BLOCK_CHANNELS": width}
    of_state = {**shared, "key": key, "value": value, **strides(key=key, value=value), "keys": keys, "length": length}
    of_application = {
        **shared,
        "query": query,
        "gate": gate,
        "output": output,
        **strides(query=query, gate=query if gate is None else gate, output=output),
        "queries": queries,
        "spans": spans,
        "tiles": tiles,
        "epsilon": epsilon,
    }
    grid = (ceiling(queries, block_queries * tiles), batch * heads)
    launches = [
        Launch(_linear_attention_state, (spans, batch * heads), of_state, summing),
        Launch(_linear_attention_apply, grid, of_application, applying),
    ]
    return launches, output


def _case(channels: int, tokens: int, dtype: torch.dtype, step: int) -> Case:
    def launch(architecture: str) -> Launch:
        heads = torch.empty(2, tokens, 20, channels, dtype=dtype, device="meta").transpose(1, 2)
        return _prepare(heads, heads, heads, heads, 1e-15, architecture)[0][step]

    # A state of 32 rows is too small for the products of sm_90 and sm_100, which take 64; they run older ones on it.
    return Case(launch, products=() if step == 0 and channels < 64 else ("float",))


CASES = {
    f"linear_attention-{name}-{kind}": _case(channels, tokens, dtype, step)
    for step, name in enumerate(("state", "apply"))
    for kind, channels, tokens, dtype in (
        ("bf16-d32", 32, 1024, torch.bfloat16),
        ("fp16-d64", 64, 4090, torch.float16),
        ("bf16-d128", 128, 4096, torch.bfloat16),
    )
}
