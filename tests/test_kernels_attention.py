"""Attention and cross-attention: kernels and references against float64, masks, layouts, and what is refused."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from kernels import attention, cross_attention, dispatch
from kernels.errors import KernelError
from tests.heads import BATCH, attention_in_float64, heads
from tests.interpreted import Interpreter, relative_error

BOUND = {"float16": 5e-4, "bfloat16": 4e-3}


def error(
    op: ModuleType,
    name: str,
    keys: int,
    channels: int,
    dtype: str,
    masks: str = "",
    layout: str = "heads",
    mode: str = "triton",
    scale: float | None = None,
) -> float:
    """The error of one call against float64.

    `masks` names what is given: `bias` (some of it -inf), `lengths`, `nothing` (the second sample sees no key).
    """
    query = heads(0, 35, channels, dtype, layout)
    key, value = heads(1, keys, channels, dtype, layout), heads(2, keys, channels, dtype, layout)
    bias, lengths, both = None, None, torch.zeros(BATCH, keys)
    if "bias" in masks:
        bias = 3 * torch.randn(BATCH, keys, generator=torch.Generator().manual_seed(3))
        bias[0, ::3] = -torch.inf
        both = both + bias
    if "lengths" in masks:
        lengths = torch.tensor([keys - 2, 0 if "nothing" in masks else 3])
        both = both.masked_fill(torch.arange(keys) >= lengths[:, None], -torch.inf)
    got = getattr(op, name)(query, key, value, key_bias=bias, key_lengths=lengths, scale=scale, mode=mode)
    return relative_error(got, attention_in_float64(query, key, value, both, scale))


CALLS: list[dict[str, Any]] = [
    {"keys": 21, "channels": 40, "dtype": "float16"},
    {"keys": 21, "channels": 64, "dtype": "bfloat16", "layout": "tokens"},
    {"keys": 32, "channels": 80, "dtype": "float16", "layout": "tokens", "scale": 0.3},
    {"keys": 19, "channels": 128, "dtype": "bfloat16", "masks": "bias"},
    {"keys": 21, "channels": 64, "dtype": "float16", "masks": "lengths", "layout": "tokens"},
    {"keys": 21, "channels": 16, "dtype": "float16", "masks": "bias lengths nothing"},
]


@pytest.mark.parametrize("operation", ["attention", "cross_attention"])
@pytest.mark.parametrize("call", CALLS)
def test_kernel_and_reference_agree_with_float64(
    interpreter: Interpreter, operation: str, call: dict[str, Any]
) -> None:
    assert interpreter.run(error, operation, name=operation, **call) <= BOUND[call["dtype"]]
    module = {"attention": attention, "cross_attention": cross_attention}[operation]
    assert error(module, name=operation, mode="reference", **call) <= BOUND[call["dtype"]]


def with_descriptors(op: ModuleType, keys: int, channels: int, dtype: str, bias: bool, layout: str) -> float:
    """The error of the form that reads and writes by tensor descriptors."""
    query = heads(0, 35, channels, dtype, layout)
    key, value = heads(1, keys, channels, dtype, layout), heads(2, keys, channels, dtype, layout)
    added = torch.randn(BATCH, keys, generator=torch.Generator().manual_seed(3)) if bias else None
    launch, output = op._prepare(query, key, value, added, None, None, "interpreter", descriptors=True)
    launch.run()
    return relative_error(output, attention_in_float64(query, key, value, added))


@pytest.mark.parametrize(
    "call",
    [
        {"keys": 21, "channels": 40, "dtype": "float16", "bias": False, "layout": "tokens"},
        {"keys": 32, "channels": 64, "dtype": "bfloat16", "bias": True, "layout": "heads"},
        {"keys": 21, "channels": 128, "dtype": "float16", "bias": True, "layout": "tokens"},
    ],
)
def test_tensor_descriptors_agree_with_float64(interpreter: Interpreter, call: dict[str, Any]) -> None:
    assert interpreter.run(with_descriptors, "attention", **call) <= BOUND[call["dtype"]]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("elif not WHOLE:", "elif False:"),
        ("tl.minimum(tl.load(lengths + batch), keys)", "keys"),
        ("bias += batch * keys", "bias += 0"),
        ("base_2(tl.load(bias", "(tl.load(bias"),
        ("base_2(scale),", "scale,"),
        ("accumulator * correction[:, None])", "accumulator)"),
        (
            "scores * factor + offset[None, :], 1.0\n        if weight",
            "scores + offset[None, :], factor\n        if weight",
        ),
        ('"WHOLE": keys % block_keys == 0 and key_lengths is None', '"WHOLE": True'),
        ("first, queries, CHANNELS", "first, queries + 1, CHANNELS"),
        ("head = tl.program_id(1) % heads", "head = tl.program_id(1) // heads"),
        ("        queries,\n", "        queries + 1,\n"),
    ],
)
def test_broken_attention_is_seen(interpreter: Interpreter, old: str, new: str) -> None:
    call = {"name": "attention", "keys": 21, "channels": 40, "dtype": "float16", "masks": "bias lengths"}
    assert interpreter.sees("attention", old, new, error, above=BOUND["float16"], **call)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('scores = tl.where(position[None, :] < tokens, scores, -float("inf"))', "scores += 0"),
        ("tl.minimum(tl.load(lengths + batch), keys)", "keys"),
        ("bias + batch * keys + position", "bias + position"),
        ("* base_2(scale)", "* scale"),
        ("tl.sum(weights, 1)", "tl.sum(weights, 1) + 1"),
        ("        queries,\n", "        queries + 1,\n"),
    ],
)
def test_broken_cross_attention_is_seen(interpreter: Interpreter, old: str, new: str) -> None:
    call = {"name": "cross_attention", "keys": 21, "channels": 40, "dtype": "float16", "masks": "bias lengths"}
    assert interpreter.sees("cross_attention", old, new, error, above=BOUND["float16"], **call)


def by_vendor(masks: str) -> float:
    query, key, value = (heads(seed, 20, 64, "float32") for seed in range(3))
    bias = torch.randn(BATCH, 20) if "bias" in masks else None
    lengths = torch.tensor([20, 7]) if "lengths" in masks else None
    got = attention.attention_by_vendor(query, key, value, key_bias=bias, key_lengths=lengths, scale=0.2)
    expected = attention.attention_reference(query, key, value, key_bias=bias, key_lengths=lengths, scale=0.2)
    return relative_error(got, expected)


@pytest.mark.parametrize("masks", ["", "bias", "lengths", "bias lengths"])
def test_the_vendor_is_asked_for_the_same(masks: str) -> None:
    assert by_vendor(masks) <= 1e-6


def test_what_goes_where_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dispatch.Choice] = []

    def choose(*call: Any, **options: Any) -> dispatch.Choice:
        seen.append(dispatch.choose(*call, **options))
        return seen[-1]

    for module in (attention, cross_attention):
        monkeypatch.setattr(module, "choose", choose)
    monkeypatch.setattr(dispatch, "_architecture", lambda device: ("sm_90", None))
    query, few, wide, long = (
        torch.randn(1, 1, tokens, channels, dtype=torch.bfloat16)
        for tokens, channels in ((4, 64), (4, 64), (4, 160), (257, 64))
    )
    attention.attention(query, few, few)
    assert (seen[-1].implementation, "cuDNN" in seen[-1].reason) == ("vendor", True)
    attention.attention(wide, wide, wide)
    assert "16 to 128 channels, a multiple of 8, not 160" in seen[-1].reason
    attention.attention(query.float(), few.float(), few.float())
    assert "not torch.float32" in seen[-1].reason
    cross_attention.cross_attention(query, long, long)
    assert "a tile holds 256 keys of 64 channels, not 257" in seen[-1].reason


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    query, key = torch.zeros(1, 2, 4, 64), torch.zeros(1, 2, 5, 64)
    for wrong, message in (
        ((query[0], key, key), "takes tensors"),
        ((query, key, key[:, :, :4]), "takes tensors"),
        ((query, key[:, :, :0], key[:, :, :0]), "with something in them"),
        ((query, key[:, :1], key[:, :1]), "must agree"),
        ((query, key.half(), key), "of one type"),
    ):
        with pytest.raises(KernelError, match=message):
            attention.attention(*wrong)
    with pytest.raises(KernelError, match="above zero, not -1"):
        attention.attention(query, key, key, scale=-1.0)
    for masks, message in (
        ({"key_bias": torch.zeros(1, 4)}, r"key_bias must be \(1, 5\) on cpu"),
        ({"key_lengths": torch.zeros(2, dtype=torch.int32)}, "key_lengths must be 1 integers"),
        ({"key_lengths": torch.zeros(1)}, "not .* of torch.float32"),
    ):
        for call in (attention.attention, cross_attention.cross_attention):
            with pytest.raises(KernelError, match=message):
                call(query, key, key, **masks)
