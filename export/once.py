"""What a plan computes before its first row: of the prompts once, of the timesteps for all rows as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from export.program import PartFunction
from export.step_plan import StepPlan

Tensors = Mapping[str, np.ndarray]

_TIMESTEP = "timestep"


def prepare(
    plan: StepPlan,
    functions: Mapping[str, PartFunction],
    halves: Mapping[bool, Tensors],
    samples: int,
    timestep_dtype: np.dtype,
) -> tuple[Mapping[bool, Tensors], dict[str, np.ndarray]]:
    """Run the segments of `plan.once`.

    Args:
        plan: its rows are those that will run.
        functions: by segment name.
        halves: the conditioning tensors of the conditional half (False) and of both halves, unconditional first (True).
        samples: of a half.
        timestep_dtype: of `timestep`.

    Returns:
        The conditioning tensors with what was computed of them, and the tensors (rows, halves * samples, ...) that
        differ from row to row.
    """
    if not plan.once:
        return halves, {}
    by_call: list[str] = []
    moving = {_TIMESTEP}
    for name in plan.once:
        if moving.intersection(plan.segments[name].inputs):
            by_call.append(name)
            moving.update(plan.segments[name].outputs)
    both = run_all(plan, functions, [name for name in plan.once if name not in by_call], halves[True])
    conditional = {name: value[-samples:] for name, value in both.items()}
    rows, batch = len(plan.steps), len(next(iter(both.values()))) if both else samples
    taken = {name for segment in by_call for name in plan.segments[segment].inputs}
    tiled = {name: np.tile(value, (rows, *[1] * (value.ndim - 1))) for name, value in both.items() if name in taken}
    tiled[_TIMESTEP] = np.repeat(np.array([step.t for step in plan.steps], timestep_dtype), batch)
    computed = run_all(plan, functions, by_call, tiled)
    by_row = {name: computed[name].reshape(rows, batch, *computed[name].shape[1:]) for name in moving - {_TIMESTEP}}
    return {False: conditional, True: both}, by_row


def run_all(
    plan: StepPlan, functions: Mapping[str, PartFunction], names: Sequence[str], tensors: Tensors
) -> dict[str, np.ndarray]:
    """The tensors, and what some segments compute of them."""
    known = dict(tensors)
    for name in names:
        segment = plan.segments[name]
        result = functions[name]({key: known[key] for key in segment.inputs})
        known.update({key: result[key] for key in segment.outputs})
    return known
