"""Product of 8-bit activations and 8-bit weights with everything that follows it: scales, low-rank branch, bias, cast.

    y[i, j] = a_scale[i] * b_scale[j] * sum_k a[i, k] b[j, k]  +  sum_r projected[i, r] up[j, r]  +  bias[j]

so that neither the sums nor the branch go through memory. The low-rank branch keeps in 16 bits what 8 bits lose (Li et
al. 2024, arXiv 2411.05007); its first product, `projected = x A`, is made before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.capability import INTERPRETER
from kernels.dispatch import Mode, choose
from kernels.errors import KernelError
from kernels.language import ceiling, jit, tl
from kernels.launch import Argument, Configuration, Launch, configuration_for
from kernels.machine_code import Case
from kernels.quantize import DTYPES, Kind, Quantized

_WIDE = Configuration(warps=8, stages=3, blocks={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "BAND": 8})
_NARROW = Configuration(warps=8, stages=4, blocks={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "BAND": 8})

_TALL = Configuration(warps=8, stages=3, blocks={"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 128, "BAND": 8})

CONFIGURATIONS = {
    "default": _WIDE,
    "sm_86": _NARROW,
    "sm_89": _NARROW,
    "sm_90": _TALL,  # of ten, within 1 % of the fastest on an H200 in int8, and the fastest in fp8
    "sm_120": _NARROW,
    INTERPRETER: Configuration(warps=4, blocks={"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "BAND": 2}),
}

MOST_RANK = 128
"""Both factors of the low-rank branch are one tile along the rank."""


class LowRank(NamedTuple):
    """A 16-bit branch beside a product.

    Attributes:
        projected: (..., rank) the inputs times the first factor.
        up: (outputs, rank) the second factor.
    """

    projected: torch.Tensor
    up: torch.Tensor


def gemm_w8a8(
    a: Quantized,
    b: Quantized,
    bias: torch.Tensor | None = None,
    low_rank: LowRank | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    mode: Mode | None = None,
) -> torch.Tensor:
    """Multiply.

    Args:
        a: activations (..., inputs) with a scale per row (...,).
        b: weights (outputs, inputs) with a scale per output (outputs,), in the same 8-bit format.
        bias: (outputs,).
        low_rank: added to the product.
        dtype: of the result, 16 bits.
        mode: see `kernels.dispatch.choose`; the operation is called `gemm_int8` or `gemm_fp8`. The vendor's library
            multiplies fp8 without a low-rank branch, to bf16, where inputs and outputs are multiples of 16.

    Returns:
        (..., outputs).

    Raises:
        KernelError: the two are of different formats, or their sizes do not fit.
    """
    kind = _kind(a, b)
    outputs, inputs = b.codes.shape
    unfit = None
    if not (a.codes.is_contiguous() and b.codes.is_contiguous()):
        unfit = "an operand is not contiguous"
    elif low_rank is not None and not _fits(low_rank):
        unfit = f"the low-rank branch is not of one 16-bit type and a rank up to {MOST_RANK}"
    choice = choose(
        f"gemm_{kind}",
        a.codes.device,
        a.codes.dtype,
        (a.codes.numel() // inputs, outputs, inputs),
        needs=(kind,),
        unfit=unfit,
        vendor=kind == "fp8" and low_rank is None and dtype == torch.bfloat16 and outputs % 16 == inputs % 16 == 0,
        mode=mode,
    )
    if choice.implementation == "reference":
        return gemm_w8a8_reference(a, b, bias, low_rank, dtype)
    if choice.implementation == "vendor":
        return _vendor(a, b, bias)
    out = torch.empty(*a.codes.shape[:-1], outputs, dtype=dtype, device=a.codes.device)
    _launch(a, b, bias, low_rank, out, choice.architecture).run()
    return out


def gemm_w8a8_reference(
    a: Quantized, b: Quantized, bias: torch.Tensor | None, low_rank: LowRank | None, dtype: torch.dtype
) -> torch.Tensor:
    """The definition: whole numbers are summed exactly, everything else in float32."""
    small = a.codes.dtype != torch.int8 or a.codes.shape[-1] * 128 * 128 < 1 << 24  # float32 holds every sum
    exact = torch.float32 if small else torch.float64
    made = (a.codes.to(exact) @ b.codes.to(exact).T).float() * a.scale[..., None] * b.scale
    if low_rank is not None:
        made = made + low_rank.projected.float() @ low_rank.up.float().T
    if bias is not None:
        made = made + bias.float()
    return made.to(dtype)


def _kind(a: Quantized, b: Quantized) -> Kind:
    kinds: list[Kind] = [kind for kind, dtype in DTYPES.items() if a.codes.dtype == b.codes.dtype == dtype]
    if not kinds:
        raise KernelError(f"operands of {a.codes.dtype} and {b.codes.dtype} are not of one 8-bit format")
    if (
        a.codes.shape[-1] != b.codes.shape[1]
        or a.scale.shape != a.codes.shape[:-1]
        or b.scale.shape != b.codes.shape[:1]
    ):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (*a, *b))
        raise KernelError(f"activations, their scales, weights and their scales do not fit: {shapes}")
    return kinds[0]


def _fits(low_rank: LowRank) -> bool:
    one_type = low_rank.projected.dtype == low_rank.up.dtype and low_rank.up.dtype.itemsize == 2
    return one_type and low_rank.up.shape[1] <= MOST_RANK


def _vendor(a: Quantized, b: Quantized, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of cuBLASLt, with a scale per row of both.

    Its sums are not moved to float32 on the way: on an H200 that takes 0.8 of the time, and of 3072 products the error
    is 1.8e-3 where it was 1.7e-3.
    """
    made = torch._scaled_mm(
        a.codes.reshape(-1, a.codes.shape[-1]),
        b.codes.T,
        scale_a=a.scale.reshape(-1, 1),
        scale_b=b.scale.reshape(1, -1),
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return made.view(*a.codes.shape[:-1], len(b.codes))


@jit
def _gemm_w8a8(
    a: tl.tensor,
    b: tl.tensor,
    a_scale: tl.tensor,
    b_scale: tl.tensor,
    bias: tl.tensor,
    projected: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    rank: tl.tensor,
    RANK: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
) -> None:
    """Programs go down bands of rows, so that those at work together share operands in the cache."""
    across, down = tl.cdiv(outputs, BLOCK_N), tl.cdiv(rows, BLOCK_M)
    band = tl.program_id(0) // (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * across)
    row = (band * BAND + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_at = a + (row % rows).to(tl.int64)[:, None] * inputs + k[None, :]
    b_at = b + (output % outputs).to(tl.int64)[None, :] * inputs + k[:, None]
    WHOLE: tl.constexpr = a.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if WHOLE else tl.float32
    # The fp8 products of sm_90 add with few bits: their sums are moved to float32 after every block.
    FEW: tl.constexpr = None if WHOLE else BLOCK_K
    total = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    for first in range(0, inputs, BLOCK_K):
        inner = k < inputs - first
        left = tl.load(a_at + first, mask=inner[None, :], other=0.0)
        right = tl.load(b_at + first, mask=inner[:, None], other=0.0)
        total = tl.dot(left, right, total, max_num_imprecise_acc=FEW, out_dtype=SUM)
    in_rows, in_outputs = row < rows, output < outputs
    factors = tl.load(a_scale + row, mask=in_rows, other=0.0)[:, None]
    factors *= tl.load(b_scale + output, mask=in_outputs, other=0.0)[None, :]
    made = total.to(tl.float32) * factors
    if RANK > 0:
        r = tl.arange(0, RANK)
        left = tl.load(
            projected + row.to(tl.int64)[:, None] * rank + r[None, :],
            mask=in_rows[:, None] & (r < rank)[None, :],
            other=0.0,
        )
        right = tl.load(
            up + output[None, :] * rank + r[:, None], mask=in_outputs[None, :] & (r < rank)[:, None], other=0.0
        )
        made = tl.dot(left, right, made)
    if BIASED:
        made += tl.load(bias + output, mask=in_outputs, other=0.0).to(tl.float32)[None, :]
    at = out + row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(at, made.to(out.dtype.element_ty), mask=in_rows[:, None] & in_outputs[None, :])


def _launch(
    a: Quantized,
    b: Quantized,
    bias: torch.Tensor | None,
    low_rank: LowRank | None,
    out: torch.Tensor,
    architecture: str,
) -> Launch:
    configuration = configuration_for(CONFIGURATIONS, architecture)
    outputs, inputs = b.codes.shape
    rows = a.codes.numel() // inputs
    rank = 0 if low_rank is None else low_rank.up.shape[1]
    arguments: dict[str, Argument] = {
        "a": a.codes,
        "b": b.codes,
        "a_scale": a.scale,
        "b_scale": b.scale,
        "bias": bias,
        "projected": None if low_rank is None else low_rank.projected.contiguous(),
        "up": None if low_rank is None else low_rank.up.contiguous(),
        "out": out,
        "rows": rows,
        "outputs": outputs,
        "inputs": inputs,
        "rank": rank,
        "RANK": max(16, 1 << (rank - 1).bit_length()) if rank else 0,
        "BIASED": bias is not None,
    }
    blocks = configuration.blocks
    programs = ceiling(rows, blocks["BLOCK_M"]) * ceiling(outputs, blocks["BLOCK_N"])
    return Launch(_gemm_w8a8, (programs,), arguments, configuration)


def _case(architecture: str, kind: Kind, rank: int) -> Launch:
    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, outputs, inputs, half = 8192, 3072, 3072, torch.bfloat16
    a = Quantized(empty(rows, inputs, dtype=DTYPES[kind]), empty(rows, dtype=torch.float32))
    b = Quantized(empty(outputs, inputs, dtype=DTYPES[kind]), empty(outputs, dtype=torch.float32))
    branch = LowRank(empty(rows, rank, dtype=half), empty(outputs, rank, dtype=half)) if rank else None
    return _launch(a, b, empty(outputs, dtype=half), branch, empty(rows, outputs, dtype=half), architecture)


CASES = {
    "gemm-int8": Case(lambda architecture: _case(architecture, "int8", 0), ("int8",)),
    "gemm-int8-rank32": Case(lambda architecture: _case(architecture, "int8", 32), ("int8", "float")),
    "gemm-fp8": Case(lambda architecture: _case(architecture, "fp8", 0), ("fp8",)),
    "gemm-fp8-rank32": Case(lambda architecture: _case(architecture, "fp8", 32), ("fp8", "float")),
}
