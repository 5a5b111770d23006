"""Root-mean-square normalisation of rows with a weight, as the queries and keys of a head are normalised.

    y = x / sqrt(mean(x^2) + eps) * weight

with the mean over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467).
"""

from __future__ import annotations

import torch

from kernels.dispatch import Mode
from kernels.errors import KernelError
from kernels.language import jit, tl
from kernels.launch import Argument, Launch
from kernels.machine_code import Case
from kernels.quantize import kernel_architecture, load_rows, load_vector, row_launch, row_sum, store_rows


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, mode: Mode | None = None) -> torch.Tensor:
    """Normalise.

    Args:
        x: (..., channels).
        weight: (channels,).
        eps: added to the mean square.
        mode: see `kernels.dispatch.choose`.

    Returns:
        (..., channels) in the type of x.

    Raises:
        KernelError: the weight is of another size, or the kernel was asked for and cannot run.
    """
    if weight.shape != x.shape[-1:]:
        raise KernelError(f"the weight must be {tuple(x.shape[-1:])} as the channels are, not {tuple(weight.shape)}")
    architecture = kernel_architecture("rms_norm", x, None, mode, weight)
    if architecture is None:
        return rms_norm_reference(x, weight, eps).to(x.dtype)
    out = torch.empty_like(x)
    _launch(x, weight, eps, out, architecture).run()
    return out


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition, in float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()


@jit
def _rms_norm(
    x: tl.tensor,
    weight: tl.tensor,
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
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, rest = load_rows(x, row, rows, channels, channels, HEAD, REST)
    inverse = (1.0 / tl.sqrt(row_sum(head * head, rest * rest, REST) / channels + eps))[:, None]
    factor, more = load_vector(weight, channels, HEAD, REST)
    head, rest = head * inverse * factor, rest * inverse * more
    store_rows(head, rest, out, out_scale, row, rows, channels, LIMIT, HEAD, REST)


def _launch(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, architecture: str) -> Launch:
    arguments: dict[str, Argument] = {"x": x, "weight": weight, "eps": eps}
    return row_launch(_rms_norm, arguments, out, None, None, architecture)


def _case(architecture: str, channels: int) -> Launch:
    x = torch.empty(2, 4096, 24, channels, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(channels, dtype=torch.bfloat16, device="meta")
    return _launch(x, weight, 1e-6, torch.empty_like(x), architecture)


CASES = {
    "rms-norm-bf16-64": Case(lambda architecture: _case(architecture, 64)),
    "rms-norm-bf16-128": Case(lambda architecture: _case(architecture, 128)),
}
