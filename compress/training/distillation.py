"""One student taught by the model it was copied from, in a folder that outlives a kill."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compress.errors import PassError
from compress.progress import Progress
from compress.training.objective import Objective
from compress.training.randomness import generator
from compress.training.recompute import Recomputed
from compress.training.runs import Asked, conditioned, teacher_runs
from compress.training.targets import GuidedTarget, SegmentTarget, TargetRule
from compress.training.teacher import Network, Teacher
from compress.training.trainer import Schedule, train

if TYPE_CHECKING:
    from compress.families.segments import Network as Module
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
    inputs = {
        "what": "training",
        "model": model.state_hash(),
        "lesson": asdict(lesson),
        "schedule": asdict(schedule),
    }
    student = copy.deepcopy(model.denoiser).requires_grad_(True)
    runs = teacher_runs(model, lesson.rows, lesson.asked, store, progress, ends_only=lesson.online)
    runs = runs.to(next(student.parameters()).device)
    learner = _network(model, student, plan, lesson.bf16)
    if lesson.recompute:
        learner = replace(learner, denoise=Recomputed(model.family, student))
    objective = Objective(runs, _rule(model, plan, lesson), learner)
    with _folder(store, inputs) as folder:
        if not schedule.updates:
            schedule = replace(schedule, updates=_updates(objective, schedule, lesson.minutes or 0.0, folder))
        trained = train(student, objective, schedule, folder, progress, lesson.what)
    own = dict(model.denoiser.named_parameters())
    for name, weight in trained.average.items():
        own[name].data.copy_(weight)
    said = {"updates": schedule.updates, "seconds": round(trained.seconds, 1), "loss": trained.curve}
    model.provenance.append({"trained": lesson.what, **said})


def _network(model: LatentDiffusion, denoiser: Module, plan: StepPlan, bf16: bool) -> Network:
    whole = model.family.segments(denoiser, None).segments[0].module
    return Network(whole, plan.latent_input, plan.prediction, bf16)


def _rule(model: LatentDiffusion, plan: StepPlan, lesson: Lesson) -> TargetRule:
    if not lesson.online:
        return SegmentTarget()
    device = next(model.denoiser.parameters()).device
    steps = [plan.steps[row] for row in lesson.rows]
    scales = torch.tensor([step.guidance_scale if step.guidance != "none" else 1.0 for step in steps], device=device)
    nothing = conditioned(model, None, lesson.asked.height, lesson.asked.width)
    network = _network(model, model.denoiser, plan, lesson.bf16)
    return GuidedTarget(Teacher(network, {name: row.to(device) for name, row in nothing.items()}), scales)


@contextlib.contextmanager
def _folder(store: Store | None, inputs: Mapping[str, object]) -> Iterator[Path]:
    if store is not None:
        with store.workspace(inputs) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="training-") as name:
        yield Path(name)


def _updates(objective: Objective, schedule: Schedule, minutes: float, folder: Path) -> int:
    """As many updates as fit; decided once, and kept for a run that goes on after a kill."""
    kept = folder / "updates.json"
    if kept.is_file():
        return int(json.loads(kept.read_text(encoding="utf-8")))
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        for part in objective.losses(generator(schedule.seed, 0), schedule.batch, schedule.accumulate):
            part().backward()
        seconds.append(time.perf_counter() - began)
    updates = max(1, int(60.0 * minutes / min(seconds)))
    written = kept.with_suffix(".part")
    written.write_text(json.dumps(updates), encoding="utf-8")
    os.replace(written, kept)
    return updates
