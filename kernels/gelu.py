"""GELU and GEGLU between the two products of a feed-forward layer, in the network's type or rounded to 8 bits.

GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415) with the error function, or its approximation by tanh; GEGLU (Shazeer
2020, arXiv 2002.05202) is `value * gelu(gate)` with the value in the first half of the channels, as in diffusers.
"""

from __future__ import annotations

import torch

from kernels.dispatch import Mode
from kernels.language import jit, tl
from kernels.launch import Argument, Launch
from kernels.machine_code import Case
from kernels.quantize import (
    Kind,
    Quantized,
    allocated,
    kernel_architecture,
    load_rows,
    quantize_reference,
    row_launch,
    store_rows,
)


def gelu(x: torch.Tensor, *, gated: bool = False, tanh: bool = False, mode: Mode | None = None) -> torch.Tensor:
    """Activate.

    Args:
        x: (..., channels), or (..., 2 * channels) if gated: the values, then their gates.
        gated: GEGLU.
        tanh: whether GELU is approximated by `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
        mode: see `kernels.dispatch.choose`.

    Returns:
        (..., channels) in the type of x.
    """
    architecture = kernel_architecture("gelu", x, None, mode)
    if architecture is None:
        return gelu_reference(x, gated, tanh).to(x.dtype)
    out = torch.empty(_shape(x, gated), dtype=x.dtype, device=x.device)
    _launch(x, gated, tanh, out, None, None, architecture).run()
    return out


def gelu_quantized(
    x: torch.Tensor, kind: Kind, *, gated: bool = False, tanh: bool = False, mode: Mode | None = None
) -> Quantized:
    """The same as `gelu`, rounded to 8 bits with a scale per row (...,)."""
    architecture = kernel_architecture("gelu", x, kind, mode)
    if architecture is None:
        return quantize_reference(gelu_reference(x, gated, tanh), kind)
    out = Quantized(*allocated(x, _shape(x, gated), kind))
    _launch(x, gated, tanh, *out, kind, architecture).run()
    return out


def gelu_reference(x: torch.Tensor, gated: bool, tanh: bool) -> torch.Tensor:
    """The definition, in float32."""
    value, gate = x.float().chunk(2, dim=-1) if gated else (1.0, x.float())
    return value * torch.nn.functional.gelu(gate, approximate="tanh" if tanh else "none")


@jit
def activated(gate: tl.tensor, TANH: tl.constexpr) -> tl.tensor:
    """GELU of float32 numbers."""
    if TANH:
        # 0.5 (1 + tanh(z)) is the logistic function of 2 z.
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    # The smaller tail of the normal distribution: Abramowitz and Stegun 1964, 7.1.26, right to 1.5e-7.
    magnitude = tl.abs(gate)
    t = 1.0 / (1.0 + 0.23164190198 * magnitude)
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    tail *= tl.exp2(-0.7213475204444817 * gate * gate)
    return gate * tl.where(gate > 0.0, 1.0 - tail, tail)


@jit
def _gelu(
    x: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    GATED: tl.constexpr,
    TANH: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    width = channels * (2 if GATED else 1)
    head, rest = load_rows(x + width - channels, row, rows, channels, width, HEAD, REST)
    head, rest = activated(head, TANH), activated(rest, TANH)
    if GATED:
        value, rest_of_value = load_rows(x, row, rows, channels, width, HEAD, REST)
        head, rest = head * value, rest * rest_of_value
    store_rows(head, rest, out, out_scale, row, rows, channels, LIMIT, HEAD, REST)


def _shape(x: torch.Tensor, gated: bool) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // (2 if gated else 1))


def _launch(
    x: torch.Tensor,
    gated: bool,
    tanh: bool,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    kind: Kind | None,
    architecture: str,
) -> Launch:
    arguments: dict[str, Argument] = {"x": x, "GATED": gated, "TANH": tanh}
    return row_launch(_gelu, arguments, out, out_scale, kind, architecture)


def _case(architecture: str, channels: int, gated: bool, kind: Kind | None) -> Launch:
    x = torch.empty(2, 4096, channels * (2 if gated else 1), dtype=torch.bfloat16, device="meta")
    shape = _shape(x, gated)
    out, out_scale = (torch.empty(shape, dtype=x.dtype, device="meta"), None)
    if kind is not None:
        out, out_scale = allocated(x, shape, kind)
    return _launch(x, gated, not gated, out, out_scale, kind, architecture)


CASES = {
    "gelu-tanh-bf16-12288-int8": Case(lambda architecture: _case(architecture, 12288, False, "int8")),
    "geglu-bf16-5120": Case(lambda architecture: _case(architecture, 5120, True, None)),
    "geglu-bf16-5120-int8": Case(lambda architecture: _case(architecture, 5120, True, "int8")),
    "geglu-bf16-5120-fp8": Case(lambda architecture: _case(architecture, 5120, True, "fp8"), needs=("fp8",)),
}
