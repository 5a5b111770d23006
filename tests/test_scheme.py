"""Tests of the number formats and of the quantization plan as data."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from compress.errors import RecipeError
from compress.quantization.scheme import SCHEMES, scheme
from export.quant_plan import Affine, LayerQuant, QuantPlan, QuantPlanError
from export.target import TARGETS

LINEAR = LayerQuant("linear", "int8-w8a8", (0.1, 0.2), Affine(0.05, 128))
CONV = LayerQuant("conv", "int8-w8a8", (0.1,), Affine(0.05, 0), Affine(0.3, 7))
STORED = LayerQuant("linear", "int8-w8a32", (1 / 3,), None)
PLAN = QuantPlan({"a.b": LINEAR, "c": CONV, "d": STORED}, {"e": "because"}, "float16", "bfloat16")


def test_int8_is_per_channel_symmetric_weights_and_per_tensor_unsigned_activations() -> None:
    row = scheme("int8-w8a8")
    assert (row.weight.dtype, row.weight.granularity, row.weight.symmetric) == ("int8", "channel", True)
    assert (row.activation.dtype, row.activation.granularity, row.activation.symmetric) == ("uint8", "tensor", False)
    assert row.is_calibrated
    assert row.weight_bytes == 1
    assert not scheme("int8-w8a32").is_calibrated
    assert scheme("int8-w8a32").is_quantized


def test_an_unknown_scheme_gives_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'int8-w8a8'"):
        scheme("int8w8a8")


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_knows_how_every_stored_format_runs(target: str) -> None:
    assert set(SCHEMES) - {"none"} <= set(TARGETS[target].formats)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.5, 3.0), (-3.0, -1.0), (0.0, 0.0), (-1e-12, 0.0)])
def test_a_grid_holds_zero_exactly_and_spans_its_range(low: float, high: float) -> None:
    grid = Affine.of_range(low, high)
    assert 0 <= grid.zero_point <= 255
    assert (0 - grid.zero_point) * grid.scale + grid.zero_point * grid.scale == 0
    first, last = grid.range
    assert first - grid.scale <= min(low, 0.0)
    assert first <= min(low, 0.0) + grid.scale
    assert last >= max(high, 0.0) - grid.scale


def test_a_grid_of_an_infinite_range_is_refused() -> None:
    with pytest.raises(QuantPlanError, match="not finite"):
        Affine.of_range(0.0, float("inf"))


def test_weights_round_to_even_and_never_to_minus_128() -> None:
    layer = replace(LINEAR, weight_scale=(1.0, 0.5))
    rounded = layer.quantize_weight(np.array([[0.5, 1.5, -2.5, -200.0], [0.25, 0.75, 1.0, 200.0]], np.float32))
    assert rounded.dtype == np.int8
    assert rounded.tolist() == [[0, 2, -2, -127], [0, 2, 2, 127]]
    with pytest.raises(QuantPlanError, match="2 weight scales for 3"):
        layer.quantize_weight(np.zeros((3, 4), np.float32))


def test_a_plan_survives_json_exactly() -> None:
    assert QuantPlan.from_json(PLAN.to_json()) == PLAN
    assert PLAN.integer_layers == {"a.b", "c"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(schema_version=9), "schema version 9"),
        (lambda raw: raw.update(storage="float8"), "unknown storage"),
        (lambda raw: raw.update(inference_precision="int2"), "unknown inference precision"),
        (lambda raw: raw.update(surprise=1), "cannot be read"),
        (lambda raw: raw["layers"]["c"].pop("input"), "cannot be read"),
        (lambda raw: raw["layers"]["c"].update(op="pool"), "unknown op"),
        (lambda raw: raw["layers"]["c"]["input"].update(scale=0.0), "not positive and finite"),
        (lambda raw: raw["layers"]["c"]["output"].update(zero_point=256), "outside 0..255"),
        (lambda raw: raw["layers"]["a.b"].update(weight_scale=[]), "not positive and finite"),
        (lambda raw: raw["layers"]["a.b"].update(weight_scale=[float("nan")]), "not positive and finite"),
        (lambda raw: raw["layers"]["a.b"].update(output={"scale": 1.0, "zero_point": 0}), "no integer convolution"),
        (lambda raw: raw["skipped"].update(c="why"), "both quantized and skipped"),
    ],
)
def test_an_impossible_plan_is_refused(change: object, message: str) -> None:
    raw = json.loads(PLAN.to_json())
    change(raw)  # type: ignore[operator]
    with pytest.raises(QuantPlanError, match=message):
        QuantPlan.from_json(json.dumps(raw))
