"""Attention to cached and fresh keys: kernel and reference against float64 on joined segments, region mask, weights."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from kernels import attention_two_segments as two_segments
from kernels import dispatch
from kernels.errors import KernelError
from tests.heads import BATCH, attention_in_float64, heads
from tests.interpreted import Interpreter, relative_error

BOUND = {"float16": 5e-4, "bfloat16": 4e-3}


def error(
    op: ModuleType,
    channels: int,
    dtype: str,
    cached: int = 21,
    fresh: int = 13,
    marks: str = "visible cached fresh",
    layout: str = "heads",
    form: str = "kernel",
) -> float:
    """The error of one call against float64; `marks` names which of mask and weights are given."""
    random = torch.Generator().manual_seed(5)
    query = heads(0, 35, channels, dtype, layout)
    segments = [
        heads(seed, tokens, channels, dtype, layout) for seed, tokens in enumerate((cached, cached, fresh, fresh), 1)
    ]
    visible = torch.rand(BATCH, cached, generator=random) < 0.6 if "visible" in marks else None
    of_cached, of_fresh = (
        4 * torch.rand(BATCH, tokens, generator=random) if name in marks else None
        for name, tokens in (("cached", cached), ("fresh", fresh))
    )
    if of_fresh is not None:
        of_fresh[:, 2] = 0.0
    if form == "descriptors":
        given = (visible, of_cached, of_fresh, None, "interpreter")
        launch, got = op._prepare(query, *segments, *given, descriptors=True)
        launch.run()
    else:
        got = op.attention_two_segments(
            query,
            *segments,
            cached_visible=visible,
            cached_weight=of_cached,
            fresh_weight=of_fresh,
            mode="triton" if form == "kernel" else form,
        )
    weights = [torch.ones(BATCH, cached) if of_cached is None else of_cached]
    weights += [torch.ones(BATCH, fresh) if of_fresh is None else of_fresh]
    if visible is not None:
        weights[0] = weights[0] * visible
    key, value = torch.cat(segments[0::2], 2), torch.cat(segments[1::2], 2)
    return relative_error(got, attention_in_float64(query, key, value, torch.cat(weights, 1).double().log()))


@pytest.mark.parametrize("form", ["kernel", "descriptors", "reference"])
@pytest.mark.parametrize(
    "call",
    [
        {"channels": 64, "dtype": "bfloat16"},
        {"channels": 40, "dtype": "float16", "marks": "visible", "layout": "tokens"},
        {"channels": 128, "dtype": "float16", "marks": "cached", "cached": 32},
        {"channels": 64, "dtype": "float16", "marks": "", "fresh": 16},
    ],
)
def test_kernel_and_reference_agree_with_float64(interpreter: Interpreter, call: dict[str, Any], form: str) -> None:
    assert interpreter.run(error, "attention_two_segments", form=form, **call) <= BOUND[call["dtype"]]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cached_visible += batch * cached", "cached_visible += 0"),
        ("cached_weight += batch * cached", "cached_weight += 0"),
        ("fresh_weight += batch * fresh", "fresh_weight += 0"),
        ("exponent = base_2(scale)", "exponent = scale"),
        (
            "        cached_weight,\n        cached_visible,\n        cached,",
            "        cached_weight,\n        None,\n        cached,",
        ),
        ("        fresh_weight,\n        None,\n        fresh,", "        None,\n        None,\n        fresh,"),
        (
            "        accumulator,\n        maximum,\n        total,\n",
            "        accumulator,\n        maximum,\n        total * 0,\n",
        ),
        ("        fresh_value,\n        fresh_value_strides,\n", "        fresh_key,\n        fresh_value_strides,\n"),
    ],
)
def test_a_broken_kernel_is_seen(interpreter: Interpreter, old: str, new: str) -> None:
    call = {"channels": 40, "dtype": "float16"}
    assert interpreter.sees("attention_two_segments", old, new, error, above=BOUND["float16"], **call)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"WHOLE_CACHED": cached % block_keys == 0', '"WHOLE_CACHED": True'),
        ('"WHOLE_FRESH": fresh % block_keys == 0', '"WHOLE_FRESH": True'),
    ],
)
def test_a_lost_tail_is_seen(interpreter: Interpreter, old: str, new: str) -> None:
    call = {"channels": 40, "dtype": "float16", "marks": ""}
    assert interpreter.sees("attention_two_segments", old, new, error, above=BOUND["float16"], **call)


def by_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every choice fall on the vendor's library."""
    monkeypatch.setattr(two_segments, "choose", lambda *call, **options: dispatch.Choice("vendor", "", "sm_90"))


def test_the_vendor_is_asked_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    by_vendor(monkeypatch)
    assert error(two_segments, 64, "float32", form="auto") <= 1e-6


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    query, cached, fresh = (torch.zeros(1, 2, tokens, 64) for tokens in (4, 6, 5))
    with pytest.raises(KernelError, match="cached_visible must be"):
        two_segments.attention_two_segments(query, cached, cached, fresh, fresh, cached_visible=torch.ones(1, 5) > 0)
    with pytest.raises(KernelError, match="fresh_weight must be"):
        two_segments.attention_two_segments(query, cached, cached, fresh, fresh, fresh_weight=torch.ones(1, 6))
    with pytest.raises(KernelError, match="with something in them"):
        two_segments.attention_two_segments(query, cached[:, :, :0], cached[:, :, :0], fresh, fresh)
