"""Products of 8-bit operands with their epilogue against float64, as kernels, in plain torch and by the vendor."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from kernels import dispatch
from kernels import gemm_w8a8 as op_file
from kernels.errors import KernelError
from kernels.quantize import Quantized, quantize
from tests.interpreted import Interpreter, guarded, relative_error

TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4, "float32": 2e-6}
"""Half the spacing of the result's type; float32 shows the sums themselves."""


def operands(op: ModuleType, kind: str, size: tuple[int, int, int], biased: bool, rank: int) -> tuple[Any, ...]:
    rows, outputs, inputs = size
    random = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    def rounded(values: torch.Tensor) -> Any:
        return Quantized(*(guarded(part) for part in quantize(values, kind, mode="reference")))  # type: ignore[arg-type]

    a = rounded(randn(rows, inputs) * torch.arange(1, rows + 1)[:, None])
    b = rounded(randn(outputs, inputs))
    bias = guarded(randn(outputs).bfloat16() * 30) if biased else None
    half = (randn(rows, rank), randn(outputs, rank)) if rank else ()
    low_rank = op.LowRank(*(guarded((10 * part).bfloat16()) for part in half)) if rank else None
    return a, b, bias, low_rank


def in_float64(a: Quantized, b: Quantized, bias: torch.Tensor | None, low_rank: Any) -> torch.Tensor:
    truth = (a.codes.double() * a.scale.double()[:, None]) @ (b.codes.double() * b.scale.double()[:, None]).T
    truth = truth if bias is None else truth + bias.double()
    return truth if low_rank is None else truth + low_rank.projected.double() @ low_rank.up.double().T


def error(
    op: ModuleType,
    kind: str,
    dtype: str = "float32",
    size: tuple[int, int, int] = (35, 37, 77),
    biased: bool = True,
    rank: int = 5,
    mode: str = "triton",
) -> float:
    given = operands(op, kind, size, biased, rank)
    return relative_error(op.gemm_w8a8(*given, dtype=getattr(torch, dtype), mode=mode), in_float64(*given))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(
    "arguments",
    [
        *({"dtype": dtype} for dtype in TOLERANCE),
        {"biased": False},
        {"rank": 0},
        {"size": (1, 16, 32), "rank": 16},
        {"size": (49, 16, 64), "biased": False, "rank": 0},
    ],
)
def test_kernel_and_definition_agree_with_float64(
    interpreter: Interpreter, kind: str, arguments: dict[str, Any]
) -> None:
    allowed = TOLERANCE[arguments.get("dtype", "float32")]
    assert interpreter.run(error, "gemm_w8a8", kind=kind, **arguments) <= allowed
    assert error(op_file, kind, **arguments, mode="reference") <= allowed


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("inner = k < inputs - first", "inner = k < BLOCK_K"),
        ("mask=inner[None, :], other=0.0", "mask=None"),
        ("mask=inner[:, None], other=0.0", "mask=None"),
        ("(row % rows)", "row"),
        ("(output % outputs)", "output"),
        ("tl.load(a_scale + row, mask=in_rows, other=0.0)", "tl.load(a_scale + row * 0)"),
        ("factors *= tl.load(b_scale + output", "factors *= tl.load(b_scale + output * 0"),
        ("mask=in_rows[:, None] & (r < rank)[None, :]", "mask=in_rows[:, None]"),
        ("made = tl.dot(left, right, made)", "made = tl.dot(left, right)"),
        ("tl.load(bias + output, mask=in_outputs, other=0.0)", "tl.load(bias + output * 0)"),
        ("mask=in_rows[:, None] & in_outputs[None, :])\n\n\ndef _launch", "mask=in_outputs[None, :])\n\n\ndef _launch"),
        ("mask=in_rows[:, None] & in_outputs[None, :])\n\n\ndef _launch", "mask=in_rows[:, None])\n\n\ndef _launch"),
        ("within // height", "within % height"),
    ],
)  # fmt: skip
def test_a_broken_kernel_is_seen(interpreter: Interpreter, kind: str, old: str, new: str) -> None:
    assert interpreter.sees("gemm_w8a8", old, new, error, above=2e-6, kind=kind)


def test_the_vendor_multiplies_fp8_on_sm_90_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library has the product on CPUs too, so that the call itself is run."""
    monkeypatch.setattr(dispatch, "_architecture", lambda device: ("sm_90", None))
    given = operands(op_file, "fp8", (16, 32, 48), biased=True, rank=0)
    chosen = []

    def recorded(*arguments: Any, **options: Any) -> dispatch.Choice:
        chosen.append(dispatch.choose(*arguments, **options))
        return chosen[-1]

    monkeypatch.setattr(op_file, "choose", recorded)
    assert relative_error(op_file.gemm_w8a8(*given), in_float64(*given)) <= 4e-3
    assert chosen[0].implementation == "vendor"
    assert "cuBLASLt" in chosen[0].reason


def test_int8_on_sm_100_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_architecture", lambda device: ("sm_100", None))
    given = operands(op_file, "int8", (3, 5, 7), biased=False, rank=0)
    with pytest.raises(KernelError, match=r"gemm_int8 cannot run: sm_100 has no int8 .*; use fp8"):
        op_file.gemm_w8a8(*given, mode="triton")
    assert relative_error(op_file.gemm_w8a8(*given, dtype=torch.float32), in_float64(*given)) <= 1e-6


def test_a_low_rank_branch_that_does_not_fit_says_why(interpreter: Interpreter) -> None:
    told = "the low-rank branch is not of one 16-bit type and a rank up to 128"
    assert interpreter.run(refusal, "gemm_w8a8", rank=129) == f"the Triton kernel of gemm_int8 cannot run: {told}"


def refusal(op: ModuleType, rank: int) -> str:
    with pytest.raises(KernelError) as caught:
        op.gemm_w8a8(*operands(op, "int8", (3, 5, 7), biased=False, rank=rank), mode="triton")
    return str(caught.value)


def test_operands_that_do_not_fit_are_refused() -> None:
    a, b, _, _ = operands(op_file, "int8", (3, 5, 7), biased=False, rank=0)
    other, _, _, _ = operands(op_file, "fp8", (3, 5, 7), biased=False, rank=0)
    with pytest.raises(KernelError, match="not of one 8-bit format"):
        op_file.gemm_w8a8(other, b)
    with pytest.raises(KernelError, match="do not fit"):
        op_file.gemm_w8a8(a, Quantized(b.codes, a.scale))
