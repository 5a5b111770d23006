"""Quality, plan and time of one entry of the caching benchmark, on its exported engine."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from compress.doctor import processor_name
from compress.errors import PassError, RefusedError
from compress.families.layout import Layout
from compress.measure import metrics
from compress.measure.latency import Contestant, interleave
from compress.model.latent_diffusion import LatentDiffusion
from export import conditioning
from export.engine import Engine
from export.runtime import Runtime
from export.step_plan import StepPlan
from recipes.benchmarks.caching.bench import FIRST_SEED, SIDE, Bench, layout_of, plan_key, planned, sources
from recipes.benchmarks.caching.presets import PRESETS, SAMPLERS, Run
from recipes.benchmarks.caching.results import Kept, Row, encoded, write

ROUNDS = 9
CHECKED = 8
"""Samples that the engine of a plan makes again where PyTorch made all."""
DEPARTURE = 1e-3
"""Of the norm of the latents of those; rounding grows over the steps of a sampler."""


def measure(bench: Bench, run: Run, entry: str, inputs: str) -> Row:
    """Quality and plan of one entry; its plan is kept, and for `full` its latents, pictures and scores.

    Args:
        bench: what is shared.
        run: the sampler of a model.
        entry: one of its entries.
        inputs: the key of all that is asked.
    """
    row: Row = {
        "model": run.model,
        "sampler": run.sampler,
        "options": SAMPLERS[run.model][run.sampler],
        "steps": run.steps,
        "entry": entry,
        "fields": PRESETS[run.model].get(entry),
        "target": bench.target,
        "samples": len(bench.prompts),
        "date": datetime.date.today().isoformat(),
        "processor": processor_name(),
        "inputs": inputs,
        "sources": sources(),
    }
    try:
        model = bench.prepared(run, entry)
        runtime, how = bench.opened(model, run.model)
    except RefusedError as error:
        return row | {"refused": str(error)}
    except PassError as error:
        return row | {"refused": f"fails its own check: {error}"}
    write(bench.kept.file(run, "plans", entry, ".json"), planned(model).to_json().encode())
    write(bench.kept.file(run, "layouts", entry, ".json"), encoded({"layout": layout_of(model)}))
    row |= described(model) | {"plan": plan_key(model)} | how
    latents = bench.latents(runtime)
    if not np.isfinite(latents).all():
        return row | {"refused": "its latents are not finite"}
    if "engine" not in how:
        bench.kept.put_array(run, "samples", entry, latents[:CHECKED])
    pictures = bench.pictures(runtime, latents)
    if entry == "full":
        made = judged(bench, latents, pictures)
        for kind, array in made.arrays.items():
            bench.kept.put_array(run, kind, entry, array)
        return row | made.row
    return row | judged(bench, latents, pictures, lambda kind: bench.kept.array(run, kind)).row


def completed(bench: Bench, run: Run, row: Row) -> Row:
    """A result that PyTorch computed, with the engine of its plan, once that gives the same latents.

    Args:
        bench: what is shared.
        run: the sampler of a model.
        row: has `computed` and no `engine`; its plan, layout and first latents are kept, or all latents of `full`.

    Raises:
        PassError: the engine departs from PyTorch by more than `DEPARTURE`.
    """
    entry = row["entry"]
    model = bench.prepared(run, "full")
    model.step_plan = StepPlan.from_json(bench.kept.file(run, "plans", entry, ".json").read_text(encoding="utf-8"))
    layout = json.loads(bench.kept.file(run, "layouts", entry, ".json").read_bytes())["layout"]
    model.layout = None if layout is None else Layout.from_dict(layout)
    runtime, how = bench.opened(model, run.model)
    kept = bench.kept.array(run, "latents" if entry == "full" else "samples", entry)
    expected = kept[:CHECKED]
    departure = float(np.linalg.norm(bench.latents(runtime, len(expected)) - expected) / np.linalg.norm(expected))
    if departure > DEPARTURE:
        raise PassError(f"the engine departs from PyTorch by {departure:.1e} of the latents")
    if entry == "full":
        for kind, array in judged(bench, kept, bench.pictures(runtime, kept)).arrays.items():
            bench.kept.put_array(run, kind, entry, array)
    return row | how | {"departure": departure, "processor": processor_name()}


def described(model: LatentDiffusion) -> Row:
    """What a plan does, and what it costs in full guided network calls, by its multiply-accumulates.

    `strip` has a letter a call: F full, f full without guidance, c cached (1, 2, ... where there are several cached
    paths), s at a smaller size.
    """
    plan = planned(model)
    shares = {plan.full_path: 1.0}
    if model.layout is not None:
        shares |= {k: v.macs_share for k, v in model.family.path_costs(model.denoiser, model.layout).items()}
    guided = any(step.guidance != "none" for step in plan.steps)
    cost = sum(
        shares[step.path] * step.level**2 * (0.5 if guided and step.guidance == "none" else 1.0) for step in plan.steps
    )
    cached = [name for name in plan.paths if name != plan.full_path]
    letters = {name: str(at) if len(cached) > 1 else "c" for at, name in enumerate(cached, start=1)}
    letters[plan.full_path] = "F"
    strip = "".join(
        "s"
        if step.level < 1.0
        else "f"
        if letters[step.path] == "F" and step.guidance == "none"
        else letters[step.path]
        for step in plan.steps
    )
    full = [at for at, step in enumerate(plan.steps) if step.path == plan.full_path]
    return {
        "calls": plan.network_calls,
        "full_calls": len(full),
        "cached_calls": plan.network_calls - len(full),
        "full_rows": full,
        "unguided_rows": [at for at, step in enumerate(plan.steps) if guided and step.guidance == "none"],
        "strip": strip,
        "cost": cost,
        "searched": plan.key.get("optimised"),
    }


@dataclass(frozen=True)
class Judged:
    """The quality of some pictures, as plain data, and what it was computed from."""

    row: Row
    arrays: dict[str, np.ndarray]
    psnr: np.ndarray = field(default_factory=lambda: np.zeros(0))


def judged(
    bench: Bench, latents: np.ndarray, pictures: np.ndarray, full: Callable[[str], np.ndarray] | None = None
) -> Judged:
    """Judge pictures, against the full run's of the same noise where it is given.

    Args:
        bench: holds prompts and scorer.
        latents: float32 (samples, channels, h, w).
        pictures: uint8 (samples, height, width, 3).
        full: gives latents, pictures, features and hits of the full run.
    """
    scores = bench.scorer.score(pictures)
    hits = metrics.attribute_hits(scores.logits, bench.scorer.heads, [prompt.attributes for prompt in bench.prompts])
    row: Row = {"attributes": metrics.attribute_accuracy(hits).to_dict()}
    arrays = {"latents": latents, "pictures": pictures, "features": scores.features, "hits": hits}
    if full is None:
        return Judged(row, arrays)
    reference = full("latents")
    peak = metrics.latent_peak(reference)
    each = metrics.psnr_per_sample(reference, latents, peak)
    pooled = float(np.mean(np.square(reference.astype(np.float64) - latents)))
    row["latent_psnr_db"] = metrics.mean(each).to_dict()
    row["latent_psnr_percentiles_db"] = {str(at): float(np.percentile(each, at)) for at in (1, 5, 50)}
    row["pooled_psnr_db"] = min(10 * float(np.log10(peak**2 / pooled)) if pooled else metrics.DB_CAP, metrics.DB_CAP)
    row["image_psnr_db"] = metrics.image_psnr_db(full("pictures"), pictures).to_dict()
    row["change_points"] = points(metrics.accuracy_change(full("hits"), hits))
    if len(latents) >= metrics.FRECHET_MINIMUM:
        row["frechet"] = metrics.frechet_distance(scores.features, full("features"), paired=True).to_dict()
    return Judged(row, arrays, each)


def points(change: metrics.Estimate) -> Row:
    """A change of a share, in points of a hundred."""
    interval = None if change.interval is None else [100 * bound for bound in change.interval]
    return {"value": 100 * change.value, "interval": interval, "n": change.n}


def timed(bench: Bench, run: Run, rounds: int = ROUNDS) -> None:
    """Time every measured entry of a run in turn, and write it down; where a plan is not kept, its time stays."""
    rows = {row["entry"]: row for row in bench.kept.rows(run) if "refused" not in row}
    plans: dict[str, tuple[Path, StepPlan]] = {}
    for entry, row in rows.items():
        file = bench.kept.file(run, "plans", entry, ".json")
        folder = bench.kept.root / "engines" / run.model / row["engine"]
        if file.exists() and folder.exists():
            plans[entry] = folder, StepPlan.from_json(file.read_text(encoding="utf-8"))
    for entry, found in times(plans, bench.target, bench.prompts[0].text, rounds).items():
        bench.kept.put(run, rows[entry] | found)


def times(plans: Mapping[str, tuple[Path, StepPlan]], target: str, prompt: str, rounds: int) -> dict[str, Row]:
    """Time one picture at one thread, in turn: the denoising loop alone, and from prompt to picture.

    Args:
        plans: name -> engine folder and plan; one is called `full`, to which the ratios are taken.
        target: of the engines.
        prompt: of the picture.
        rounds: timed runs of each.

    Returns:
        Name -> `ms` and `ratio` of the loop, `whole_ms` and `whole_ratio` from prompt to picture, each median with
        quartiles; ratios are full / entry, so that 2 is twice as fast.
    """
    opened: dict[Path, Runtime] = {}
    contestants, inner = [], dict[str, list[float]]()
    for name, (folder, plan) in plans.items():
        if folder not in opened:
            opened[folder] = Engine.open(folder, target, 1).runtime
        inner[name] = []
        contestants.append(Contestant(name, _picture(opened[folder].altered(plan=plan), prompt, inner[name])))
    whole = {name: timing.times for name, timing in interleave(contestants, rounds).items()}
    loops = {name: np.array(taken[-rounds:]) for name, taken in inner.items()}
    found: dict[str, Row] = {}
    for name in plans:
        row: Row = {"timed": datetime.date.today().isoformat(), "rounds": rounds}
        for prefix, taken in (("", loops), ("whole_", whole)):
            row[f"{prefix}ms"] = float(np.median(taken[name]))
            row[f"{prefix}ms_quartiles"] = _quartiles(taken[name])
            row[f"{prefix}ratio"] = float(np.median(taken["full"]) / np.median(taken[name]))
            row[f"{prefix}ratio_quartiles"] = _quartiles(taken["full"] / taken[name])
        found[name] = row
    return found


def _picture(runtime: Runtime, prompt: str, loops: list[float]) -> Callable[[], np.ndarray]:
    """One picture; the time of its denoising loop is added to `loops`, in ms."""

    def run() -> np.ndarray:
        text, nothing = runtime.encode([prompt]), runtime.encode(conditioning.unconditional(1))
        began = time.perf_counter()
        latents = runtime.sample(text, [FIRST_SEED], SIDE, SIDE, negative_prompts=nothing)
        loops.append(1e3 * (time.perf_counter() - began))
        return runtime.decode(latents)

    return run


def _quartiles(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values, (25, 75))]


def untimed(kept: Kept, run: Run) -> bool:
    """Whether an entry of a run has no time yet."""
    return any("whole_ms" not in row and "refused" not in row for row in kept.rows(run))
