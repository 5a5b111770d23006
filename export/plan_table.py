"""A step plan as the table that the denoising kernel reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from export.errors import EngineError
from export.step_plan import Step, StepPlan
from kernels.step_table import StepTable, step_table


def plan_table(plan: StepPlan) -> StepTable:
    """Lay out what every row of a plan does to the latent.

    Raises:
        EngineError: the plan has rows whose update no table holds: the latent changes its size, several slots keep
            network outputs, or a gate decides whether a network output is taken from a slot.
    """
    steps = plan.steps
    if len({step.level for step in steps}) > 1:
        raise EngineError("the latent of this plan changes its size, and a step table has one size; split the plan")
    slot = _output_slot(plan)
    latents, outputs = plan.history()
    return step_table(
        x=_window([step.x for step in steps], latents),
        m=_window([step.m for step in steps], outputs),
        noise=np.array([step.noise for step in steps]),
        timestep=np.array([step.t for step in steps]),
        input_scale=np.array([step.input_scale for step in steps]),
        guidance_scale=np.array([np.nan if step.guidance == "none" else step.guidance_scale for step in steps]),
        initial=np.array([step.initial for step in steps]),
        forecast=[step.read.get(slot, ()) if slot else () for step in steps],
        keep=[slot in step.write for step in steps],
    )


def _window(rows: Sequence[Mapping[int, float]], length: int) -> np.ndarray:
    """Coefficients by lag as (rows, length)."""
    return np.array([[row.get(lag, 0.0) for lag in range(length)] for row in rows])


def _output_slot(plan: StepPlan) -> str | None:
    """The slot that network outputs are taken from, if rows take any."""

    def taken(step: Step) -> set[str]:
        return {name for name in step.read if plan.slots[name].kind == "output"}

    names = set().union(*(taken(step) for step in plan.steps))
    if len(names) > 1:
        raise EngineError(f"a step table keeps network outputs in one slot, and this plan in {len(names)}")
    if any(step.gated and taken(step) for step in plan.steps):
        raise EngineError("a gate decides in this plan whether a network output is forecast, which no step table holds")
    if not names:
        return None
    (name,) = names
    mixed = len({step.guidance == "none" for step in plan.steps if taken(step) or name in step.write}) > 1
    if plan.slots[name].halves == "mean" and mixed:
        raise EngineError(f"slot {name!r} is read as the mean of the guidance halves, which a step table cannot hold")
    return name
