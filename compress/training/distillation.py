"""One student taught by the model it was copied from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from compress.errors import PassError
from compress.progress import Progress
from compress.training.objective import Objective
from compress.training.runs import Asked, conditioned, teacher_runs
from compress.training.targets import GuidedTarget, SegmentTarget, TargetRule
from compress.training.teacher import Teacher
from compress.training.teaching import network_of, taught
from compress.training.trainer import Schedule

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.store import Store
    from export.step_plan import StepPlan


@dataclass(frozen=True)
class Lesson:
    """What is taught.

    Attributes:
        what: is being done, for progress.
        rows: of the teacher's plan, where the student is asked.
        online: the teacher is asked for its guided estimate at every update; else its runs hold what is wanted.
        asked: the teacher's runs.
        minutes: that updates may take, where their number is left to the time one of them takes.
        bf16: networks compute in bfloat16.
        recompute: the student keeps the inputs of its units alone, see `compress.training.recompute`.
    """

    what: str
    rows: Sequence[int]
    online: bool
    asked: Asked
    minutes: float | None
    bf16: bool
    recompute: bool = False


def learn(model: LatentDiffusion, lesson: Lesson, schedule: Schedule, store: Store | None, progress: Progress) -> None:
    """Give the model's denoiser the averaged weights of a student of its own, and say so in its provenance.

    Args:
        model: teacher, and then student; its plan stays.
        lesson: what is taught.
        schedule: with 0 updates for as many as fit into the lesson's minutes.
        store: keeps the teacher's runs by content, and checkpoints until the end; None keeps neither.
        progress: receives (what, done, in all).

    Raises:
        PassError: the model has no plan, or the loss is not finite.
    """
    plan = model.step_plan
    if plan is None:
        raise PassError("the model has no step plan yet; compile its sampler first")
    inputs = {"model": model.state_hash(), "lesson": asdict(lesson)}
    runs = teacher_runs(model, lesson.rows, lesson.asked, store, progress, ends_only=lesson.online)
    runs = runs.to(next(model.denoiser.parameters()).device)
    rule = _rule(model, plan, lesson)
    model.provenance.append(
        taught(
            model.denoiser,
            lambda student: Objective(runs, rule, network_of(model, student, plan, lesson.bf16, lesson.recompute)),
            lesson.what,
            inputs,
            schedule,
            lesson.minutes,
            store,
            progress,
        )
    )


def _rule(model: LatentDiffusion, plan: StepPlan, lesson: Lesson) -> TargetRule:
    if not lesson.online:
        return SegmentTarget()
    device = next(model.denoiser.parameters()).device
    steps = [plan.steps[row] for row in lesson.rows]
    scales = torch.tensor([step.guidance_scale if step.guidance != "none" else 1.0 for step in steps], device=device)
    nothing = conditioned(model, None, lesson.asked.height, lesson.asked.width)
    network = network_of(model, model.denoiser, plan, lesson.bf16)
    return GuidedTarget(Teacher(network, {name: row.to(device) for name, row in nothing.items()}), scales)
