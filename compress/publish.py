"""Builds the engine in a temporary folder, has it examined, and puts it in its place whole, or under `rejected/`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.engine.export_engine import export_engine
from compress.engine.swap import swap_in, temporary_beside
from compress.errors import GateError
from compress.examine import Subject, examine
from compress.progress import Progress
from compress.prompts import read_prompts
from compress.report.html import render

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compress.model.latent_diffusion import LatentDiffusion
    from compress.recipe.schema import Recipe
    from compress.report.report import Report
    from compress.store import Store
    from export.target import Target

RECIPE = "recipe.yaml"
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
GOLDEN_SAMPLES = 2


def publish(
    recipe: Recipe,
    original: LatentDiffusion,
    stages: Mapping[str, LatentDiffusion],
    targets: Sequence[Target],
    store: Store,
    progress: Progress,
) -> tuple[Path, Report]:
    """Export the compressed model, measure it, judge it, and move the finished folder to `recipe.out`.

    Args:
        recipe: says where to, which sizes, and what to measure.
        original: the model before any pass.
        stages: pass name -> the model after it, in order.
        targets: to build for.
        store: keeps exported graphs and generated pictures by content.
        progress: receives what is done.

    Returns:
        The engine folder and its report.

    Raises:
        GateError: a gate is not met; the folder is under `rejected/` beside where it would have gone.
    """
    out = recipe.locate(recipe.out)
    folder = temporary_beside(out)
    try:
        shapes = shapes_of(recipe)
        compressed = list(stages.values())[-1] if stages else original
        export_engine(
            compressed,
            targets,
            shapes,
            folder,
            files={RECIPE: recipe.to_yaml()},
            provenance={"recipe": recipe.to_dict(), "passes": compressed.provenance},
            golden_prompts=_golden_prompts(recipe),
            fold=recipe.fold,
            store=store,
            progress=progress,
        )
        report, pictures, manifest = examine(
            Subject(recipe, original, stages, folder, targets, shapes), store, progress
        )
        (folder / REPORT_JSON).write_text(report.to_json(), encoding="utf-8")
        (folder / REPORT_HTML).write_text(render(report, pictures), encoding="utf-8")
        run = {path for path, entry in manifest.files.items() if entry.run}
        manifest.sealed(folder, run).write(folder)
        place = out if report.verdict.ok else out.parent / "rejected" / out.name
        place.parent.mkdir(parents=True, exist_ok=True)
        swap_in(folder, place)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if not report.verdict.ok:
        failed = "; ".join(report.verdict.failed)
        raise GateError(f"{failed}. The engine and its report are under {place}: relax the gate or the passes")
    return place, report


def shapes_of(recipe: Recipe) -> dict[str, tuple[int, int, int]]:
    """The sizes the recipe asks for: least, best, greatest."""
    shapes = {name: tuple(getattr(recipe.shapes, name)) for name in ("batch", "height", "width")}
    if recipe.shapes.prompt_tokens is not None:
        shapes["prompt_tokens"] = tuple(recipe.shapes.prompt_tokens)
    return shapes


def _golden_prompts(recipe: Recipe) -> list[str]:
    """Calibration prompts where there are any: latents kept to verify an engine need not be held out."""
    file = recipe.prompts_file() if recipe.calibration is None else recipe.locate(recipe.calibration.prompts)
    return [] if file is None else [prompt.text for prompt in read_prompts(file, GOLDEN_SAMPLES)]
