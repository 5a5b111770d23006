"""Products with packed 4-bit weights against float64, and the packing itself."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from kernels import gemm_w4a16 as op_file
from kernels.errors import KernelError
from kernels.packing import pack_int4, unpack_int4
from tests.interpreted import Interpreter, relative_error

TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4}


def error(
    op: ModuleType, dtype: str, group: int, rows: int = 19, outputs: int = 37, biased: bool = True, mode: str = "triton"
) -> float:
    """Two groups of inputs; the truth has the weights as the activations' type rounds them."""
    random, kind, inputs = torch.Generator().manual_seed(0), getattr(torch, dtype), 2 * group
    codes = torch.randint(-8, 8, (outputs, inputs), generator=random, dtype=torch.int8)
    scale = (0.1 + torch.rand(outputs, 2, generator=random)).to(kind)
    x = torch.randn(rows, inputs, generator=random).to(kind)
    bias = (100 * torch.randn(outputs, generator=random)).to(kind) if biased else None
    weights = op.Int4Weights(pack_int4(codes, group), scale)
    rounded = (codes.float() * scale.float().repeat_interleave(group, dim=1)).to(kind)
    truth = x.double() @ rounded.double().T + (0.0 if bias is None else bias.double())
    return relative_error(op.gemm_w4a16(x, weights, bias, mode=mode), truth)


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "bfloat16", "group": 64},
        {"dtype": "float16", "group": 128},
        {"dtype": "float16", "group": 64, "rows": 1, "biased": False},
        {"dtype": "bfloat16", "group": 64, "rows": 33, "outputs": 16},
    ],
)
def test_kernel_and_definition_agree_with_float64(interpreter: Interpreter, arguments: dict[str, Any]) -> None:
    allowed = TOLERANCE[arguments["dtype"]]
    assert interpreter.run(error, "gemm_w4a16", **arguments) <= allowed
    assert error(op_file, **arguments, mode="reference") <= allowed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(both & 15)", "(both & 7)"),
        ("low = ((both & 15).to(tl.float32) - 8.0) * factor", "low = ((both & 15).to(tl.float32) - 7.0) * factor"),
        ("high = ((both >> 4).to(tl.float32) - 8.0) * factor", "high = low"),
        ("scale + from_output * groups + group", "scale + from_output * groups"),
        ("from_row + group * GROUP + HALF", "from_row + group * GROUP"),
        ("(row % rows)", "row"),
        ("(output % outputs)", "output"),
        ("tl.load(bias + output, mask=in_outputs, other=0.0)", "tl.load(bias + output * 0)"),
        ("mask=in_rows[None, :] & in_outputs[:, None])", "mask=in_outputs[:, None])"),
        ("mask=in_rows[None, :] & in_outputs[:, None])", "mask=in_rows[None, :])"),
    ],
)
def test_a_broken_kernel_is_seen(interpreter: Interpreter, old: str, new: str) -> None:
    assert interpreter.sees("gemm_w4a16", old, new, error, above=TOLERANCE["float16"], dtype="float16", group=64)


def test_packing_is_undone_by_unpacking() -> None:
    codes = torch.randint(-8, 8, (5, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = pack_int4(codes, 4)
    assert packed.shape == (5, 6)
    assert torch.equal(unpack_int4(packed, 4), codes)
    assert pack_int4(torch.tensor([[-8, 7, 0, 1]]), 4).tolist() == [[0x80, 0x9F]]
    for wrong in (torch.full((1, 4), 8), torch.full((1, 4), -9)):
        with pytest.raises(KernelError, match="from -8 to 7"):
            pack_int4(wrong, 4)
    for group in (3, 8):
        with pytest.raises(KernelError, match="must be even and divide"):
            pack_int4(codes, group)


def test_what_does_not_fit_the_kernel_says_why(interpreter: Interpreter) -> None:
    assert interpreter.run(refusals, "gemm_w4a16") == [
        "the Triton kernel of gemm_w4a16 cannot run: groups of 32 weights are neither 64 nor 128",
        "the Triton kernel of gemm_w4a16 cannot run: activations of torch.float32 have not 16 bits",
        "the weights take 64 inputs, not 32",
    ]


def refusals(op: ModuleType) -> list[str]:
    told = []
    for group, dtype, inputs in ((32, torch.float16, 64), (64, torch.float32, 64), (64, torch.float16, 32)):
        weights = op.Int4Weights(torch.zeros(3, 32, dtype=torch.uint8), torch.ones(3, 64 // group))
        with pytest.raises(KernelError) as caught:
            op.gemm_w4a16(torch.ones(2, inputs, dtype=dtype), weights, mode="triton")
        told.append(str(caught.value))
    return told
