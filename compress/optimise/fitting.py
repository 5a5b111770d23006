"""A sampler of fewer calls whose linear updates are fitted to the uncached run (in the literature: bespoke solvers).

Every row of a step plan may have updates of its own, so nothing keeps them to a formula; here they are least-squares
solutions, found row after row on calibration noises, without gradients. Related: Shaul et al. 2024, arXiv 2403.01329
(bespoke non-stationary solvers, trained); Zheng et al. 2023, arXiv 2310.13268 (DPM-Solver-v3, empirical statistics).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from compress.optimise.trajectory import Trajectory, gram_of, solved
from export.loop import Lags, Revise
from export.plan_rows import Step, Update
from export.step_plan import StepPlan

STATES, OUTPUTS = 2, 3
"""Latents and network outputs that a fitted update combines, the current ones included."""


def thinned(plan: StepPlan, trajectory: Trajectory, points: Sequence[int]) -> StepPlan:
    """The uncached plan at some of its points, with updates that lead along its own run.

    Args:
        plan: of the uncached run.
        trajectory: of that run.
        points: its rows, ascending, the first 0.
    """
    ends = (*points[1:], trajectory.rows)

    def updates(start: int, stop: int) -> list[Update]:
        rows = range(start, min(stop, len(points)))
        return [update(trajectory, points[start : row + 1], ends[row], STATES, OUTPUTS) for row in rows]

    rows = zip(points, updates(0, len(points)), strict=True)
    steps = tuple(replace(plan.steps[point], x=own.x, m=own.m) for point, own in rows)
    starts = {row: tuple(updates(row, row + OUTPUTS - 1)) for row in range(1, len(points))} if plan.starts else {}
    return replace(plan, steps=steps, starts=starts, key={**plan.key, "steps": len(points), "order": 1})


def targets_of(trajectory: Trajectory, points: Sequence[int], samples: int) -> list[np.ndarray]:
    """What every row of a thinned plan is to lead to, of the first samples."""
    states = trajectory.first(samples)
    return [states[after] for after in (*points[1:], trajectory.rows)]


def fitted(
    plan: StepPlan, targets: Sequence[np.ndarray], run: Callable[[Revise], np.ndarray]
) -> tuple[np.ndarray, StepPlan]:
    """Run a plan while its updates are fitted: the last latents, and the plan with those updates.

    Args:
        plan: thinned, perhaps cached.
        targets: what every row is to lead to.
        run: runs the plan with what is to be called before every update.
    """
    fit = Fit(targets)
    made = run(fit)
    return made, replace(plan, steps=tuple(fit.steps))


def update(trajectory: Trajectory, points: Sequence[int], after: int, states: int, outputs: int) -> Update:
    """The update from some points of the run to the state before row `after` (its number of rows is the end).

    Args:
        trajectory: the run.
        points: rows, the newest last, whose states and outputs are at hand.
        after: the row that the update leads to.
        states: how many of their states are used at most, the newest first.
        outputs: how many of their outputs.
    """
    newest = list(points)[::-1]
    places = newest[:states] + [trajectory.rows + 1 + point for point in newest[:outputs]]
    found = solved(trajectory.gram[np.ix_(places, places)], trajectory.gram[places, after])
    kept = min(states, len(newest))
    return Update(
        x={lag: float(value) for lag, value in enumerate(found[:kept])},
        m={lag: float(value) for lag, value in enumerate(found[kept:])},
    )


class Fit:
    """Fits the update of every row of a run, while it runs, to the state that the uncached run had there.

    Called as `export.loop.Revise`. Each row is fitted to the latents that the rows before it really left, so that it
    corrects what they, or cached network outputs, got wrong. The terms are those of the step it is given.

    Attributes:
        steps: the rows with their fitted updates.
    """

    def __init__(self, targets: Sequence[np.ndarray]) -> None:
        """Take what every row is to lead to: float32 (samples, channels, h, w) per row."""
        self._targets = targets
        self.steps: list[Step] = []

    def __call__(self, row: int, step: Step, latents: Lags, outputs: Lags) -> Step:
        """Fit one row."""
        terms = [*(latents[lag] for lag in step.x), *(outputs[lag] for lag in step.m)]
        gram = gram_of([*terms, self._targets[row]])
        found = [float(value) for value in solved(gram[:-1, :-1], gram[:-1, -1])]
        kept = len(step.x)
        x, m = dict(zip(step.x, found[:kept], strict=True)), dict(zip(step.m, found[kept:], strict=True))
        fitted = replace(step, x=x, m=m)
        self.steps.append(fitted)
        return fitted
