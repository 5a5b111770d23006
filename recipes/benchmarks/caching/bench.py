"""The models, prompts and engines that all entries of the caching benchmark share."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compress.engine.export_engine import export_engine
from compress.guidance import place_guidance
from compress.measure.scorer import Scorer
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.cache import Cache, Optimize
from compress.prompts import Prompt, check_disjoint, read_prompts
from compress.sampler import compile_sampler
from compress.schedulers import completed
from compress.store import Store, versions
from export.engine import Engine
from export.manifest import read_manifest
from export.runtime import Runtime
from export.step_plan import Segment, StepPlan
from export.target import target
from recipes.benchmarks.caching.presets import PRESETS, SAMPLERS, Run, budget_of, steps_of
from recipes.benchmarks.caching.results import Kept, Row, key

ROOT = Path(__file__).parent.parent.parent.parent
REFERENCE = ROOT / "recipes" / "reference"
SIDE, BATCH, THREADS = 64, 16, 2
GUIDANCE = 3.0
FIRST_SEED = 2**32
CALIBRATION = 32
SEARCHED = 40.0
"""Seconds of one search."""


@dataclass
class Bench:
    """What all runs share.

    Attributes:
        kept: where results, engines and float graphs lie; engines are taken again for the same model and layout, so
            delete `engines/` after a change of how graphs are exported.
        target: the row of `export/target.py` that is measured.
        models: by name, without a sampler.
        prompts: held out, one per sample; where there are more samples, the prompts are taken again with other seeds.
        scorer: reads attributes and features.
        context: of the passes; their prompts and seeds are disjoint from those of the samples.
        engines: folders opened with `threads` threads.
        batch: samples made at once.
        threads: of every engine.
    """

    kept: Kept
    target: str
    models: dict[str, LatentDiffusion]
    prompts: Sequence[Prompt]
    scorer: Scorer
    context: PassContext
    engines: dict[Path, Runtime] = field(default_factory=dict)
    batch: int = BATCH
    threads: int = THREADS

    @classmethod
    def of(cls, kept: Kept, name: str, models: Sequence[str], samples: int, threads: int = THREADS) -> Bench:
        """Load everything."""
        file = REFERENCE / "prompts" / "heldout.jsonl"
        held_out = read_prompts(file, min(samples, len(file.read_bytes().splitlines())))
        calibration = read_prompts(REFERENCE / "prompts" / "calibration.jsonl", CALIBRATION)
        check_disjoint(calibration, held_out)
        texts = [one.text for one in calibration]
        return cls(
            kept,
            name,
            {model: load(REFERENCE / model) for model in models},
            [held_out[at % len(held_out)] for at in range(samples)],
            Scorer(REFERENCE / "recogniser", threads),
            PassContext(texts, 0, SIDE, SIDE, targets=[target(name)], store=Store(kept.root / "store")),
            threads=threads,
        )

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """Of the models."""
        return {name: model.hash() for name, model in self.models.items()}

    def inputs(self, run: Run, entry: str, against: str | None) -> str:
        """The key of all that a result depends on, but for the code.

        Args:
            run: the sampler of a model.
            entry: one of its entries.
            against: the plan of the full run it is compared with; None for that run itself.
        """
        asked = {
            "model": self.hashes[run.model],
            "sampler": [run.sampler, SAMPLERS[run.model][run.sampler], run.steps, GUIDANCE],
            "entry": PRESETS[run.model].get(entry, entry),
            "target": self.target,
            "samples": [len(self.prompts), FIRST_SEED, [prompt.text for prompt in self.prompts]],
            "calibration": [list(self.context.prompts), self.context.seed],
            "scorer": self.scorer.sha256,
            "against": against,
        }
        if budget_of(entry) is not None:
            asked["search"] = _sources_of(ROOT / "compress" / "optimise")
        return key(asked)

    def prepared(self, run: Run, entry: str) -> LatentDiffusion:
        """The model with the entry's step plan and layout.

        Raises:
            RefusedError: the model, the sampler or the number of steps cannot take it.
            PassError: the pass does not give what it promised.
        """
        count, budget = steps_of(entry), budget_of(entry)
        model = sampled(self.models[run.model].clone(), run, count or run.steps)
        if entry == "full" or count is not None:
            return model
        if budget is None:
            step = Cache(**PRESETS[run.model][entry])
        else:
            step = Cache(optimize=Optimize(latency_ratio=budget, seconds=SEARCHED))
        edits = step.plan(model, self.context.targets)
        step.apply(model, edits, self.context)
        step.check(model, edits)
        return model

    def engine(self, model: LatentDiffusion, name: str, part: Any = None) -> Path:
        """The folder of an engine with the model's layout, exported unless it is there.

        Args:
            model: with its step plan.
            name: of the model.
            part: what else the engine depends on.

        Raises:
            RefusedError: the plan runs at sizes the model cannot take.
        """
        layout = layout_of(model)
        least = round(SIDE * min(step.level for step in planned(model).steps))
        named = layout if least == SIDE and part is None else [layout, least, part]
        folder = self.kept.root / "engines" / name / key(named)
        if folder.exists():
            manifest = read_manifest(folder)
            if manifest.provenance["model"] == model.hash() and self.target in manifest.targets:
                return folder
            shutil.rmtree(folder)
        making = folder.with_name(f"{folder.name}.{os.getpid()}")
        shutil.rmtree(making, ignore_errors=True)
        sizes = {"batch": (1, 1, 2 * BATCH), "height": (least, SIDE, SIDE), "width": (least, SIDE, SIDE)}
        export_engine(model, self.context.targets, sizes, making, store=self.context.store)
        making.rename(folder)
        return folder

    def runtime(self, folder: Path, plan: StepPlan) -> Runtime:
        """An opened engine over another plan."""
        if folder not in self.engines:
            self.engines[folder] = Engine.open(folder, self.target, self.threads).runtime
        return self.engines[folder].altered(plan=plan)

    def made_again(self, run: Run, entry: str) -> bool:
        """Whether the entry's plan and layout are still those that are kept, up to the rounding of calibration."""
        model = self.prepared(run, entry)
        files = (self.kept.file(run, kind, entry, ".json") for kind in ("plans", "layouts"))
        if not all(file.exists() for file in files):
            return False
        plan, layout = (
            json.loads(self.kept.file(run, kind, entry, ".json").read_bytes()) for kind in ("plans", "layouts")
        )
        return alike(json.loads(planned(model).to_json()), plan) and layout["layout"] == layout_of(model)

    def opened(self, model: LatentDiffusion, name: str) -> tuple[Runtime, Row]:
        """What runs a prepared model, and what the result says of it.

        Raises:
            RefusedError: the plan runs at sizes the model cannot take.
        """
        folder = self.engine(model, name)
        return self.runtime(folder, planned(model)), {"engine": folder.name}

    def latents(self, runtime: Runtime, samples: int | None = None) -> np.ndarray:
        """What a plan makes of the first of the held-out prompts, float32 (samples, channels, h, w)."""
        made = []
        prompts = self.prompts[:samples]
        for first in range(0, len(prompts), self.batch):
            texts = [prompt.text for prompt in prompts[first : first + self.batch]]
            made.append(runtime.sample(texts, [FIRST_SEED + first + at for at in range(len(texts))], SIDE, SIDE))
        return np.concatenate(made)

    def pictures(self, runtime: Runtime, latents: np.ndarray) -> np.ndarray:
        """Decoded latents, uint8 (samples, height, width, 3)."""
        return np.concatenate(
            [runtime.decode(latents[at : at + self.batch]) for at in range(0, len(latents), self.batch)]
        )

    def speed(self, name: str) -> tuple[float, float]:
        """Milliseconds that a full guided network call, and decoding and scoring, take a sample here, in batches."""
        run = Run(name, next(iter(SAMPLERS[name])), 4)
        model = self.prepared(run, "full")
        runtime = self.runtime(self.engine(model, name), planned(model))
        texts, seeds = ["a circle"] * BATCH, list(range(BATCH))
        runtime.decode(runtime.sample(texts, seeds, SIDE, SIDE))
        began = time.perf_counter()
        latents = runtime.sample(texts, seeds, SIDE, SIDE)
        sampled_at = time.perf_counter()
        self.scorer.score(runtime.decode(latents))
        parts = sampled_at - began, time.perf_counter() - sampled_at
        return 1e3 * parts[0] / BATCH / planned(model).network_calls, 1e3 * parts[1] / BATCH


def planned(model: LatentDiffusion) -> StepPlan:
    """The step plan that a prepared model has."""
    if model.step_plan is None:
        raise ValueError("the model has no step plan")
    return model.step_plan


def plan_key(model: LatentDiffusion) -> str:
    """The key of a plan over a layout: what pictures and times depend on, but for the rounding of a processor."""
    return key(rounded([layout_of(model), json.loads(planned(model).to_json())]))


def layout_of(model: LatentDiffusion) -> Any:
    """The layout of a model as plain data, as JSON gives it back."""
    return None if model.layout is None else json.loads(json.dumps(model.layout.to_dict()))


def alike(one: Any, other: Any) -> bool:
    """Whether plain data is the same, its numbers up to a ten-thousandth, since what devices calibrate is rounded."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        return bool(np.isclose(one, other, rtol=1e-4, atol=1e-12))
    return bool(one == other)


def rounded(value: Any) -> Any:
    """Plain data with its floats to nine significant digits: processors differ in the last ones."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def sources() -> str:
    """The hash of the code that plans and runs."""
    return versions()["sources"]


def _sources_of(folder: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))).hexdigest()


def sampled(model: LatentDiffusion, run: Run, steps: int, guidance: float = GUIDANCE) -> LatentDiffusion:
    """The model with the step plan of a sampler.

    Args:
        model: is given the plan.
        run: names model and sampler.
        steps: of the sampler.
        guidance: scale; 1 is none.

    Raises:
        RefusedError: the scheduler takes no such number of steps.
    """
    segments, paths, slots = model.family.segments(model.denoiser, model.layout)
    side = SIDE // model.latent["downscale"]
    told: Mapping[str, Any] = model.family.sampler_options(model.denoiser, side, side)
    model.step_plan = compile_sampler(
        run.sampler,
        model.scheduler_config,
        steps,
        place_guidance(model, guidance),
        segments={segment.name: Segment(segment.inputs, segment.outputs) for segment in segments},
        paths=paths,
        slots=slots,
        options=completed(run.sampler, model.scheduler_config, SAMPLERS[run.model][run.sampler], told),
    )
    return model
