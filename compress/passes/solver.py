"""The pass `solver`: fewer network calls, at the sampler points and with the linear updates that calibration finds."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge
from typing_extensions import override

from compress.errors import PassError, RefusedError
from compress.passes.base import Edit, Pass, PassContext
from export.step_plan import StepPlan, StepPlanError

if TYPE_CHECKING:
    import numpy as np

    from compress.model.latent_diffusion import LatentDiffusion
    from export.loop import Revise
    from export.runtime import Runtime
    from export.target import Target

NOISES = 32
"""Calibration noises at most that updates are fitted on, all at once; half as many others judge."""


@dataclass
class Solver(Pass):
    """A sampler of its own for this model: `calls` of the sampler's points, each with a least-squares update.

    The model is run in float with all steps; a dynamic programme chooses the points from that run, and the updates are
    fitted while the model, quantized as it will be, runs without the others. No weight changes. Any deterministic
    scheduler will do. The plan must beat the scheduler's own with as many steps, on noises that were not fitted.

    Attributes:
        calls: network calls of the new sampler.
    """

    name: ClassVar[str] = "solver"
    paper: ClassVar[str] = "cf. Shaul et al. 2024, arXiv 2403.01329, and Zheng et al. 2023, arXiv 2310.13268"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    changes: ClassVar[frozenset[str]] = frozenset({"plan"})

    calls: Annotated[int, Ge(1)]

    @override
    def plan(self, model: LatentDiffusion, targets: Sequence[Target]) -> list[Edit]:
        plan = _uncached(model)
        every = int(plan.key.get("order", 1))
        most = -(-plan.network_calls // every) - (every == 1)
        if any(step.noise for step in plan.steps):
            raise RefusedError(
                f"solver: {plan.key.get('scheduler')} draws noise at its steps, so that no run leads to the same "
                "picture: choose a deterministic scheduler"
            )
        if self.calls > most:
            raise RefusedError(
                f"solver: calls: {self.calls} are no fewer than the {plan.network_calls} network calls of the sampler: "
                f"give 1 to {most}, or more sampler.steps"
            )
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.denoiser.parameters())
        why = (
            f"{self.calls} of {plan.network_calls} network calls; calibration chooses the points and fits their updates"
        )
        return [Edit(self.name, "denoiser", "solver", size, size, why)]

    @override
    def apply(self, model: LatentDiffusion, edits: Sequence[Edit], context: PassContext) -> None:
        from compress.optimise.lab import HELD_OUT

        if not context.prompts:
            raise RefusedError("solver: needs the key calibration, whose prompts it samples")
        plan = _uncached(model)
        noises = _Noises(context, context.seed, min(NOISES, len(context.prompts)))
        points, result = self._fitted(model, plan, noises)
        decibels = self._judged(
            model, result, replace(noises, seed=context.seed + HELD_OUT, count=noises.count // 2 + 1)
        )
        if decibels["solver"] < decibels.get("fewer steps", 0.0):
            raise RefusedError(
                f"solver: {self.calls} fitted calls reach {decibels['solver']:.1f} dB, as many steps of the scheduler "
                f"itself {decibels['fewer steps']:.1f}: set sampler.steps to {self.calls} in place of this pass"
            )
        said = {"points": list(points), "of": plan.network_calls, "noises": noises.count, "held_out_psnr_db": decibels}
        model.step_plan = replace(result, key={**result.key, "solver": said})

    def _fitted(self, model: LatentDiffusion, plan: StepPlan, noises: _Noises) -> tuple[tuple[int, ...], StepPlan]:
        """Of the points that differently weighted programmes choose, those that end best once fitted; their plan."""
        from compress.optimise.fitting import fitted, targets_of, thinned
        from compress.optimise.points import EMPHASES, best_points, point_errors
        from compress.optimise.trajectory import watched

        floats, progress = model.runtime(simulate=False), noises.context.progress

        def fit(points: tuple[int, ...], runtime: Runtime) -> tuple[float, StepPlan]:
            bare = thinned(plan, trajectory, points)
            targets = targets_of(trajectory, points, noises.count)
            made, result = fitted(bare, targets, noises.watching(runtime.altered(plan=bare)))
            return _decibels(trajectory.states[-1], made), result

        progress("run all steps", 0, 1)
        trajectory = watched(noises.watching(floats))
        progress("run all steps", 1, 1)
        errors = point_errors(trajectory, int(plan.key.get("order", 1)))
        chosen = dict.fromkeys(best_points(errors, self.calls, emphasis)[-1] for emphasis in EMPHASES)
        best: tuple[float, tuple[int, ...], StepPlan] | None = None
        for done, points in enumerate(chosen):
            progress("fit updates", done, len(chosen))
            decibels, result = fit(points, floats)
            if best is None or decibels > best[0]:
                best = decibels, points, result
        progress("fit updates", len(chosen), len(chosen))
        if best is None:
            raise PassError("there are no sampler points to choose from")
        _, points, result = best
        return points, fit(points, model.runtime())[1] if model.quant_plans else result

    def _judged(self, model: LatentDiffusion, result: StepPlan, noises: _Noises) -> dict[str, float]:
        """Mean latent PSNR against all steps in float, dB: of the fitted plan, and of as many steps as they are."""
        from compress.measure.baselines import plan_with_steps

        noises.context.progress("judge on other noises", 0, 1)
        real, end = model.runtime(), noises.sample(model.runtime(simulate=False))
        decibels = {"solver": _decibels(end, noises.sample(real.altered(plan=result)))}
        with contextlib.suppress(RefusedError):  # some schedulers do not take so few steps
            own = plan_with_steps(model, self.calls)
            decibels["fewer steps"] = _decibels(end, noises.sample(real.altered(plan=own)))
        noises.context.progress("judge on other noises", 1, 1)
        return decibels

    @override
    def check(self, model: LatentDiffusion, edits: Sequence[Edit]) -> None:
        plan = model.step_plan
        if plan is None or plan.network_calls != self.calls or "solver" not in plan.key:
            raise PassError(f"the step plan has not the {self.calls} calls that were fitted")
        try:
            plan.validate(model.family.inputs(model.denoiser))
        except StepPlanError as error:
            raise PassError(f"the fitted step plan is not valid: {error}") from error


@dataclass(frozen=True)
class _Noises:
    """Prompts and seeds that are run together."""

    context: PassContext
    seed: int
    count: int

    def sample(self, runtime: Runtime, revise: Revise | None = None) -> np.ndarray:
        """The last latents of a plan, float32 (count, channels, h, w)."""
        prompts = [self.context.prompts[at % len(self.context.prompts)] for at in range(self.count)]
        seeds = [self.seed + at for at in range(self.count)]
        return runtime.sample(prompts, seeds, self.context.height, self.context.width, revise=revise)

    def watching(self, runtime: Runtime) -> Callable[[Revise], np.ndarray]:
        """The same, as a function of what is called before every update."""
        return functools.partial(self.sample, runtime)


def _decibels(end: np.ndarray, made: np.ndarray) -> float:
    from compress.measure.metrics import latent_peak, psnr_per_sample

    return round(float(psnr_per_sample(end, made, latent_peak(end)).mean()), 2)


def _uncached(model: LatentDiffusion) -> StepPlan:
    """The plan of a compiled sampler that nothing has rewritten yet."""
    if model.step_plan is None:
        raise RefusedError("solver: the model has no step plan; the sampler must be compiled first")
    if model.step_plan.contract is not None and model.step_plan.contract.every:
        raise RefusedError("solver: the weights were distilled for the calls of their plan: leave this pass out")
    if model.layout is not None or model.step_plan.slots or "solver" in model.step_plan.key:
        raise RefusedError("solver: the step plan is rewritten already; put this pass before cache, once")
    return model.step_plan
