"""Spans: rows whose network calls run as one batch, against the same rows one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from export.loop import Loop
from export.memory import Fallback
from export.noise import noise
from export.program import look_up
from export.runtime import RuntimeInputError
from export.start import started_at
from export.step_plan import Segment, Slot, Step, StepPlan, StepPlanError, Update
from tests.plain import (
    SHAPE,
    SPLIT_FUNCTIONS,
    SPLIT_PATHS,
    SPLIT_SEGMENTS,
    SPLIT_SLOTS,
    counting,
    given,
    over_numpy,
    plain_loop,
    random_update,
    sampled,
)

SEEDS = (1, 2, 3)
CONDITIONING = ("sample", "timestep", "label")


def split_plan(seed: int, rows: int = 12, guidance: str | None = None) -> StepPlan:
    """Full rows, and spans of one to four decoder rows that read one slot with coefficients of their own."""
    rng = np.random.default_rng(seed)
    steps: list[Step] = []
    while len(steps) < rows:
        if len(steps) < 2 or rng.random() < 0.3:
            steps.append(_row(rng, len(steps), guidance, write=tuple(SPLIT_SLOTS)))
            continue
        span = int(rng.integers(1, min(4, rows - len(steps)) + 1))
        name = str(rng.choice(list(SPLIT_SLOTS)))
        mode = guidance or str(rng.choice(["none", "cfg"]))
        for at in range(span):
            alphas = (1.0,) if rng.random() < 0.3 else tuple(rng.normal(size=int(rng.integers(1, 3))).tolist())
            row = _row(rng, len(steps), mode, path="decoder", read={name: alphas})
            steps.append(replace(row, span=span if at == 0 else 1))
    return StepPlan(SPLIT_SEGMENTS, SPLIT_PATHS, SPLIT_SLOTS, tuple(steps), init_noise_sigma=1.5)


def _row(rng: np.random.Generator, row: int, guidance: str | None, **more: Any) -> Step:
    fields = random_update(rng, row)
    mode = guidance or fields["guidance"]
    scale = 1.0 if mode == "none" else 2.5
    return Step(
        **{**fields, "guidance": mode, "guidance_scale": scale, "initial": float(rng.choice([0.0, 0.05])), **more}
    )


def one_by_one(plan: StepPlan) -> StepPlan:
    return replace(plan, steps=tuple(replace(step, span=1) for step in plan.steps))


def sample(plan: StepPlan, calls: list[tuple[str, int]] | None = None, **more: Any) -> np.ndarray:
    functions = SPLIT_FUNCTIONS if calls is None else counting(SPLIT_FUNCTIONS, calls)
    return sampled(over_numpy(plan, functions), SEEDS, **more)


@pytest.mark.parametrize("guidance", [None, "none", "cfg", "cfg_sequential"])
@pytest.mark.parametrize("seed", range(12))
def test_a_span_is_its_rows_one_by_one(seed: int, guidance: str | None) -> None:
    plan = split_plan(seed, guidance=guidance)
    plan.validate(CONDITIONING)
    expected = sample(one_by_one(plan))
    np.testing.assert_array_equal(sample(plan), expected)
    np.testing.assert_array_equal(plain_loop(plan, *given(3), SEEDS, SPLIT_FUNCTIONS), expected)


@pytest.mark.parametrize("seed", range(4))
def test_on_step_sees_every_row_of_a_span(seed: int) -> None:
    plan = split_plan(seed)
    assert any(step.span > 1 for step in plan.steps)
    seen: list[list[tuple[int, np.ndarray, dict[str, np.ndarray]]]] = [[], []]
    for kept, each in zip(seen, (plan, one_by_one(plan)), strict=True):
        sample(each, on_step=lambda row, latents, tensors, kept=kept: kept.append((row, latents, tensors)))
    assert [row for row, _, _ in seen[0]] == list(range(12))
    for (_, latents, tensors), (_, expected, whole) in zip(*seen, strict=True):
        np.testing.assert_array_equal(latents, expected)
        assert tensors.keys() == whole.keys()
        for name, value in whole.items():
            np.testing.assert_array_equal(tensors[name], value)


def fixed(spans: Mapping[int, int], rows: int = 8, **more: Any) -> StepPlan:
    """Rows 0 and 1 are full, the others decoder rows."""
    steps = [
        Step(
            t=float(row),
            x={0: 0.9},
            m={0: -0.2},
            path="full" if row < 2 else "decoder",
            write=("mid",) if row < 2 else (),
            read={} if row < 2 else {"mid": (1.5, -0.5)},
            guidance="cfg",
            guidance_scale=2.0,
            span=spans.get(row, 1),
        )
        for row in range(rows)
    ]
    return StepPlan(SPLIT_SEGMENTS, SPLIT_PATHS, SPLIT_SLOTS, tuple(steps), **more)


def test_a_span_is_one_batch() -> None:
    calls: list[tuple[str, int]] = []
    sample(fixed({2: 4}), calls)
    assert [batch for segment, batch in calls if segment == "decoder"] == [6, 6, 24, 6, 6]


def test_a_span_of_samples_does_not_mix_them() -> None:
    plan = split_plan(3)
    together = sampled(over_numpy(plan, SPLIT_FUNCTIONS), (10, 2, 33, 4))
    for order in ([0], [3], [2, 0]):
        part = sampled(over_numpy(plan, SPLIT_FUNCTIONS), (10, 2, 33, 4), order)
        np.testing.assert_array_equal(part, together[order])


def test_inpainting_goes_through_a_span() -> None:
    plan = fixed({2: 4})
    plan = replace(plan, steps=tuple(replace(step, signal=0.6, sigma=0.8) for step in plan.steps))
    kept: dict[str, Any] = {
        "image_latents": noise((9,), 0, SHAPE),
        "mask": np.float32(noise((8,), 0, (1, *SHAPE[1:])) > 0),
    }
    np.testing.assert_array_equal(sample(plan, **kept), sample(one_by_one(plan), **kept))


@pytest.mark.parametrize("start", range(1, 8))
def test_a_start_inside_a_span_cuts_it_again(start: int) -> None:
    updates = {row: (Update({0: 0.8}, {0: -0.1}, initial=0.05),) for row in range(1, 8)}
    plan = fixed({2: 3, 5: 3}, starts=updates)
    late = started_at(plan, start)
    expected = {1: [1, 3, 1, 1, 3, 1, 1], 2: [1, 2, 1, 3, 1, 1], 3: [1, 1, 3, 1, 1], 4: [1, 3, 1, 1], 5: [1, 2, 1]}
    assert [step.span for step in late.steps] == expected.get(start, [1, 1][: 8 - start])
    assert late.steps[0].path == "full"
    assert late.steps[0].initial == 0.05
    image = noise((9,), 0, SHAPE)
    calls: list[tuple[str, int]] = []
    got = sample(plan, calls, image_latents=image, start_step=start)
    np.testing.assert_array_equal(got, sample(one_by_one(plan), image_latents=image, start_step=start))
    assert [batch // 6 for segment, batch in calls if segment == "decoder"] == _batches(late)


def _batches(plan: StepPlan) -> list[int]:
    spans, at = [], 0
    while at < len(plan.steps):
        spans.append(plan.steps[at].span)
        at += spans[-1]
    return spans


@pytest.mark.parametrize("lost", range(1, 6))
def test_a_span_whose_slots_cannot_be_read_runs_full_rows(lost: int) -> None:
    plan = fixed({2: 5})
    plan = replace(plan, steps=tuple(replace(s, read={"mid": (1.0,)}) if s.read else s for s in plan.steps))
    loop = Loop(plan, look_up(plan, SPLIT_FUNCTIONS), "sample", 1, np.dtype(np.float32))
    labels, negative = given(3)

    def on_step(row: int, latents: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
        if row == lost:
            loop.slots.forget("mid")

    halves = {False: {"label": labels}, True: {"label": np.concatenate([negative, labels])}}
    got = loop.run(noise(SEEDS, 0, SHAPE), halves, lambda draw, shape: noise(SEEDS, draw, shape[1:]), on_step=on_step)
    full = 2 if lost == 1 else 7  # the batch of the span has run when its rows are told
    assert loop.fallbacks == [Fallback(full, "mid", "missing")]
    instead = list(plan.steps)
    instead[full] = replace(instead[full], read={}, path="full", write=("mid",))
    expected = plain_loop(replace(plan, steps=tuple(instead)), labels, negative, SEEDS, SPLIT_FUNCTIONS)
    np.testing.assert_array_equal(got, expected)


def test_a_span_ends_before_a_row_whose_slots_cannot_be_read() -> None:
    """The older of two values is lost; every second row reads the newer one alone."""
    plan = fixed({2: 4})
    steps = [replace(step, read={"mid": (1.0,)}) if row in (2, 3, 5) else step for row, step in enumerate(plan.steps)]
    plan = replace(plan, steps=tuple(steps[:6]))
    labels, negative = given(3)
    calls: list[tuple[str, int]] = []
    loop = Loop(plan, look_up(plan, counting(SPLIT_FUNCTIONS, calls)), "sample", 1, np.dtype(np.float32))

    def on_step(row: int, latents: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
        if row == 1:
            loop.slots._rings["mid"][1].row = 77

    halves = {False: {"label": labels}, True: {"label": np.concatenate([negative, labels])}}
    got = loop.run(noise(SEEDS, 0, SHAPE), halves, lambda draw, shape: noise(SEEDS, draw, shape[1:]), on_step=on_step)
    assert loop.fallbacks == [Fallback(4, "mid", "stale")]
    assert [batch for segment, batch in calls if segment == "decoder"] == [6, 6, 12, 6, 6]
    steps[4] = replace(steps[4], read={}, path="full")
    expected = plain_loop(replace(plan, steps=tuple(steps[:6])), labels, negative, SEEDS, SPLIT_FUNCTIONS)
    np.testing.assert_array_equal(got, expected)


def test_a_scalar_timestep_forbids_spans_that_take_it() -> None:
    with pytest.raises(RuntimeInputError, match="step 2 spans 3 rows, but this denoiser takes one timestep"):
        over_numpy(fixed({2: 3}), SPLIT_FUNCTIONS, timestep_rank=0)
    over_numpy(fixed({}), SPLIT_FUNCTIONS, timestep_rank=0)
    timeless = {**SPLIT_SEGMENTS, "embed": Segment(("label",), ("emb",))}
    functions = {**SPLIT_FUNCTIONS, "embed": lambda tensors: {"emb": np.cos(tensors["label"])}}
    results = [
        sampled(over_numpy(replace(fixed(spans), segments=timeless), functions, timestep_rank=0), SEEDS)
        for spans in ({2: 3}, {})
    ]
    np.testing.assert_array_equal(*results)


def test_a_tensor_without_a_batch_axis_is_refused() -> None:
    functions = {**SPLIT_FUNCTIONS, "embed": lambda tensors: {"emb": SPLIT_FUNCTIONS["embed"](tensors)["emb"][:1]}}
    with pytest.raises(StepPlanError, match=r"'emb' has the shape \(1, 1, 1, 1\), not 18 entries"):
        sampled(over_numpy(fixed({2: 3}), functions), SEEDS, on_step=lambda row, latents, tensors: None)


def changed(row: int, **more: Any) -> StepPlan:
    plan = fixed({2: 3})
    steps = list(plan.steps)
    steps[row] = replace(steps[row], **more)
    return replace(plan, steps=tuple(steps))


WITH_LATENT = {**SPLIT_SEGMENTS, "embed": Segment(("timestep", "label", "sample"), ("emb",))}
TWO_SLOTS = {"mid_emb": (1.0,)}
REFUSED: dict[str, tuple[StepPlan, str]] = {
    "another path": (changed(3, path="full", read={}), "step 2 cannot span 3 rows: step 3 runs path 'full'"),
    "other slots": (changed(4, read=TWO_SLOTS), "which holds 0"),
    "guidance": (changed(3, guidance="none"), "step 3 batches its guidance halves otherwise"),
    "sequential": (changed(3, guidance="cfg_sequential"), "step 3 batches its guidance halves otherwise"),
    "writes": (changed(3, path="full", read={}, write=("mid",)), "step 3 writes slot 'mid'"),
    "first writes": (changed(2, path="full", read={}, write=("mid",)), "step 2 writes slot 'mid'"),
    "latent": (replace(fixed({2: 3}), segments=WITH_LATENT), "segment 'embed' of path 'decoder' takes the latent"),
    "full": (fixed({0: 2}), "step 0 cannot span 2 rows: step 0 writes slot 'mid'"),
    "inside": (changed(3, span=2), "step 3 begins a span inside the span of step 2"),
    "beyond": (fixed({6: 3}), "step 6 spans 3 rows, beyond the end of the plan"),
    "nothing": (changed(3, span=0), "step 3 spans 0 rows"),
    "output slot": (
        StepPlan(
            SPLIT_SEGMENTS,
            SPLIT_PATHS,
            {"out": Slot("out", "output")},
            (
                Step(1.0, {}, {0: 1.0}, write=("out",)),
                Step(1.0, {}, {0: 1.0}, read={"out": (1.0,)}, path="decoder", span=2),
                Step(1.0, {}, {0: 1.0}, read={"out": (1.0,)}, path="decoder"),
            ),
        ),
        "a row that takes its network output from a slot makes no call",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_spans_that_cannot_be_are_refused(name: str) -> None:
    plan, message = REFUSED[name]
    with pytest.raises(StepPlanError) as caught:
        plan.validate()
    assert message in str(caught.value)


def test_rows_that_read_other_slots_do_not_span() -> None:
    plan = changed(3, read=TWO_SLOTS)
    steps = [replace(step, write=tuple(SPLIT_SLOTS)) if step.write else step for step in plan.steps]
    with pytest.raises(StepPlanError, match="step 2 cannot span 3 rows: step 3 reads other slots"):
        replace(plan, steps=tuple(steps)).validate()


def test_the_latent_may_have_another_name() -> None:
    plan = replace(fixed({2: 3}), segments=WITH_LATENT)
    plan.validate(latent_input="other")
    with pytest.raises(StepPlanError, match="takes the latent 'label'"):
        fixed({2: 3}).validate(latent_input="label")
    with pytest.raises(StepPlanError, match="takes the latent 'label'"):
        over_numpy(fixed({2: 3}), SPLIT_FUNCTIONS, latent_input="label")


def test_spans_survive_json() -> None:
    plan = fixed({2: 3, 5: 2})
    assert StepPlan.from_json(plan.to_json()) == plan
    raw = json.loads(plan.to_json())
    for wrong in (2.0, True, "2", None):
        raw["steps"][2]["span"] = wrong
        with pytest.raises(StepPlanError, match="is not a whole number"):
            StepPlan.from_json(json.dumps(raw))
