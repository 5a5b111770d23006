"""Rounds activations to 8 bits and multiplies them by the first factor of a low-rank branch, in one pass over them.

The codes go into `gemm_w8a8` and the projection into its low-rank branch (SVDQuant, Li et al. 2024, arXiv 2411.05007).
"""

from __future__ import annotations

import torch

from kernels.capability import INTERPRETER
from kernels.dispatch import Mode, choose
from kernels.language import ceiling, jit, tl
from kernels.launch import Argument, Configuration, Launch, configuration_for
from kernels.machine_code import Case
from kernels.quantize import LIMITS, NEEDS, Kind, Quantized, allocated, codes, quantize_reference

MOST_RANK = 128

_TALL = Configuration(warps=4, stages=3, blocks={"ROWS": 64, "BLOCK": 128})

CONFIGURATIONS = {
    "default": Configuration(warps=4, stages=3, blocks={"ROWS": 32, "BLOCK": 128}),
    "sm_90": _TALL,  # their tensor cores multiply 64 rows at least
    "sm_100": _TALL,
    INTERPRETER: Configuration(warps=4, blocks={"ROWS": 16, "BLOCK": 32}),
}


def quantize_projected(
    x: torch.Tensor, down: torch.Tensor, kind: Kind, *, mode: Mode | None = None
) -> tuple[Quantized, torch.Tensor]:
    """Round and project.

    Args:
        x: (..., channels) in 16 bits.
        down: (rank, channels) the first factor, in the type of x.
        kind: of the codes.
        mode: see `kernels.dispatch.choose`.

    Returns:
        The codes of x with a scale per row, and the projection (..., rank) in the type of x.
    """
    unfit = None
    if not (x.is_contiguous() and down.is_contiguous()):
        unfit = "an input is not contiguous"
    elif x.dtype != down.dtype or x.dtype.itemsize != 2 or len(down) > MOST_RANK:
        unfit = f"the inputs are not of one 16-bit type and a rank up to {MOST_RANK}"
    choice = choose("quantize_projected", x.device, x.dtype, x.shape, needs=NEEDS[kind], unfit=unfit, mode=mode)
    if choice.implementation == "reference":
        return quantize_projected_reference(x, down, kind)
    quantized = Quantized(*allocated(x, x.shape, kind))
    projected = torch.empty(*x.shape[:-1], len(down), dtype=x.dtype, device=x.device)
    _launch(x, down, quantized, projected, kind, choice.architecture).run()
    return quantized, projected


def quantize_projected_reference(x: torch.Tensor, down: torch.Tensor, kind: Kind) -> tuple[Quantized, torch.Tensor]:
    """The definition; sums are taken in float32."""
    return quantize_reference(x, kind), (x.float() @ down.float().T).to(x.dtype)


@jit
def _quantize_projected(
    x: tl.tensor,
    down: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    projected: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    rank: tl.tensor,
    LIMIT: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The rows are read twice, the second time from the cache."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, r = tl.arange(0, BLOCK), tl.arange(0, RANK)
    in_rows = (row < rows)[:, None]
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    largest = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, RANK], tl.float32)
    for first in range(0, channels, BLOCK):
        inside = column < channels - first
        values = tl.load(x + at + first, mask=in_rows & inside[None, :], other=0.0)
        factor = tl.load(
            down + r[None, :] * channels + first + column[:, None],
            mask=(r < rank)[None, :] & inside[:, None],
            other=0.0,
        )
        total = tl.dot(values, factor, total)
        largest = tl.maximum(largest, tl.max(tl.abs(values.to(tl.float32)), 1))
    scale = tl.where(largest > 0.0, largest / LIMIT, 1.0)
    tl.store(out_scale + row, scale, mask=row < rows)
    to = projected + row.to(tl.int64)[:, None] * rank + r[None, :]
    tl.store(to, total.to(projected.dtype.element_ty), mask=in_rows & (r < rank)[None, :])
    for first in range(0, channels, BLOCK):
        inside = in_rows & (column < channels - first)[None, :]
        values = tl.load(x + at + first, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at + first, codes(values, (1.0 / scale)[:, None], out.dtype.element_ty), mask=inside)


def _launch(
    x: torch.Tensor,
    down: torch.Tensor,
    quantized: Quantized,
    projected: torch.Tensor,
    kind: Kind,
    architecture: str,
) -> Launch:
    configuration = configuration_for(CONFIGURATIONS, architecture)
    rank, channels = down.shape
    rows = x.numel() // channels
    arguments: dict[str, Argument] = {
        "x": x,
        "down": down,
        "out": quantized.codes,
        "out_scale": quantized.scale,
        "projected": projected,
        "rows": rows,
        "channels": channels,
        "rank": rank,
        "LIMIT": LIMITS[kind],
        "RANK": max(16, 1 << (rank - 1).bit_length()),
    }
    return Launch(_quantize_projected, (ceiling(rows, configuration.blocks["ROWS"]),), arguments, configuration)


def _case(architecture: str, kind: Kind) -> Launch:
    x = torch.empty(8192, 3072, dtype=torch.bfloat16, device="meta")
    down = torch.empty(32, 3072, dtype=torch.bfloat16, device="meta")
    projected = torch.empty(8192, 32, dtype=torch.bfloat16, device="meta")
    return _launch(x, down, Quantized(*allocated(x, x.shape, kind)), projected, kind, architecture)


CASES = {
    "quantize-rank32-bf16-int8": Case(lambda architecture: _case(architecture, "int8"), ("float",)),
    "quantize-rank32-bf16-fp8": Case(lambda architecture: _case(architecture, "fp8"), ("float",), needs=("fp8",)),
}
