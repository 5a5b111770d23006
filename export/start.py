"""Cuts a step plan at the row where image-to-image sampling begins, so that the rest runs by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from export.lineage import batching
from export.plan_checks import span_fault
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


def started_at(plan: StepPlan, row: int, latent_input: str | None = None) -> StepPlan:
    """The rows from `row` on as a plan of their own.

    The first updates are those the sampler makes without history. A row that reads a slot which nothing has
    written yet runs the path, and fills the slots, of the latest earlier row that wrote it; a forecast from more
    values than have been written becomes the reuse of the newest. A span that this breaks is cut again, into the
    longest pieces that can still run as one batch.

    Args:
        plan: the whole run.
        row: where to begin; 0 gives the plan itself.
        latent_input: the tensor that is the latent; None is that of the plan.

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
            step = replace(step, x=update.x, m=update.m, noise=update.noise, initial=update.initial)
        step = _readable(plan, at, step, written)
        for name in step.write:
            written[name] += 1
        steps.append(step)
    contract = None if plan.contract is None else plan.contract.started(row)
    bare = replace(plan, steps=tuple(steps), starts={}, contract=contract)
    started = _respanned(plan, row, bare, latent_input or plan.latent_input)
    started.validate(latent_input=latent_input)
    return started


def _respanned(plan: StepPlan, row: int, started: StepPlan, latent_input: str) -> StepPlan:
    """`started` with the spans of `plan`, cut where its rows do not go together any more."""
    if all(step.span == 1 for step in plan.steps):
        return started
    steps = list(started.steps)
    halves = batching(started)
    for opened in (at for at, step in enumerate(plan.steps) if step.span > 1):
        at, end = max(opened - row, 0), opened + plan.steps[opened].span - row
        while at < end:
            last = at + 1
            while last < end and span_fault(started, range(at, last + 1), halves, latent_input) is None:
                last += 1
            steps[at] = replace(steps[at], span=last - at)
            at = last
    return replace(started, steps=tuple(steps))


def _readable(plan: StepPlan, at: int, step: Step, written: Mapping[str, int]) -> Step:
    empty = [name for name in step.read if not written[name]]
    if empty:
        writer = next(earlier for earlier in reversed(plan.steps[:at]) if set(empty) <= set(earlier.write))
        step = replace(step, path=writer.path, write=writer.write, read=writer.read, gated=False)
        if any(not written[name] for name in step.read):
            raise StepPlanError(f"row {at} cannot be the first: the row that fills {empty[0]!r} reads slots itself")
    read = {name: alphas if len(alphas) <= written[name] else (1.0,) for name, alphas in step.read.items()}
    return replace(step, read=read)
