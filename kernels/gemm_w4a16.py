"""Product of 16-bit activations and 4-bit weights, which are widened in registers: a quarter of the weights' memory.

    y[i, j] = sum_k x[i, k] * (code[j, k] * scale[j, k // group])  +  bias[j]

with each weight rounded to the activations' type, and sums in float32. It saves memory and, with few rows, the time
that reading weights takes; with many rows the product itself costs as much as in 16 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.capability import INTERPRETER
from kernels.dispatch import Mode, choose
from kernels.errors import KernelError
from kernels.language import ceiling, jit, tl
from kernels.launch import Argument, Configuration, Configurations, Launch, configuration_for
from kernels.machine_code import Case
from kernels.packing import unpack_int4

FEW = 32
"""Up to so many rows, programs take 16 rows each, and more outputs."""

MANY_ROWS: Configurations = {
    "default": Configuration(warps=8, stages=3, blocks={"BLOCK_M": 128, "BLOCK_N": 128}),
    "sm_90": Configuration(warps=4, stages=3, blocks={"BLOCK_M": 128, "BLOCK_N": 64}),
    INTERPRETER: Configuration(warps=4, blocks={"BLOCK_M": 16, "BLOCK_N": 16}),
}
FEW_ROWS: Configurations = {
    "default": Configuration(warps=4, stages=4, blocks={"BLOCK_M": 16, "BLOCK_N": 128}),
    "sm_90": Configuration(warps=4, stages=4, blocks={"BLOCK_M": 16, "BLOCK_N": 64}),
    INTERPRETER: MANY_ROWS[INTERPRETER],
}


class Int4Weights(NamedTuple):
    """Packed weights of a linear layer.

    Attributes:
        packed: uint8 (outputs, inputs / 2), see `kernels.packing`.
        scale: (outputs, inputs / group) in 16 or 32 bits.
    """

    packed: torch.Tensor
    scale: torch.Tensor

    @property
    def group(self) -> int:
        """How many inputs share a scale."""
        return 2 * self.packed.shape[1] // self.scale.shape[1]


def gemm_w4a16(
    x: torch.Tensor, weights: Int4Weights, bias: torch.Tensor | None = None, *, mode: Mode | None = None
) -> torch.Tensor:
    """Multiply.

    Args:
        x: (..., inputs) in 16 bits.
        weights: in groups of 64 or 128 for the kernel.
        bias: (outputs,).
        mode: see `kernels.dispatch.choose`.

    Returns:
        (..., outputs) in the type of x.

    Raises:
        KernelError: the inputs are not those of the weights.
    """
    outputs, inputs = weights.packed.shape[0], 2 * weights.packed.shape[1]
    if x.shape[-1] != inputs:
        raise KernelError(f"the weights take {inputs} inputs, not {x.shape[-1]}")
    unfit = None
    if weights.group not in (64, 128):
        unfit = f"groups of {weights.group} weights are neither 64 nor 128"
    elif x.dtype not in (torch.float16, torch.bfloat16):
        unfit = f"activations of {x.dtype} have not 16 bits"
    elif not x.is_contiguous():
        unfit = "the activations are not contiguous"
    choice = choose("gemm_w4a16", x.device, x.dtype, (x.numel() // inputs, outputs, inputs), unfit=unfit, mode=mode)
    if choice.implementation == "reference":
        return gemm_w4a16_reference(x, weights, bias)
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    _launch(x, weights, bias, out, choice.architecture).run()
    return out


def gemm_w4a16_reference(x: torch.Tensor, weights: Int4Weights, bias: torch.Tensor | None) -> torch.Tensor:
    """The definition."""
    codes = unpack_int4(weights.packed, weights.group).float()
    widened = codes * weights.scale.float().repeat_interleave(weights.group, dim=1)
    made = x.float() @ widened.to(x.dtype).float().T
    return (made if bias is None else made + bias.float()).to(x.dtype)


@jit
def _gemm_w4a16(
    x: tl.tensor,
    packed: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    BIASED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """The result is made transposed: weights are then the operand that tensor cores take from registers."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    HALF: tl.constexpr = GROUP // 2
    half = tl.arange(0, HALF)
    groups = inputs // GROUP
    from_row = x + (row % rows).to(tl.int64)[None, :] * inputs + half[:, None]
    from_output = (output % outputs).to(tl.int64)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for group in range(0, groups):
        both = tl.load(packed + from_output[:, None] * (inputs // 2) + group * HALF + half[None, :])
        factor = tl.load(scale + from_output * groups + group).to(tl.float32)[:, None]
        low = ((both & 15).to(tl.float32) - 8.0) * factor
        high = ((both >> 4).to(tl.float32) - 8.0) * factor
        total = tl.dot(low.to(x.dtype.element_ty), tl.load(from_row + group * GROUP), total)
        total = tl.dot(high.to(x.dtype.element_ty), tl.load(from_row + group * GROUP + HALF), total)
    in_rows, in_outputs = row < rows, output < outputs
    if BIASED:
        total += tl.load(bias + output, mask=in_outputs, other=0.0).to(tl.float32)[:, None]
    at = out + row.to(tl.int64)[None, :] * outputs + output[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=in_rows[None, :] & in_outputs[:, None])


def _launch(
    x: torch.Tensor, weights: Int4Weights, bias: torch.Tensor | None, out: torch.Tensor, architecture: str
) -> Launch:
    outputs, inputs = weights.packed.shape[0], x.shape[-1]
    rows = x.numel() // inputs
    configuration = configuration_for(FEW_ROWS if rows <= FEW else MANY_ROWS, architecture)
    arguments: dict[str, Argument] = {
        "x": x,
        "packed": weights.packed,
        "scale": weights.scale,
        "bias": bias,
        "out": out,
        "rows": rows,
        "outputs": outputs,
        "inputs": inputs,
        "BIASED": bias is not None,
        "GROUP": weights.group,
    }
    grid = ceiling(rows, configuration.blocks["BLOCK_M"]), ceiling(outputs, configuration.blocks["BLOCK_N"])
    return Launch(_gemm_w4a16, grid, arguments, configuration)


def _case(architecture: str, rows: int, group: int, dtype: torch.dtype) -> Launch:
    outputs, inputs = 3072, 3072
    packed = torch.empty(outputs, inputs // 2, dtype=torch.uint8, device="meta")
    weights = Int4Weights(packed, torch.empty(outputs, inputs // group, dtype=dtype, device="meta"))
    x, out = (torch.empty(rows, width, dtype=dtype, device="meta") for width in (inputs, outputs))
    return _launch(x, weights, torch.empty(outputs, dtype=dtype, device="meta"), out, architecture)


CASES = {
    "gemm-w4a16-bf16-g64": Case(lambda architecture: _case(architecture, 4096, 64, torch.bfloat16), ("float",)),
    "gemm-w4a16-fp16-g128": Case(lambda architecture: _case(architecture, 4096, 128, torch.float16), ("float",)),
    "gemm-w4a16-bf16-g128-few": Case(lambda architecture: _case(architecture, 16, 128, torch.bfloat16), ("float",)),
}
