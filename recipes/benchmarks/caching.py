"""Measures every preset of the `cache` pass on exported engines, against the same sampler with fewer steps."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.engine.export_engine import export_engine
from compress.errors import PassError, RefusedError
from compress.guidance import place_guidance
from compress.measure import metrics
from compress.measure.environment import environment
from compress.measure.scorer import Scorer
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.cache import Cache, Optimize
from compress.prompts import Prompt, read_prompts
from compress.sampler import compile_sampler
from compress.schedulers import completed
from compress.store import Store
from export.engine import Engine
from export.runtime import Runtime
from export.step_plan import Segment, StepPlan
from export.target import target
from recipes.benchmarks import caching_tables

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "caching"
REFERENCE = ROOT / "recipes" / "reference"
TARGET = "openvino-cpu"
SIDE, BATCH, THREADS, ROUNDS = 64, 16, 2, 7
GUIDANCE = 3.0
FIRST_SEED = 2**32
SHARES = (0.5, 0.4, 0.3, 0.2, 0.14, 0.1)
"""Of the steps: how many the runs with fewer steps take."""

SAMPLERS: dict[str, dict[str, dict[str, Any]]] = {
    "unet": {
        "DPMSolverMultistepScheduler": {},
        "DDIMScheduler": {"clip_sample": False},
        "UniPCMultistepScheduler": {},
    },
    "mmdit": {
        "FlowMatchEulerDiscreteScheduler": {},
        "FlowMatchHeunDiscreteScheduler": {},
        "UniPCMultistepScheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.5},
    },
}
"""Model -> scheduler -> its options; the first scheduler is the model's own."""

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "unet": {
        "deepcache": {"method": "deepcache", "cut": 0, "interval": 3},
        "deepcache taylor1": {"method": "deepcache", "cut": 0, "interval": 4, "forecast": "taylor1"},
        "deepcache signed-power": {"method": "deepcache", "cut": 0, "interval": 3, "schedule": "signed-power"},
        **{
            name: {"method": name}
            for name in (
                "encoder-propagation",
                "fora",
                "taylorseer",
                "hicache",
                "smoothcache",
                "pab",
                "t-gate",
                "guidance-interval",
            )
        },
    },
    "mmdit": {
        "deepcache": {"method": "deepcache", "cut": 1, "interval": 3},
        "deepcache taylor1": {"method": "deepcache", "cut": 1, "interval": 4, "forecast": "taylor1"},
        **{
            name: {"method": name}
            for name in (
                "ddt",
                "delta-dit",
                "fora",
                "smoothcache",
                "teacache",
                "first-block-cache",
                "dbcache",
                "magcache",
                "taylorseer",
                "hicache",
                "pab",
                "guidance-interval",
            )
        },
    },
}
"""Model -> entry -> keys of the pass."""


@dataclass(frozen=True)
class Run:
    """One sampler of one model at one number of steps; all its entries are compared with its entry `full`."""

    model: str
    sampler: str
    steps: int

    def file(self, kind: str, entry: str, suffix: str) -> Path:
        """Where something of an entry is kept: build/caching/<kind>/<model>/<sampler>/<steps>/<entry><suffix>."""
        return BUILD / kind / self.model / self.sampler / str(self.steps) / f"{entry}{suffix}"

    def fewer(self) -> list[int]:
        """The numbers of steps of the runs with fewer of them."""
        wanted = {max(1, round(share * self.steps)) for share in SHARES}
        return sorted((count for count in wanted if count < self.steps), reverse=True)

    def entries(self, budgets: Sequence[float], only: Sequence[str] | None) -> list[str]:
        """Names of what is measured, in order; `full` is always among them."""
        names = ["full", *(f"{count} steps" for count in self.fewer()), *PRESETS[self.model]]
        names += [f"optimised {budget:g}" for budget in budgets]
        return [name for name in names if only is None or name == "full" or name in only]


@dataclass
class Bench:
    """What all runs share.

    Attributes:
        models: by name, without a sampler.
        prompts: held out, one per sample.
        scorer: reads attributes and features.
        context: of the passes.
        store: of float graphs.
        engines: folders opened with `THREADS` threads.
    """

    models: dict[str, LatentDiffusion]
    prompts: Sequence[Prompt]
    scorer: Scorer
    context: PassContext
    store: Store
    engines: dict[Path, Runtime]

    @classmethod
    def of(cls, models: Sequence[str], samples: int) -> Bench:
        """Load everything."""
        store = Store(BUILD / "store")
        calibration = read_prompts(REFERENCE / "prompts" / "calibration.jsonl", 32)
        context = PassContext([one.text for one in calibration], 0, SIDE, SIDE, targets=[target(TARGET)], store=store)
        return cls(
            {name: load(REFERENCE / name) for name in models},
            read_prompts(REFERENCE / "prompts" / "heldout.jsonl", samples),
            Scorer(REFERENCE / "recogniser", THREADS),
            context,
            store,
            {},
        )

    def prepared(self, run: Run, entry: str) -> LatentDiffusion:
        """The model with the entry's step plan and layout.

        Raises:
            RefusedError: the model, the sampler or the number of steps cannot take it.
            PassError: the pass changed nothing.
        """
        fewer = entry.removesuffix(" steps")
        count = int(fewer) if entry != fewer else run.steps
        model = sampled(self.models[run.model].clone(), run.sampler, SAMPLERS[run.model][run.sampler], count)
        if entry == "full" or entry != fewer:
            return model
        fields = PRESETS[run.model].get(entry)
        if fields is None:
            fields = {"optimize": Optimize(latency_ratio=float(entry.removeprefix("optimised ")))}
        step = Cache(**fields)
        edits = step.plan(model, self.context.targets)
        step.apply(model, edits, self.context)
        step.check(model, edits)
        return model

    def engine(self, run: Run, model: LatentDiffusion) -> Path:
        """The folder of an engine with the model's layout, exported unless it is there."""
        layout = None if model.layout is None else model.layout.to_dict()
        key = hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest()[:16]
        folder = BUILD / "engines" / run.model / key
        if not folder.exists():
            making = folder.with_name(f"{key}.{os.getpid()}")
            shutil.rmtree(making, ignore_errors=True)
            sizes = {"batch": (1, 1, 2 * BATCH), "height": (SIDE,) * 3, "width": (SIDE,) * 3}
            export_engine(model, self.context.targets, sizes, making, store=self.store)
            making.rename(folder)
        return folder

    def runtime(self, folder: Path, plan: StepPlan) -> Runtime:
        """An opened engine over another plan."""
        if folder not in self.engines:
            self.engines[folder] = Engine.open(folder, TARGET, THREADS).runtime
        return self.engines[folder].altered(plan=plan)

    def latents(self, runtime: Runtime) -> np.ndarray:
        """What a plan makes of the held-out prompts, float32 (samples, channels, h, w)."""
        made = []
        for first in range(0, len(self.prompts), BATCH):
            texts = [prompt.text for prompt in self.prompts[first : first + BATCH]]
            seeds = [FIRST_SEED + first + i for i in range(len(texts))]
            made.append(runtime.sample(texts, seeds, SIDE, SIDE))
        return np.concatenate(made)


def sampled(model: LatentDiffusion, name: str, options: Mapping[str, Any], steps: int) -> LatentDiffusion:
    """The model with the step plan of a guided sampler.

    Raises:
        RefusedError: the scheduler takes no such number of steps.
    """
    segments, paths, slots = model.family.segments(model.denoiser, model.layout)
    side = SIDE // model.latent["downscale"]
    model.step_plan = compile_sampler(
        name,
        model.scheduler_config,
        steps,
        place_guidance(model, GUIDANCE),
        segments={segment.name: Segment(segment.inputs, segment.outputs) for segment in segments},
        paths=paths,
        slots=slots,
        options=completed(
            name, model.scheduler_config, options, model.family.sampler_options(model.denoiser, side, side)
        ),
    )
    return model


def measure(bench: Bench, run: Run, entry: str) -> dict[str, Any]:
    """Quality and plan of one entry; its plan, latents, and for `full` its pictures and scores are kept as files."""
    row: dict[str, Any] = {
        "model": run.model,
        "sampler": run.sampler,
        "options": SAMPLERS[run.model][run.sampler],
        "steps": run.steps,
        "entry": entry,
        "fields": PRESETS[run.model].get(entry),
        "samples": len(bench.prompts),
        "date": datetime.date.today().isoformat(),
    }
    try:
        model = bench.prepared(run, entry)
    except RefusedError as error:
        return row | {"refused": str(error)}
    except PassError as error:
        return row | {"refused": f"fails its own check: {error}"}
    plan = model.step_plan
    if plan is None:
        raise PassError(f"{entry} has no step plan")
    folder = bench.engine(run, model)
    runtime = bench.runtime(folder, plan)
    row |= {
        "engine": folder.name,
        "calls": plan.network_calls,
        "full_rows": [at for at, step in enumerate(plan.steps) if step.path == plan.full_path],
        "paths": [step.path for step in plan.steps],
        "unguided_rows": [at for at, step in enumerate(plan.steps) if step.guidance == "none"],
    }
    write(run.file("plans", entry, ".json"), plan.to_json().encode())
    latents = bench.latents(runtime)
    keep(run.file("latents", entry, ".npy"), latents)
    if not np.isfinite(latents).all():
        return row | {"refused": "its latents are not finite"}
    parts = [runtime.decode(latents[first : first + BATCH]) for first in range(0, len(latents), BATCH)]
    pictures = np.concatenate(parts)
    scores = bench.scorer.score(pictures)
    hits = metrics.attribute_hits(scores.logits, bench.scorer.heads, [prompt.attributes for prompt in bench.prompts])
    row["attributes"] = metrics.attribute_accuracy(hits).to_dict()
    if entry == "full":
        for kind, array in (("pictures", pictures), ("features", scores.features), ("hits", hits)):
            keep(run.file(kind, entry, ".npy"), array)
        return row
    known = {kind: np.load(run.file(kind, "full", ".npy")) for kind in ("latents", "pictures", "features", "hits")}
    row["latent_psnr_db"] = metrics.latent_psnr_db(known["latents"], latents).to_dict()
    row["image_psnr_db"] = metrics.image_psnr_db(known["pictures"], pictures).to_dict()
    row["change_points"] = points(metrics.accuracy_change(known["hits"], hits))
    if len(latents) >= metrics.FRECHET_MINIMUM:
        row["frechet"] = metrics.frechet_distance(scores.features, known["features"], paired=True).to_dict()
    return row


def points(change: metrics.Estimate) -> dict[str, Any]:
    """A change of a share, in points of a hundred."""
    interval = None if change.interval is None else [100 * bound for bound in change.interval]
    return {"value": 100 * change.value, "interval": interval, "n": change.n}


def timed(bench: Bench, run: Run) -> None:
    """Time the denoising loop of every measured entry for one picture at one thread, in turn, and write it down."""
    rows = {row["entry"]: row for row in results(run) if "refused" not in row}
    opened: dict[str, Runtime] = {}
    loops: dict[str, Callable[[], np.ndarray]] = {}
    text: dict[str, np.ndarray] | None = None
    for entry, row in rows.items():
        if row["engine"] not in opened:
            folder = BUILD / "engines" / run.model / row["engine"]
            opened[row["engine"]] = Engine.open(folder, TARGET, 1).runtime
        base = opened[row["engine"]]
        text = text or base.encode([bench.prompts[0].text])
        plan = StepPlan.from_json(run.file("plans", entry, ".json").read_text(encoding="utf-8"))
        loops[entry] = loop(base.altered(plan=plan), text)
    taken: dict[str, list[float]] = {entry: [] for entry in loops}
    for turn in range(ROUNDS + 1):
        for entry, sample in loops.items():
            began = time.perf_counter()
            sample()
            if turn:
                taken[entry].append(1e3 * (time.perf_counter() - began))
    middle = {entry: statistics.median(values) for entry, values in taken.items()}
    for entry, row in rows.items():
        row |= {"ms": middle[entry], "rounds_ms": taken[entry], "ratio": middle["full"] / middle[entry]}
        write(run.file("results", entry, ".json"), encoded(row))


def loop(runtime: Runtime, text: Mapping[str, np.ndarray]) -> Callable[[], np.ndarray]:
    """One run of the denoising loop for one picture, the prompt encoded beforehand."""
    return lambda: runtime.sample(text, [FIRST_SEED], SIDE, SIDE)


def results(run: Run) -> list[dict[str, Any]]:
    """What is kept of a run."""
    return [json.loads(file.read_bytes()) for file in sorted(run.file("results", "x", "").parent.glob("*.json"))]


def encoded(row: Mapping[str, Any]) -> bytes:
    """Plain data as a JSON file."""
    return (json.dumps(row, indent=1) + "\n").encode()


def write(file: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    making = file.with_name(f".{file.name}.{os.getpid()}")
    making.write_bytes(data)
    making.replace(file)


def keep(file: Path, array: np.ndarray) -> None:
    """Write an array that appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    making = file.with_name(f".{os.getpid()}.{file.name}")
    np.save(making, array)
    making.replace(file)


def merged(older: Mapping[str, Any] | None, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries of an older report, those measured anew replaced, in the order of the tables."""
    found = {identity(row): dict(row) for row in (older or {}).get("entries", [])}
    found |= {identity(row): dict(row) for row in rows}
    return sorted(found.values(), key=place)


def identity(row: Mapping[str, Any]) -> tuple[str, str, int, str]:
    """What a row is about."""
    return row["model"], row["sampler"], row["steps"], row["entry"]


def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Where a row stands: models, samplers and entries in the order above, most steps first."""
    model, sampler, steps, entry = identity(row)
    models, samplers, presets = list(SAMPLERS), list(SAMPLERS[model]), list(PRESETS[model])
    kind: tuple[int, float]
    if entry == "full":
        kind = 0, 0.0
    elif entry.endswith(" steps"):
        kind = 1, -float(entry.removesuffix(" steps"))
    elif entry in presets:
        kind = 2, float(presets.index(entry))
    else:
        kind = 3, -float(entry.removeprefix("optimised "))
    return models.index(model), samplers.index(sampler), -steps, *kind


def aggregate(folder: Path = caching_tables.RESULTS, build: Path = BUILD) -> dict[str, Any]:
    """Merge every result with the newest older report, and write caching-DATE.json and caching.md.

    Args:
        folder: of the dated reports.
        build: holds `results/`.
    """
    dated = sorted(folder.glob("caching-????-??-??.json"))
    older = json.loads(dated[-1].read_bytes()) if dated else None
    rows = [json.loads(file.read_bytes()) for file in sorted((build / "results").rglob("*.json"))]
    today = datetime.date.today().isoformat()
    report = {
        "date": today,
        "environment": environment(),
        "target": TARGET,
        "batch": BATCH,
        "entries": merged(older, rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"caching-{today}.json", encoded(report))
    write(folder / "caching.md", (caching_tables.document(report)).encode())
    return report


def runs(models: Sequence[str], samplers: str, steps: Sequence[int]) -> Iterator[Run]:
    """Every run asked for: the default samplers alone, or all."""
    for count in steps:
        for model in models:
            names = list(SAMPLERS[model])
            for name in names if samplers == "all" else names[:1]:
                yield Run(model, name, count)


def known(run: Run, entry: str, samples: int) -> dict[str, Any] | None:
    """The result of an entry, if it is there with as many samples."""
    file = run.file("results", entry, ".json")
    row = json.loads(file.read_bytes()) if file.exists() else None
    return row if row is not None and row["samples"] == samples else None


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is not measured yet, then aggregate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--samplers", choices=["default", "all"], default="default")
    parser.add_argument("--steps", nargs="+", type=int, default=[50])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--budgets", nargs="*", type=float, default=[0.4, 0.2], help="latency ratios of optimised runs")
    parser.add_argument("--only", nargs="+", default=None, help="names of entries; full is always measured")
    told = parser.parse_args(words)
    wanted = [(run, run.entries(told.budgets, told.only)) for run in runs(told.models, told.samplers, told.steps)]
    bench = Bench.of(told.models, told.samples)
    left = sum(known(run, entry, told.samples) is None for run, entries in wanted for entry in entries)
    done, began, failed = 0, time.perf_counter(), list[str]()
    for run, entries in wanted:
        if known(run, "full", told.samples) is None:
            shutil.rmtree(run.file("results", "x", "").parent, ignore_errors=True)
            left = done + sum(known(one, name, told.samples) is None for one, names in wanted for name in names)
        for entry in entries:
            if known(run, entry, told.samples) is not None:
                continue
            start = time.perf_counter()
            try:
                row = measure(bench, run, entry)
            except Exception:
                if entry == "full":
                    raise
                failed.append(f"{run.model} {run.sampler} {run.steps} {entry}")
                left -= 1
                print(f"{failed[-1]}: {traceback.format_exc()}", flush=True)
                continue
            write(run.file("results", entry, ".json"), encoded(row))
            done += 1
            now = time.perf_counter()
            rest = (now - began) / done * (left - done) / 60
            said = row.get("refused") or f"{row.get('latent_psnr_db', {}).get('value', float('nan')):.2f} dB"
            where = f"{run.model} {run.sampler} {run.steps}"
            print(f"{done}/{left} {where} {entry}: {said}, {now - start:.1f} s, {rest:.0f} min left", flush=True)
        if any("ms" not in row and "refused" not in row for row in results(run)):
            start = time.perf_counter()
            timed(bench, run)
            print(f"{run.model} {run.sampler} {run.steps}: timed in {time.perf_counter() - start:.1f} s", flush=True)
        bench.engines.clear()
    aggregate()
    if failed:
        raise SystemExit(f"not measured, and tried again by the next run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
