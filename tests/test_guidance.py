"""Guidance with one half after the other, against both halves in one batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from export.step_plan import StepPlan
from tests.plain import FUNCTIONS, counting, given, over_numpy, plain_loop, random_plan, sampled

SEEDS = (1, 2, 3)


def sequential(plan: StepPlan, rows: range | None = None) -> StepPlan:
    """Every guided row, or those of `rows`, with one half after the other."""
    chosen = range(len(plan.steps)) if rows is None else rows
    steps = [
        replace(step, guidance="cfg_sequential") if step.guidance == "cfg" and row in chosen else step
        for row, step in enumerate(plan.steps)
    ]
    return replace(plan, steps=tuple(steps))


@pytest.mark.parametrize("seed", range(12))
def test_sequential_guidance_is_that_of_one_batch(seed: int) -> None:
    plan = random_plan(seed)
    expected = sampled(over_numpy(plan), SEEDS)
    np.testing.assert_array_equal(sampled(over_numpy(sequential(plan)), SEEDS), expected)
    np.testing.assert_array_equal(sampled(over_numpy(sequential(plan, range(0, 12, 2))), SEEDS), expected)
    np.testing.assert_array_equal(plain_loop(sequential(plan), *given(3), SEEDS), expected)


def test_no_batch_holds_both_halves() -> None:
    """An unguided row whose slots a sequential row reads runs one half after the other as well."""
    calls: list[tuple[str, int]] = []
    for seed in range(12):
        sampled(over_numpy(sequential(random_plan(seed)), counting(FUNCTIONS, calls)), SEEDS)
    assert {batch for _, batch in calls} == {3}


@pytest.mark.parametrize("seed", range(4))
def test_on_step_sees_both_halves_all_the_same(seed: int) -> None:
    plan = random_plan(seed)
    seen: list[list[dict[str, np.ndarray]]] = [[], []]
    for kept, each in zip(seen, (plan, sequential(plan)), strict=True):
        sampled(over_numpy(each), SEEDS, on_step=lambda row, latents, tensors, kept=kept: kept.append(tensors))
    for one, two in zip(*seen, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            np.testing.assert_array_equal(two[name], value)


@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_a_scalar_timestep_stays_one(dtype: str) -> None:
    def scalar(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert np.ndim(tensors["timestep"]) == 0
        times = np.full(len(tensors["sample"]), tensors["timestep"], np.float32)
        return FUNCTIONS["entry"]({**tensors, "timestep": times})

    plan = random_plan(3)
    runtime = over_numpy(sequential(plan), {**FUNCTIONS, "entry": scalar}, timestep_rank=0, timestep_dtype=dtype)
    shapes = []
    got = sampled(runtime, SEEDS, on_step=lambda row, latents, tensors: shapes.append(tensors["timestep"].shape))
    np.testing.assert_array_equal(got, sampled(over_numpy(plan), SEEDS))
    assert set(shapes) == {()}
