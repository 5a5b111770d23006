"""Our operations as PyTorch operators, `torch.ops.latent.*`, so that graphs of `torch.export` hold them whole.

An operator runs what the plain function of the same name dispatches to: the kernel or the vendor's library on a GPU,
plain torch on a CPU. It takes inputs however they lie, and its output always lies as its fake says. None can be
differentiated: networks are trained and calibrated without them. Import this file before a graph that holds them is
loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op, register_fake

from kernels import adaln as adaln_rows
from kernels import attention as attention_heads
from kernels import gated_residual as gated_residual_rows
from kernels import gelu as gelu_rows
from kernels import gemm_w8a8 as gemm_rows
from kernels import group_norm_silu as group_norm_pixels
from kernels import quantize as quantize_rows
from kernels import rms_norm as rms_norm_rows
from kernels.errors import KernelError
from kernels.quantize import DTYPES, Kind, Quantized

NAMESPACE = "latent"


@custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """See `kernels.attention`; what is returned lies as (batch, queries, heads, channels), ready for a projection."""
    made = attention_heads.attention(query, key, value, key_bias=key_bias, scale=scale)
    return made.transpose(1, 2).contiguous().transpose(1, 2)


@register_fake(f"{NAMESPACE}::attention")
def _(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    batch, heads, queries, channels = query.shape
    return query.new_empty(batch, queries, heads, channels).transpose(1, 2)


@custom_op(f"{NAMESPACE}::adaln", mutates_args=())
def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """See `kernels.adaln`."""
    return adaln_rows.adaln(x.contiguous(), shift, scale, eps)


@register_fake(f"{NAMESPACE}::adaln")
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    return x.new_empty(x.shape)


@custom_op(f"{NAMESPACE}::gated_residual", mutates_args=())
def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """See `kernels.gated_residual`; what is added is broadcast, since caching gives one zero for what nobody reads."""
    return gated_residual_rows.gated_residual(x.contiguous(), gate, y.expand_as(x).contiguous())


@register_fake(f"{NAMESPACE}::gated_residual")
def _(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@custom_op(f"{NAMESPACE}::gelu", mutates_args=())
def gelu(x: Tensor, gated: bool = False, tanh: bool = False) -> Tensor:
    """See `kernels.gelu`."""
    return gelu_rows.gelu(x.contiguous(), gated=gated, tanh=tanh)


@register_fake(f"{NAMESPACE}::gelu")
def _(x: Tensor, gated: bool = False, tanh: bool = False) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2 if gated else x.shape[-1])


@custom_op(f"{NAMESPACE}::group_norm_silu", mutates_args=())
def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """See `kernels.group_norm_silu`; channels stay last in memory where they are."""
    norm = group_norm_pixels.GroupNorm(weight, bias, groups, eps)
    layout = _layout(x)
    return group_norm_pixels.group_norm_silu(x.contiguous(memory_format=layout), norm).contiguous(memory_format=layout)


@register_fake(f"{NAMESPACE}::group_norm_silu")
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    return torch.empty_like(x, memory_format=_layout(x))


def _layout(x: Tensor) -> torch.memory_format:
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


@custom_op(f"{NAMESPACE}::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """See `kernels.rms_norm`; heads stay where they lie as (batch, tokens, heads, channels) in memory."""
    if _heads(x):
        return rms_norm_rows.rms_norm(x.transpose(1, 2), weight, eps).transpose(1, 2)
    return rms_norm_rows.rms_norm(x.contiguous(), weight, eps)


@register_fake(f"{NAMESPACE}::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    if _heads(x):
        return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)
    return x.new_empty(x.shape)


def _heads(x: Tensor) -> bool:
    """Whether a tensor is (batch, heads, tokens, channels) seen in what a projection made."""
    return x.ndim == 4 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous()


@custom_op(f"{NAMESPACE}::quantize", mutates_args=())
def quantize(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """See `kernels.quantize`: codes and their scales; the kind is `int8` or `fp8`."""
    codes, scale = quantize_rows.quantize(x.contiguous(), _kind(kind))
    return codes, scale


@register_fake(f"{NAMESPACE}::quantize")
def _(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=DTYPES[_kind(kind)]), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _kind(name: str) -> Kind:
    for kind in DTYPES:
        if kind == name:
            return kind
    raise KernelError(f"the 8-bit formats are {', '.join(DTYPES)}, not {name!r}")


@custom_op(f"{NAMESPACE}::gemm_w8a8", mutates_args=())
def gemm_w8a8(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See `kernels.gemm_w8a8`; without a low-rank branch."""
    activations = Quantized(codes.contiguous(), scale.contiguous())
    return gemm_rows.gemm_w8a8(activations, Quantized(weight, weight_scale), bias, dtype=dtype)


@register_fake(f"{NAMESPACE}::gemm_w8a8")
def _(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], weight.shape[0], dtype=dtype)
