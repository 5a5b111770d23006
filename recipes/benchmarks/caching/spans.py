"""Measures what batching the decoders of several steps gains, and what steps that share an encoder cost in quality."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from compress.doctor import processor_name
from compress.measure.memory import engine_peak_mib
from compress.passes.cache import Cache
from export.manifest import STEP_PLAN, read_manifest
from export.step_plan import StepPlan
from recipes.benchmarks import caching_tables
from recipes.benchmarks.caching.__main__ import BUILD
from recipes.benchmarks.caching.bench import SIDE, Bench, planned, sampled
from recipes.benchmarks.caching.measure import ROUNDS, judged, times
from recipes.benchmarks.caching.presets import SAMPLERS, Run
from recipes.benchmarks.caching.results import Kept, Row, aggregate, encoded, write

LENGTHS = (1, 2, 4, 8)
"""Decoder calls that follow each full one."""


def spanned(bench: Bench, run: Run, length: int) -> tuple[Path, StepPlan]:
    """The engine and the plan that runs the encoder at every `length + 1`-th call, decoders between them as a batch."""
    model = sampled(bench.models[run.model].clone(), run, run.steps)
    step = Cache(method="encoder-propagation", key_steps=length + 1, inject=0.0, span=True)
    edits = step.plan(model, bench.context.targets)
    step.apply(model, edits, bench.context)
    step.check(model, edits)
    return bench.engine(model, run.model), planned(model)


def alone(plan: StepPlan) -> StepPlan:
    """The same calls one after the other."""
    return replace(plan, steps=tuple(replace(step, span=1) for step in plan.steps))


def measure(bench: Bench, run: Run, lengths: Sequence[int]) -> Row:
    """Time, memory and quality at every length; batched and one after the other give the same picture."""
    model = bench.prepared(run, "full")
    plans = {"full": (bench.engine(model, run.model), planned(model))}
    for length in lengths:
        folder, plan = spanned(bench, run, length)
        plans[f"{length} batched"], plans[f"{length} in turn"] = (folder, plan), (folder, alone(plan))
    found = times(plans, bench.target, bench.prompts[0].text, ROUNDS)
    full = {kind: bench.kept.array(run, kind)[: len(bench.prompts)] for kind in ("latents", "features", "hits")}
    full["pictures"] = bench.kept.array(run, "pictures")[: len(bench.prompts)]
    rows = []
    for length in lengths:
        folder, plan = plans[f"{length} batched"]
        runtime = bench.runtime(folder, plan)
        latents = bench.latents(runtime)
        few = bench.latents(runtime.altered(plan=alone(plan)), 2)
        row = judged(bench, latents, bench.pictures(runtime, latents), full.__getitem__).row
        row |= {"length": length, "difference": float(np.abs(few - latents[:2]).max())}
        for name in ("batched", "in turn"):
            row[name] = found[f"{length} {name}"] | {"peak_mib": peak(bench, folder, plans[f"{length} {name}"][1])}
        rows.append(row)
        print(
            f"{run} spans of {length}: {row['batched']['ratio']:.2f}x, {row['latent_psnr_db']['value']:.1f} dB",
            flush=True,
        )
    told = {"model": run.model, "sampler": run.sampler, "steps": run.steps, "samples": len(bench.prompts)}
    when = {"date": datetime.date.today().isoformat(), "processor": processor_name(), "target": bench.target}
    return {**told, **when, "full_ms": found["full"]["ms"], "rows": rows}


def peak(bench: Bench, folder: Path, plan: StepPlan) -> float:
    """Peak memory, MiB, of a process that makes one picture with this plan."""
    kept, manifest = (folder / STEP_PLAN).read_text(encoding="utf-8"), read_manifest(folder)
    run = set(manifest.files)
    try:
        write(folder / STEP_PLAN, (plan.to_json() + "\n").encode())
        manifest.sealed(folder, run).write(folder)
        return engine_peak_mib(folder, bench.target, bench.prompts[0].text, SIDE, SIDE)
    finally:
        write(folder / STEP_PLAN, kept.encode())
        manifest.write(folder)


def main(words: Sequence[str] | None = None) -> None:
    """Measure the UNet's own sampler, then aggregate."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.caching.spans", description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=256, help="at most those of the full run that is there")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--build", type=Path, default=BUILD, help="what is kept on the way")
    parser.add_argument("--results", type=Path, default=caching_tables.RESULTS, help="the dated reports")
    told = parser.parse_args(words)
    run = Run("unet", next(iter(SAMPLERS["unet"])), told.steps)
    bench = Bench.of(Kept(told.build), caching_tables.TARGET, ["unet"], told.samples)
    if not bench.kept.file(run, "pictures", "full", ".npy").exists():
        raise SystemExit("measure the full run first: python -m recipes.benchmarks.caching --models unet --only full")
    file = told.build / "spans" / f"unet-{run.sampler}-{told.steps}.json"
    write(file, encoded(measure(bench, run, told.lengths)))
    aggregate(told.results, [told.build])


if __name__ == "__main__":
    main()
