"""Adaptive layer normalisation: LayerNorm without parameters, times (1 + scale), plus shift, and rounded to 8 bits.

    y = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift

with mean and variance over the channels of each token (adaLN of Peebles and Xie 2022, arXiv 2212.09748).
"""

from __future__ import annotations

import torch

from kernels.dispatch import Mode
from kernels.language import jit, tl
from kernels.launch import Argument, Launch
from kernels.machine_code import Case
from kernels.modulation import check_modulation
from kernels.quantize import (
    Kind,
    Quantized,
    allocated,
    kernel_architecture,
    load_rows,
    load_vector,
    quantize_reference,
    row_launch,
    row_sum,
    store_rows,
)


def adaln(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6, *, mode: Mode | None = None
) -> torch.Tensor:
    """Normalise and modulate.

    Args:
        x: (batch, tokens, channels).
        shift: (batch, channels); its rows may lie apart, as those of a chunk do.
        scale: likewise.
        eps: added to the variance.
        mode: see `kernels.dispatch.choose`.

    Returns:
        (batch, tokens, channels) in the type of x.

    Raises:
        KernelError: a shape is another, or the kernel was asked for and cannot run.
    """
    check_modulation(x, shift=shift, scale=scale)
    architecture = kernel_architecture("adaln", x, None, mode, shift[0], scale[0])
    if architecture is None:
        return adaln_reference(x, shift, scale, eps).to(x.dtype)
    out = torch.empty_like(x)
    _launch(x, shift, scale, eps, out, None, None, architecture).run()
    return out


def adaln_quantized(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    kind: Kind,
    eps: float = 1e-6,
    *,
    mode: Mode | None = None,
) -> Quantized:
    """The same as `adaln`, rounded to 8 bits with a scale per token (batch, tokens)."""
    check_modulation(x, shift=shift, scale=scale)
    architecture = kernel_architecture("adaln", x, kind, mode, shift[0], scale[0])
    if architecture is None:
        return quantize_reference(adaln_reference(x, shift, scale, eps), kind)
    out = Quantized(*allocated(x, x.shape, kind))
    _launch(x, shift, scale, eps, *out, kind, architecture).run()
    return out


def adaln_reference(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition, in float32."""
    normalised = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return normalised * (1.0 + scale.float()[:, None]) + shift.float()[:, None]


@jit
def _adaln(
    x: tl.tensor,
    shift: tl.tensor,
    scale: tl.tensor,
    shift_stride: tl.tensor,
    scale_stride: tl.tensor,
    eps: tl.tensor,
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
    x += sample.to(tl.int64) * rows * channels
    out += sample.to(tl.int64) * rows * channels
    if LIMIT > 0.0:
        out_scale += sample * rows
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, rest = load_rows(x, row, rows, channels, channels, HEAD, REST)
    mean = (row_sum(head, rest, REST) / channels)[:, None]
    head = tl.where((tl.arange(0, HEAD) < channels)[None, :], head - mean, 0.0)
    rest = rest - mean
    inverse = (1.0 / tl.sqrt(row_sum(head * head, rest * rest, REST) / channels + eps))[:, None]
    factor, more_factor = load_vector(scale + sample.to(tl.int64) * scale_stride, channels, HEAD, REST)
    offset, more_offset = load_vector(shift + sample.to(tl.int64) * shift_stride, channels, HEAD, REST)
    head = head * inverse * (1.0 + factor) + offset
    rest = rest * inverse * (1.0 + more_factor) + more_offset
    store_rows(head, rest, out, out_scale, row, rows, channels, LIMIT, HEAD, REST)


def _launch(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    kind: Kind | None,
    architecture: str,
) -> Launch:
    arguments: dict[str, Argument] = {
        "x": x,
        "shift": shift,
        "scale": scale,
        "shift_stride": shift.stride(0),
        "scale_stride": scale.stride(0),
        "eps": eps,
    }
    return row_launch(_adaln, arguments, out, out_scale, kind, architecture, len(x))


def _case(architecture: str, channels: int, kind: Kind | None) -> Launch:
    x = torch.empty(2, 4096, channels, dtype=torch.bfloat16, device="meta")
    shift, scale, *_ = torch.empty(2, 6 * channels, dtype=torch.bfloat16, device="meta").chunk(6, dim=1)
    out, out_scale = (torch.empty_like(x), None) if kind is None else allocated(x, x.shape, kind)
    return _launch(x, shift, scale, 1e-6, out, out_scale, kind, architecture)


CASES = {
    "adaln-bf16-1152": Case(lambda architecture: _case(architecture, 1152, None)),
    "adaln-bf16-3072-int8": Case(lambda architecture: _case(architecture, 3072, "int8")),
    "adaln-bf16-3072-fp8": Case(lambda architecture: _case(architecture, 3072, "fp8"), needs=("fp8",)),
}
