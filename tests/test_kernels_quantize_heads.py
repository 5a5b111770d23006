"""8-bit codes of heads: decoded, they are as near as the format allows; padding is zero; smoothing is exact."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels import quantize_heads
from kernels.quantize import LIMITS, Kind
from tests.heads import attention_in_float64, heads
from tests.interpreted import Interpreter, relative_error

TOKENS, GROUP = 37, 16
LONG = 1100  # tokens, which some pieces of the statistics take two steps for, and some not at all
FACTOR = 0.3


def of_rounding(decoded: Tensor, exact: Tensor, scale: Tensor, kind: str) -> float:
    """The largest error as a share of what rounding to the nearest code allows; infinite where it is no number."""
    if kind == "int8":
        allowed = 0.5 * scale.expand_as(exact)
    else:  # half of the last of 3 binary digits, or of the smallest code
        allowed = torch.maximum(exact.abs() * 2.0**-4, scale * 2.0**-10)
    share = ((decoded - exact).abs() / allowed).max()
    return float(share) if torch.isfinite(share) else float("inf")


def inside(decoded: Tensor, channels: int) -> Tensor:
    """What is no padding of (batch, heads, padded tokens, padded channels); NaN if the padding is not zero."""
    kept = decoded[:, :, :TOKENS, :channels].clone()
    decoded[:, :, :TOKENS, :channels] = 0
    return kept if bool((decoded == 0).all()) else kept * torch.nan


def in_order(codes: Tensor) -> Tensor:
    """Codes of values (..., tokens) in the order of their tokens."""
    return codes.float().unflatten(-1, (-1, 4, 2, 2)).transpose(-2, -3).flatten(-4)


def of_codes(op: ModuleType, kind: Kind, channels: int, layout: str) -> float:
    """The largest rounding error of queries, keys and values (those in e4m3 alone), see `of_rounding`."""
    query, key, value = (heads(seed, TOKENS, channels, "bfloat16", layout) for seed in range(3))
    key[0, 1, GROUP : 2 * GROUP] = key[0, 1].double().mean(0)
    query[0, 1, :GROUP] = 0
    value[0, 0, :, 3] = 0
    launches, coded = op.prepare_heads(query, key, value if kind == "fp8" else None, kind, GROUP, GROUP, FACTOR)
    for launch in launches:
        launch.run()
    errors = []
    for exact, codes, scales in (
        (query.double() * FACTOR, coded.query, coded.query_scales),
        (key.double() - key.double().mean(2, keepdim=True), coded.key, coded.key_scales),
    ):
        scale = scales.repeat_interleave(GROUP, 2)[..., None]
        errors.append(of_rounding(inside(codes.float() * scale, channels), exact, scale[:, :, :TOKENS], kind))
    if coded.value is not None:
        scale = coded.value_scales[:, :, None]
        if float(coded.value_scales[0, 0, 3]) != 1.0:
            return float("inf")
        errors.append(of_rounding(inside(in_order(coded.value).mT, channels) * scale, value.double(), scale, "fp8"))
    return max(errors)


def of_statistics(op: ModuleType) -> float:
    """The error of the mean of keys and the peaks of values over many tokens."""
    key, value = heads(0, LONG, 16, "float16"), heads(1, LONG, 16, "float16")
    statistics = op.prepare_heads(key, key, value, "fp8", GROUP, GROUP, 1.0)[0][0]
    statistics.run()
    sums, peaks = statistics.arguments["sums"], statistics.arguments["peaks"]
    of_peaks = relative_error(peaks.amax(2), value.double().abs().amax(2))
    return max(of_peaks, relative_error(sums.sum(2) / LONG, key.double().mean(2)))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("smooth", [True, False])
def test_references_round_to_the_nearest_code(kind: Kind, smooth: bool) -> None:
    source = heads(0, TOKENS, 40, "float16")
    mean = quantize_heads.smoothing(source) if smooth else None
    exact = source.double() - (0 if mean is None else mean[:, :, None].double())
    padded = torch.nn.functional.pad(exact, (0, 0, 0, -TOKENS % GROUP)).unflatten(2, (-1, GROUP))
    peak = padded.abs().amax((3, 4)).repeat_interleave(GROUP, 2)[:, :, :TOKENS, None]
    decoded = quantize_heads.group_reference(source, kind, GROUP, mean)
    assert of_rounding(decoded, exact, peak / LIMITS[kind], kind) <= 1 + 1e-4
    decoded = quantize_heads.channel_reference(source, "fp8")
    scale = source.double().abs().amax(2, keepdim=True) / 448
    assert of_rounding(decoded, source.double(), scale, "fp8") <= 1 + 1e-4


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("channels", "layout"), [(40, "tokens"), (64, "heads")])
def test_heads_are_rounded_to_the_nearest_code(
    interpreter: Interpreter, kind: Kind, channels: int, layout: str
) -> None:
    assert interpreter.run(of_codes, "quantize_heads", kind=kind, channels=channels, layout=layout) <= 1 + 1e-4


def test_statistics_are_those_of_all_tokens(interpreter: Interpreter) -> None:
    assert interpreter.run(of_statistics, "quantize_heads") <= 1e-6


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("found += tile.to(tl.float32)", "found = tile.to(tl.float32)"),
        ("tl.maximum(found, tl.abs(tile.to(tl.float32)))", "tl.abs(tile.to(tl.float32))"),
        ("start = tl.program_id(0) * length", "start = tl.program_id(0) * TOGETHER"),
        ("tl.minimum(start + length, tokens)", "start + length"),
        ("at = (row * tl.num_programs(0) + tl.program_id(0))", "at = (0 * row + tl.program_id(0))"),
    ],
)
def test_broken_statistics_are_seen(interpreter: Interpreter, old: str, new: str) -> None:
    assert interpreter.sees("quantize_heads", old, new, of_statistics, above=1e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("token[:, None] < keys, tile.to(tl.float32) - mean[None, :], 0.0)", "token[:, None] >= 0, tile - mean, 0.0)"),
        ("(row * PIECES + tl.arange(0, PIECES))", "tl.arange(0, PIECES)"),
        ("asked.to(tl.float32) * factor", "asked.to(tl.float32)"),
        ("tl.abs(tile), 0), 0), LIMIT)", "tl.abs(tile), 0), 0), 2 * LIMIT)"),
        ("tl.store(scales + index", "tl.store(scales + 0 * index"),
        ("out + index.to(tl.int64) * GROUP", "out + 0 * index * GROUP"),
        ("scale_of(peak, LIMIT)", "scale_of(peak, 2 * LIMIT)"),
        ("in_fragments(coded)", "coded"),
        ("channel[:, None] * padded + token[None, :]", "channel[:, None] * padded + 1 + token[None, :]"),
        ("value_scales + row * CHANNELS", "value_scales"),
        ("value_codes += row", "value_codes += 0 * row"),
        ("if group < query_groups:", "if group < 1:"),
    ],
)
def test_broken_codes_are_seen(interpreter: Interpreter, old: str, new: str) -> None:
    call = {"kind": "fp8", "channels": 40, "layout": "tokens"}
    assert interpreter.sees("quantize_heads", old, new, of_codes, above=1 + 1e-4, **call)


def test_the_softmax_does_not_see_the_smoothing() -> None:
    query, key, value = (heads(seed, 21, 40, "float32") for seed in range(3))
    smooth = key.double() - quantize_heads.smoothing(key)[:, :, None].double()
    assert relative_error(attention_in_float64(query, smooth, value), attention_in_float64(query, key, value)) <= 1e-12
