"""Rounds rows of channels to 8 bits with a scale each; operations that end so share the tiles and the rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from kernels.capability import INTERPRETER, Format
from kernels.dispatch import Mode, choose
from kernels.language import Kernel, ceiling, jit, tl
from kernels.launch import Argument, Configuration, Launch
from kernels.machine_code import Case

Kind = Literal["int8", "fp8"]
"""An 8-bit format: two's complement, or e4m3 (Micikevicius et al. 2022, arXiv 2209.05433)."""

DTYPES: dict[Kind, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

LIMITS: dict[Kind, float] = {"int8": 127.0, "fp8": 448.0}
"""The largest magnitude of a code; -128 is left out, so that codes are symmetric."""

NEEDS: dict[Kind | None, tuple[Format, ...]] = {"int8": (), "fp8": ("fp8",), None: ()}
"""What an architecture must have to write codes: bytes need nothing, e4m3 its conversion."""

MOST_CHANNELS = 32768
"""A row is one program's; longer ones do not fit its registers."""

PER_WARP = 1024
"""Elements of a row that one warp takes."""

LEAST = 32
"""Channels of a second tile that are worth it."""

_MOST_WARPS = 16


class Quantized(NamedTuple):
    """Codes and their scale: `codes * scale` approximates the values.

    Attributes:
        codes: (..., channels) int8 or e4m3.
        scale: float32 (...,) one per row, or (1,).
    """

    codes: torch.Tensor
    scale: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """The values in float32, (..., channels)."""
        return self.codes.float() * self.scale[..., None]


def quantize(x: torch.Tensor, kind: Kind, *, mode: Mode | None = None) -> Quantized:
    """Round each row of x (..., channels) to 8 bits; see `quantize_reference`."""
    architecture = kernel_architecture("quantize", x, kind, mode)
    if architecture is None:
        return quantize_reference(x, kind)
    codes, scale = allocated(x, x.shape, kind)
    _launch(x, codes, scale, kind, architecture).run()
    return Quantized(codes, scale)


def quantize_reference(values: torch.Tensor, kind: Kind) -> Quantized:
    """Round rows (..., channels) to 8 bits, each by its largest magnitude; a row of zeros has the scale 1."""
    values = values.float()
    largest = values.abs().amax(dim=-1)
    scale = torch.where(largest > 0, largest / LIMITS[kind], 1.0)
    return Quantized(codes_reference(values, scale[..., None], kind), scale)


def codes_reference(values: torch.Tensor, scale: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The codes of float32 values, rounded to the nearest, ties to even; what is too large saturates."""
    scaled = (values * (1.0 / scale)).clamp(-LIMITS[kind], LIMITS[kind])
    return (scaled.round() if kind == "int8" else scaled).to(DTYPES[kind])


@jit
def scale_of(largest: tl.tensor, LIMIT: tl.constexpr) -> tl.tensor:
    """The scale of numbers of this largest magnitude."""
    return tl.where(largest > 0.0, largest / LIMIT, 1.0)


@jit
def codes(values: tl.tensor, inverse: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    """The codes of float32 values by the inverse of their scale, which keeps them within the limit.

    Adding 1.5 * 2^23 rounds to whole numbers, ties to even, and leaves the number in the low bits.
    """
    scaled = values * inverse
    if TYPE == tl.int8:
        return (scaled + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    return scaled.to(TYPE)


@jit
def load_part(
    x: tl.tensor, row: tl.tensor, in_rows: tl.tensor, width: tl.tensor, stride: tl.tensor, WIDTH: tl.constexpr
) -> tl.tensor:
    """One tile (rows, WIDTH) of `load_rows`."""
    column = tl.arange(0, WIDTH)
    inside = in_rows[:, None] & (column < width)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@jit
def load_rows(
    x: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    stride: tl.tensor,
    HEAD: tl.constexpr,
    REST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Rows as two tiles of float32, (rows, HEAD) and (rows, REST), zero outside of the channels.

    The widths of networks are often three or five times a power of two, which is what two powers of two add up to. The
    second tile is the number zero where REST is. `stride` elements lie between rows.
    """
    head = load_part(x, row, row < rows, channels, stride, HEAD)
    if REST > 0:
        rest = load_part(x + HEAD, row, row < rows, channels - HEAD, stride, REST)
    else:
        rest = 0.0
    return head, rest


@jit
def load_vector(
    x: tl.tensor, channels: tl.tensor, HEAD: tl.constexpr, REST: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Numbers that all rows share, as `load_rows` gives a single row."""
    return load_rows(x, tl.arange(0, 1), 1, channels, 0, HEAD, REST)


@jit
def row_sum(head: tl.tensor, rest: tl.tensor, REST: tl.constexpr) -> tl.tensor:
    """The sum over the channels of both tiles."""
    total = tl.sum(head, 1)
    if REST > 0:
        total += tl.sum(rest, 1)
    return total


@jit
def store_part(
    values: tl.tensor,
    inverse: tl.tensor,
    out: tl.tensor,
    row: tl.tensor,
    in_rows: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    CODED: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """One tile (rows, WIDTH) of `store_rows`."""
    column = tl.arange(0, WIDTH)
    inside = in_rows[:, None] & (column < width)[None, :]
    at = out + row.to(tl.int64)[:, None] * stride + column[None, :]
    if CODED:
        tl.store(at, codes(values, inverse[:, None], out.dtype.element_ty), mask=inside)
    else:
        tl.store(at, values.to(out.dtype.element_ty), mask=inside)


@jit
def store_rows(
    head: tl.tensor,
    rest: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    LIMIT: tl.constexpr,
    HEAD: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    """Store both tiles of rows, zero outside of the channels: as they are, or as codes if LIMIT > 0."""
    inverse = head
    if LIMIT > 0.0:
        largest = tl.max(tl.abs(head), 1)
        if REST > 0:
            largest = tl.maximum(largest, tl.max(tl.abs(rest), 1))
        scale = scale_of(largest, LIMIT)
        tl.store(out_scale + row, scale, mask=row < rows)
        inverse = 1.0 / scale
    store_part(head, inverse, out, row, row < rows, channels, channels, LIMIT > 0.0, HEAD)
    if REST > 0:
        store_part(rest, inverse, out + HEAD, row, row < rows, channels - HEAD, channels, LIMIT > 0.0, REST)


@jit
def _quantize(
    x: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, rest = load_rows(x, row, rows, channels, channels, HEAD, REST)
    store_rows(head, rest, out, out_scale, row, rows, channels, LIMIT, HEAD, REST)


def _launch(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, kind: Kind, architecture: str) -> Launch:
    return row_launch(_quantize, {"x": x}, codes, scale, kind, architecture)


def row_launch(
    kernel: Kernel,
    arguments: dict[str, Argument],
    out: torch.Tensor,
    scale: torch.Tensor | None,
    kind: Kind | None,
    architecture: str,
    samples: int = 1,
) -> Launch:
    """The launch of a kernel that ends with `store_rows`: whole rows per program, two 16-byte loads a thread.

    Args:
        kernel: takes `out`, `out_scale`, `rows`, `channels`, `LIMIT`, `ROWS`, `HEAD` and `REST` besides the
            arguments.
        arguments: of its own.
        out: (..., channels).
        scale: (...,) where the output is rounded.
        kind: likewise.
        architecture: to run on.
        samples: the second axis of the grid; `rows` are those of one sample, and no program takes rows of two.
    """
    channels = out.shape[-1]
    rows = out.numel() // channels // samples
    head, rest = widths(channels, architecture)
    block = 2 * head if rest else head
    together = 2 if architecture == INTERPRETER else max(1, 4 * PER_WARP // block)
    warps = min(_MOST_WARPS, max(1, together * block // PER_WARP))
    shared: dict[str, Argument] = {
        "out": out,
        "out_scale": scale,
        "rows": rows,
        "channels": channels,
        "LIMIT": 0.0 if kind is None else LIMITS[kind],
    }
    configuration = Configuration(warps=warps, blocks={"ROWS": together, "HEAD": head, "REST": rest})
    return Launch(kernel, (ceiling(rows, together), samples), {**arguments, **shared}, configuration)


def widths(channels: int, architecture: str) -> tuple[int, int]:
    """Widths of the two tiles of a row, powers of two: without padding if they add up to the channels, else with."""
    above = 1 << (channels - 1).bit_length()
    head, rest = above // 2, channels - above // 2
    least = 2 if architecture == INTERPRETER else LEAST
    return (head, rest) if rest.bit_count() == 1 and rest >= least and above != channels else (max(16, above), 0)


def kernel_architecture(
    operation: str, x: torch.Tensor, kind: Kind | None, mode: Mode | None, *others: torch.Tensor
) -> str | None:
    """The architecture whose kernel a row operation runs; None where plain torch does.

    Args:
        operation: its name.
        x: (..., channels) the main input; it and the `others` must lie in memory row after row.
        kind: of the output.
        mode: see `kernels.dispatch.choose`.
        others: further inputs.
    """
    unfit = None
    if not all(tensor.is_contiguous() for tensor in (x, *others)):
        unfit = "an input is not contiguous"
    if x.shape[-1] > MOST_CHANNELS:
        unfit = f"rows of {x.shape[-1]} channels are longer than {MOST_CHANNELS}"
    choice = choose(operation, x.device, x.dtype, x.shape, needs=NEEDS[kind], unfit=unfit, mode=mode)
    return choice.architecture if choice.implementation == "triton" else None


def allocated(like: torch.Tensor, shape: Sequence[int], kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for codes (..., channels) and the scales of their rows (...,)."""
    codes = torch.empty(shape, dtype=DTYPES[kind], device=like.device)
    return codes, torch.empty(shape[:-1], dtype=torch.float32, device=like.device)


def _case(architecture: str, kind: Kind) -> Launch:
    x = torch.empty(2, 4096, 1280, dtype=torch.bfloat16, device="meta")
    return _launch(x, *allocated(x, x.shape, kind), kind, architecture)


CASES = {
    "quantize-bf16-int8": Case(lambda architecture: _case(architecture, "int8")),
    "quantize-bf16-fp8": Case(lambda architecture: _case(architecture, "fp8"), needs=("fp8",)),
}
