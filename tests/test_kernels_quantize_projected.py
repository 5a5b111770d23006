"""Rounding together with a low-rank projection, against float64, and as the two halves of a quantized linear layer."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from kernels import quantize_projected as op_file
from kernels.errors import KernelError
from kernels.gemm_w8a8 import LowRank, gemm_w8a8
from kernels.quantize import quantize
from tests.interpreted import Interpreter, relative_error
from tests.test_kernels_rows import rounded

TOLERANCE = {"bfloat16": 4e-3, "float16": 2e-3}


def error(op: ModuleType, dtype: str, kind: str, rank: int = 5, channels: int = 77, mode: str = "triton") -> float:
    """The larger error of the two results."""
    random, made = torch.Generator().manual_seed(0), getattr(torch, dtype)
    x = torch.randn(5, 7, channels, generator=random).to(made)
    x[2, 3] = 0.0
    x[1] *= 100.0
    down = torch.randn(rank, channels, generator=random).to(made)
    quantized, projected = op.quantize_projected(x, down, kind, mode=mode)
    assert float(quantized.scale[2, 3]) == 1.0
    codes_error = relative_error(quantized.dequantized(), rounded(x.double(), kind))
    return max(codes_error, relative_error(projected, x.double() @ down.double().T))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("kind", "rank", "channels"), [("int8", 5, 77), ("fp8", 16, 64), ("int8", 33, 16)])
def test_kernel_and_definition_agree_with_float64(
    interpreter: Interpreter, dtype: str, kind: str, rank: int, channels: int
) -> None:
    given = {"dtype": dtype, "kind": kind, "rank": rank, "channels": channels}
    assert interpreter.run(error, "quantize_projected", **given) <= TOLERANCE[dtype]
    assert error(op_file, **given, mode="reference") <= TOLERANCE[dtype]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("inside = column < channels - first\n", "inside = column < BLOCK\n"),
        ("inside = in_rows & (column < channels - first)[None, :]", "inside = in_rows & (column < BLOCK)[None, :]"),
        ("mask=(r < rank)[None, :] & inside[:, None]", "mask=inside[:, None]"),
        ("total = tl.dot(values, factor, total)", "total = tl.dot(values, factor)"),
        ("tl.max(tl.abs(values.to(tl.float32)), 1)", "tl.max(values.to(tl.float32), 1)"),
        ("largest / LIMIT, 1.0)", "largest / LIMIT, 0.0)"),
        ("in_rows = (row < rows)[:, None]", "in_rows = (row < rows + 1)[:, None]"),
        ("mask=in_rows & (r < rank)[None, :])\n    for", "mask=in_rows)\n    for"),
    ],
)
def test_a_broken_kernel_is_seen(interpreter: Interpreter, old: str, new: str) -> None:
    above = TOLERANCE["float16"]
    assert interpreter.sees("quantize_projected", old, new, error, above=above, dtype="float16", kind="int8")


def test_a_low_rank_branch_makes_up_for_what_8_bits_lose() -> None:
    """A weight with one direction much larger than the rest: the branch carries it, the codes carry what is left."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=random).bfloat16()
    down, up = torch.randn(1, 64, generator=random).bfloat16(), torch.randn(48, 1, generator=random).bfloat16()
    rest = 0.01 * torch.randn(48, 64, generator=random)
    truth = x.double() @ (rest.double() + up.double() @ down.double()).T
    quantized, projected = op_file.quantize_projected(x, down, "int8")
    with_branch = gemm_w8a8(quantized, quantize(rest, "int8"), None, LowRank(projected, up), torch.float32)
    without = gemm_w8a8(quantized, quantize(rest + up.float() @ down.float(), "int8"), dtype=torch.float32)
    assert relative_error(with_branch, truth) < 0.5 * relative_error(without, truth)


def test_what_does_not_fit_the_kernel_says_why(interpreter: Interpreter) -> None:
    assert interpreter.run(refusal, "quantize_projected") == "not of one 16-bit type and a rank up to 128"


def refusal(op: ModuleType) -> str:
    with pytest.raises(KernelError) as caught:
        op.quantize_projected(torch.ones(2, 4).half(), torch.ones(129, 4).half(), "int8", mode="triton")
    return str(caught.value).partition("the inputs are ")[2]
