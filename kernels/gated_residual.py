"""Gated residual: x + gate * y, with one gate per sample and channel, as the blocks of diffusion transformers end."""

from __future__ import annotations

import torch

from kernels.dispatch import Mode
from kernels.errors import KernelError
from kernels.language import jit, tl
from kernels.launch import Argument, Launch
from kernels.machine_code import Case
from kernels.modulation import check_modulation
from kernels.quantize import kernel_architecture, load_rows, load_vector, row_launch, store_rows


def gated_residual(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, *, mode: Mode | None = None) -> torch.Tensor:
    """Add a gated branch (adaLN-zero of Peebles and Xie 2022, arXiv 2212.09748).

    Args:
        x: (batch, tokens, channels).
        gate: (batch, channels); its rows may lie apart, as those of a chunk do.
        y: as x.
        mode: see `kernels.dispatch.choose`.

    Returns:
        (batch, tokens, channels) in the type of x.

    Raises:
        KernelError: a shape is another, or the kernel was asked for and cannot run.
    """
    check_modulation(x, gate=gate)
    if x.shape != y.shape:
        raise KernelError(f"what is added must be {tuple(x.shape)} as the tokens are, not {tuple(y.shape)}")
    architecture = kernel_architecture("gated_residual", x, None, mode, y, gate[0])
    if architecture is None:
        return gated_residual_reference(x, gate, y)
    out = torch.empty_like(x)
    _launch(x, gate, y, out, architecture).run()
    return out


def gated_residual_reference(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The definition; the sum is taken in float32."""
    return (x.float() + gate.float()[:, None] * y.float()).to(x.dtype)


@jit
def _gated_residual(
    x: tl.tensor,
    gate: tl.tensor,
    y: tl.tensor,
    gate_stride: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    sample = tl.program_id(1)
    before = sample.to(tl.int64) * rows * channels
    x, y, out = x + before, y + before, out + before
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, rest = load_rows(x, row, rows, channels, channels, HEAD, REST)
    branch, rest_of_branch = load_rows(y, row, rows, channels, channels, HEAD, REST)
    factor, more = load_vector(gate + sample.to(tl.int64) * gate_stride, channels, HEAD, REST)
    head, rest = head + branch * factor, rest + rest_of_branch * more
    store_rows(head, rest, out, out_scale, row, rows, channels, LIMIT, HEAD, REST)


def _launch(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, out: torch.Tensor, architecture: str) -> Launch:
    arguments: dict[str, Argument] = {
        "x": x,
        "gate": gate,
        "y": y,
        "gate_stride": gate.stride(0),
    }
    return row_launch(_gated_residual, arguments, out, None, None, architecture, len(x))


def _case(architecture: str) -> Launch:
    x, y = (torch.empty(2, 4096, 1536, dtype=torch.bfloat16, device="meta") for _ in range(2))
    gate = torch.empty(2, 6 * 1536, dtype=torch.bfloat16, device="meta").chunk(6, dim=1)[2]
    return _launch(x, gate, y, torch.empty_like(x), architecture)


CASES = {"gated-residual-bf16-1536": Case(_case)}
