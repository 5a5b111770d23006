"""GroupNorm with SiLU against float64, over chunks of a group, plain and rounded to 8 bits."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from kernels import group_norm_silu as op_file
from kernels.errors import KernelError
from tests.interpreted import Interpreter, guarded, relative_error

TOLERANCE = {"float32": 1e-6, "float16": 6e-4, "bfloat16": 4e-3}
FAR = 1e-4  # a mean of 3000 in float32 is 1e-4 off


def error(
    op: ModuleType,
    dtype: str,
    kind: str | None = None,
    mode: str = "triton",
    pixels: tuple[int, int] = (5, 13),
    last: bool = False,
    offset: float = 0.0,
) -> float:
    """2 samples, 3 groups of 4 channels, far from 0; of codes, how many are off by one or more."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 12, *pixels), (12,), (12,))]
    made[0] = made[0] * torch.linspace(0.1, 3.0, 12)[:, None, None] + torch.linspace(-9.0, 9.0, 12)[:, None, None]
    made[0] += offset
    x, weight, bias = (guarded(tensor.to(getattr(torch, dtype))) for tensor in made)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    norm = op.GroupNorm(weight, bias, 3, 0.1)
    wide = torch.nn.functional.group_norm(x.double(), 3, weight.double(), bias.double(), 0.1)
    truth = torch.nn.functional.silu(wide)
    if kind is None:
        got = op.group_norm_silu(x, norm, mode=mode)
        assert got.stride() == x.stride()
        return relative_error(got, truth)
    scale = torch.tensor([0.6 * float(truth.abs().max()) / {"int8": 127.0, "fp8": 448.0}[kind]])  # some saturate
    got = op.group_norm_silu_quantized(x, norm, scale, kind, mode=mode)
    limit = {"int8": 127.0, "fp8": 448.0}[kind]
    scaled = (truth / scale.double()).clamp(-limit, limit)
    expected = scaled.round() if kind == "int8" else scaled.float().to(torch.float8_e4m3fn).double()
    assert bool((expected.abs() == limit).any())
    return float((got.double() != expected).double().mean())


RUNS: list[dict[str, Any]] = [
    *({"dtype": dtype} for dtype in TOLERANCE),
    {"dtype": "float32", "pixels": (2, 1)},
    {"dtype": "float32", "pixels": (16, 4)},
    *({"dtype": dtype, "last": True} for dtype in TOLERANCE),
    {"dtype": "float32", "pixels": (3, 1), "last": True},
    *({"dtype": "float32", "kind": kind, "last": last} for kind in ("int8", "fp8") for last in (False, True)),
]


@pytest.mark.parametrize("arguments", RUNS)
def test_kernel_and_definition_agree_with_float64(interpreter: Interpreter, arguments: dict[str, Any]) -> None:
    allowed = 2e-3 if "kind" in arguments else TOLERANCE[arguments["dtype"]]
    assert interpreter.run(error, "group_norm_silu", **arguments) <= allowed
    assert error(op_file, **arguments, mode="reference") <= allowed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.where(inside, values - shift[None, :], 0.0)", "values - shift[None, :]"),
        ("inside = (at < left)[:, None] & there[None, :]", "inside = (at < chunk)[:, None] & there[None, :]"),
        ("squares += apart * apart", "squares += apart"),
        (" - mean * mean * count", ""),
        ("mean + shift", "mean"),
        ("inside = (part < chunks)[:, None] & there[None, :]", "inside = there[None, :]"),
        ("tl.minimum(pixels - part * chunk, chunk)", "(part * 0 + chunk)"),
        ("apart * apart * seen * share", "0.0"),
        ("seen * (means - mean) * (means - mean)", "0.0"),
        ("variance + eps", "variance"),
        ("tl.load(weight + own", "tl.load(weight + column"),
        ("tl.load(bias + own", "tl.load(bias + column"),
        (" - mean * factor", ""),
        ("pair = joined + tl.program_id(1) * 2 * channels + block * WIDTH", "pair = joined + block * WIDTH"),
        ("values * root * root", "root * root"),
        ("made, mask=inside)", "made)"),
    ],
)
def test_a_broken_kernel_is_seen(interpreter: Interpreter, old: str, new: str) -> None:
    assert interpreter.sees("group_norm_silu", old, new, error, above=1e-6, dtype="float32", last=True)


@pytest.mark.parametrize("last", [False, True])
def test_a_mean_far_from_zero_takes_no_digits_away(interpreter: Interpreter, last: bool) -> None:
    run: dict[str, Any] = {"dtype": "float32", "offset": 3000.0, "last": last}
    assert interpreter.run(error, "group_norm_silu", **run) <= FAR
    old, new = (
        "column * channel_stride, mask=there, other=0.0)",
        "column * channel_stride, mask=there, other=0.0) * 0.0",
    )
    assert interpreter.sees("group_norm_silu", old, new, error, above=FAR, **run)


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("fp8", "1.0 / tl.load(out_scale)", "1.1 / tl.load(out_scale)"),
        ("int8", "tl.minimum(tl.maximum(values, -LIMIT), LIMIT)", "values"),
    ],
)
def test_a_wrong_scale_is_seen(interpreter: Interpreter, kind: str, old: str, new: str) -> None:
    assert interpreter.sees("group_norm_silu", old, new, error, above=2e-3, dtype="float32", kind=kind)


@pytest.mark.parametrize(
    ("pixels", "channels", "last", "tile"),
    [
        (4096, 320, True, (64, 64)),
        (4096, 1280, True, (32, 128)),
        (4096, 12, True, (256, 16)),
        (64, 320, True, (64, 64)),
        (4096, 320, False, (4096, 1)),
        (60, 320, False, (64, 64)),
        (60, 20, False, (64, 32)),
    ],
)
def test_tiles_lie_along_memory(pixels: int, channels: int, last: bool, tile: tuple[int, int]) -> None:
    assert op_file._tile(4096, 128, pixels, channels, last) == tile


def test_another_layout_goes_to_plain_torch(interpreter: Interpreter) -> None:
    assert interpreter.run(transposed, "group_norm_silu") == "contiguous neither"


def transposed(op: ModuleType) -> str:
    x, parameters = torch.ones(2, 4, 3, 5).transpose(2, 3), torch.ones(2, 4)
    norm = op.GroupNorm(*parameters, 2)
    assert op.group_norm_silu(x, norm).shape == x.shape
    with pytest.raises(KernelError, match="contiguous neither") as caught:
        op.group_norm_silu(x, norm, mode="triton")
    return "contiguous neither" if "with them last" in str(caught.value) else str(caught.value)
