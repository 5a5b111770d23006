"""Tests of the number formats and of the quantization plan as data."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from compress.errors import RecipeError
from compress.quantization.scheme import SCHEMES, scheme
from export.quant_plan import (
    Affine,
    Dynamic,
    LayerQuant,
    LowRank,
    QuantPlan,
    QuantPlanError,
    Scaled,
    WeightGrid,
)
from export.target import TARGETS

LINEAR = LayerQuant("linear", "int8-w8a8", WeightGrid.per_channel((0.1, 0.2)), Affine(0.05, 128))
CONV = LayerQuant("conv", "int8-w8a8", WeightGrid.per_channel((0.1,)), Affine(0.05, 0), Affine(0.3, 7))
STORED = LayerQuant("linear", "int8-w8a32", WeightGrid.per_channel((1 / 3,)), None)
BLOCKS = LayerQuant(
    "linear",
    "nvfp4",
    WeightGrid("e2m1", np.full((2, 2), 0.5, np.float32), 16, "e4m3", 0.25, np.full((2, 32), -1.5, np.float16)),
    Dynamic("e2m1", 16, "e4m3", 0.5),
    smooth=np.linspace(0.5, 2.0, 32, dtype=np.float32),
    rotation=16,
    low_rank=LowRank(np.ones((3, 32), np.float16), np.ones((2, 3), np.float16)),
    bias=np.zeros(2, np.float32),
)
FLOATS = LayerQuant("linear", "fp8-w8a8", WeightGrid.per_channel((0.1, 0.2), "e4m3"), Scaled("e4m3", 0.25))
PLAN = QuantPlan(
    {"a.b": LINEAR, "c": CONV, "d": STORED, "f": BLOCKS, "g": FLOATS}, {"e": "because"}, "float16", "bfloat16"
)


def test_int8_is_per_channel_symmetric_weights_and_per_tensor_unsigned_activations() -> None:
    row = scheme("int8-w8a8")
    assert (row.weight.dtype, row.weight.granularity, row.weight.symmetric) == ("int8", "channel", True)
    assert (row.activation.dtype, row.activation.granularity, row.activation.symmetric) == ("uint8", "tensor", False)
    assert row.is_calibrated
    assert row.weight.bytes_of(3, 10) == 3 * 10 + 3 * 4
    assert not scheme("int8-w8a32").is_calibrated
    assert scheme("int8-w8a32").is_quantized


def test_an_unknown_scheme_gives_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'int8-w8a8'"):
        scheme("int8w8a8")


@pytest.mark.parametrize("target", [name for name, row in TARGETS.items() if not row.library])
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
    grid = WeightGrid.per_channel((1.0, 0.5))
    rounded = grid.rounded(np.array([[0.5, 1.5, -2.5, -200.0], [0.25, 0.75, 1.0, 200.0]], np.float32))
    assert rounded.dtype == np.int8
    assert rounded.tolist() == [[0, 2, -2, -127], [0, 2, 2, 127]]
    with pytest.raises(QuantPlanError, match="2 weight scales for 3"):
        grid.rounded(np.zeros((3, 4), np.float32))


def test_a_plan_survives_json_exactly() -> None:
    again = QuantPlan.from_json(PLAN.to_json())
    assert again == PLAN
    assert again != replace(PLAN, layers={**PLAN.layers, "c": replace(CONV, rotation=4)})
    branch = again.layers["f"].low_rank
    assert branch is not None
    assert branch.up.dtype == np.float16


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
        (
            lambda raw: raw["layers"]["a.b"]["weight"]["scale"].update(base64="", shape=[0, 1]),
            "not positive and finite",
        ),
        (lambda raw: raw["layers"]["a.b"]["weight"]["scale"].update(base64="AADAfwAAwH8="), "not positive and finite"),
        (lambda raw: raw["layers"]["a.b"]["weight"]["scale"].update(dtype="object"), "an array of 'object'"),
        (lambda raw: raw["layers"]["a.b"]["weight"]["scale"].update(shape=[3, 1]), "cannot be read"),
        (lambda raw: raw["layers"]["a.b"]["weight"].update(element="e9m9"), "the element 'e9m9' is unknown"),
        (lambda raw: raw["layers"]["a.b"]["weight"].update(stored="e5m3"), "scales stored as 'e5m3'"),
        (lambda raw: raw["layers"]["f"]["input"].update(stored="e5m3"), "scales stored as 'e5m3'"),
        (lambda raw: raw["layers"]["f"].update(rotation=12), "no power of two"),
        (lambda raw: raw["layers"]["g"]["input"].update(kind="pickle"), "cannot be read"),
        (lambda raw: raw["layers"]["a.b"].update(output=raw["layers"]["c"]["output"]), "no integer convolution"),
        (lambda raw: raw["skipped"].update(c="why"), "both quantized and skipped"),
    ],
)
def test_an_impossible_plan_is_refused(change: object, message: str) -> None:
    raw = json.loads(PLAN.to_json())
    change(raw)  # type: ignore[operator]
    with pytest.raises(QuantPlanError, match=message):
        QuantPlan.from_json(json.dumps(raw))
