"""Attention in int8 and in e4m3: kernels against their references, and both against attention in float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from kernels import attention_fp8, attention_int8, dispatch
from kernels.errors import KernelError
from tests.heads import attention_in_float64, heads
from tests.interpreted import Interpreter, relative_error

OPERATIONS = {"attention_int8": attention_int8, "attention_fp8": attention_fp8}
AGAINST_REFERENCE = {"float16": 2e-3, "bfloat16": 1e-2}  # a code that falls to the other side of a tie is part of it
AGAINST_FLOAT64 = {"attention_int8": 1.5e-2, "attention_fp8": 6e-2}


def errors(
    op: ModuleType,
    name: str,
    channels: int = 64,
    dtype: str = "float16",
    queries: int = 133,
    keys: int = 150,
    offset: float = 5.0,
    layout: str = "heads",
    mode: str = "triton",
) -> list[float]:
    """The error of one call against the reference, and that against float64.

    The values are normal; `offset` times another normal value is added to each channel of the keys, for all tokens.
    """
    query, value = heads(0, queries, channels, dtype, layout), heads(2, keys, channels, dtype, layout)
    key = heads(1, keys, channels, dtype, layout)
    key += offset * heads(3, 1, channels, dtype)
    got = getattr(op, name)(query, key, value, mode=mode)
    reference = getattr(op, f"{name}_reference")(query, key, value)
    return [relative_error(got, reference), relative_error(got, attention_in_float64(query, key, value))]


def error(op: ModuleType, name: str) -> float:
    """The error against the reference."""
    return errors(op, name)[0]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"channels": 40, "layout": "tokens"},
        {"channels": 128, "dtype": "bfloat16", "keys": 128, "queries": 40, "offset": 0.0},
    ],
)
def test_kernel_agrees_with_its_reference_and_float64(
    interpreter: Interpreter, operation: str, call: dict[str, Any]
) -> None:
    of_reference, of_float64 = interpreter.run(errors, operation, name=operation, **call)
    assert of_reference <= AGAINST_REFERENCE[call.get("dtype", "float16")]
    assert of_float64 <= AGAINST_FLOAT64[operation]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_keys_without_smoothing_lose_far_more(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = OPERATIONS[operation]
    smooth = errors(module, operation, mode="reference")[1]
    monkeypatch.setattr(module, "smoothing", lambda key: key.new_zeros(*key.shape[:2], key.shape[3]))
    rough = errors(module, operation, mode="reference")[1]
    assert smooth <= AGAINST_FLOAT64[operation]
    assert rough >= 2 * smooth


SHARED = [
    ("tl.cdiv(keys, BLOCK_KEYS) * BLOCK_KEYS - keys", "0 * keys"),
    ("row * query_groups + start", "row * query_groups + 0 * start"),
    ("tl.load(key_scales + first", "tl.load(key_scales + 0 * first"),
    ("row.to(tl.int64) * query_groups", "0 * row * query_groups"),
    ("normalised(accumulator, total)", "normalised(accumulator, total * 2)"),
    ("GROUP, factor)", "GROUP, 1.0)"),
    ("scores, scale, accumulator, maximum", "scores, scale, accumulator * 0, maximum"),
]


@pytest.mark.parametrize(("old", "new"), SHARED)
def test_broken_int8_attention_is_seen(interpreter: Interpreter, old: str, new: str) -> None:
    assert interpreter.sees(
        "attention_int8", old, new, error, above=AGAINST_REFERENCE["float16"], name="attention_int8"
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *SHARED,
        ("value_scale[None, :]", "1.1 * value_scale[None, :]"),
        ("in_fragments(weights.to(values.dtype))", "weights.to(values.dtype)"),
        ('"SHIFT": float(_SHIFT)', '"SHIFT": -2.0'),
    ],
)
def test_broken_fp8_attention_is_seen(interpreter: Interpreter, old: str, new: str) -> None:
    assert interpreter.sees("attention_fp8", old, new, error, above=AGAINST_REFERENCE["float16"], name="attention_fp8")


def test_an_architecture_without_the_format_gets_the_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    for operation, architecture, told in (
        ("attention_int8", "sm_100", "sm_100 has no int8 tensor-core instruction"),
        ("attention_fp8", "sm_86", "sm_86 has no fp8 tensor-core instruction"),
    ):
        monkeypatch.setattr(dispatch, "_architecture", lambda device, name=architecture: (name, None))
        needs = ("int8",) if operation == "attention_int8" else ("fp8",)
        device = torch.device("cuda")
        choice = dispatch.choose(operation, device, torch.float16, (1, 2, 3, 64), needs=needs, vendor=True)
        assert choice.implementation == "vendor"
        assert told in choice.reason
        query = torch.zeros(1, 1, 4, 64, dtype=torch.float16)
        with pytest.raises(KernelError, match=told):
            getattr(OPERATIONS[operation], operation)(query, query, query, mode="triton")
