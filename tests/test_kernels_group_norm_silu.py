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


def error(
    op: ModuleType,
    dtype: str,
    kind: str | None = None,
    mode: str = "triton",
    pixels: tuple[int, int] = (5, 7),
    last: bool = False,
) -> float:
    """2 samples, 3 groups of 4 channels, far from 0; of codes, how many are off by one or more."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 12, *pixels), (12,), (12,))]
    made[0] = made[0] * torch.linspace(0.1, 3.0, 12)[:, None, None] + torch.linspace(-9.0, 9.0, 12)[:, None, None]
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


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("centred = tl.where(inside, values - here[None, :], 0.0)", "centred = values - here[None, :]"),
        ("(here - mean) * (here - mean) * seen * share", "0.0"),
        ("count * (means - mean) * (means - mean)", "0.0"),
        ("stop = tl.minimum(start + chunk, length)", "stop = start + chunk"),
        ("/ total + eps", "/ total"),
        ("tl.load(weight + own", "tl.load(weight + channel"),
        ("values *= tl.sigmoid(values)", "values = tl.sigmoid(values)"),
        ("tl.store(out + base + at, made, mask=inside)", "tl.store(out + base + at, made)"),
        ("at % channels if LAST else at // pixels", "at // pixels if LAST else at % channels"),
        ("tl.load(bias + channel", "tl.load(bias + channel * 0"),
    ],
)
def test_a_broken_kernel_is_seen(interpreter: Interpreter, last: bool, old: str, new: str) -> None:
    assert interpreter.sees("group_norm_silu", old, new, error, above=1e-6, dtype="float32", last=last)


def test_a_wrong_scale_is_seen(interpreter: Interpreter) -> None:
    old, new = "inverse = 1.0 / tl.load", "inverse = 1.1 / tl.load"
    assert interpreter.sees("group_norm_silu", old, new, error, above=2e-3, dtype="float32", kind="fp8")


def test_another_layout_goes_to_plain_torch(interpreter: Interpreter) -> None:
    assert interpreter.run(transposed, "group_norm_silu") == "contiguous neither"


def transposed(op: ModuleType) -> str:
    x, parameters = torch.ones(2, 4, 3, 5).transpose(2, 3), torch.ones(2, 4)
    norm = op.GroupNorm(*parameters, 2)
    assert op.group_norm_silu(x, norm).shape == x.shape
    with pytest.raises(KernelError, match="contiguous neither") as caught:
        op.group_norm_silu(x, norm, mode="triton")
    return "contiguous neither" if "with them last" in str(caught.value) else str(caught.value)
