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


def of_groups(op: ModuleType, kind: Kind, smooth: bool, channels: int, layout: str) -> float:
    """The rounding error of codes of groups, see `of_rounding`."""
    source = heads(0, TOKENS, channels, "float16", layout)
    source[0, 1, GROUP : 2 * GROUP] = 0
    mean = op.smoothing(source) if smooth else None
    launch, codes, scales = op.prepare_groups(source, kind, GROUP, mean, 0.3)
    launch.run()
    scale = scales.repeat_interleave(GROUP, 2)[..., None]
    exact = (source.double() - (0 if mean is None else mean[:, :, None].double())) * 0.3
    return of_rounding(inside(codes.float() * scale, channels), exact, scale[:, :, :TOKENS], kind)


def of_channels(op: ModuleType, channels: int, layout: str) -> float:
    """The rounding error of codes of channels, see `of_rounding`."""
    source = heads(0, TOKENS, channels, "bfloat16", layout)
    source[0, 0, :, 3] = 0
    peaks = op.peaks_of(source)
    launch, codes = op.prepare_channels(source, "fp8", GROUP, peaks)
    launch.run()
    scale = (peaks / 448).where(peaks != 0, 1.0)[:, :, None]
    return of_rounding(inside(codes.float().mT, channels) * scale, source.double(), scale, "fp8")


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
@pytest.mark.parametrize(("smooth", "channels", "layout"), [(True, 40, "tokens"), (False, 64, "heads")])
def test_groups_are_rounded_to_the_nearest_code(
    interpreter: Interpreter, kind: Kind, smooth: bool, channels: int, layout: str
) -> None:
    call = {"kind": kind, "smooth": smooth, "channels": channels, "layout": layout}
    assert interpreter.run(of_groups, "quantize_heads", **call) <= 1 + 1e-4


@pytest.mark.parametrize(("channels", "layout"), [(40, "tokens"), (64, "heads")])
def test_channels_are_rounded_to_the_nearest_code(interpreter: Interpreter, channels: int, layout: str) -> None:
    assert interpreter.run(of_channels, "quantize_heads", channels=channels, layout=layout) <= 1 + 1e-4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("first + token[:, None] < tokens, tile - centre[None, :], 0.0)", "tile == tile, tile - centre[None, :], 0.0)"),
        ("tl.load(mean + row * CHANNELS", "tl.load(mean + head * CHANNELS".replace("head", "0")),
        ("tile *= factor", "tile *= 1"),
        ("tl.abs(tile), 0), 0), LIMIT)", "tl.abs(tile), 0), 0), 2 * LIMIT)"),
        ("tl.store(scales + index", "tl.store(scales + group"),
        ("out + index * GROUP", "out + group * GROUP"),
    ],
)
def test_broken_groups_are_seen(interpreter: Interpreter, old: str, new: str) -> None:
    call = {"kind": "int8", "smooth": True, "channels": 40, "layout": "tokens"}
    assert interpreter.sees("quantize_heads", old, new, of_groups, above=1 + 1e-4, **call)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("peaks + row * CHANNELS", "peaks"),
        ("scale_of(peak, LIMIT)", "scale_of(peak, LIMIT / 2)"),
        ("channel[:, None] * padded + token[None, :], coded", "channel[:, None] * padded + 1 + token[None, :], coded"),
    ],
)
def test_broken_channels_are_seen(interpreter: Interpreter, old: str, new: str) -> None:
    assert interpreter.sees("quantize_heads", old, new, of_channels, above=1 + 1e-4, channels=40, layout="heads")


def test_the_softmax_does_not_see_the_smoothing() -> None:
    query, key, value = (heads(seed, 21, 40, "float32") for seed in range(3))
    smooth = key.double() - quantize_heads.smoothing(key)[:, :, None].double()
    assert relative_error(attention_in_float64(query, smooth, value), attention_in_float64(query, key, value)) <= 1e-12
