"""Measures whether int8 and caching get in each other's way: none, each alone, both, and what each alone promises."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.compiler import apply
from compress.doctor import processor_name
from compress.passes.base import Pass
from compress.passes.cache import Cache
from compress.passes.quantize import Quantize
from compress.store import Store
from export.step_plan import StepPlan
from recipes.benchmarks import caching_tables
from recipes.benchmarks.caching.__main__ import BUILD
from recipes.benchmarks.caching.bench import Bench, planned, sampled
from recipes.benchmarks.caching.measure import ROUNDS, judged, times
from recipes.benchmarks.caching.presets import PRESETS, SAMPLERS, Run
from recipes.benchmarks.caching.results import Kept, Row, aggregate, encoded, write

SCHEME = "int8-w8a8"
ENTRY = "deepcache taylor1"


def variants(model: str, entry: str) -> dict[str, list[Pass]]:
    """Name -> its passes; the full run first."""
    return {
        "full": [],
        SCHEME: [Quantize(scheme=SCHEME)],
        entry: [Cache(**PRESETS[model][entry])],
        "both": [Quantize(scheme=SCHEME), Cache(**PRESETS[model][entry])],
    }


def expected_psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Mean PSNR, dB, if the errors of both changes were independent, so that their squares add up.

    Args:
        one: (n,), of every sample under one change.
        other: (n,), under the other.
    """
    return float(np.mean(-10.0 * np.log10(10.0 ** (-one / 10.0) + 10.0 ** (-other / 10.0))))


def measure(bench: Bench, run: Run, entry: str) -> Row:
    """Speed and quality of the four, and what the two alone promise for both."""
    rows: dict[str, Row] = {}
    store = Store(bench.kept.root / "store")
    plans: dict[str, tuple[Path, StepPlan]] = {}
    psnr: dict[str, np.ndarray] = {}
    full: dict[str, np.ndarray] = {}
    for name, passes in variants(run.model, entry).items():
        model = sampled(bench.models[run.model].clone(), run, run.steps)
        stages = apply(model, passes, bench.context.targets, bench.context, store)
        model = list(stages.values())[-1] if stages else model
        quantized = model.state_hash() if model.quant_plans else None
        plans[name] = bench.engine(model, run.model, quantized), planned(model)
        runtime = bench.runtime(*plans[name])
        latents = bench.latents(runtime)
        made = judged(bench, latents, bench.pictures(runtime, latents), full.__getitem__ if full else None)
        rows[name], psnr[name] = made.row, made.psnr
        full = full or made.arrays
        psnr_db = made.row.get("latent_psnr_db", {}).get("value")
        print(f"{run} {name}: {'done' if psnr_db is None else f'{psnr_db:.2f} dB'}", flush=True)
    for name, found in times(plans, bench.target, bench.prompts[0].text, ROUNDS).items():
        rows[name] |= found
    return {
        "model": run.model,
        "sampler": run.sampler,
        "steps": run.steps,
        "entry": entry,
        "scheme": SCHEME,
        "target": bench.target,
        "samples": len(bench.prompts),
        "date": datetime.date.today().isoformat(),
        "processor": processor_name(),
        "rows": rows,
        "expected": expected(rows, entry, expected_psnr(psnr[SCHEME], psnr[entry])),
    }


def expected(rows: dict[str, Row], entry: str, psnr: float) -> dict[str, Any]:
    """What the two changes alone promise for both: ratios multiply, errors and losses add up."""
    ratios = {key: rows[SCHEME][key] * rows[entry][key] for key in ("ratio", "whole_ratio")}
    change = sum(rows[name]["change_points"]["value"] for name in (SCHEME, entry))
    return {**ratios, "latent_psnr_db": psnr, "change_points": change}


def main(words: Sequence[str] | None = None) -> None:
    """Measure every model that has no result of as many samples, then aggregate."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.caching.interaction", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--steps", nargs="+", type=int, default=[50])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--entry", default=ENTRY, help="a preset")
    parser.add_argument("--build", type=Path, default=BUILD, help="what is kept on the way")
    parser.add_argument("--results", type=Path, default=caching_tables.RESULTS, help="the dated reports")
    told = parser.parse_args(words)
    for model in told.models:
        if told.entry not in PRESETS[model]:
            raise SystemExit(f"{model} has no preset {told.entry!r}; there are {', '.join(PRESETS[model])}")
    bench = Bench.of(Kept(told.build), caching_tables.TARGET, told.models, told.samples)
    for model in told.models:
        for steps in told.steps:
            run = Run(model, next(iter(SAMPLERS[model])), steps)
            file = told.build / "interaction" / f"{model}-{run.sampler}-{steps}.json"
            known = json.loads(file.read_bytes()) if file.exists() else {}
            if (known.get("samples"), known.get("entry")) != (told.samples, told.entry):
                write(file, encoded(measure(bench, run, told.entry)))
            bench.engines.clear()
            aggregate(told.results, [told.build])


if __name__ == "__main__":
    main()
