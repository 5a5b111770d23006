"""Attention in 16 and 8 bits against every back end of torch's own, quantization included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention import attention
from kernels.attention_fp8 import attention_fp8
from kernels.attention_int8 import attention_int8
from kernels.attention_two_segments import attention_two_segments
from kernels.cross_attention import cross_attention
from kernels.dispatch import Mode
from kernels.linear_attention import linear_attention
from recipes.benchmarks.gpu.bench import Bar, Bench, Row, judged
from recipes.benchmarks.gpu.shapes import SEQUENCES, TEXT, TINY_SEQUENCES, Tokens

BACKENDS = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
EIGHT_BITS = Bar(1.3, "best of torch")
_LONG, _WIDE = 4096, 128  # tokens and channels from which 8-bit attention is promised to be faster


def run(bench: Bench) -> Iterator[Row]:
    """Longest first: that is where 8 bits pay."""
    for shape in reversed(TINY_SEQUENCES if bench.tiny else SEQUENCES):
        yield from _own(bench, shape)
        yield from _others(bench, shape)


def _own(bench: Bench, shape: Tokens) -> Iterator[Row]:
    q, k, v = _tensors(bench, shape, shape.tokens)
    truth = functional.scaled_dot_product_attention(q.float(), k.float(), v.float()) if shape.tokens <= _LONG else None
    promised = shape.tokens >= _LONG and shape.head >= _WIDE
    mode: Mode | None = "triton" if q.is_cuda else None
    ours: dict[str, Callable[[], Any]] = {
        "ours int8": lambda: attention_int8(q, k, v, mode=mode),
        "ours fp8": lambda: attention_fp8(q, k, v, mode=mode),
        "ours": lambda: attention(q, k, v),
        "ours, the kernel": lambda: attention(q, k, v, mode=mode),
    }
    contestants = {**ours, **_peers(q, k, v)}
    row = bench.contest("attention", shape.model, _said(shape), contestants, **_cost(shape, shape.tokens), truth=truth)
    if promised and "best_peer" in row:
        best = row["ms"][row["best_peer"]]
        row["bars"] = {
            name: judged({**row, "ms": {"ours": row["ms"].get(name, math.inf), "best of torch": best}}, EIGHT_BITS)
            for name in ("ours int8", "ours fp8")
        }
    yield row


def _others(bench: Bench, shape: Tokens) -> Iterator[Row]:
    q, k, v = _tensors(bench, shape, TEXT)
    contestants = {"ours": lambda: cross_attention(q, k, v), **_peers(q, k, v)}
    yield bench.contest("cross_attention", shape.model, _said(shape), contestants, **_cost(shape, TEXT))
    q, k, v = _tensors(bench, shape, shape.tokens)
    fresh = slice(0, shape.tokens // 4)
    parts = [tensor[:, :, fresh].contiguous() for tensor in (q, k, v)]
    visible = torch.arange(shape.tokens, device=bench.device).expand(shape.batch, -1) >= shape.tokens // 4

    def joined() -> Tensor:
        keys, values = torch.cat([k, parts[1]], dim=2), torch.cat([v, parts[2]], dim=2)
        seen = functional.pad(visible, (0, parts[1].shape[2]), value=True)[:, None, None]
        return functional.scaled_dot_product_attention(parts[0], keys, values, attn_mask=seen)

    contestants = {
        "ours": lambda: attention_two_segments(parts[0], k, v, parts[1], parts[2], cached_visible=visible),
        "joined": joined,
    }
    cost = _cost(shape, shape.tokens + shape.tokens // 4)
    cost = {**cost, "flops": cost["flops"] / 4}
    yield bench.contest("attention_two_segments", shape.model, _said(shape), contestants, **cost)

    def plain() -> Tensor:
        left, right = q.relu(), k.relu()
        return left @ (right.mT @ v) / (left @ right.sum(2)[..., None] + 1e-15)

    contestants = {"ours": lambda: linear_attention(q, k, v), "eager": plain}
    cost = {"moved": 8.0 * q.numel(), "flops": 4.0 * q.numel() * shape.head}
    yield bench.contest("linear_attention", shape.model, _said(shape), contestants, **cost)


def _tensors(bench: Bench, shape: Tokens, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = shape.channels // shape.head

    def one(tokens: int, seed: int) -> Tensor:
        return bench.randn(shape.batch, tokens, heads, shape.head, seed=seed).transpose(1, 2)

    return one(shape.tokens, 0), one(keys, 1), one(keys, 2)


def _peers(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Any]]:
    if not q.is_cuda:
        return {"sdpa": lambda: functional.scaled_dot_product_attention(q, k, v)}

    def by(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(q, k, v)

    return {name: lambda backend=backend: by(backend) for name, backend in BACKENDS.items()}


def _cost(shape: Tokens, keys: int) -> dict[str, float]:
    width = shape.batch * shape.channels
    return {"moved": 4.0 * width * (shape.tokens + keys), "flops": 4.0 * width * shape.tokens * keys}


def _said(shape: Tokens) -> str:
    return f"{shape.batch} x {shape.channels // shape.head} x {shape.tokens} x {shape.head}"
