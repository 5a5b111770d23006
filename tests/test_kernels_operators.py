"""The operators `torch.ops.latent.*`: what PyTorch asks of them, their values, and graphs that hold them whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.library import opcheck

from kernels import adaln, attention, gated_residual, gelu, gemm_w8a8, group_norm_silu, operators, quantize, rms_norm
from kernels.errors import KernelError


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads(tokens: int, seed: int) -> Tensor:
    """Queries, keys or values as projections leave them: (batch, tokens, heads, channels), seen as heads."""
    return randn(2, tokens, 3, 16, seed=seed).transpose(1, 2)


X = randn(3, 5, 24)
SHIFT, SCALE, GATE = randn(3, 3 * 24, seed=1).chunk(3, dim=1)
PICTURE, WEIGHT = randn(2, 8, 3, 5), (randn(8, seed=1), randn(8, seed=2))
SPLIT = randn(3, 11, 24)[:, 3:8]  # as a joint attention leaves the tokens of one stream
LAST = PICTURE.to(memory_format=torch.channels_last)
CODES, WEIGHTS = quantize.quantize(X, "int8"), quantize.quantize(randn(7, 24), "int8")
NORM = group_norm_silu.GroupNorm(*WEIGHT, 4, 1e-5)

CASES: dict[str, tuple[Any, tuple[Any, ...], Callable[[], Any]]] = {
    "attention": (
        operators.attention,
        (heads(5, 0), heads(7, 1), heads(7, 2)),
        lambda: attention.attention(heads(5, 0), heads(7, 1), heads(7, 2)),
    ),
    "attention, a bias": (
        operators.attention,
        (heads(5, 0), heads(7, 1), heads(7, 2), randn(2, 7), 0.3),
        lambda: attention.attention(heads(5, 0), heads(7, 1), heads(7, 2), key_bias=randn(2, 7), scale=0.3),
    ),
    "adaln": (operators.adaln, (X, SHIFT, SCALE, 0.1), lambda: adaln.adaln(X, SHIFT, SCALE, 0.1)),
    "adaln of a split": (operators.adaln, (SPLIT, SHIFT, SCALE), lambda: adaln.adaln(SPLIT, SHIFT, SCALE)),
    "gated residual": (
        operators.gated_residual,
        (X, GATE, SPLIT),
        lambda: gated_residual.gated_residual(X, GATE, SPLIT),
    ),
    "gated residual of a number": (
        operators.gated_residual,
        (X, GATE, X[0, 0, :1]),
        lambda: gated_residual.gated_residual(X, GATE, X[0, 0, :1].expand(3, 5, 24).contiguous()),
    ),
    "gelu": (operators.gelu, (SPLIT, False, True), lambda: gelu.gelu(SPLIT, tanh=True)),
    "geglu": (operators.gelu, (X, True), lambda: gelu.gelu(X, gated=True)),
    "group norm": (
        operators.group_norm_silu,
        (PICTURE, *WEIGHT, 4, 1e-5),
        lambda: group_norm_silu.group_norm_silu(PICTURE, NORM),
    ),
    "group norm, channels last": (
        operators.group_norm_silu,
        (LAST, *WEIGHT, 4, 1e-5),
        lambda: group_norm_silu.group_norm_silu(PICTURE, NORM),
    ),
    "group norm, neither": (
        operators.group_norm_silu,
        (PICTURE.mT, *WEIGHT, 4, 1e-5),
        lambda: group_norm_silu.group_norm_silu(PICTURE.mT, NORM),
    ),
    "rms norm": (operators.rms_norm, (SPLIT, X[0, 0], 0.1), lambda: rms_norm.rms_norm(SPLIT, X[0, 0], 0.1)),
    "rms norm of heads": (
        operators.rms_norm,
        (heads(5, 0), X[0, 0, :16], 0.1),
        lambda: rms_norm.rms_norm(heads(5, 0).contiguous(), X[0, 0, :16], 0.1),
    ),
    "quantize": (operators.quantize, (SPLIT, "int8"), lambda: quantize.quantize(SPLIT, "int8")),
    "quantize, fp8": (operators.quantize, (X, "fp8"), lambda: quantize.quantize(X, "fp8")),
    "gemm": (
        operators.gemm_w8a8,
        (*CODES, *WEIGHTS, randn(7), torch.bfloat16),
        lambda: gemm_w8a8.gemm_w8a8(CODES, WEIGHTS, randn(7)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operator_is_what_pytorch_asks_of_one(name: str) -> None:
    """Schema, fake and real outputs alike in shape, type and layout, and tracing with sizes that vary."""
    operator, given, _ = CASES[name]
    found = opcheck(operator, given)
    assert set(found) == {
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    }
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", CASES)
def test_an_operator_computes_what_the_function_does(name: str) -> None:
    operator, given, function = CASES[name]
    got, wanted = operator(*given), function()
    for one, other in zip(*((x,) if isinstance(x, Tensor) else tuple(x) for x in (got, wanted)), strict=True):
        assert one.dtype == other.dtype
        # A chunk of an input lies otherwise, so that torch may add in another order.
        torch.testing.assert_close(one.float(), other.float(), rtol=1e-5, atol=1e-5)


def test_an_operator_dispatches_as_the_function_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_KERNELS", "triton")
    for operator, given, _ in CASES.values():
        with pytest.raises(KernelError, match=r"the Triton kernel of \w+ cannot run"):
            operator(*given)


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(KernelError, match="8-bit formats are int8, fp8, not 'int4'"):
        operators.quantize(X, "int4")


def test_shapes_that_a_kernel_would_read_beyond_are_refused() -> None:
    for operator, given, reason in (
        (
            operators.adaln,
            (X, SHIFT[:1], SCALE),
            "the shift must be (3, 24) as the tokens are, not (1, 24)",
        ),
        (operators.adaln, (X[0], SHIFT, SCALE), "tokens must be (batch, tokens, channels), not (5, 24)"),
        (operators.gated_residual, (X, GATE[:, :8], X), "the gate must be (3, 24)"),
        (gated_residual.gated_residual, (X, GATE, X[:, :2]), "what is added must be (3, 5, 24)"),
        (operators.rms_norm, (X, X[0, 0, :8]), "the weight must be (24,)"),
    ):
        with pytest.raises(KernelError, match=re.escape(reason)):
            operator(*given)


class Block(nn.Module):
    """Every operator once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(value) for value in WEIGHT)

    def forward(self, picture: Tensor, modulation: Tensor) -> Tensor:
        hidden = operators.group_norm_silu(picture, self.weight, self.bias, 4)
        tokens = hidden.flatten(2).transpose(1, 2)
        shift, scale, gate = modulation.chunk(3, dim=1)
        modulated = operators.adaln(tokens, shift, scale)
        split = operators.rms_norm(modulated.unflatten(2, (2, 4)).transpose(1, 2), self.weight[:4])
        attended = operators.attention(split, split, split).transpose(1, 2).flatten(2)
        tokens = operators.gated_residual(tokens, gate, attended)
        rounded = operators.quantize(operators.gelu(torch.cat([tokens, tokens], dim=2), gated=True), "int8")
        weights = operators.quantize(self.weight[None].expand(8, 8), "int8")
        return operators.gemm_w8a8(*rounded, *weights, self.bias, torch.float32)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch uses what it deprecates itself
def test_exported_graphs_hold_the_operators_at_any_batch() -> None:
    block, sizes = Block().eval(), {0: Dim.DYNAMIC}
    inputs = {"picture": PICTURE, "modulation": randn(2, 24)}
    program = export(block, (), inputs, dynamic_shapes=dict.fromkeys(inputs, sizes), strict=False)
    for each in (program, program.run_decompositions()):
        called = {str(node.target) for node in each.graph.nodes if str(node.target).startswith("latent.")}
        assert called == {
            f"latent.{operator._opoverload._schema.name[8:]}.default" for operator, _, _ in CASES.values()
        }
        for batch in (2, 5):
            given = {"picture": randn(batch, 8, 3, 5), "modulation": randn(batch, 24, seed=4)}
            torch.testing.assert_close(each.module()(**given), block(**given))
