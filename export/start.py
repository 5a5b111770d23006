"""Cuts a step plan at the row where image-to-image sampling begins, so that the rest runs by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from export.step_plan import Step, StepPlan, StepPlanError


def start_row(plan: StepPlan, strength: float) -> int:
    """The row where image-to-image begins: the later, the more of the picture is kept.

    Args:
        plan: its key holds `steps` (sampling steps) and `order` (network calls per step).
        strength: in (0, 1]; 1 keeps nothing of the picture.

    Returns:
        As the diffusers pipelines choose it: they round the number of steps taken down for diffusion models and the
        first step down for flow models.

    Raises:
        StepPlanError: strength outside (0, 1], or so small that no step is left.
    """
    if not 0.0 < strength <= 1.0:
        raise StepPlanError(f"strength must be above 0 and at most 1, not {strength!r}")
    order = int(plan.key.get("order", 1))
    steps = int(plan.key.get("steps", plan.network_calls))
    taken = steps * strength if plan.prediction == "flow" else int(steps * strength)
    row = int(steps - taken) * order
    if row >= plan.network_calls:
        raise StepPlanError(f"strength {strength} leaves none of the {steps} steps; take at least {1 / steps:.3g}")
    return row


def started_at(plan: StepPlan, row: int) -> StepPlan:
    """The rows from `row` on as a plan of their own.

    The first updates are those the sampler makes without history. A row that reads a slot which nothing has
    written yet runs the path, and fills the slots, of the latest earlier row that wrote it; a forecast from more
    values than have been written becomes the reuse of the newest.

    Args:
        plan: the whole run.
        row: where to begin; 0 gives the plan itself.

    Raises:
        StepPlanError: sampling cannot begin there.
    """
    if row == 0:
        return plan
    if row not in plan.starts:
        allowed = ", ".join(map(str, (0, *sorted(plan.starts))))
        raise StepPlanError(f"sampling cannot begin at row {row}; it can at {allowed}")
    updates = plan.starts[row]
    written = dict.fromkeys(plan.slots, 0)
    steps = []
    for at in range(row, plan.network_calls):
        step = plan.steps[at]
        if at - row < len(updates):
            update = updates[at - row]
            step = replace(step, x=update.x, m=update.m, noise=update.noise)
        step = _readable(plan, at, step, written)
        for name in step.write:
            written[name] += 1
        steps.append(step)
    started = replace(plan, steps=tuple(steps), starts={})
    started.validate()
    return started


def _readable(plan: StepPlan, at: int, step: Step, written: Mapping[str, int]) -> Step:
    empty = [name for name in step.read if not written[name]]
    if empty:
        writer = next(earlier for earlier in reversed(plan.steps[:at]) if set(empty) <= set(earlier.write))
        step = replace(step, path=writer.path, write=writer.write, read=writer.read)
        if any(not written[name] for name in step.read):
            raise StepPlanError(f"row {at} cannot be the first: the row that fills {empty[0]!r} reads slots itself")
    read = {name: alphas if len(alphas) <= written[name] else (1.0,) for name, alphas in step.read.items()}
    return replace(step, read=read)
