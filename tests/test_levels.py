"""Levels: runs that begin with a smaller latent, and the rows where it grows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from export.noise import noise
from export.resample import RISE, fits, level_size, resample
from export.runtime import LatentSpec, Runtime, RuntimeInputError
from export.start import started_at
from export.step_plan import Gate, Segment, Step, StepPlan, StepPlanError, Update
from tests.plain import (
    FUNCTIONS,
    PATHS,
    SEGMENTS,
    SHAPE,
    SLOTS,
    given,
    over_numpy,
    plain_loop,
    random_update,
    sampled,
)

SEEDS = (1, 2, 3)


def levelled(seed: int, levels: tuple[float, ...] = (0.25,) * 3 + (0.5,) * 4 + (1.0,) * 5) -> StepPlan:
    """Rows with memory and slots, which begin anew wherever the level rises."""
    rng = np.random.default_rng(seed)
    steps: list[Step] = []
    since = 0
    for row, level in enumerate(levels):
        since = 0 if row == 0 or level > levels[row - 1] else since + 1
        fields = random_update(rng, row, since) | {"level": level, "signal": 0.8, "sigma": 0.6}
        if since and rng.random() < 0.5:
            count = int(rng.integers(1, min(since, 2) + 1)) if steps[-1].write else 1
            read = {"feature": (1.0,) if count == 1 else (1.5, -0.5)}
            steps.append(Step(path="shallow", read=read if steps[-1].write else {"feature": (1.0,)}, **fields))
        else:
            steps.append(Step(write=("feature", "residual"), **fields))
    return StepPlan(SEGMENTS, PATHS, SLOTS, _readable(steps), init_noise_sigma=1.5)


def _readable(steps: list[Step]) -> tuple[Step, ...]:
    """Two values are read only where two were written since the rise."""
    written, level, rows = 0, 0.0, []
    for step in steps:
        written = 0 if step.level > level else written
        level = step.level
        rows.append(replace(step, read={"feature": (1.0,)}) if step.read and written < 2 else step)
        written += bool(step.write)
    return tuple(rows)


@pytest.mark.parametrize("seed", range(12))
def test_levels_against_the_plain_loop(seed: int) -> None:
    plan = levelled(seed)
    plan.validate(("sample", "timestep", "label"))
    np.testing.assert_array_equal(sampled(over_numpy(plan), SEEDS), plain_loop(plan, *given(3), SEEDS))


def test_latents_have_the_size_of_their_level() -> None:
    sizes: list[tuple[int, ...]] = []
    plan = levelled(1)
    sampled(over_numpy(plan), SEEDS, on_step=lambda row, latents, tensors: sizes.append(latents.shape))
    assert sizes == [(3, 4, *(round(8 * step.level) for _ in range(2))) for step in plan.steps]


def test_samples_do_not_mix() -> None:
    plan = levelled(2)
    together = sampled(over_numpy(plan), (10, 2, 33, 4))
    for order in ([0], [3], [2, 0]):
        np.testing.assert_array_equal(sampled(over_numpy(plan), (10, 2, 33, 4), order), together[order])


def test_a_rise_mixes_the_estimate_with_fresh_noise() -> None:
    steps = (
        Step(1.0, {0: 1.0}, {}, level=0.5),
        Step(1.0, {0: 1.0}, {}, level=1.0, signal=0.75, sigma=0.5),
    )
    got = sampled(over_numpy(StepPlan(SEGMENTS, PATHS, {}, steps)), SEEDS)
    clean = torch.from_numpy(noise(SEEDS, 0, (4, 4, 4)))
    larger = torch.nn.functional.interpolate(clean, size=(8, 8), mode="bilinear", align_corners=False).numpy()
    np.testing.assert_allclose(got, 0.75 * larger + 0.5 * noise(SEEDS, RISE + 1, SHAPE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("old", [(4, 4), (3, 5), (1, 2), (7, 6)])
@pytest.mark.parametrize("new", [(8, 8), (9, 5), (4, 13), (32, 24)])
def test_resampling_is_that_of_torch(old: tuple[int, int], new: tuple[int, int]) -> None:
    latents = noise(SEEDS, 0, (4, *old))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(latents).double(), size=new, mode="bilinear", align_corners=False
    )
    got = resample(latents, new)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(resample(latents[1:2], new), got[1:2])
    np.testing.assert_array_equal(resample(latents, old), latents)


def test_noise_may_be_given_for_every_draw() -> None:
    plan = levelled(3)
    expected = sampled(over_numpy(plan), SEEDS)
    draws: list[tuple[int, tuple[int, ...]]] = []

    def source(draw: int, shape: tuple[int, ...]) -> np.ndarray:
        draws.append((draw, shape))
        return noise(SEEDS, draw, shape[1:])

    labels, negative = given(3)
    prompts: dict[str, Any] = {"prompts": {"label": labels}, "negative_prompts": {"label": negative}}
    runtime = over_numpy(plan)
    np.testing.assert_array_equal(runtime.sample(**prompts, height=8, width=8, noise=source), expected)
    assert draws[0] == (0, (3, 4, 2, 2))
    assert (RISE + 3, (3, 4, 4, 4)) in draws
    assert (RISE + 7, (3, 4, 8, 8)) in draws
    for row, step in enumerate(plan.steps):
        side = round(8 * step.level)
        assert ((row + 1, (3, 4, side, side)) in draws) == bool(step.noise)
    initial = noise(SEEDS, 0, (4, 2, 2))
    np.testing.assert_array_equal(runtime.sample(**prompts, seeds=SEEDS, noise=initial), expected)
    with pytest.raises(RuntimeInputError, match="one seed per sample"):
        runtime.sample(**prompts, noise=initial)
    quiet = replace(plan, steps=tuple(replace(step, noise=0.0) for step in plan.steps))
    with pytest.raises(RuntimeInputError, match="one seed per sample"):
        over_numpy(quiet).sample(**prompts, noise=initial)
    with pytest.raises(RuntimeInputError, match=r"noise must have the shape \(3, 4, 2, 2\), not \(3, 4, 8, 8\)"):
        runtime.sample(**prompts, seeds=SEEDS, height=8, width=8, noise=noise(SEEDS, 0, SHAPE))


def test_a_size_that_a_level_does_not_divide_is_refused() -> None:
    labels, negative = given(1)
    conditioning: dict[str, Any] = {"prompts": {"label": labels}, "negative_prompts": {"label": negative}}
    plan = levelled(0)
    runtime = Runtime(plan, FUNCTIONS, {}, LatentSpec(4, downscale=8))
    message = r"64 x 80 pixels at level 0.25 \(row 0\) are no whole multiple of 8 pixels"
    with pytest.raises(RuntimeInputError, match=message) as caught:
        runtime.sample(**conditioning, seeds=(1,), height=64, width=80)
    assert "\n" not in str(caught.value)
    assert runtime.sample(**conditioning, seeds=(1,), height=64, width=96).shape == (1, 4, 8, 12)
    runtime = Runtime(plan, FUNCTIONS, {}, LatentSpec(4, downscale=8, multiple=2))
    with pytest.raises(RuntimeInputError, match=r"112 x 112 pixels at level 0.25 .* multiple of 16 pixels"):
        runtime.sample(**conditioning, seeds=(1,), height=112, width=112)
    assert runtime.sample(**conditioning, seeds=(1,), height=128, width=64).shape == (1, 4, 16, 8)


def test_levels_that_are_thirds_fit() -> None:
    assert level_size((48, 24), 1 / 3) == (16, 8)
    assert fits((48, 24), 1 / 3, 8)
    assert not fits((48, 24), 1 / 3, 16)
    assert not fits((49, 24), 1 / 3, 1)
    assert not fits((1, 8), 0.1, 1)
    assert not fits((1, 8), 1e-8, 1)


def test_pictures_need_every_row_at_full_size() -> None:
    plan = levelled(4)
    runtime = over_numpy(replace(plan, starts={9: (Update({0: 1.0}, {0: -0.1}),) * 3, 5: (Update({}, {0: 1.0}),) * 2}))
    picture = noise((9,), 0, SHAPE)
    for options in ({}, {"mask": np.ones((1, 1, 8, 8), np.float32)}, {"start_step": 5}):
        with pytest.raises(RuntimeInputError, match="a picture cannot be begun from or kept: this plan samples at a"):
            sampled(runtime, SEEDS, image_latents=picture, **options)
    late = sampled(runtime, SEEDS, image_latents=picture, start_step=9)
    assert late.shape == (3, *SHAPE)


def test_a_start_before_a_rise_counts_what_was_written_since() -> None:
    plan = levelled(5)
    late = started_at(replace(plan, starts={4: (Update({}, {0: 1.0}),) * 3}), 4)
    assert [step.read for step in late.steps[3:]] == [step.read for step in plan.steps[7:]]


def edited(row: int, **more: Any) -> Callable[[StepPlan], StepPlan]:
    def edit(plan: StepPlan) -> StepPlan:
        steps = list(plan.steps)
        steps[row] = replace(steps[row], **more)
        return replace(plan, steps=tuple(steps))

    return edit


REFUSED: dict[str, tuple[Callable[[StepPlan], StepPlan], str]] = {
    "falls": (edited(2, level=0.25), "step 2 lowers the level from 0.5 to 0.25"),
    "nothing": (edited(0, level=0.0), "step 0 has the level 0.0"),
    "too large": (edited(5, level=1.5), "step 5 has the level 1.5"),
    "not a number": (edited(5, level=float("nan")), "step 5 holds a number that is not finite"),
    "ends small": (
        lambda plan: replace(plan, steps=plan.steps[:3]),
        "the last step has the level 0.5, but a run ends at level 1",
    ),
    "x at the rise": (edited(3, x={0: 1.0, 1: 0.5}), "step 3 reaches back across the rise of the level at step 3"),
    "m after the rise": (edited(4, m={2: 0.5}), "step 4 reaches back across the rise of the level at step 3"),
    "read at the rise": (edited(3, path="shallow", read={"feature": (1.0,)}, write=()), "step 3 reads 1 values"),
    "read after the rise": (edited(4, read={"feature": (1.5, -0.5)}), "step 4 reads 2 values of slot 'feature'"),
    "first latent": (edited(4, initial=0.1), "step 4 adds the first latent, which is smaller since the rise at step 3"),
    "start across": (
        lambda plan: replace(plan, starts={2: (Update({0: 1.0}, {0: 1.0}), Update({0: 1.0, 1: 1.0}, {0: 1.0}))}),
        "start 2: step 3 reaches back before the start",
    ),
    "gate across": (
        lambda plan: edited(4, gated=True)(
            edited(3, path="whole", write=("feature",))(replace(plan, gate=Gate("skip", 0.1, 1)))
        ),
        "step 4 is gated, but no full step before it",
    ),
    "span across": (
        lambda plan: replace(
            plan,
            steps=(
                Step(1.0, {0: 1.0}, {0: -0.1}, path="blind", level=0.5, span=2),
                Step(1.0, {0: 1.0}, {0: -0.1}, path="blind"),
            ),
        ),
        "step 0 cannot span 2 rows: the level rises at step 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_levels_that_cannot_be_are_refused(name: str) -> None:
    steps = [
        Step(
            t=1.0,
            x={0: 1.0},
            m={0: -0.1},
            path="shallow" if row in (4, 5) else "full",
            write=() if row in (4, 5) else ("feature",),
            read={"feature": (1.0,)} if row in (4, 5) else {},
            level=0.5 if row < 3 else 1.0,
        )
        for row in range(6)
    ]
    paths = {**PATHS, "whole": ("entry", "deep", "deep", "exit"), "blind": ("blind",)}
    segments = {**SEGMENTS, "blind": Segment(("timestep", "label"), ("out",))}
    plan = StepPlan(segments, paths, SLOTS, tuple(steps))
    plan.validate()
    edit, message = REFUSED[name]
    with pytest.raises(StepPlanError) as caught:
        edit(plan).validate()
    assert message in str(caught.value)


def test_levels_survive_json() -> None:
    plan = levelled(6)
    assert StepPlan.from_json(plan.to_json()) == plan
