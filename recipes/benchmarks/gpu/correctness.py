"""Every operation against float64 on odd shapes, before any time is taken; memory is NaN before it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from kernels.adaln import adaln, adaln_quantized
from kernels.attention import attention
from kernels.attention_fp8 import attention_fp8
from kernels.attention_int8 import attention_int8
from kernels.attention_two_segments import attention_two_segments
from kernels.cross_attention import cross_attention
from kernels.denoise_step import begin, denoise_step
from kernels.dispatch import Mode
from kernels.gated_residual import gated_residual
from kernels.gelu import gelu, gelu_quantized
from kernels.gemm_w4a16 import Int4Weights, gemm_w4a16
from kernels.gemm_w8a8 import LowRank, gemm_w8a8
from kernels.group_norm_silu import GroupNorm, group_norm_silu, group_norm_silu_quantized
from kernels.linear_attention import linear_attention
from kernels.packing import pack_int4
from kernels.quantize import Quantized, quantize
from kernels.quantize_projected import quantize_projected
from kernels.step_table import step_table
from recipes.benchmarks.gpu.bench import Bench, Row, relative_error

Check = tuple[str, Callable[[], Any], torch.Tensor, float]
"""Name, call, truth in float64, and the relative error that is allowed."""

BF16, INT8, FP8 = 5e-3, 1.5e-2, 4e-2  # of results in 16 bits; of rounding to 8 bits


class Poisoned(TorchFunctionMode):
    """Fills what `torch.empty` and its kin allocate with NaN."""

    _MAKERS = (torch.empty, torch.empty_like, torch.Tensor.new_empty)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call, and poison."""
        made = func(*args, **(kwargs or {}))
        if func in self._MAKERS and made.is_contiguous() and made.device.type != "meta":
            made.view(torch.uint8).fill_(0xFF) if made.numel() and made.dim() else None
        return made


def run(bench: Bench) -> Iterator[Row]:
    """One row per check; a kernel that fails is a row too."""
    for make in (_rows, _products, _heads, _step):
        for name, call, truth, allowed in make(bench):
            row: Row = {"check": name, "allowed": allowed}
            try:
                with Poisoned(), torch.no_grad():
                    row["error"] = relative_error(_values(call()), truth)
                row["passed"] = row["error"] <= allowed
            except Exception as error:
                row |= {"passed": False, "reason": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
            yield row


def _values(result: Any) -> torch.Tensor:
    return result.dequantized() if isinstance(result, Quantized) else result


def _rows(bench: Bench) -> Iterator[Check]:
    x, y = bench.randn(2, 37, 136), bench.randn(2, 37, 136, seed=1)
    shift, scale = bench.randn(2, 136, seed=2), bench.randn(2, 136, seed=3)
    wide, half = x.double(), x.double().chunk(2, dim=-1)
    modulated = functional.layer_norm(wide, (136,), eps=1e-6) * (1 + scale.double()[:, None]) + shift.double()[:, None]
    yield "quantize int8", lambda: quantize(x, "int8"), wide, INT8
    yield "quantize fp8", lambda: quantize(x, "fp8"), wide, FP8
    yield "adaln", lambda: adaln(x, shift, scale), modulated, BF16
    yield "adaln int8", lambda: adaln_quantized(x, shift, scale, "int8"), modulated, INT8
    yield "adaln fp8", lambda: adaln_quantized(x, shift, scale, "fp8"), modulated, FP8
    yield "gated_residual", lambda: gated_residual(x, scale, y), wide + scale.double()[:, None] * y.double(), BF16
    yield "gelu", lambda: gelu(x, tanh=True), functional.gelu(wide, approximate="tanh"), BF16
    yield "geglu", lambda: gelu(x, gated=True), half[0] * functional.gelu(half[1]), BF16
    yield "geglu fp8", lambda: gelu_quantized(x, "fp8", gated=True), half[0] * functional.gelu(half[1]), FP8
    norm = GroupNorm(bench.randn(48, seed=4), bench.randn(48, seed=5), 8)
    one = torch.full((1,), 0.05, device=bench.device)
    for layout in (torch.contiguous_format, torch.channels_last):
        pixels = bench.randn(2, 48, 13, 11, seed=6).contiguous(memory_format=layout)
        normed = functional.group_norm(pixels.double(), 8, norm.weight.double(), norm.bias.double(), norm.eps)
        truth, name = functional.silu(normed), "" if layout == torch.contiguous_format else " channels last"
        yield f"group_norm_silu{name}", lambda p=pixels: group_norm_silu(p, norm), truth, BF16
        coded = lambda p=pixels: group_norm_silu_quantized(p, norm, one, "int8").float() * one  # noqa: E731
        yield f"group_norm_silu int8{name}", coded, truth.clamp(-127 * 0.05, 127 * 0.05), 2 * INT8


def _products(bench: Bench) -> Iterator[Check]:
    x, weight, bias = bench.randn(37, 160), bench.randn(96, 160, seed=1), bench.randn(96, seed=2)
    down, up = bench.randn(16, 160, seed=3), bench.randn(96, 16, seed=4)
    for kind in ("int8", "fp8"):
        a, b = (Quantized(*quantize(value, kind)) for value in (x, weight))
        exact = a.dequantized().double() @ b.dequantized().double().T + bias.double()
        yield f"gemm_{kind}", lambda a=a, b=b: gemm_w8a8(a, b, bias), exact, BF16
        codes, projected = quantize_projected(x, down, kind)
        branch = exact + projected.double() @ up.double().T
        low_rank = LowRank(projected, up)
        call = lambda a=codes, b=b, branch=low_rank: gemm_w8a8(a, b, bias, branch)  # noqa: E731
        yield f"gemm_{kind} with a low-rank branch", call, branch, BF16
        yield f"quantize_projected {kind}", lambda p=projected: p, x.double() @ down.double().T, BF16
    codes = torch.randint(-8, 8, (96, 256), device=bench.device)
    packed = Int4Weights(pack_int4(codes, 64), bench.randn(96, 4, seed=5).abs())
    wide = codes.double() * packed.scale.double().repeat_interleave(64, dim=1)
    for rows in (3, 70):
        given = bench.randn(rows, 256, seed=6)
        exact = given.double() @ wide.T + bias.double()
        yield f"gemm_w4a16, {rows} rows", lambda g=given: gemm_w4a16(g, packed, bias), exact, BF16


def _heads(bench: Bench) -> Iterator[Check]:
    for channels in (40, 64, 128):
        q, k, v = (bench.randn(2, 3, tokens, channels, seed=s) for s, tokens in enumerate((133, 150, 150)))
        exact = functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
        yield f"attention {channels}", lambda q=q, k=k, v=v: attention(q, k, v), exact, BF16
        mode: Mode | None = "triton" if q.is_cuda else None
        in_int8 = lambda q=q, k=k, v=v, mode=mode: attention_int8(q, k, v, mode=mode)  # noqa: E731
        in_fp8 = lambda q=q, k=k, v=v, mode=mode: attention_fp8(q, k, v, mode=mode)  # noqa: E731
        yield f"attention_int8 {channels}", in_int8, exact, 3 * INT8
        yield f"attention_fp8 {channels}", in_fp8, exact, 2 * FP8
        few = slice(0, 77)
        short = functional.scaled_dot_product_attention(q.double(), k[:, :, few].double(), v[:, :, few].double())
        call = lambda q=q, k=k[:, :, few], v=v[:, :, few]: cross_attention(q, k, v)  # noqa: E731
        yield f"cross_attention {channels}", call, short, BF16
        parts = (q, k[:, :, :90], v[:, :, :90], k[:, :, 90:], v[:, :, 90:])
        yield f"attention_two_segments {channels}", lambda parts=parts: attention_two_segments(*parts), exact, BF16
    q, k, v = (bench.randn(2, 3, 150, 32, seed=s) for s in range(3))
    left, right = q.double().relu(), k.double().relu()
    exact = left @ (right.mT @ v.double()) / (left @ right.sum(2)[..., None] + 1e-15)
    yield "linear_attention", lambda: linear_attention(q, k, v), exact, 2 * BF16


def _step(bench: Bench) -> Iterator[Check]:
    rows, shape = 6, (2, 4, 13, 11)
    numbers = np.random.default_rng(0)
    x, m = (np.tril(numbers.normal(size=(rows, 3)), 0) / 2 for _ in range(2))
    scale, noise = np.full(rows, 4.0), np.where(np.arange(rows) % 2, 0.1, 0.0)
    table = step_table(x, m, noise, np.arange(rows, dtype=float), np.ones(rows), scale)
    first, draws = bench.randn(*shape, dtype=torch.float32), bench.randn(table.draws, *shape, dtype=torch.float32)
    outputs = bench.randn(rows, 2 * shape[0], *shape[1:], dtype=torch.float32, seed=1)

    def call() -> torch.Tensor:
        state = begin(table, first, draws)
        for output in outputs:
            denoise_step(state, output)
        return state.latent(rows).clone()

    latents, guided, drawn = [first.double()], [], 0
    for row in range(rows):
        uncond, cond = outputs[row].double().chunk(2)
        guided.append(uncond + 4.0 * (cond - uncond))
        total = sum(float(np.float32(x[row, lag])) * latents[row - lag] for lag in range(min(row + 1, 3)))
        total = total + sum(float(np.float32(m[row, lag])) * guided[row - lag] for lag in range(min(row + 1, 3)))
        if noise[row]:
            total, drawn = total + float(np.float32(noise[row])) * draws[drawn].double(), drawn + 1
        latents.append(total)
    yield "denoise_step", call, latents[-1], 1e-6
