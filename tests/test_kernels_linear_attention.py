"""Linear attention: kernels and reference against float64, spans, gate, and the two ways to sum it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from kernels import linear_attention as linear
from kernels.errors import KernelError
from tests.heads import heads
from tests.interpreted import Interpreter, relative_error

BOUND = {"float16": 8e-4, "bfloat16": 5e-3}


def error(
    op: ModuleType,
    channels: int,
    dtype: str,
    queries: int = 37,
    keys: int = 45,
    gated: bool = True,
    epsilon: float = 1e-15,
    layout: str = "heads",
    mode: str = "triton",
) -> float:
    """The error of one call against float64, summed pair by pair, without a state; one query has no feature."""
    query, gate = heads(0, queries, channels, dtype, layout), heads(3, queries, channels, dtype, layout)
    key, value = heads(1, keys, channels, dtype, layout), heads(2, keys, channels, dtype, layout)
    query[0, 0, 2] = -1.0
    got = op.linear_attention(query, key, value, gate=gate if gated else None, epsilon=epsilon, mode=mode)
    weights = query.double().relu() @ key.double().relu().mT
    truth = weights @ value.double() / (weights.sum(-1, keepdim=True) + epsilon)
    return relative_error(got, truth * gate.double() if gated else truth)


@pytest.mark.parametrize("mode", ["triton", "reference"])
@pytest.mark.parametrize(
    "call",
    [
        {"channels": 32, "dtype": "float16"},
        {"channels": 40, "dtype": "bfloat16", "layout": "tokens"},
        {"channels": 64, "dtype": "float16", "keys": 32, "gated": False, "layout": "tokens"},
        {"channels": 128, "dtype": "bfloat16", "keys": 70, "epsilon": 9.0},
    ],
)
def test_kernel_and_reference_agree_with_float64(interpreter: Interpreter, call: dict[str, Any], mode: str) -> None:
    assert interpreter.run(error, "linear_attention", mode=mode, **call) <= BOUND[call["dtype"]]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "features = tl.maximum(tile.to(tl.float32), 0.0)\n        state",
            "features = tile.to(tl.float32)\n        state",
        ),
        (
            "features = tl.maximum(features, 0.0)\n        normaliser",
            "features = features * 1.0\n        normaliser",
        ),
        ("(tl.program_id(0) + 1) * tiles):", "tl.program_id(0) * tiles + 1):"),
        ("tl.minimum((span + 1) * length, keys), BLOCK_KEYS)", "keys, BLOCK_KEYS)"),
        ("range(0, spans)", "range(0, 1)"),
        ("total += tl.sum(features, 0)", "total += tl.sum(features, 0) / 2"),
        ("total += tl.load(totals + index * BLOCK_CHANNELS", "total += tl.load(totals + 0 * BLOCK_CHANNELS"),
        ("+ epsilon\n", "+ 1\n"),
        ("bits + 0x1000) & -0x2000", "bits + 0x400000) & -0x800000"),
        ("result *= gates.to(tl.float32)", "result *= 1"),
        (
            "head, first, keys, CHANNELS, BLOCK_KEYS, BLOCK_CHANNELS, False)\n        values",
            "head, first, keys + 1, CHANNELS, BLOCK_KEYS, BLOCK_CHANNELS, False)\n        values",
        ),
    ],
)
def test_a_broken_kernel_is_seen(interpreter: Interpreter, old: str, new: str) -> None:
    assert interpreter.sees("linear_attention", old, new, error, above=BOUND["float16"], channels=32, dtype="float16")


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    query = torch.zeros(1, 2, 4, 32)
    with pytest.raises(KernelError, match="the gate must be like the query"):
        linear.linear_attention(query, query, query, gate=query[:, :, :3])
    with pytest.raises(KernelError, match="epsilon must be above zero, not 0"):
        linear.linear_attention(query, query, query, epsilon=0.0)
