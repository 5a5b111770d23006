"""The running softmax: block by block it is the softmax of the whole, with hidden keys too."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from kernels.language import jit, tl
from kernels.launch import Configuration, Launch
from kernels.softmax import fold, normalised
from tests.interpreted import Interpreter, relative_error

QUERIES, KEYS, CHANNELS, SHIFT = 16, 48, 16, 3.0
HIDDEN = 5  # this query sees no key


@jit
def _attend(
    scores: tl.tensor,
    values: tl.tensor,
    peaks: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    SHIFT: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, column, channel = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, CHANNELS)
    maximum = tl.full([BLOCK], -float("inf"), tl.float32)
    total, largest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for first in range(0, KEYS, BLOCK):
        block = tl.load(scores + row[:, None] * KEYS + first + column[None, :])
        weights, correction, maximum, total = fold(block, scale, maximum, total, SHIFT)
        value = tl.load(values + (first + column)[:, None] * CHANNELS + channel[None, :])
        sums = tl.dot(weights, value, sums * correction[:, None])
        largest = tl.maximum(largest * correction, tl.max(weights, 1))
    tl.store(peaks + row, largest)
    tl.store(out + row[:, None] * CHANNELS + channel[None, :], normalised(sums, total))


def error(op: ModuleType) -> float:
    """The error of the weighted values against float64; infinite where the largest weight is not in its octave."""
    globals().update(fold=op.fold, normalised=op.normalised)
    random = torch.Generator().manual_seed(0)
    scores = 5 * torch.randn(QUERIES, KEYS, generator=random)
    scores[:, :17][::2] = -torch.inf
    scores[HIDDEN] = -torch.inf
    values = torch.randn(KEYS, CHANNELS, generator=random)
    peaks, out = torch.empty(QUERIES), torch.empty(QUERIES, CHANNELS)
    arguments = {"scores": scores, "values": values, "peaks": peaks, "out": out, "scale": 1.7}
    sizes = {"SHIFT": SHIFT, "KEYS": KEYS, "CHANNELS": CHANNELS}
    Launch(_attend, (1,), {**arguments, **sizes}, Configuration(warps=4, blocks={"BLOCK": 16})).run()
    seen = peaks[torch.arange(QUERIES) != HIDDEN]
    if not bool((seen <= 2**SHIFT).all() and (seen > 2 ** (SHIFT - 1)).all()) or out[HIDDEN].any():
        return float("inf")
    weights = torch.exp2(1.7 * (scores.double() - scores.double().amax(1, keepdim=True).clamp(min=-1e300)))
    return relative_error(out, weights @ values.double() / weights.sum(1, keepdim=True).clamp(min=1e-300))


def test_blocks_make_the_whole(interpreter: Interpreter) -> None:
    assert interpreter.run(error, "softmax") <= 1e-6


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.ceil(tl.max(scores, 1) * scale)", "tl.max(scores, 1)"),
        ('origin = tl.where(higher == -float("inf"), 0.0, higher)', "origin = higher"),
        ("(origin - SHIFT)", "(origin + SHIFT)"),
        ("tl.exp2(maximum - origin)", "tl.exp2(maximum * 0)"),
        ("total * correction + ", "total + "),
        ("tl.where(total == 0.0, 1.0, total)", "total"),
    ],
)
def test_a_broken_softmax_is_seen(interpreter: Interpreter, old: str, new: str) -> None:
    assert interpreter.sees("softmax", old, new, error, above=1e-6)
