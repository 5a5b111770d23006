"""GroupNorm with SiLU against float64, over chunks of a group, plain and rounded to 8 bits."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from kernels import group_norm_silu as op_file
from tests.interpreted import Interpreter, guarded, relative_error

TOLERANCE = {"float32": 1e-6, "float16": 6e-4, "bfloat16": 4e-3}


def error(
    op: ModuleType, dtype: str, kind: str | None = None, mode: str = "triton", pixels: tuple[int, int] = (5, 7)
) -> float:
    """2 samples, 3 groups of 4 channels, far from 0; of codes, how many are off by one or more."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 12, *pixels), (12,), (12,))]
    made[0] = made[0] * torch.linspace(0.1, 3.0, 12)[:, None, None] + torch.linspace(-9.0, 9.0, 12)[:, None, None]
    x, weight, bias = (guarded(tensor.to(getattr(torch, dtype))) for tensor in made)
    norm = op.GroupNorm(weight, bias, 3, 0.1)
    wide = torch.nn.functional.group_norm(x.double(), 3, weight.double(), bias.double(), 0.1)
    truth = torch.nn.functional.silu(wide)
    if kind is None:
        return relative_error(op.group_norm_silu(x, norm, mode=mode), truth)
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
    *({"dtype": "float32", "kind": kind} for kind in ("int8", "fp8")),
]


@pytest.mark.parametrize("arguments", RUNS)
def test_kernel_and_definition_agree_with_float64(interpreter: Interpreter, arguments: dict[str, Any]) -> None:
    allowed = 2e-3 if "kind" in arguments else TOLERANCE[arguments["dtype"]]
    assert interpreter.run(error, "group_norm_silu", **arguments) <= allowed
    assert error(op_file, **arguments, mode="reference") <= allowed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("centred = tl.where(inside, values - here, 0.0)", "centred = values - here"),
        ("(here - mean) * (here - mean) * seen * share", "0.0"),
        ("count * (means - mean) * (means - mean)", "0.0"),
        ("stop = tl.minimum(start + chunk, length)", "stop = start + chunk"),
        ("deviation / length + eps", "deviation / length"),
        ("(group % groups) * channels", "group * 0"),
        ("values *= tl.sigmoid(values)", "values = tl.sigmoid(values)"),
        ("tl.store(out + group * length + at, made, mask=inside)", "tl.store(out + group * length + at, made)"),
        ("at // pixels", "at % channels"),
    ],
)
def test_a_broken_kernel_is_seen(interpreter: Interpreter, old: str, new: str) -> None:
    assert interpreter.sees("group_norm_silu", old, new, error, above=1e-6, dtype="float32")


def test_a_wrong_scale_is_seen(interpreter: Interpreter) -> None:
    old, new = "codes(values, tl.load(out_scale)", "codes(values, 1.1 * tl.load(out_scale)"
    assert interpreter.sees("group_norm_silu", old, new, error, above=2e-3, dtype="float32", kind="fp8")
