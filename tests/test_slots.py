"""Slots: stamped rings that give what the plan counts on or nothing, and the rows that then run the full path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from export.loop import Loop
from export.memory import Fallback
from export.noise import noise
from export.program import look_up
from export.slots import Slots
from export.step_plan import Segment, Slot, Step, StepPlan
from tests.plain import (
    FUNCTIONS,
    PATHS,
    SEGMENTS,
    SHAPE,
    counting,
    given,
    over_numpy,
    plain_loop,
    random_plan,
    sampled,
)

SLOTS = {"feature": Slot("up", history=2), "residual": Slot("up", "residual", base="skip", history=2)}
SEEDS = (1, 2, 3)
FLOAT = np.dtype(np.float32)


def slots() -> Slots:
    made = Slots({"a": Slot("up", history=2), "b": Slot("up")})
    made.begin()
    return made


def put(made: Slots, name: str, row: int, value: float, shape: tuple[int, ...] = (2, 3)) -> np.ndarray:
    array = made.write(name, row, shape, FLOAT)
    array[...] = value
    return array


def test_a_ring_gives_the_newest_first_and_uses_its_buffers_again() -> None:
    made = slots()
    first, second, third = (put(made, "a", row, value) for row, value in ((0, 1.0), (3, 2.0), (4, 3.0)))
    assert third is first
    assert second is not first
    found = made.find("a", (4, 3), (2,))
    assert [float(array[0, 0]) for array in found if isinstance(array, np.ndarray)] == [3.0, 2.0]
    made.begin()
    assert put(made, "a", 0, 9.0) is second


def test_what_the_plan_does_not_count_on_is_not_given() -> None:
    made = slots()
    assert made.find("a", (0,), (2,)) == "missing"
    put(made, "a", 0, 1.0)
    assert made.find("a", (1,), (2,)) == "stale"
    assert made.find("a", (0, 0), (2,)) == "missing"
    assert made.find("a", (0,), (4,)) == "shape"
    put(made, "a", 1, 1.0, (2, 4))
    assert made.find("a", (1,), (2,)) == "shape"
    made.forget("a")
    assert made.find("a", (1,), (2,)) == "missing"
    put(made, "b", 0, 1.0)
    made.begin()
    assert made.find("b", (0,), (2,)) == "stale"


def test_an_unplanned_value_serves_reuse_alone_and_pushes_nothing_out() -> None:
    made = slots()
    put(made, "a", 0, 1.0)
    put(made, "a", 1, 2.0)
    made.write_unplanned("a", 2, (2, 3), FLOAT)[...] = 5.0
    found = made.find("a", (1, 0), (2,))
    assert [float(array[0, 0]) for array in found if isinstance(array, np.ndarray)] == [2.0, 1.0]
    made.forget("a")
    made.write_unplanned("a", 2, (2, 3), FLOAT)[...] = 5.0
    assert made.find("a", (1,), (2,)) == "missing"
    assert made.find("a", (3,), (2,), reuse=True) == "missing"
    found = made.find("a", (1,), (2,), reuse=True)
    assert isinstance(found, list)
    assert float(found[0][0, 0]) == 5.0
    made.begin()
    assert made.find("a", (1,), (2,), reuse=True) == "missing"


Tamper = Callable[[Slots, int, tuple[int, ...]], None]


def forget(made: Slots, row: int, shape: tuple[int, ...]) -> None:
    made.forget("feature")


def another_run(made: Slots, row: int, shape: tuple[int, ...]) -> None:
    made.begin()


def another_row(made: Slots, row: int, shape: tuple[int, ...]) -> None:
    made.write("feature", 77, shape, FLOAT)[...] = 100.0


def another_shape(made: Slots, row: int, shape: tuple[int, ...]) -> None:
    made.write("feature", row, (*shape[:-1], shape[-1] - 1), FLOAT)[...] = 100.0


def another_batch(made: Slots, row: int, shape: tuple[int, ...]) -> None:
    made.write("feature", row, (shape[0] - 1, *shape[1:]), FLOAT)[...] = 100.0


CAUSES: dict[str, tuple[Tamper, str]] = {
    "missing": (forget, "missing"),
    "another run": (another_run, "stale"),
    "another row": (another_row, "stale"),
    "another shape": (another_shape, "shape"),
    "another batch": (another_batch, "shape"),
}


def cached_plan(full: dict[int, bool], read: tuple[float, ...], rows: int, guidance: Any = "cfg") -> StepPlan:
    """Full rows, which write both slots or none, and shallow ones that forecast from `feature`."""
    steps, written = [], 0
    for row in range(rows):
        alphas = read if written >= len(read) else (1.0,)
        step = Step(
            t=float(row),
            x={0: 0.9, **({1: 0.05} if row else {})},
            m={0: -0.2, **({1: 0.1} if row else {})},
            noise=0.1 if row % 2 else 0.0,
            path="full" if row in full else "shallow",
            write=tuple(SLOTS) if full.get(row) else (),
            read={} if row in full else {"feature": alphas},
            guidance=guidance,
            guidance_scale=2.5 if guidance != "none" else 1.0,
        )
        written += len(step.write) > 0
        steps.append(step)
    return StepPlan(SEGMENTS, PATHS, SLOTS, tuple(steps))


def tampered(plan: StepPlan, tamper: Tamper, after: int, calls: list[tuple[str, int]]) -> tuple[np.ndarray, Loop]:
    """Sample with the slots interfered with after one row."""
    labels, negative = given(len(SEEDS))
    both = {"label": np.concatenate([negative, labels])}
    loop = Loop(plan, look_up(plan, counting(FUNCTIONS, calls)), "sample", 1, FLOAT)
    size = (2 if plan.steps[0].guidance != "none" else 1) * len(SEEDS)

    def on_step(row: int, latents: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
        if row == after:
            writers = [at for at, step in enumerate(plan.steps[: after + 1]) if "feature" in step.write]
            tamper(loop.slots, writers[-1], (size, *SHAPE))

    got = loop.run(
        noise(SEEDS, 0, SHAPE),
        {False: {"label": labels}, True: both},
        lambda draw, shape: noise(SEEDS, draw, shape[1:]),
        on_step=on_step,
    )
    return got, loop


@pytest.mark.parametrize("guidance", ["cfg", "cfg_sequential", "none"])
@pytest.mark.parametrize("name", CAUSES)
def test_a_row_that_cannot_read_its_slot_runs_the_full_path(name: str, guidance: str) -> None:
    tamper, cause = CAUSES[name]
    plan = cached_plan({0: True, 3: True}, (1.0,), 6, guidance)
    calls: list[tuple[str, int]] = []
    got, loop = tampered(plan, tamper, 1, calls)
    assert loop.fallbacks == [Fallback(2, "feature", cause)]
    halves = 2 if guidance == "cfg_sequential" else 1
    assert [segment for segment, _ in calls].count("deep") == 3 * halves
    for slot in SLOTS:  # it wrote what the full path can write, the slot that nobody read included
        assert loop.slots._unplanned[slot].row == 2
    instead = cached_plan({0: True, 2: False, 3: True}, (1.0,), 6, guidance)
    np.testing.assert_array_equal(got, plain_loop(instead, *given(3), SEEDS))


def test_what_the_full_path_left_is_reused_by_the_next_rows() -> None:
    plan = cached_plan({0: True, 3: True}, (1.0,), 6)
    got, loop = tampered(plan, forget, 0, [])
    assert [fallback.row for fallback in loop.fallbacks] == [1]
    instead = cached_plan({0: True, 1: True, 3: True}, (1.0,), 6)
    np.testing.assert_array_equal(got, plain_loop(instead, *given(3), SEEDS))


def test_forecasts_begin_again_once_their_values_are_there() -> None:
    """Rows 2 and 3 lack a value of row 1, row 5 still does; row 7 has those of rows 6 and 4."""
    plan = cached_plan({0: True, 1: True, 4: True, 6: True}, (1.5, -0.5), 9)
    got, loop = tampered(plan, forget, 1, [])
    assert [fallback.row for fallback in loop.fallbacks] == [2, 3, 5]
    instead = cached_plan({0: True, 1: True, 2: False, 3: False, 4: True, 5: False, 6: True}, (1.5, -0.5), 9)
    np.testing.assert_array_equal(got, plain_loop(instead, *given(3), SEEDS))


def test_an_output_slot_that_cannot_be_read_runs_the_network() -> None:
    steps = [
        Step(1.0, {0: 1.0}, {0: -0.5}, write=("feature",)),
        Step(2.0, {0: 1.0}, {0: -0.5}, read={"feature": (1.0,)}),
    ]
    plan = StepPlan(SEGMENTS, PATHS, {"feature": Slot("out", "output")}, tuple(steps))
    got, loop = tampered(plan, forget, 0, [])
    assert loop.fallbacks == [Fallback(1, "feature", "missing")]
    instead = replace(plan, steps=(steps[0], replace(steps[1], read={})))
    np.testing.assert_array_equal(got, plain_loop(instead, *given(3), SEEDS))


def test_runs_use_buffers_again_and_never_each_others_values() -> None:
    runtime = over_numpy(random_plan(7))
    plain = over_numpy(random_plan(7))
    first = sampled(runtime, SEEDS)
    for seeds in ((4, 5), (6, 7, 8, 9), SEEDS):
        np.testing.assert_array_equal(sampled(runtime, seeds), sampled(over_numpy(random_plan(7)), seeds))
    np.testing.assert_array_equal(sampled(plain, SEEDS), first)
    assert len(runtime._idle_slots) == 1
    assert runtime.fallbacks == 0


def test_a_run_that_fails_leaves_nothing_behind() -> None:
    plan = cached_plan({0: True, 3: True}, (1.0,), 6)
    runtime = over_numpy(plan)

    def stop(row: int, latents: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
        if row == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampled(runtime, (8, 9, 10), on_step=stop)
    np.testing.assert_array_equal(sampled(runtime, SEEDS), plain_loop(plan, *given(3), SEEDS))
    assert runtime.fallbacks == 0


def test_the_runtime_counts_its_fallbacks() -> None:
    runtime = over_numpy(cached_plan({0: True, 3: True}, (1.0,), 6))
    sampled(runtime, SEEDS)
    made = runtime._idle_slots[0]

    def on_step(row: int, latents: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
        if row in (0, 4):
            made.forget("feature")

    sampled(runtime, SEEDS, on_step=on_step)
    assert runtime.fallbacks == 2


@pytest.mark.parametrize("kind", ["feature", "residual"])
@pytest.mark.parametrize("halves", ["each", "mean"])
def test_a_conditional_row_reads_its_own_half_or_the_mean_of_both(halves: Any, kind: Any) -> None:
    """T-GATE: from the gate row on, cross-attention gives the mean of the guidance halves."""
    slot = Slot("up", kind, base="skip" if kind == "residual" else None, history=2, halves=halves)
    rows = [Step(t=float(k), x={0: 0.9}, m={0: -0.2}, write=("s",), guidance="cfg", guidance_scale=2.5) for k in (0, 1)]
    read = Step(t=2.0, x={0: 0.9}, m={0: -0.2}, path="shallow", read={"s": (1.5, -0.5)})
    guided = replace(read, guidance="cfg", guidance_scale=2.5)
    plan = StepPlan(SEGMENTS, PATHS, {"s": slot}, (*rows, guided, read))
    seen: list[dict[str, np.ndarray]] = []
    calls: list[tuple[str, int]] = []
    sampled(over_numpy(plan, counting(FUNCTIONS, calls)), SEEDS, on_step=lambda row, x, tensors: seen.append(tensors))
    assert calls[-1] == ("exit", 3)
    kept = [tensors["up"] - tensors["skip"] if kind == "residual" else tensors["up"] for tensors in seen[:2]]
    values = [0.5 * (value[:3] + value[3:]) if halves == "mean" else value[3:] for value in kept]
    base = seen[3]["skip"] if kind == "residual" else 0.0
    np.testing.assert_allclose(seen[3]["up"], base + 1.5 * values[1] - 0.5 * values[0], rtol=1e-5, atol=1e-6)
    whole = 1.5 * kept[1] - 0.5 * kept[0] + (seen[2]["skip"] if kind == "residual" else 0.0)
    np.testing.assert_allclose(seen[2]["up"], whole, rtol=1e-5, atol=1e-6)  # a guided row reads both halves


def test_the_mean_of_a_slot_that_one_half_wrote_is_that_half() -> None:
    rows = (
        Step(1.0, {0: 0.9}, {0: -0.2}, write=("s",)),
        Step(2.0, {0: 0.9}, {0: -0.2}, path="shallow", read={"s": (1.0,)}),
    )
    plans = [StepPlan(SEGMENTS, PATHS, {"s": Slot("up", halves=halves)}, rows) for halves in ("each", "mean")]
    np.testing.assert_array_equal(*(sampled(over_numpy(plan), SEEDS) for plan in plans))


def test_a_slot_keeps_its_value_while_its_row_hands_it_on() -> None:
    """A row reads and writes one slot, and its functions hand the value read on as the network output."""
    segments = {
        "first": Segment(("sample",), ("kept",)),
        "hold": Segment(("kept",), ("held",)),
        "last": Segment(("sample", "timestep", "held"), ("kept", "out")),
    }
    passing = {
        "first": lambda tensors: {"kept": tensors["sample"] * 0},
        "hold": lambda tensors: {"held": tensors["kept"]},
        "last": lambda tensors: {"kept": tensors["sample"] * 0 - tensors["timestep"][0], "out": tensors["held"]},
    }
    paths = {"full": ("first", "hold", "last"), "short": ("hold", "last")}
    rows = [Step(float(row + 1), {}, {0: 1.0}, path="short", read={"s": (1.0,)}, write=("s",)) for row in range(4)]
    rows[0] = replace(rows[0], path="full", read={})
    rows[1] = replace(rows[1], write=())
    seen: list[float] = []
    runtime = over_numpy(StepPlan(segments, paths, {"s": Slot("kept")}, tuple(rows)), passing)
    sampled(runtime, SEEDS, on_step=lambda row, latents, tensors: seen.append(float(latents.flat[0])))
    assert seen == [0.0, -1.0, -1.0, -3.0]


def test_a_row_of_two_halves_reads_each_whatever_the_slot_gives_one_half() -> None:
    plans = []
    for guidance in ("cfg", "cfg_sequential"):
        plan = cached_plan({0: True, 3: True}, (1.0,), 6, guidance)
        plans.append(replace(plan, slots={name: replace(slot, halves="mean") for name, slot in SLOTS.items()}))
    np.testing.assert_array_equal(*(sampled(over_numpy(plan), SEEDS) for plan in plans))


def test_every_run_of_a_loop_is_another() -> None:
    plan = cached_plan({0: True, 3: True}, (1.0,), 6)
    labels, negative = given(3)
    loop = Loop(plan, look_up(plan, FUNCTIONS), "sample", 1, FLOAT)
    halves = {False: {"label": labels}, True: {"label": np.concatenate([negative, labels])}}
    for run in (1, 2):
        loop.run(noise(SEEDS, 0, SHAPE), halves, lambda draw, shape: noise(SEEDS, draw, shape[1:]))
        assert loop.slots.run == run
