"""The gate: every sample's network calls are skipped by its own change alone, whatever else is in its batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from export.gate import GateState
from export.loop import Loop
from export.memory import Fallback
from export.noise import noise
from export.program import look_up
from export.start import started_at
from export.step_plan import Gate, Segment, Slot, Step, StepPlan, StepPlanError, Update
from tests.plain import (
    FUNCTIONS,
    PATHS,
    SEGMENTS,
    SHAPE,
    counting,
    given,
    over_numpy,
    plain_loop,
    random_update,
    sampled,
)

SEEDS = (10, 2, 33, 4, 57)
SLOTS = {"feature": Slot("up", history=2), "residual": Slot("up", "residual", base="skip")}
GATES = {
    "last_full": Gate("skip", 0.35, 3),
    "previous": Gate("skip", 0.5, 3, "previous"),
    "polynomial": Gate("skip", 0.12, 2, "last_full", (0.9, -0.1, 0.02)),
    "previous polynomial": Gate("skip", 0.3, 4, "previous", (0.3, 0.5, 0.0)),
}


def gated_plan(gate: Gate | None, seed: int, rows: int = 14, guidance: str | None = None) -> StepPlan:
    """Full rows that write both slots, gated rows, and shallow rows that the gate does not decide."""
    rng = np.random.default_rng(seed)
    steps = []
    for row in range(rows):
        fields = random_update(rng, row)
        # Calm updates, so that the watched tensor moves about as much as the thresholds say.
        fields |= {"x": {0: 0.95}, "m": {0: float(rng.normal() / 8)}, "input_scale": 1.0, "t": 3.0 + row / 10}
        if guidance is not None:
            fields |= {"guidance": guidance, "guidance_scale": 1.0 if guidance == "none" else 2.5}
        kind = "full" if row == 0 else str(rng.choice(["full", "gated", "gated", "gated", "shallow"]))
        if kind == "full":
            steps.append(Step(write=tuple(SLOTS), **fields))
        else:
            read = {str(rng.choice(list(SLOTS))): (float(rng.choice([1.0, 0.9])),)}
            steps.append(Step(path="shallow", read=read, gated=kind == "gated", **fields))
    return StepPlan(SEGMENTS, PATHS, SLOTS, tuple(steps), gate=gate)


def decided(plan: StepPlan, which: list[int] | None = None) -> tuple[np.ndarray, dict[int, dict[str, np.ndarray]]]:
    """The latents, and the tensors of the gated rows."""
    seen: dict[int, dict[str, np.ndarray]] = {}

    def on_step(row: int, latents: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
        if plan.steps[row].gated:
            seen[row] = tensors
        else:
            assert "gate" not in tensors

    return sampled(over_numpy(plan), SEEDS, which, on_step=on_step), seen


@pytest.mark.parametrize("guidance", [None, "none", "cfg", "cfg_sequential"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("seed", range(4))
def test_every_sample_is_decided_as_if_alone(seed: int, gate: str, guidance: str | None) -> None:
    plan = gated_plan(GATES[gate], seed, guidance=guidance)
    plan.validate(("sample", "timestep", "label"))
    got, seen = decided(plan)
    gates: list[dict[int, float]] = []
    if guidance is not None:  # an unguided row compares one half or both, as the rows after it need
        np.testing.assert_array_equal(got, plain_loop(plan, *given(5), SEEDS, gates=gates))
        for row, tensors in seen.items():
            np.testing.assert_allclose(tensors["gate"], [judged[row] for judged in gates], rtol=1e-12)
    for order in ([0], [3], [4, 1], [2, 0, 3]):
        part, alone = decided(plan, order)
        np.testing.assert_array_equal(part, got[order])
        for row, tensors in alone.items():
            np.testing.assert_array_equal(tensors["gate"], seen[row]["gate"][order])
            np.testing.assert_array_equal(tensors["gate_full"], seen[row]["gate_full"][order])


def test_the_plans_above_skip_some_samples_and_not_others() -> None:
    shares = []
    for name, gate in GATES.items():
        decisions = [
            tensors["gate_full"] for seed in range(4) for tensors in decided(gated_plan(gate, seed))[1].values()
        ]
        shares += [float(np.mean(decision)) for decision in decisions]
        assert any(0 < np.mean(decision) < 1 for decision in decisions), name
    assert min(shares) == 0.0
    assert max(shares) == 1.0


def uniform(gate: Gate, rows: int = 6, **more: Any) -> StepPlan:
    """One full row, then gated ones."""
    steps = [
        Step(
            t=3.0,
            x={0: 0.9},
            m={0: -0.1},
            path="shallow" if row else "full",
            write=() if row else ("feature",),
            read={"feature": (1.0,)} if row else {},
            gated=row > 0,
            guidance="cfg",
            guidance_scale=2.0,
        )
        for row in range(rows)
    ]
    return StepPlan(SEGMENTS, PATHS, SLOTS, tuple(steps), gate=gate, **more)


def test_a_threshold_of_nothing_is_the_full_run_and_one_of_everything_the_cached_run() -> None:
    always = uniform(Gate("skip", -1.0, 9))
    full = replace(
        always, steps=tuple(replace(s, gated=False, path="full", read={}, write=("feature",)) for s in always.steps)
    )
    np.testing.assert_array_equal(decided(always)[0], sampled(over_numpy(full), SEEDS))
    never = uniform(Gate("skip", 1e9, 9))
    cached = replace(never, steps=tuple(replace(step, gated=False) for step in never.steps))
    np.testing.assert_array_equal(decided(never)[0], sampled(over_numpy(cached), SEEDS))


def test_no_sample_is_cached_longer_than_max_run() -> None:
    _, seen = decided(uniform(Gate("skip", 1e9, 2), 10))
    full = np.array([seen[row]["gate_full"] for row in range(1, 10)])
    np.testing.assert_array_equal(full, np.tile((np.arange(1, 10) % 3 == 0)[:, None], (1, 5)))


def test_a_must_run_row_begins_the_runs_of_all_samples_again() -> None:
    plan = uniform(Gate("skip", 1e9, 3), 10)
    steps = list(plan.steps)
    steps[2] = replace(steps[0], write=("feature",))
    _, seen = decided(replace(plan, steps=tuple(steps)))
    assert [row for row, tensors in seen.items() if tensors["gate_full"].all()] == [6]


def test_a_cached_row_that_the_gate_does_not_decide_counts_as_cached() -> None:
    plan = uniform(Gate("skip", 1e9, 3), 10)
    steps = list(plan.steps)
    steps[2] = replace(steps[2], gated=False)
    _, seen = decided(replace(plan, steps=tuple(steps)))
    assert [row for row, tensors in seen.items() if tensors["gate_full"].all()] == [4, 8]


def test_only_the_samples_that_move_run_the_deep_segment() -> None:
    calls: list[tuple[str, int]] = []
    plan = gated_plan(GATES["last_full"], 1, guidance="cfg")
    seen: dict[int, np.ndarray] = {}
    sampled(
        over_numpy(plan, counting(FUNCTIONS, calls)),
        SEEDS,
        on_step=lambda row, latents, tensors: seen.update({row: tensors.get("gate_full", np.zeros(0))}),
    )
    full = [10 for step in plan.steps if step.path == "full"]
    deep = [batch for segment, batch in calls if segment == "deep"]
    assert sum(deep) == sum(full) + 2 * sum(int(flags.sum()) for flags in seen.values())
    assert {batch for segment, batch in calls if segment == "entry"} == {10}
    assert {batch for segment, batch in calls if segment == "exit"} > {10}


def test_tensors_of_some_samples_are_left_out() -> None:
    segments = {**SEGMENTS, "deep": Segment(("skip", "label"), ("inner", "up"))}
    functions = {**FUNCTIONS, "deep": lambda tensors: {"inner": tensors["skip"], **FUNCTIONS["deep"](tensors)}}
    plan = replace(gated_plan(GATES["last_full"], 1, guidance="cfg"), segments=segments)
    found: set[bool] = set()

    def on_step(row: int, latents: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
        if plan.steps[row].gated:
            found.add("inner" in tensors)
            assert ("inner" in tensors) == tensors["gate_full"].all()
            assert tensors["up"].shape == tensors["skip"].shape == (10, *SHAPE)

    sampled(over_numpy(plan, functions), SEEDS, on_step=on_step)
    assert found == {True, False}


@pytest.mark.parametrize("lost", ["feature", "residual"])
def test_a_gated_row_whose_slot_cannot_be_read_runs_full(lost: str) -> None:
    plan = uniform(Gate("skip", 1e9, 9))
    plan = replace(plan, steps=(replace(plan.steps[0], write=tuple(SLOTS)), *plan.steps[1:]))
    loop = Loop(plan, look_up(plan, FUNCTIONS), "sample", 1, np.dtype(np.float32))
    labels, negative = given(5)
    seen: list[dict[str, np.ndarray]] = []

    def on_step(row: int, latents: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
        seen.append(tensors)
        if row == 1:
            loop.slots.forget(lost)

    halves = {False: {"label": labels}, True: {"label": np.concatenate([negative, labels])}}
    got = loop.run(noise(SEEDS, 0, SHAPE), halves, lambda draw, shape: noise(SEEDS, draw, shape[1:]), on_step=on_step)
    steps = list(plan.steps)
    if lost == "feature":
        assert loop.fallbacks == [Fallback(2, "feature", "missing")]
        assert np.isnan(seen[2]["gate"]).all()
        assert seen[2]["gate_full"].all()
        steps[2] = replace(steps[0], write=("feature",))
    else:  # nobody reads it
        assert loop.fallbacks == []
    np.testing.assert_array_equal(got, plain_loop(replace(plan, steps=tuple(steps)), labels, negative, SEEDS))


def test_samples_go_on_being_replaced_after_a_fallback() -> None:
    """What a fallback left is what later full samples replace, and what later cached samples read."""
    plan = gated_plan(GATES["last_full"], 1, guidance="cfg")
    steps = list(plan.steps)
    for row in range(1, 14):
        steps[row] = replace(steps[row], path="shallow", read={"feature": (1.0,)}, write=(), gated=True)
    plan = replace(plan, steps=tuple(steps))
    loop = Loop(plan, look_up(plan, FUNCTIONS), "sample", 1, np.dtype(np.float32))
    labels, negative = given(5)

    def on_step(row: int, latents: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
        if row == 3:
            loop.slots.forget("feature")

    halves = {False: {"label": labels}, True: {"label": np.concatenate([negative, labels])}}
    got = loop.run(noise(SEEDS, 0, SHAPE), halves, lambda draw, shape: noise(SEEDS, draw, shape[1:]), on_step=on_step)
    assert loop.fallbacks == [Fallback(4, "feature", "missing")]
    steps[4] = replace(steps[0], t=steps[4].t, x=steps[4].x, m=steps[4].m, noise=steps[4].noise)
    np.testing.assert_array_equal(got, plain_loop(replace(plan, steps=tuple(steps)), labels, negative, SEEDS))


def test_a_row_that_is_full_for_all_samples_fills_what_was_lost() -> None:
    """Nobody reads the lost slot at the gated rows; the row after them does, and need not run full."""
    plan = uniform(Gate("skip", -1.0, 9))
    first = replace(plan.steps[0], write=tuple(SLOTS))
    last = replace(plan.steps[5], gated=False, read={"residual": (1.0,)})
    plan = replace(plan, steps=(first, *plan.steps[1:5], last))
    labels, negative = given(5)
    for guidance in ("cfg", "cfg_sequential"):
        plan = replace(plan, steps=tuple(replace(step, guidance=guidance) for step in plan.steps))
        loop = Loop(plan, look_up(plan, FUNCTIONS), "sample", 1, np.dtype(np.float32))

        def on_step(row: int, latents: np.ndarray, tensors: dict[str, np.ndarray], loop: Loop = loop) -> None:
            if row == 1:
                loop.slots.forget("residual")

        halves = {False: {"label": labels}, True: {"label": np.concatenate([negative, labels])}}
        got = loop.run(noise(SEEDS, 0, SHAPE), halves, lambda k, shape: noise(SEEDS, k, shape[1:]), on_step=on_step)
        assert loop.fallbacks == []
        np.testing.assert_array_equal(got, plain_loop(plan, labels, negative, SEEDS))


def test_what_a_guided_gate_compares_with_has_both_halves() -> None:
    """The unguided full row 1 writes no slot, but is what the guided row 2 compares with."""
    full = Step(3.0, {0: 0.9}, {0: -0.1}, write=("feature",))
    gated = uniform(Gate("skip", 1e9, 9)).steps[1]
    plan = StepPlan(SEGMENTS, PATHS, SLOTS, (full, replace(full, write=()), gated), gate=Gate("skip", 1e9, 9))
    _, seen = decided(plan)
    assert np.isfinite(seen[2]["gate"]).all()
    assert not seen[2]["gate_full"].any()


def test_a_gate_begins_again_where_the_level_rises() -> None:
    """Row 1 computes the watched tensor at another size than the full row before it, and is no full row itself."""
    row = uniform(Gate("skip", 1e9, 9)).steps
    steps = (replace(row[0], level=0.5), replace(row[0], path="other", signal=0.8, sigma=0.6), row[0], *row[1:3])
    gate = Gate("skip", 1e9, 9, "previous")
    plan = StepPlan(SEGMENTS, {**PATHS, "other": ("entry", "deep", "deep", "exit")}, SLOTS, steps, gate=gate)
    _, seen = decided(plan)
    assert [tensors["gate"].shape for tensors in seen.values()] == [(5,), (5,)]
    assert all(np.isfinite(tensors["gate"]).all() for tensors in seen.values())


def test_an_unguided_gated_row_leaves_no_stale_half() -> None:
    """Rows: guided full, unguided gated, then an unguided row that reads the mean of both halves."""
    slots = {"feature": Slot("up", halves="mean")}
    first = Step(3.0, {0: 0.9}, {0: -0.1}, write=("feature",), guidance="cfg", guidance_scale=2.0)
    gated = Step(3.0, {0: 0.9}, {0: -0.1}, path="shallow", read={"feature": (1.0,)}, gated=True)
    last = replace(gated, gated=False)
    plan = StepPlan(SEGMENTS, PATHS, slots, (first, gated, last), gate=Gate("skip", -1.0, 1))
    full = replace(first, guidance="none", guidance_scale=1.0)
    expected = replace(plan, steps=(first, full, last))
    np.testing.assert_array_equal(sampled(over_numpy(plan), SEEDS), sampled(over_numpy(expected), SEEDS))
    guided = replace(last, guidance="cfg", guidance_scale=2.0)
    calls: list[tuple[str, int]] = []
    plan = replace(plan, steps=(first, gated, guided))
    got = sampled(over_numpy(plan, counting(FUNCTIONS, calls)), SEEDS)
    assert {batch for _, batch in calls} == {10}
    np.testing.assert_array_equal(got, sampled(over_numpy(replace(plan, steps=(first, full, guided))), SEEDS))


def test_what_cannot_be_compared_calls_for_a_full_run() -> None:
    state = GateState(Gate("skip", 1e9, 9), 2)
    zeros, ones = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    assert state.judge((ones,))[1].all()
    state.ran_full((np.stack([zeros[0], ones[0]]),))
    values, full = state.judge((ones,))
    assert np.isnan(values[0])
    assert values[1] == 0.0
    np.testing.assert_array_equal(full, [True, False])
    state.resized()
    assert state.judge((ones,))[1].all()


def test_the_metric_is_that_of_both_halves() -> None:
    state = GateState(Gate("skip", 0.5, 9, "previous", (2.0, 1.0)), 1)
    one = np.array([[1.0, -3.0]], np.float32)
    state.ran_full((one, 2 * one))
    values, full = state.judge((one + 1, 2 * one))
    assert values[0] == pytest.approx(2.0 * (2 / 12) + 1.0)
    assert full[0]
    state = GateState(Gate("skip", 5.0, 9, "previous", (2.0, 1.0)), 1)
    state.ran_full((one, 2 * one))
    first, _ = state.judge((one + 1, 2 * one))
    second, _ = state.judge((one + 1, 2 * one + 1))
    assert second[0] == pytest.approx(first[0] + 2.0 * (2 / 12) + 1.0)
    third, _ = state.judge((2 * one + 1,))  # one half: compared with that half
    assert third[0] == pytest.approx(second[0] + 1.0)


def test_a_start_at_a_gated_row_runs_it_in_full() -> None:
    plan = uniform(Gate("skip", 0.3, 2), starts={row: () for row in range(1, 6)})
    late = started_at(plan, 3)
    assert [step.gated for step in late.steps] == [False, True, True]
    assert late.steps[0].path == "full"
    kept = {"image_latents": noise((9,), 0, SHAPE), "start_step": 3}
    assert np.isfinite(sampled(over_numpy(plan), SEEDS, **kept)).all()


def test_late_starts_may_carry_the_first_latent() -> None:
    plan = uniform(Gate("skip", 0.3, 2), starts={2: (Update({0: 0.5}, {0: 0.1}, initial=0.25),)})
    assert started_at(plan, 2).steps[0].initial == 0.25


def edited(row: int | None = None, **more: Any) -> Callable[[StepPlan], StepPlan]:
    def edit(plan: StepPlan) -> StepPlan:
        if row is None:
            return replace(plan, **more)
        steps = list(plan.steps)
        steps[row] = replace(steps[row], **more)
        return replace(plan, steps=tuple(steps))

    return edit


REFUSED: dict[str, tuple[Callable[[StepPlan], StepPlan], str]] = {
    "no gate": (edited(gate=None), "step 1 is gated, but the plan has no gate"),
    "unknown reference": (edited(gate=Gate("skip", 0.1, 1, "first")), "unknown reference 'first'"),  # type: ignore[arg-type]
    "no threshold": (edited(gate=Gate("skip", float("nan"), 1)), "needs a finite threshold"),
    "no polynomial": (edited(gate=Gate("skip", 0.1, 1, polynomial=())), "a polynomial of finite coefficients"),
    "infinite polynomial": (edited(gate=Gate("skip", 0.1, 1, polynomial=(float("inf"),))), "of finite coefficients"),
    "no runs": (edited(gate=Gate("skip", 0.1, 0)), "allows runs of 0 cached calls"),
    "unknown tensor": (edited(gate=Gate("mid", 0.1, 1)), "the gate watches 'mid', which no segment computes"),
    "name of a decision": (
        edited(segments={**SEGMENTS, "deep": Segment(("skip", "label"), ("gate", "up"))}, paths=PATHS),
        "a segment computes 'gate'",
    ),
    "reads nothing": (edited(2, path="full", read={}), "step 2 is gated, but it reads no slot"),
    "writes": (edited(2, write=("output",)), "step 2 is gated, so it writes what the full path fills by itself"),
    "nothing to compare with": (
        edited(0, path="whole", write=("feature",)),
        "no full step before it gives the gate something to compare with",
    ),
    "skipped rows are not full": (
        lambda plan: edited(1, path="full", read={"output": (1.0,)}, gated=False)(
            edited(0, path="whole", write=("feature", "output"))(plan)
        ),
        "step 2 is gated, but no full step before it",
    ),
    "deep tensor": (edited(gate=Gate("up", 0.1, 1)), "do not begin with the same segments"),
    "output slot": (edited(2, read={"output": (1.0,)}), "takes its network output from slot 'output'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_gates_that_cannot_be_are_refused(name: str) -> None:
    edit, message = REFUSED[name]
    plan = uniform(Gate("skip", 0.1, 1))
    slots = {**SLOTS, "output": Slot("out", "output")}
    segments = {**SEGMENTS, "whole": Segment(("sample",), ("skip", "up", "out"))}
    paths = {**PATHS, "whole": ("whole",)}
    first = replace(plan.steps[0], write=("feature", "output"))
    plan = replace(plan, slots=slots, paths=paths, segments=segments, steps=(first, *plan.steps[1:]))
    plan.validate()
    with pytest.raises(StepPlanError) as caught:
        edit(plan).validate()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_denoiser_that_is_one_segment_per_path_has_no_gate() -> None:
    segments = {
        "whole": Segment(("sample", "timestep", "label"), ("skip", "up", "out")),
        "rest": Segment(("sample", "timestep", "label", "up"), ("skip", "out")),
    }
    plan = replace(
        uniform(Gate("skip", 0.1, 1)),
        segments=segments,
        paths={"full": ("whole",), "shallow": ("rest",)},
        slots={"feature": Slot("up")},
    )
    with pytest.raises(StepPlanError, match="path 'shallow' and path 'full' do not begin with the same segments up to"):
        plan.validate()


def test_the_watched_tensor_comes_before_any_slot() -> None:
    plan = uniform(Gate("skip", 0.1, 1))
    segments = {**SEGMENTS, "entry": Segment(("sample", "timestep", "label", "up"), ("skip",))}
    with pytest.raises(StepPlanError, match="before any slot is read"):
        replace(plan, segments=segments).validate()


def test_forecasts_from_several_values_and_gates_exclude_each_other() -> None:
    plan = uniform(Gate("skip", 0.1, 1))
    steps = list(plan.steps)
    steps[1] = replace(steps[0])
    steps[2] = replace(steps[2], read={"feature": (1.5, -0.5)})
    with pytest.raises(
        StepPlanError, match="step 2 is gated, so it can only reuse slot 'feature', not forecast from 2"
    ):
        replace(plan, steps=tuple(steps)).validate()
    steps[2] = replace(plan.steps[2])
    steps[3] = replace(plan.steps[3], gated=False, read={"feature": (1.5, -0.5)})
    with pytest.raises(StepPlanError, match="step 3 forecasts from 2 values of slot 'feature', some of which the gate"):
        replace(plan, steps=tuple(steps)).validate()
    steps[3:5] = [replace(steps[0]), replace(steps[0])]
    steps[5] = replace(plan.steps[5], gated=False, read={"feature": (1.5, -0.5)})
    replace(plan, steps=tuple(steps)).validate()


def test_a_gated_row_is_not_in_a_span() -> None:
    plan = uniform(Gate("skip", 0.1, 1))
    with pytest.raises(StepPlanError, match="step 1 cannot span 2 rows: step 1 is gated"):
        edited(1, span=2)(plan).validate()


def test_gates_survive_json_and_wrong_types_do_not() -> None:
    for gate in (*GATES.values(), None):
        plan = gated_plan(gate, 0) if gate else replace(uniform(GATES["last_full"], 1), gate=None)
        assert StepPlan.from_json(plan.to_json()) == plan
    raw = json.loads(uniform(GATES["polynomial"]).to_json())
    for key, wrong in (
        ("tensor", 3),
        ("threshold", "0.1"),
        ("threshold", True),
        ("max_run", 1.5),
        ("max_run", True),
        ("polynomial", 1.0),
        ("polynomial", ["1"]),
        ("reference", 3),
        ("more", 1),
    ):
        with pytest.raises(StepPlanError):
            StepPlan.from_json(json.dumps({**raw, "gate": {**raw["gate"], key: wrong}}))
    for wrong_gate in ("skip", [], 1):
        with pytest.raises(StepPlanError):
            StepPlan.from_json(json.dumps({**raw, "gate": wrong_gate}))
    for wrong_flag in (1, "true", None):
        raw["steps"][1]["gated"] = wrong_flag
        with pytest.raises(StepPlanError, match="neither true nor false"):
            StepPlan.from_json(json.dumps(raw))
