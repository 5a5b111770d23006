"""Kernels over whole rows of channels, against float64: quantize, adaln, RMS norm, gated residual, GELU and GEGLU."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from kernels import adaln, gated_residual, gelu, quantize, rms_norm
from kernels.errors import KernelError
from tests.interpreted import Interpreter, guarded, relative_error

TOLERANCE = {"float32": 1e-6, "float16": 6e-4, "bfloat16": 4e-3, "int8": 2e-3, "fp8": 4e-3}
"""Half the spacing of a type; of codes, how many may differ where float32 and float64 round to another."""


TWO = 48
"""Channels that are two powers of two, and so two tiles."""


def randn(*shape: int, seed: int, dtype: str) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return guarded(made.to(getattr(torch, dtype)))


def rounded(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Rows of float64 as their codes say."""
    limit = {"int8": 127.0, "fp8": 448.0}[kind]
    scale = values.abs().amax(dim=-1, keepdim=True) / limit
    scale[scale == 0] = 1.0
    codes = (values / scale).round() if kind == "int8" else (values / scale).float().to(torch.float8_e4m3fn).double()
    return codes * scale


def of_quantize(op: ModuleType, dtype: str, kind: str, mode: str = "triton", channels: int = 37) -> float:
    x = randn(3, 5, channels, seed=0, dtype=dtype)
    x[1, 2] = 0.0
    x[0, 1] *= 100.0
    got = op.quantize(x, kind, mode=mode)
    assert got.scale.shape == (3, 5)
    assert float(got.scale[1, 2]) == 1.0
    return relative_error(got.dequantized(), rounded(x.double(), kind))


def of_adaln(op: ModuleType, dtype: str, kind: str | None = None, mode: str = "triton", channels: int = 37) -> float:
    x = guarded(3.0 + randn(3, 5, channels, seed=0, dtype=dtype))
    shift, scale, _ = randn(3, 3 * channels, seed=1, dtype=dtype).chunk(3, dim=1)
    wide, centred = x.double(), x.double() - x.double().mean(dim=-1, keepdim=True)
    truth = centred / (wide.var(dim=-1, correction=0, keepdim=True) + 0.1).sqrt()
    truth = truth * (1.0 + scale.double()[:, None]) + shift.double()[:, None]
    if kind is None:
        return relative_error(op.adaln(x, shift, scale, 0.1, mode=mode), truth)
    got = op.adaln_quantized(x, shift, scale, kind, 0.1, mode=mode)
    return relative_error(got.dequantized(), rounded(truth, kind))


def of_gated_residual(op: ModuleType, dtype: str, mode: str = "triton", channels: int = 37) -> float:
    x, y = (randn(3, 5, channels, seed=seed, dtype=dtype) for seed in (0, 1))
    gate = randn(3, 2 * channels, seed=2, dtype=dtype).chunk(2, dim=1)[1]
    truth = x.double() + gate.double()[:, None] * y.double()
    return relative_error(op.gated_residual(x, gate, y, mode=mode), truth)


def of_rms_norm(op: ModuleType, dtype: str, mode: str = "triton", channels: int = 37) -> float:
    x, weight = randn(3, 5, channels, seed=0, dtype=dtype), randn(channels, seed=1, dtype=dtype)
    truth = x.double() / (x.double().square().mean(dim=-1, keepdim=True) + 0.1).sqrt() * weight.double()
    return relative_error(op.rms_norm(x, weight, 0.1, mode=mode), truth)


def of_gelu(
    op: ModuleType,
    dtype: str,
    gated: bool,
    tanh: bool,
    kind: str | None = None,
    mode: str = "triton",
    channels: int = 37,
) -> float:
    x = randn(5, 2 * channels if gated else channels, seed=0, dtype=dtype)
    gate = x.double()[:, -channels:]
    truth = torch.nn.functional.gelu(gate, approximate="tanh" if tanh else "none")
    truth = truth * x.double()[:, :channels] if gated else truth
    if kind is None:
        return relative_error(op.gelu(x, gated=gated, tanh=tanh, mode=mode), truth)
    got = op.gelu_quantized(x, kind, gated=gated, tanh=tanh, mode=mode)
    return relative_error(got.dequantized(), rounded(truth, kind))


RUNS: list[tuple[Any, ModuleType, dict[str, Any]]] = [
    *((of_quantize, quantize, {"dtype": dtype, "kind": "int8"}) for dtype in ("float32", "float16", "bfloat16")),
    (of_quantize, quantize, {"dtype": "bfloat16", "kind": "fp8"}),
    *((of_adaln, adaln, {"dtype": dtype}) for dtype in ("float32", "float16", "bfloat16")),
    (of_adaln, adaln, {"dtype": "float32", "channels": 64}),
    *((of_adaln, adaln, {"dtype": "bfloat16", "kind": kind}) for kind in ("int8", "fp8")),
    *((of_rms_norm, rms_norm, {"dtype": dtype}) for dtype in ("float32", "float16", "bfloat16")),
    *((of_gated_residual, gated_residual, {"dtype": dtype}) for dtype in ("float32", "float16", "bfloat16")),
    *((of_gelu, gelu, {"dtype": "float32", "gated": gated, "tanh": tanh}) for gated in (0, 1) for tanh in (0, 1)),
    *((of_gelu, gelu, {"dtype": "bfloat16", "gated": True, "tanh": False, "kind": kind}) for kind in ("int8", "fp8")),
    (of_quantize, quantize, {"dtype": "bfloat16", "kind": "int8", "channels": TWO}),
    (of_adaln, adaln, {"dtype": "bfloat16", "kind": "fp8", "channels": TWO}),
    (of_adaln, adaln, {"dtype": "float32", "channels": TWO}),
    (of_rms_norm, rms_norm, {"dtype": "float32", "channels": TWO}),
    (of_gated_residual, gated_residual, {"dtype": "float32", "channels": TWO}),
    (of_gelu, gelu, {"dtype": "float32", "gated": True, "tanh": True, "channels": TWO}),
    (of_gelu, gelu, {"dtype": "bfloat16", "gated": False, "tanh": False, "kind": "int8", "channels": TWO}),
]


@pytest.mark.parametrize(("error", "op", "arguments"), RUNS)
def test_kernel_and_definition_agree_with_float64(
    interpreter: Interpreter, error: Any, op: ModuleType, arguments: dict[str, Any]
) -> None:
    allowed = TOLERANCE[arguments.get("kind") or arguments["dtype"]]
    assert interpreter.run(error, op.__name__.removeprefix("kernels."), **arguments) <= allowed
    assert error(op, **arguments, mode="reference") <= allowed


@pytest.mark.parametrize(
    ("operation", "old", "new", "error", "arguments"),
    [
        ("quantize", "largest / LIMIT, 1.0)", "largest * LIMIT, 1.0)", of_quantize, {"kind": "int8"}),
        ("quantize", "scaled + 12582912.0", "scaled + 12582913.0", of_quantize, {"kind": "int8"}),
        ("quantize", "mask=inside, other=0.0)", "mask=None)", of_quantize, {"kind": "int8"}),
        ("quantize", "element_ty), mask=inside)\n    else", "element_ty))\n    else", of_quantize, {"kind": "fp8"}),
        ("quantize", "scale, mask=row < rows)", "scale)", of_quantize, {"kind": "fp8"}),
        ("quantize", "tl.max(tl.abs(head), 1)", "tl.max(head, 1)", of_quantize, {"kind": "fp8"}),
        ("quantize", "tl.maximum(largest, tl.max(tl.abs(rest), 1))", "largest", of_quantize,
         {"kind": "int8", "channels": TWO}),
        ("quantize", "load_part(x + HEAD, row", "load_part(x, row", of_quantize, {"kind": "fp8", "channels": TWO}),
        ("quantize", "out + HEAD, row", "out, row", of_quantize, {"kind": "fp8", "channels": TWO}),
        ("adaln", "(tl.arange(0, HEAD) < channels)[None, :], head - mean, 0.0", "mean < float('inf'), head - mean, 0.0",
         of_adaln, {}),
        ("adaln", "/ channels + eps", "/ channels", of_adaln, {}),
        ("adaln", "(1.0 + factor)", "factor", of_adaln, {}),
        ("adaln", "(1.0 + more_factor)", "more_factor", of_adaln, {"channels": TWO}),
        ("adaln", "rest = rest - mean", "rest = rest", of_adaln, {"channels": TWO}),
        ("adaln", "scale + sample.to(tl.int64) * scale_stride", "scale", of_adaln, {}),
        ("adaln", "shift_stride, channels", "channels, channels", of_adaln, {}),
        ("adaln", "out_scale += sample * rows", "out_scale += 0", of_adaln, {"kind": "int8"}),
        ("rms_norm", "/ channels + eps", "/ channels", of_rms_norm, {}),
        ("rms_norm", "/ channels + eps", "/ HEAD + eps", of_rms_norm, {}),
        ("rms_norm", "head * inverse * factor", "head * inverse", of_rms_norm, {}),
        ("rms_norm", "rest * inverse * more", "rest * inverse", of_rms_norm, {"channels": TWO}),
        ("gated_residual", "x + before, y + before", "x + before, y", of_gated_residual, {}),
        ("gated_residual", "gate + sample.to(tl.int64) * gate_stride", "gate", of_gated_residual, {}),
        ("gated_residual", "head + branch * factor", "head - branch * factor", of_gated_residual, {}),
        ("gated_residual", "rest_of_branch * more", "rest_of_branch", of_gated_residual, {"channels": TWO}),
        ("gelu", "0.044715 * gate * gate * gate", "0.044715 * gate * gate", of_gelu, {"gated": True, "tanh": True}),
        ("gelu", "x + width - channels", "x", of_gelu, {"gated": True, "tanh": False}),
        ("gelu", "gate > 0.0, 1.0 - tail, tail", "gate < 0.0, 1.0 - tail, tail", of_gelu,
         {"gated": False, "tanh": False}),
        ("gelu", "0.5307027145", "0.53", of_gelu, {"gated": False, "tanh": False}),
        ("gelu", "rest * rest_of_value", "rest", of_gelu, {"gated": True, "tanh": False, "channels": TWO}),
    ],
)  # fmt: skip
def test_a_broken_kernel_is_seen(
    interpreter: Interpreter, operation: str, old: str, new: str, error: Any, arguments: dict[str, Any]
) -> None:
    above = TOLERANCE[arguments.get("kind") or "float32"]
    assert interpreter.sees(operation, old, new, error, above=above, dtype="float32", **arguments)


def test_what_does_not_fit_the_kernel_says_why(interpreter: Interpreter) -> None:
    assert interpreter.run(refusals, "quantize") == [
        "the Triton kernel of quantize cannot run: an input is not contiguous",
        "the Triton kernel of quantize cannot run: rows of 32769 channels are longer than 32768",
    ]
    assert torch.equal(quantize.quantize(torch.ones(4, 2).T, "int8").codes, torch.full((2, 4), 127, dtype=torch.int8))


def refusals(op: ModuleType) -> list[str]:
    told = []
    for x in (torch.ones(4, 2).T, torch.ones(1, 32769)):
        with pytest.raises(KernelError) as caught:
            op.quantize(x, "int8", mode="triton")
        told.append(str(caught.value))
    return told
