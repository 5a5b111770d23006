"""The pass `distill`: the denoiser learns from its own runs to need no second guidance half, or fewer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge
from typing_extensions import override

from compress.cost import Cost
from compress.errors import PassError, RefusedError
from compress.passes.base import Edit, Pass, PassContext
from compress.training.effort import Effort
from export.step_plan import StepPlan, StepPlanError

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from export.target import Target

_LESS = "fewer updates, a smaller batch, or recompute: true"


@dataclass
class Distill(Effort, Pass):
    """Trains the denoiser on its own runs, without data, and rewrites the step plan to what it has learned.

    `guidance` puts the plan's guidance scale into the weights: half the denoiser's work, the sampler stays. `segment`
    gives a student of `steps` steps, each of which lands where the teacher's own sampler comes to in several, guidance
    included; `progressive` comes there by halvings, each student the teacher of the next. How long, see
    `compress.training.effort.Effort`. The prompts are those of the calibration.

    Attributes:
        objective: what is learned.
        steps: of the student's sampler; for segment and progressive.
        recompute: gradients take memory for one block of the denoiser at a time, and one more pass forward.
    """

    name: ClassVar[str] = "distill"
    paper: ClassVar[str] = "Meng et al. 2022, arXiv 2210.03142; Salimans and Ho 2022, arXiv 2202.00512"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration", "training"})
    changes: ClassVar[frozenset[str]] = frozenset({"weights", "plan"})

    objective: Literal["guidance", "segment", "progressive"]
    steps: Annotated[int, Ge(1)] | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        """Refuse fields that do not go together."""
        if self.objective == "guidance" and self.steps is not None:
            raise ValueError("steps: guidance keeps the sampler's steps; leave it out, or choose segment")
        if self.objective != "guidance" and self.steps is None:
            raise ValueError(f"steps: is missing; {self.objective} needs the number of steps of the student")
        self.check_effort()

    @property
    @override
    def label(self) -> str:
        return f"{self.name}-{self.objective}"

    @override
    def plan(self, model: LatentDiffusion, targets: Sequence[Target]) -> list[Edit]:
        plan = _plain(model)
        guided = any(step.guidance != "none" for step in plan.steps)
        if self.objective == "guidance":
            if not guided:
                raise RefusedError(
                    "distill: the plan has no guidance to learn: set sampler.guidance_scale above 1, or leave this out"
                )
            why = f"guidance of scale {self._scale(plan):g} goes into the weights: one half a call instead of two"
        else:
            why = self._why(plan)
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.denoiser.parameters())
        return [Edit(self.name, "denoiser", self.label, size, size, why)]

    def _scale(self, plan: StepPlan) -> float:
        from compress.training.student import guidance_of

        return guidance_of(plan) or 1.0

    def _why(self, plan: StepPlan) -> str:
        from compress.training.student import guidance_of

        guidance_of(plan)
        whole = plan.network_calls // int(plan.key.get("order", 1))
        if any(step.noise for step in plan.steps):
            raise RefusedError(
                f"distill: {plan.key.get('scheduler')} draws noise at its steps, so that no run leads to the same "
                "picture: choose a deterministic scheduler"
            )
        if self.steps is None or self.steps >= whole:
            raise RefusedError(f"distill: steps: {self.steps} are no fewer than the {whole} of the sampler")
        return f"{self.steps} steps land where {whole} of {plan.key.get('scheduler')} do, guidance included"

    @override
    def costs(self, model: LatentDiffusion, edits: Sequence[Edit], context: PassContext) -> list[Cost]:
        from compress.training.cost import denoiser_cost

        plan = _plain(model)
        one = denoiser_cost(model, context.height, context.width, self.recompute)
        asked = 2 * one.forward if self.objective == "guidance" else 0.0
        halves = sum(2 if step.guidance != "none" else 1 for step in plan.steps)
        runs = halves + sum(self._rounds(plan)[:-1])
        seconds = self.seconds(self.name, one.update + asked) + self.samples * runs * one.forward
        return [Cost(f"the pass {self.label}", seconds, self.memory(one), _LESS)]

    def _rounds(self, plan: StepPlan) -> list[int]:
        """Steps of every student in a row; of guidance, the plan's own calls."""
        from compress.training.student import halvings

        if self.steps is None:
            return [plan.network_calls]
        if self.objective == "segment":
            return [self.steps]
        return halvings(plan.network_calls // int(plan.key.get("order", 1)), self.steps)

    @override
    def apply(self, model: LatentDiffusion, edits: Sequence[Edit], context: PassContext) -> None:
        if not context.prompts:
            raise RefusedError("distill: needs the key calibration, whose prompts it samples")
        rounds = self._rounds(_plain(model))
        for steps in rounds:
            self._round(model, steps, len(rounds), context)

    def _round(self, model: LatentDiffusion, steps: int, rounds: int, context: PassContext) -> None:
        """Train one student, and give the model its weights and its plan."""
        from compress.training.distillation import Lesson, learn
        from compress.training.student import guided_plan, points_of, student_plan

        plan = _plain(model)
        few = self.steps is not None
        rows = points_of(plan, steps) if few else list(range(plan.network_calls))
        lesson = Lesson(
            what=f"distill {self.objective}, {steps} steps",
            rows=rows,
            online=not few,
            asked=self.asked(context),
            minutes=None if self.minutes is None else self.minutes / rounds,
            bf16=self.bf16,
            recompute=self.recompute,
        )
        learn(model, lesson, self.schedule(context.seed, rounds), context.store, context.progress)
        model.step_plan = student_plan(plan, rows) if few else guided_plan(plan)

    @override
    def check(self, model: LatentDiffusion, edits: Sequence[Edit]) -> None:
        import torch

        plan = model.step_plan
        if plan is None or plan.contract is None or plan.contract.every == (self.steps is None):
            raise PassError("the step plan holds no contract of what was distilled")
        if self.steps is not None and plan.network_calls != self.steps:
            raise PassError(f"the step plan makes {plan.network_calls} calls, not the {self.steps} that were distilled")
        if any(step.guidance != "none" for step in plan.steps):
            raise PassError("a row of the step plan is still guided")
        if not all(bool(torch.isfinite(weight).all()) for weight in model.denoiser.parameters()):
            raise PassError("the distilled weights are not finite")
        try:
            plan.validate(model.family.inputs(model.denoiser))
        except StepPlanError as error:
            raise PassError(f"the step plan is not valid: {error}") from error


def _plain(model: LatentDiffusion) -> StepPlan:
    """The plan of a model in float whose denoiser runs whole at every call."""
    if model.step_plan is None:
        raise RefusedError("distill: the model has no step plan; the sampler must be compiled first")
    if model.layout is not None or model.step_plan.slots or model.quant_plans or "solver" in model.step_plan.key:
        raise RefusedError("distill: the model is quantized or its calls are cached already; put this pass first")
    return model.step_plan
