"""The plan of a few-step student: which rows of the teacher's plan it keeps, and the updates that lead between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from compress.errors import RefusedError
from compress.training.predictions import step_coefficients
from compress.training.runs import level_of
from export.step_plan import Contract, Step, StepPlan


def points_of(plan: StepPlan, steps: int) -> list[int]:
    """The rows where `steps` segments of a teacher's plan begin, as equally long as its steps allow.

    Args:
        plan: with `order` network calls a step.
        steps: of the student, fewer than the plan has.
    """
    order = int(plan.key.get("order", 1))
    whole = -(-plan.network_calls // order)
    return [order * (segment * whole // steps) for segment in range(steps)]


def halvings(whole: int, steps: int) -> list[int]:
    """The steps of every student in a row, each with half as many as the one before, the last with `steps`.

    The first has at most half of the `whole` steps of the teacher: halving is nearly free, what the first grid loses
    is not (measured; see Salimans and Ho 2022, arXiv 2202.00512, for the schedule).
    """
    found = [steps]
    while 4 * found[0] <= whole:
        found.insert(0, 2 * found[0])
    return found


def guidance_of(plan: StepPlan) -> float | None:
    """The scale of guidance that weights trained on runs of a plan will give; None where nothing guides.

    Raises:
        RefusedError: the rows are guided in different ways.
    """
    if plan.contract is not None and plan.contract.guidance_scale is not None:
        return plan.contract.guidance_scale
    scales = {step.guidance_scale if step.guidance != "none" else 1.0 for step in plan.steps}
    if len(scales) > 1:
        raise RefusedError(
            "distill: the rows of the plan are guided by different scales, and a contract holds one: leave "
            "sampler.guidance_interval out"
        )
    (scale,) = scales
    return None if scale == 1.0 else scale


def guided_plan(plan: StepPlan) -> StepPlan:
    """The plan for weights that give its guidance by themselves: the same updates, one half a call."""
    contract = Contract(plan.prediction, tuple(step.t for step in plan.steps), False, guidance_of(plan))
    return replace(unguided(plan), contract=contract)


def unguided(plan: StepPlan) -> StepPlan:
    """The plan without guidance, for the same weights."""
    steps = tuple(replace(step, guidance="none", guidance_scale=1.0) for step in plan.steps)
    return replace(plan, steps=steps, key={**plan.key, "guidance_scale": 1.0, "guidance_interval": None})


def student_plan(plan: StepPlan, points: Sequence[int]) -> StepPlan:
    """The plan for weights that go from each of some rows to the next in one deterministic step.

    Latents are as the network takes them, so that no input scale is left; the run may begin at any row.

    Args:
        plan: of the teacher.
        points: rows of it, the first one 0.
    """
    kept = [plan.steps[row] for row in points]
    levels = [level_of(step) for step in kept]
    steps = []
    for step, level, following in zip(kept, levels, [*levels[1:], (1.0, 0.0)], strict=True):
        x, m = step_coefficients(plan.prediction, level, following)
        row = Step(t=step.t, x={0: x}, m={0: m}, path=plan.full_path, signal=level[0], sigma=level[1])
        steps.append(row)
    contract = Contract(plan.prediction, tuple(step.t for step in kept), True, guidance_of(plan))
    key = {
        **{name: value for name, value in plan.key.items() if name not in ("options", "solver")},
        "scheduler": "distilled",
        "steps": len(steps),
        "order": 1,
        "network_calls": len(steps),
        "guidance_scale": 1.0,
        "guidance_interval": None,
    }
    return replace(
        plan,
        steps=tuple(steps),
        starts={row: () for row in range(1, len(steps))},
        init_noise_sigma=plan.init_noise_sigma * kept[0].input_scale,
        key=key,
        contract=contract,
    )
