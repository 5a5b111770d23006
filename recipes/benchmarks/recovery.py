"""Quality of a pruned model before and after its recovery, on held-out prompts of its recipe."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from compress import compiler
from compress.measure.environment import environment, ran
from compress.measure.quality import Judge, Stage, Workload, changes, generate
from compress.measure.scorer import Scorer
from compress.model.latent_diffusion import LatentDiffusion
from compress.passes.prune import Prune
from compress.progress import Progress
from compress.prompts import read_prompts
from compress.recipe.reader import pass_fields
from compress.recipe.schema import Recipe

FIRST_SEED = 1_000_000


def main() -> None:
    """Prune without recovery and with it, make the same pictures with both, and write what they are worth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="keeps what is done; a killed run goes on from there")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    progress = told()
    recipe = Recipe.load(given.recipe)
    made = compiler.opened(recipe, progress=progress, work_dir=given.work)
    (step,) = recipe.passes
    if not isinstance(step, Prune) or recipe.evaluate is None or recipe.evaluate.scorer is None:
        sys.exit(f"{given.recipe} must have the one pass prune, and evaluate with a scorer")
    steps = {"pruned": dataclasses.replace(step, recover=None), "recovered": step}
    models = {"original": made.original}
    for name, one in steps.items():
        (models[name],) = compiler.apply(made.original, [one], made.targets, made.context, made.store).values()
    file = recipe.prompts_file()
    if file is None:
        sys.exit("evaluate.prompts is missing")
    prompts = read_prompts(file, given.samples)
    work = Workload.of(prompts, FIRST_SEED, made.context.height, made.context.width)
    stages = {name: pictures(model, work, name, given.work, progress) for name, model in models.items()}
    judge = Judge(prompts, Scorer(recipe.locate(recipe.evaluate.scorer)))
    original = judge.quality(stages["original"])
    quality = {name: judge.quality(stages[name], stages["original"], original) for name in steps}
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "evidence": ran(),
        "environment": environment(),
        "recipe": recipe.to_dict(),
        "pass": pass_fields(step),
        "samples": given.samples,
        "threads": given.threads,
        "provenance": [row for row in models["recovered"].provenance if "fields" not in row],
        "original": rows(original),
    }
    for name, one in quality.items():
        found[name] = rows(one) | {"change": {key: value.to_dict() for key, value in changes(original, one).items()}}
    given.out.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    print(json.dumps({name: found[name] for name in ("original", *steps)}, indent=1, default=str))


def rows(quality: Any) -> dict[str, Any]:
    """Metric -> value with its interval."""
    return {name: estimate.to_dict() for name, estimate in quality.estimates.items()}


def pictures(model: LatentDiffusion, work: Workload, name: str, folder: Path, progress: Progress) -> Stage:
    """What a model makes, kept by its state."""
    kept = folder / f"{name}-{model.state_hash()[:16]}-{len(work.prompts)}.npz"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        stage = generate(model.runtime(), work, name, progress)
        part = kept.with_name(f"{kept.stem}.part.npz")
        stage.save(part)
        part.rename(kept)
    return Stage.load(kept)


def told() -> Progress:
    """Say now and then how far it is."""
    last = [0.0, time.monotonic()]

    def progress(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - last[0] > 10.0 or done == total:
            last[0] = now
            print(f"{now - last[1]:7.0f} s  {what} {done}/{total}", flush=True)

    return progress


if __name__ == "__main__":
    main()
