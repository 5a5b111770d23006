"""The step plan as data: exact round trips, late starts, and every malformed plan refused in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from export.start import start_row, started_at
from export.step_plan import Gate, Segment, Slot, Step, StepPlan, StepPlanError, Update

CONDITIONING = ("sample", "timestep", "encoder_hidden_states")


def cached(rows: int = 6) -> StepPlan:
    """A UNet cut in three; every third row runs whole, the others forecast."""
    steps = []
    for k in range(rows):
        full = k % 3 == 0
        step = Step(
            t=1000.0 - 100 * k - 1 / 3,
            x={0: 1 + 1e-17 + k / 7, **({2: -0.1} if k > 1 else {})},
            m={0: -math.pi / (k + 1)},
            noise=0.0 if k == rows - 1 else 0.25,
            input_scale=1 / (k + 3),
            path="full" if full else "shallow",
            write=("deep",) if full else (),
            read={} if full else {"deep": (1.0,) if k < 3 else (2.0, -1.0)},
            guidance="cfg" if k < 4 else "none",
            guidance_scale=7.5 if k < 4 else 1.0,
            signal=math.sqrt(k / 10),
            sigma=math.sqrt(1 - k / 10),
        )
        steps.append(step)
    return StepPlan(
        segments={
            "entry": Segment(CONDITIONING, ("skip", "temb")),
            "deep": Segment(("skip", "temb", "encoder_hidden_states"), ("up",)),
            "exit": Segment(("up", "skip", "temb"), ("out_sample",)),
        },
        paths={"full": ("entry", "deep", "exit"), "shallow": ("entry", "exit")},
        slots={"deep": Slot("up", history=2)},
        steps=tuple(steps),
        starts=dict.fromkeys(range(1, rows - 1), (Update({0: 1 / 3}, {0: 1e-30}, 0.1), Update({}, {0: 2.0, 1: 3.0}))),
        init_noise_sigma=14.614646,
        prediction="v_prediction",
        key={"scheduler": "X", "steps": rows, "order": 1, "nested": [1, None, {"a": True}]},
    )


def test_round_trip_is_exact() -> None:
    plan = cached()
    again = StepPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    again.validate(CONDITIONING)


def test_round_trip_keeps_every_bit_of_random_numbers() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**63, 200, dtype=np.uint64).view(np.float64)
    numbers = [float(value) for value in bits if np.isfinite(value)]
    plan = cached()
    steps = tuple(replace(plan.steps[k], m={0: numbers[k]}, noise=-numbers[k + 10]) for k in range(6))
    assert StepPlan.from_json(replace(plan, steps=steps).to_json()).steps == steps


def test_plans_written_before_a_key_existed_still_load() -> None:
    raw = json.loads(cached().to_json())
    del raw["gate"]
    for row in raw["steps"]:
        for key in ("initial", "span", "gated", "level"):
            del row[key]
    del raw["slots"]["deep"]["halves"]
    for updates in raw["starts"].values():
        for update in updates:
            del update["initial"]
    assert StepPlan.from_json(json.dumps(raw)) == cached()


def test_round_trip_keeps_the_fields_of_every_kind() -> None:
    plan = cached()
    slots = {"deep": replace(plan.slots["deep"], halves="mean")}
    alone: dict[str, Any] = {"x": {0: 1 / 7}, "guidance": "cfg_sequential"}
    steps = [replace(step, **alone, read={"deep": (1.0,)} if step.read else {}) for step in plan.steps]
    steps[0] = replace(steps[0], level=1 / 3, initial=0.003)
    steps[1] = replace(steps[0], level=1.0, initial=0.0)
    steps[4] = replace(steps[4], gated=True)
    starts = {3: (Update({0: 1 / 3}, {0: 1.0}, 0.1, 1 / 9),)}
    plan = replace(
        plan, slots=slots, steps=tuple(steps), starts=starts, gate=Gate("skip", 1 / 3, 2, "previous", (0.1, 1 / 7))
    )
    again = StepPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.gate == plan.gate


def test_history_covers_rows_and_starts() -> None:
    plan = cached()
    assert plan.history() == (3, 2)
    assert replace(plan, starts={}).history() == (3, 1)
    assert plan.network_calls == 6
    assert plan.output == "out_sample"


def dropped(*keys: str) -> Callable[[dict[str, Any]], None]:
    def mutate(raw: dict[str, Any]) -> None:
        for key in keys[:-1]:
            raw = raw[int(key)] if isinstance(raw, list) else raw[key]
        del raw[keys[-1]]

    return mutate


def put(value: Any, *keys: str) -> Callable[[dict[str, Any]], None]:
    def mutate(raw: dict[str, Any]) -> None:
        for key in keys[:-1]:
            raw = raw[int(key)] if isinstance(raw, list) else raw[key]
        if isinstance(raw, list):
            raw[int(keys[-1])] = value
        else:
            raw[keys[-1]] = value

    return mutate


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no version": (dropped("schema_version"), "schema version None"),
    "newer version": (put(2, "schema_version"), "schema version 2"),
    "no steps key": (dropped("steps"), "steps"),
    "no steps": (put([], "steps"), "no steps"),
    "steps are a number": (put(3, "steps"), "cannot be read"),
    "a step is text": (put("full", "steps", "0"), "cannot be read"),
    "no paths": (put({}, "paths"), "no paths"),
    "empty path": (put([], "paths", "full"), "'full' has no segments"),
    "path of an unknown segment": (put(["entry", "middle"], "paths", "full"), "unknown segment 'middle'"),
    "path that ends early": (put(["entry"], "paths", "shallow"), "does not end in the network output"),
    "segment without outputs": (put([], "segments", "deep", "outputs"), "'deep' computes nothing"),
    "segment with a misspelt key": (put(["x"], "segments", "deep", "output"), "output"),
    "segment inputs are text": (put("sample", "segments", "deep", "inputs"), "not a list of names"),
    "tensor name is a number": (put(7, "segments", "deep", "inputs", "0"), "7 is not a name"),
    "slot of an unknown tensor": (put("down", "slots", "deep", "tensor"), "'down', which no segment computes"),
    "slot of an unknown kind": (put("token", "slots", "deep", "kind"), "unknown kind 'token'"),
    "residual without base": (put("residual", "slots", "deep", "kind"), "needs a base"),
    "feature with base": (put("skip", "slots", "deep", "base"), "no other kind has one"),
    "slot without history": (put(0, "slots", "deep", "history"), "keeps no history"),
    "slot with half a history": (put(1.5, "slots", "deep", "history"), "not a whole number"),
    "slot with a misspelt key": (put(2, "slots", "deep", "lenght"), "lenght"),
    "step without t": (dropped("steps", "0", "t"), "'t'"),
    "step with a misspelt key": (put(1.0, "steps", "0", "sigmma"), "sigmma"),
    "t is text": (put("999", "steps", "0", "t"), "'999' is not a number"),
    "t is true": (put(True, "steps", "0", "t"), "True is not a number"),
    "t is NaN": (put(math.nan, "steps", "0", "t"), "step 0 holds a number that is not finite"),
    "sigma is infinite": (put(math.inf, "steps", "2", "sigma"), "step 2 holds"),
    "coefficient is NaN": (put(math.nan, "steps", "3", "m", "0"), "step 3 holds"),
    "coefficient is null": (put(None, "steps", "3", "m", "0"), "None is not a number"),
    "lag is text": (put(1.0, "steps", "3", "m", "newest"), "cannot be read"),
    "negative lag": (put(1.0, "steps", "3", "m", "-1"), "step 3 reaches back"),
    "lag before the start": (put(1.0, "steps", "1", "x", "2"), "step 1 reaches back before the first step"),
    "unknown path": (put("half", "steps", "1", "path"), "unknown path 'half'"),
    "unknown guidance": (put("auto", "steps", "1", "guidance"), "unknown guidance 'auto'"),
    "guidance is a list": (put(["cfg"], "steps", "1", "guidance"), "unknown guidance"),
    "read of an unknown slot": (put({"skip": [1.0]}, "steps", "1", "read"), "unknown slot 'skip'"),
    "read before the write": (put({"deep": [1.0]}, "steps", "0", "read"), "holds 0"),
    "read of more than was written": (put([2.0, -1.0], "steps", "1", "read", "deep"), "reads 2 values"),
    "read of more than is kept": (put([1.0, 1.0, 1.0], "steps", "5", "read", "deep"), "reads 3 values"),
    "read of nothing": (put([], "steps", "1", "read", "deep"), "reads 0 values"),
    "forecast with NaN": (put([math.nan], "steps", "1", "read", "deep"), "step 1 holds"),
    "write of an unknown slot": (put(["mid"], "steps", "0", "write"), "unknown slot 'mid'"),
    "write of what is not computed": (put(["deep"], "steps", "1", "write"), "'shallow' does not compute it"),
    "start at the first row": (put([], "starts", "0"), "start 0 lies outside"),
    "start after the last row": (put([], "starts", "6"), "start 6 lies outside"),
    "start longer than the plan": (put([{"x": {}, "m": {}, "noise": 0.0}] * 3, "starts", "4"), "lies outside"),
    "start that reaches back": (put(1.0, "starts", "3", "0", "x", "1"), "step 3 reaches back before the start"),
    "start whose rows reach back": (put([], "starts", "2"), "step 2 reaches back before the start"),
    "start with NaN": (put(math.nan, "starts", "3", "1", "noise"), "start 3 holds"),
    "step with a level as text": (put("1", "steps", "0", "level"), "'1' is not a number"),
    "level of the last row": (put(0.5, "steps", "5", "level"), "step 5 lowers the level from 1.0 to 0.5"),
    "initial is true": (put(True, "steps", "0", "initial"), "True is not a number"),
    "initial is NaN": (put(math.nan, "steps", "0", "initial"), "step 0 holds"),
    "span is half a row": (put(1.5, "steps", "0", "span"), "the span 1.5 is not a whole number"),
    "span over the end": (put(2, "steps", "5", "span"), "step 5 spans 2 rows, beyond the end"),
    "gated is a number": (put(1, "steps", "1", "gated"), "neither true nor false"),
    "gated without a gate": (put(True, "steps", "1", "gated"), "the plan has no gate"),
    "unknown halves": (put("both", "slots", "deep", "halves"), "unknown halves 'both'"),
    "halves are a list": (put(["mean"], "slots", "deep", "halves"), "unknown halves"),
    "base is a number": (put(3, "slots", "deep", "base"), "3 is not a name"),
    "gate without tensor": (put({"threshold": 0.1, "max_run": 1}, "gate"), "'tensor'"),
    "slot written twice": (put(["deep", "deep"], "steps", "0", "write"), "writes slot 'deep' twice"),
    "start with initial as text": (put("1", "starts", "3", "0", "initial"), "'1' is not a number"),
    "start without noise": (dropped("starts", "3", "0", "noise"), "'noise'"),
    "start with infinite initial": (put(math.inf, "starts", "3", "1", "initial"), "start 3 holds"),
    "start is text": (put([], "starts", "late"), "cannot be read"),
    "initial sigma is text": (put("1", "init_noise_sigma"), "'1' is not a number"),
    "initial sigma is NaN": (put(math.nan, "init_noise_sigma"), "init_noise_sigma"),
    "prediction is a number": (put(1, "prediction"), "1 is not a name"),
    "key is a number": (put(1, "key"), "cannot be read"),
    "misspelt key": (put({}, "slot"), "slot"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_plans_are_refused(name: str) -> None:
    mutate, message = MALFORMED[name]
    raw = json.loads(cached().to_json())
    mutate(raw)
    with pytest.raises(StepPlanError) as caught:
        StepPlan.from_json(json.dumps(raw))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"plan"', '{"schema_version": 1}', "\x00"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(StepPlanError):
        StepPlan.from_json(text)


def test_missing_inputs_are_found() -> None:
    plan = cached()
    with pytest.raises(StepPlanError, match="nothing produces the input 'encoder_hidden_states' of segment 'entry'"):
        plan.validate(("sample", "timestep"))
    steps = (plan.steps[0], replace(plan.steps[1], read={}), *plan.steps[2:])
    with pytest.raises(StepPlanError, match="step 1: nothing produces the input 'up' of segment 'exit'"):
        replace(plan, steps=steps).validate(CONDITIONING)


def test_a_row_that_skips_the_network_writes_nothing() -> None:
    plan = cached()
    slots = {**plan.slots, "out": Slot("out_sample", "output")}
    first = replace(plan.steps[0], write=("deep", "out"))
    second = replace(plan.steps[1], path="full", read={"out": (1.0,)})
    replace(plan, slots=slots, steps=(first, second), starts={}).validate(CONDITIONING)
    broken = replace(second, write=("deep",))
    with pytest.raises(StepPlanError, match="computes nothing to write"):
        replace(plan, slots=slots, steps=(first, broken), starts={}).validate(CONDITIONING)


@pytest.mark.parametrize("strength", [0.05, 0.1, 0.25, 0.3, 0.55, 0.75, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
@pytest.mark.parametrize("steps", [1, 4, 7, 20])
def test_start_row_is_that_of_the_pipelines(strength: float, prediction: str, steps: int) -> None:
    """`get_timesteps` of the image-to-image pipelines of Stable Diffusion and of Stable Diffusion 3."""
    plan = replace(cached(2), steps=cached(2).steps[:1] * (2 * steps - 1), starts={}, prediction=prediction)
    plan = replace(plan, key={"steps": steps, "order": 2})
    if prediction == "flow":
        expected = int(max(steps - min(steps * strength, steps), 0))
    else:
        expected = max(steps - min(int(steps * strength), steps), 0)
    if expected == steps:
        with pytest.raises(StepPlanError, match="leaves none"):
            start_row(plan, strength)
    else:
        assert start_row(plan, strength) == 2 * expected


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.1, math.nan])
def test_strength_outside_its_range_is_refused(strength: float) -> None:
    with pytest.raises(StepPlanError, match="strength must be above 0"):
        start_row(cached(), strength)


def test_a_late_start_is_a_plan_of_its_own() -> None:
    plan = cached()
    assert started_at(plan, 0) is plan
    late = started_at(plan, 2)
    late.validate(CONDITIONING)
    assert late.network_calls == 4
    assert (late.steps[0].x, late.steps[0].m, late.steps[0].noise) == ({0: 1 / 3}, {0: 1e-30}, 0.1)
    assert late.steps[2].x == plan.steps[4].x
    assert late.steps[0].t == plan.steps[2].t
    assert (late.steps[0].path, late.steps[0].write, late.steps[0].read) == ("full", ("deep",), {})
    assert late.steps[1].path == "full"
    assert late.steps[2].read == {"deep": (2.0, -1.0)}
    at_write = started_at(plan, 3)
    assert at_write.steps[0].write == ("deep",)
    assert at_write.steps[1].read == {"deep": (1.0,)}


def test_a_start_the_sampler_cannot_make_is_refused() -> None:
    with pytest.raises(StepPlanError, match=r"cannot begin at row 5; it can at 0, 1, 2, 3, 4"):
        started_at(cached(), 5)
