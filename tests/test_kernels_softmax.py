"""The running softmax: block by block it is the softmax of the whole, with hidden keys too."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch

from kernels.language import jit, tl
from kernels.launch import Configuration, Launch
from kernels.softmax import fold, fold_patiently, normalised, without_zeros
from tests.interpreted import Interpreter, relative_error

QUERIES, KEYS, CHANNELS, SHIFT, PATIENCE = 16, 48, 16, 3.0, 2.0
PADDING = 7  # the last keys, whose scores are zero and whose values do not count
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


@jit
def _attend_patiently(
    scores: tl.tensor,
    values: tl.tensor,
    peaks: tl.tensor,
    moves: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    padding: tl.tensor,
    SHIFT: tl.constexpr,
    PATIENCE: tl.constexpr,
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
        before = maximum
        weights, sums, maximum, total = fold_patiently(block, scale, sums, maximum, total, SHIFT, PATIENCE)
        value = tl.load(values + (first + column)[:, None] * CHANNELS + channel[None, :])
        sums = tl.dot(weights, value, sums)
        largest = tl.maximum(largest, tl.max(weights, 1))
        tl.store(moves + first // BLOCK + tl.arange(0, 1), tl.max((maximum > before).to(tl.float32), 0))
    tl.store(peaks + row, largest)
    total = without_zeros(total, maximum, padding, SHIFT)
    tl.store(out + row[:, None] * CHANNELS + channel[None, :], normalised(sums, total))


def patient_error(op: ModuleType) -> float:
    """The error of weighted values; infinite where a weight is too large or a maximum moves for too little.

    The scores of the second block are beyond those of the first by less than the patience, those of the third more.
    """
    globals().update(fold_patiently=op.fold_patiently, normalised=op.normalised, without_zeros=op.without_zeros)
    random = torch.Generator().manual_seed(0)
    scores = torch.rand(QUERIES, KEYS, generator=random) - 0.1
    scores[:, 20], scores[:, 35] = 1.7, 5.0 + torch.arange(QUERIES)
    scores[:, -PADDING:] = 0
    values = torch.randn(KEYS, CHANNELS, generator=random)
    values[-PADDING:] = 0
    peaks, moves, out = torch.empty(QUERIES), torch.empty(KEYS // 16), torch.empty(QUERIES, CHANNELS)
    arguments = {"scores": scores, "values": values, "peaks": peaks, "moves": moves, "out": out, "scale": 1.7}
    sizes = {"padding": PADDING, "SHIFT": SHIFT, "PATIENCE": PATIENCE, "KEYS": KEYS, "CHANNELS": CHANNELS}
    configuration = Configuration(warps=4, blocks={"BLOCK": 16})
    Launch(_attend_patiently, (1,), {**arguments, **sizes}, configuration).run()
    if bool((peaks > 2 ** (SHIFT + PATIENCE)).any()) or moves.tolist() != [1.0, 0.0, 1.0]:
        return float("inf")
    seen = 1.7 * scores[:, :-PADDING].double()
    return relative_error(out, torch.softmax(seen * math.log(2), 1) @ values[:-PADDING].double())


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


def test_blocks_make_the_whole_where_maxima_move_rarely(interpreter: Interpreter) -> None:
    assert interpreter.run(patient_error, "softmax") <= 1e-6


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.ceil(tl.max(scores, 1) * scale)", "tl.max(scores, 1)"),
        ('origin = tl.where(higher == -float("inf"), 0.0, higher)', "origin = higher"),
        ("(origin - SHIFT)", "(origin + SHIFT)"),
        ("tl.exp2(maximum - origin)", "tl.exp2(maximum * 0)"),
        ("tl.exp2(scores * scale - (origin - SHIFT)", "tl.exp2(scores - (origin - SHIFT)"),
        ("total * correction + ", "total + "),
        ("tl.where(total == 0.0, 1.0, total)", "total"),
    ],
)
def test_a_broken_softmax_is_seen(interpreter: Interpreter, old: str, new: str) -> None:
    assert interpreter.sees("softmax", old, new, error, above=1e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.max(beyond, 0) > PATIENCE", "tl.max(beyond, 0) > 0"),
        ("tl.max(beyond, 0) > PATIENCE", "tl.max(beyond, 0) > 99"),
        ("tl.ceil(peak)", "peak - 9"),
        ("tl.exp2(maximum - higher)", "tl.exp2(maximum * 0)"),
        ("accumulator *= correction[:, None]", "accumulator *= 1"),
        ("total *= correction", "total *= 1"),
        ("(maximum - SHIFT)", "(maximum + SHIFT)"),
        ("total + tl.sum(weights, 1)", "tl.sum(weights, 1)"),
        ("count * tl.exp2(SHIFT - maximum)", "count * tl.exp2(0 * maximum)"),
    ],
)
def test_a_broken_patient_softmax_is_seen(interpreter: Interpreter, old: str, new: str) -> None:
    assert interpreter.sees("softmax", old, new, patient_error, above=1e-6)
