"""The flow on one screen: load, plan every edit, apply and check each pass, export, measure, publish."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.engine.jobs import checked_shapes
from compress.engine.swap import swap_in, temporary_beside
from compress.errors import RefusedError
from compress.estimate import Estimate, estimate
from compress.guidance import place_guidance
from compress.measure.quality import planned_metrics
from compress.measure.verdict import refuse_gates
from compress.mixed_precision import UP_TO
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.model.lora import fuse_lora
from compress.model.quantized_checkpoint import Written, write
from compress.passes.base import Edit, Pass, PassContext
from compress.progress import Progress, silent
from compress.prompts import check_disjoint, read_prompts
from compress.publish import publish, shapes_of
from compress.quantization.scheme import SCHEMES
from compress.recipe.reader import pass_fields
from compress.sampler import compile_sampler
from compress.schedulers import completed
from compress.store import Store, cache_folder
from export.backends import BACKENDS
from export.step_plan import Segment
from export.target import Target, require_buildable, target
from export.to_tensorrt import BuildOptions, library
from export.to_web import PageOptions

if TYPE_CHECKING:
    from rich.console import RenderableType

    from compress.recipe.schema import Recipe
    from compress.report.report import Report


@dataclass(frozen=True)
class Outcome:
    """What a run gave: always the edits; the engine folder and its report unless it was a dry run."""

    recipe: Recipe
    edits: Sequence[Edit]
    estimate: Estimate
    engine: Path | None = None
    report: Report | None = None

    def render(self) -> RenderableType:
        """Return what the terminal shows."""
        from compress.report.outcome_view import render

        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `--json`."""
        return {
            "recipe": self.recipe.to_dict(),
            "edits": [vars(edit) for edit in self.edits],
            "estimate": self.estimate.to_dict(),
            "engine": None if self.engine is None else str(self.engine),
            "report": None if self.report is None else self.report.model_dump(mode="json"),
        }


def _unheard(cost: Estimate) -> None:
    """Nobody is told."""


def run(
    recipe: Recipe,
    *,
    dry_run: bool = False,
    progress: Progress = silent,
    work_dir: Path | None = None,
    announce: Callable[[Estimate], None] = _unheard,
) -> Outcome:
    """Follow a recipe from a trained model to a measured engine folder.

    A run that was killed goes on where it was, and an edited recipe repeats only what changed: results are kept by
    content under `work_dir`; `announce` is told what all of it will take before any of it is done.

    Raises:
        RefusedError: the model, a target or a pass refuses; before anything is computed.
        EngineError: a target is compiled where it runs, and this machine cannot run it; a dry run plans anywhere.
        RecipeError: a gate bounds what will not be measured.
        PassError: a pass, the export or a measurement broke its promise.
        GateError: a gate was not met; the engine is kept under `rejected/`.
    """
    made = opened(recipe, progress=progress, work_dir=work_dir)
    cost = _cost(recipe, made, announce)
    if dry_run:
        return Outcome(recipe, made.edits, cost)
    for row in made.targets:
        require_buildable(row)
        if row.library:
            library(row.library)
    stages = apply(made.original, recipe.passes, made.targets, made.context, made.store)
    engine, report = publish(recipe, made.original, stages, made.targets, made.store, progress)
    return Outcome(recipe, made.edits, cost, engine, report)


def checkpoint(
    recipe: Recipe,
    out: Path,
    *,
    progress: Progress = silent,
    work_dir: Path | None = None,
    announce: Callable[[Estimate], None] = _unheard,
) -> Written:
    """Follow a recipe to its last pass, and write the quantized model as a diffusers folder.

    Args:
        recipe: with the pass `quantize`; its targets say which number formats may be chosen.
        out: a new folder; it appears whole or not at all.
        progress: receives what is done.
        work_dir: as for `run`.
        announce: likewise.

    Raises:
        RefusedError: as `run`, or the recipe quantizes nothing that the format has a name for.
        PassError: a pass broke its promise.
    """
    if not any(step.name == "quantize" for step in recipe.passes):
        raise RefusedError("the recipe has no pass quantize, so there is no quantized checkpoint to write: add it")
    made = opened(recipe, progress=progress, work_dir=work_dir)
    _cost(recipe, made, announce, engine=False)
    stages = apply(made.original, recipe.passes, made.targets, made.context, made.store)
    folder = temporary_beside(out)
    try:
        written = write(list(stages.values())[-1], folder)
        swap_in(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return written


@dataclass(frozen=True)
class Opened:
    """A recipe with its model, and all checked that can be before hours are spent."""

    original: LatentDiffusion
    targets: list[Target]
    context: PassContext
    store: Store
    edits: list[Edit]


def opened(recipe: Recipe, *, progress: Progress = silent, work_dir: Path | None = None) -> Opened:
    """Load the model, compile its sampler and plan every edit.

    Raises:
        RefusedError, RecipeError: as `run`.
    """
    store = Store((work_dir or cache_folder()) / "store")
    original = load(recipe.locate(recipe.model))
    for lora in recipe.loras:
        fuse_lora(original, recipe.locate(lora.file), lora.strength)
    checked_shapes(original, shapes_of(recipe))
    sample(original, recipe)
    targets = targets_of(recipe)
    context = _context(recipe, progress, targets, store)
    _check_gates(recipe)
    _check_evaluate(original, recipe)
    edits = plan(original, recipe.passes, targets)
    _check_formats(edits, targets)
    return Opened(original, targets, context, store, edits)


def _cost(recipe: Recipe, made: Opened, announce: Callable[[Estimate], None], *, engine: bool = True) -> Estimate:
    """The estimate, told, and within the limits of the recipe."""
    cost = estimate(recipe, made.original, made.edits, made.context, engine=engine)
    announce(cost)
    if recipe.limits is not None:
        cost.refuse_beyond(recipe.limits.memory_gib, recipe.limits.minutes)
    return cost


def targets_of(recipe: Recipe) -> list[Target]:
    """The rows of the target table that the recipe names, with what it asks of their builders."""
    rows, asked = [], recipe.tensorrt
    for row in map(target, recipe.targets):
        if row.library and asked is not None:
            options = BuildOptions(**asked.model_dump(exclude={"architectures"}))
            own = asked.architectures is None or not row.build.architectures
            named = row.build.architectures if own else asked.architectures
            row = replace(row, build=replace(options, architectures=named or ()))
        if row.page is not None and recipe.web is not None:
            package = "" if recipe.web.onnxruntime is None else str(recipe.locate(recipe.web.onnxruntime))
            row = replace(row, page=PageOptions(package, recipe.web.webgpu))
        rows.append(row)
    return rows


def sample(model: LatentDiffusion, recipe: Recipe) -> None:
    """Compile the recipe's sampler into the model's step plan.

    Raises:
        RefusedError: the scheduler cannot be compiled, or the denoiser takes no guidance.
    """
    name = recipe.sampler.scheduler or model.scheduler_config["_class_name"]
    height, width = (
        side // model.latent["downscale"] for side in (recipe.shapes.height.best, recipe.shapes.width.best)
    )
    told = model.family.sampler_options(model.denoiser, height, width)
    scale = place_guidance(model, recipe.sampler.guidance_scale, recipe.sampler.guidance_interval)
    segments, paths, slots = model.family.segments(model.denoiser, model.layout)
    model.step_plan = compile_sampler(
        name,
        model.scheduler_config,
        recipe.sampler.steps,
        scale,
        recipe.sampler.guidance_interval,
        segments={segment.name: Segment(segment.inputs, segment.outputs) for segment in segments},
        paths=paths,
        slots=slots,
        options=completed(name, model.scheduler_config, recipe.sampler.options, told),
    )


def plan(model: LatentDiffusion, passes: Sequence[Pass], targets: Sequence[Target]) -> list[Edit]:
    """List the edits of all passes on the model as it is; what cannot be done is refused here."""
    return [edit for step in passes for edit in step.plan(model, targets)]


def apply(
    model: LatentDiffusion, passes: Sequence[Pass], targets: Sequence[Target], context: PassContext, store: Store
) -> dict[str, LatentDiffusion]:
    """Apply and check the passes in order, each on the result of the one before; results are stored by content.

    Returns:
        Label of a pass -> the model after it.
    """
    stages: dict[str, LatentDiffusion] = {}
    for step in passes:
        edits = step.plan(model, targets)
        before = model

        def make(
            folder: Path, step: Pass = step, edits: Sequence[Edit] = edits, before: LatentDiffusion = before
        ) -> None:
            changed = before.clone(networks="weights" in step.changes)
            step.apply(changed, edits, context)
            step.check(changed, edits)
            changed.provenance.append({"pass": step.name, "fields": pass_fields(step)})
            if "weights" in step.changes:
                changed.save(folder)
            else:
                changed.save_plans(folder)

        inputs = {
            "what": "pass",
            "model": before.state_hash(),
            "pass": step.name,
            "fields": pass_fields(step),
            "targets": [row.name for row in targets],
            "calibration": [list(context.prompts), context.seed, context.height, context.width],
        }
        model = store.fetch(inputs, make, load if "weights" in step.changes else before.with_plans)
        step.check(model, edits)
        stages[step.label] = model
    return stages


def _check_gates(recipe: Recipe) -> None:
    """Refuse gates that nothing of this recipe could judge, before anything is computed."""
    evaluate = recipe.evaluate
    if evaluate is not None:
        measured = planned_metrics(evaluate.scorer is not None, evaluate.clip_model is not None, evaluate.samples)
        refuse_gates(recipe.to_dict().get("gates", {}), measured)


def _check_formats(edits: Sequence[Edit], targets: Sequence[Target]) -> None:
    """Refuse number formats that a target does not have, before anything is computed."""
    for scheme in {edit.action.removeprefix(UP_TO): None for edit in edits}:
        for row in targets:
            reason = row.refusal(scheme) if scheme in SCHEMES and scheme not in ("none", "float32") else None
            if reason is not None:
                raise RefusedError(reason)


def _check_evaluate(model: LatentDiffusion, recipe: Recipe) -> None:
    """Refuse to measure what would need more than prompts, before anything is computed."""
    if recipe.evaluate is not None and not any(target(name).backend in BACKENDS for name in recipe.targets):
        raise RefusedError(
            f"evaluate: engines for {', '.join(recipe.targets)} are not opened here, so nothing can be measured: "
            "add the target onnxruntime-cpu, or leave evaluate out"
        )
    if recipe.evaluate is not None and model.family.residuals(model.denoiser):
        raise RefusedError(
            f"evaluate: a {model.index['_class_name']} follows a control picture, and prompts have none: leave "
            "evaluate out, and measure the engine with residuals of your own"
        )


def _context(recipe: Recipe, progress: Progress, targets: Sequence[Target], store: Store) -> PassContext:
    prompts = []
    if recipe.calibration is not None:
        prompts = read_prompts(recipe.locate(recipe.calibration.prompts), recipe.calibration.samples)
    file = recipe.prompts_file()
    if recipe.evaluate is not None and file is not None:
        check_disjoint(prompts, read_prompts(file, recipe.evaluate.samples))
    return PassContext(
        prompts=[prompt.text for prompt in prompts],
        seed=recipe.seed,
        height=recipe.shapes.height.best,
        width=recipe.shapes.width.best,
        progress=progress,
        targets=targets,
        store=store,
    )
