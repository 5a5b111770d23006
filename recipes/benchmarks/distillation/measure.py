"""Quality and diversity of one entry of the distillation benchmark, on its exported engine."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.doctor import processor_name
from compress.errors import RefusedError
from compress.measure import metrics
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.quantize import Quantize
from compress.prompts import Prompt
from export.runtime import Runtime
from export.step_plan import StepPlan
from recipes.benchmarks.caching.bench import FIRST_SEED, SIDE, Bench, planned, sampled
from recipes.benchmarks.caching.measure import points
from recipes.benchmarks.caching.presets import Run
from recipes.benchmarks.caching.results import Row, encoded, key, write
from recipes.benchmarks.distillation.entries import Entry, full
from recipes.benchmarks.distillation.students import folder_of
from recipes.reference.scenes import attribute_ids, caption, draw_scenes

SEEDS = 4
"""Pictures of one prompt that are compared with each other."""
SHARE = 8
"""One prompt in so many is given that many seeds."""
SHOWN = 10
"""Pictures that are kept for the sheet."""


@dataclass(frozen=True)
class Study:
    """What all entries share.

    Attributes:
        bench: models, prompts, engines, scorer.
        build: where students and results are kept.
    """

    bench: Bench
    build: Path

    def file(self, kind: str, model: str, entry: Entry, suffix: str) -> Path:
        """Where something of an entry is kept: <kind>/<model>/<name and content>."""
        name = str(entry).replace(", ", "-").replace(" ", "-")
        return self.build / kind / model / f"{name}-{self.inputs(model, entry)}{suffix}"

    def inputs(self, model: str, entry: Entry) -> str:
        """The key of all that a result depends on, but for the code."""
        bench = self.bench
        taught = folder_of(self.build, bench.models[model], model, entry.student).name if entry.student else None
        return key(
            {
                "model": bench.hashes[model],
                "entry": [entry.sampler, entry.steps, entry.guidance, taught, entry.scheme],
                "calibration": [list(bench.context.prompts), bench.context.seed] if entry.scheme else None,
                "target": bench.target,
                "samples": [len(bench.prompts), FIRST_SEED, SEEDS, [prompt.text for prompt in bench.prompts]],
                "scorer": bench.scorer.sha256,
            }
        )

    def row(self, model: str, entry: Entry) -> Row | None:
        """The result of an entry, if it is there."""
        file = self.file("results", model, entry, ".json")
        return json.loads(file.read_bytes()) if file.exists() else None

    def array(self, model: str, entry: Entry, kind: str) -> np.ndarray:
        """An array that was kept with a result."""
        with np.load(self.file("arrays", model, entry, ".npz"), allow_pickle=False) as kept:
            found: np.ndarray = kept[kind]
        return found

    def prepared(self, model: str, entry: Entry) -> LatentDiffusion:
        """The teacher with the entry's sampler, or a student that has been trained.

        Raises:
            RefusedError: the student has not, or the scheduler takes no such number of steps.
        """
        if entry.student:
            folder = folder_of(self.build, self.bench.models[model], model, entry.student)
            if not folder.exists():
                raise RefusedError(
                    f"{model}: the student of {entry.student} is not trained yet: run "
                    "python -m recipes.benchmarks.distillation.students"
                )
            found = load(folder)
        else:
            run = Run(model, entry.sampler, entry.steps)
            found = sampled(self.bench.models[model].clone(networks=False), run, entry.steps, entry.guidance)
        if entry.scheme:
            step = Quantize(scheme=entry.scheme)
            edits = step.plan(found, self.bench.context.targets)
            step.apply(found, edits, self.bench.context)
            step.check(found, edits)
        return found

    def engine(self, model: str, entry: Entry) -> tuple[Path, StepPlan]:
        """The folder of an entry's engine, exported unless it is there, and the plan to run it by."""
        found = self.prepared(model, entry)
        name = "-".join(filter(None, (model, entry.student.replace(" ", "-"), entry.scheme)))
        part = self.inputs(model, entry) if entry.scheme else None
        return self.bench.engine(found, name, part), planned(found)

    @functools.cached_property
    def renders(self) -> np.ndarray:
        """Features of a drawn scene of every prompt, (samples, width)."""
        return self.bench.scorer.score(rendered(self.bench.prompts)).features

    def measure(self, model: str, entry: Entry) -> Row:
        """Measure an entry, and keep its result; of the full run also what others are compared with."""
        bench, row = self.bench, self._head(model, entry)
        try:
            runtime = bench.runtime(*self.engine(model, entry))
        except RefusedError as error:
            if entry.student:
                raise
            return row | {"refused": str(error)}
        latents = bench.latents(runtime)
        pictures = bench.pictures(runtime, latents)
        scores = bench.scorer.score(pictures)
        labels = [prompt.attributes for prompt in bench.prompts]
        hits = metrics.attribute_hits(scores.logits, bench.scorer.heads, labels)
        row |= {
            "attributes": metrics.attribute_accuracy(hits).to_dict(),
            "frechet_renders": metrics.frechet_distance(scores.features, self.renders, paired=True).to_dict(),
            "diversity": self.diversity(runtime, scores.features).to_dict(),
        }
        arrays = {"pictures": pictures[:SHOWN]}
        if entry == full(model):
            arrays |= {"latents": latents, "features": scores.features, "hits": hits}
        else:
            row |= self._compared(model, latents, scores.features, hits)
        if entry.student:
            row |= trained(self.prepared(model, replace(entry, scheme="")))
        file = self.file("arrays", model, entry, ".npz")
        file.parent.mkdir(parents=True, exist_ok=True)
        making = file.with_name(f".{file.name}")
        np.savez_compressed(making, **arrays)
        making.replace(file)
        return row

    def _head(self, model: str, entry: Entry) -> Row:
        return {
            "model": model,
            "entry": str(entry),
            "sampler": entry.sampler,
            "student": entry.student,
            "steps": entry.steps,
            "guidance": entry.guidance,
            "scheme": entry.scheme,
            "evaluations": entry.evaluations,
            "target": self.bench.target,
            "samples": len(self.bench.prompts),
            "date": datetime.date.today().isoformat(),
            "processor": processor_name(),
            "inputs": self.inputs(model, entry),
        }

    def _compared(self, model: str, latents: np.ndarray, features: np.ndarray, hits: np.ndarray) -> Row:
        """Against the teacher with all steps, from the same noise."""
        whole = full(model)
        return {
            "change_points": points(metrics.accuracy_change(self.array(model, whole, "hits"), hits)),
            "frechet_teacher": metrics.frechet_distance(
                features, self.array(model, whole, "features"), paired=True
            ).to_dict(),
            "latent_psnr_db": metrics.latent_psnr_db(self.array(model, whole, "latents"), latents).to_dict(),
        }

    def diversity(self, runtime: Runtime, features: np.ndarray) -> metrics.Estimate:
        """See `diversity`; the first picture of a prompt is the one that was made of it already."""
        bench = self.bench
        prompts = bench.prompts[: max(2, len(bench.prompts) // SHARE)]
        groups = [features[: len(prompts)]]
        for round_ in range(1, SEEDS):
            made, first = [], FIRST_SEED + round_ * 2**16
            for at in range(0, len(prompts), bench.batch):
                texts = [prompt.text for prompt in prompts[at : at + bench.batch]]
                seeds = [first + at + one for one in range(len(texts))]
                made.append(runtime.decode(runtime.sample(texts, seeds, SIDE, SIDE)))
            groups.append(bench.scorer.score(np.concatenate(made)).features)
        return diversity(np.stack(groups, axis=1))


def diversity(features: np.ndarray) -> metrics.Estimate:
    """Mean distance between the pictures of one prompt, with the normal 95 % interval over prompts.

    Args:
        features: (prompts, seeds, width).
    """
    pairs = itertools.combinations(range(features.shape[1]), 2)
    each = [np.linalg.norm(features[:, one].astype(np.float64) - features[:, other], axis=1) for one, other in pairs]
    return metrics.mean(np.mean(each, axis=0))


def rendered(prompts: Sequence[Prompt]) -> np.ndarray:
    """A drawn scene of every prompt, the first of the held-out ones with that caption; uint8 (n, 64, 64, 3).

    Raises:
        RefusedError: a prompt is the caption of none of them.
    """
    where: dict[str, int] = {}
    wanted = [prompt.text for prompt in prompts]
    for seed, ids in enumerate(attribute_ids("heldout", 0, 8 * max(64, len(set(wanted))))):
        where.setdefault(caption(ids), seed)
    missing = [text for text in wanted if text not in where]
    if missing:
        raise RefusedError(f"no held-out scene has the caption {missing[0]!r}: take the prompts of heldout.jsonl")
    drawn = {text: draw_scenes("heldout", where[text], 1).images[0].numpy() for text in set(wanted)}
    pictures = np.stack([drawn[text] for text in wanted]).transpose(0, 2, 3, 1)
    found: np.ndarray = np.round(255 * pictures).clip(0, 255).astype(np.uint8)
    return found


def trained(model: LatentDiffusion) -> Row:
    """How the weights came about: updates and seconds of all lessons."""
    taught = [entry for entry in model.provenance if "trained" in entry]
    return {
        "lessons": [{name: entry[name] for name in ("trained", "updates", "seconds")} for entry in taught],
        "training_seconds": sum(entry["seconds"] for entry in taught),
    }


def do(study: Study, model: str, wanted: Sequence[Entry], say: Callable[[str], Any] = print) -> list[str]:
    """Measure what is not measured yet; returns the students that are not there."""
    absent = []
    for entry in wanted:
        if study.row(model, entry) is not None:
            continue
        try:
            row = study.measure(model, entry)
        except RefusedError as error:
            say(str(error))
            absent.append(f"{model} {entry}")
            continue
        write(study.file("results", model, entry, ".json"), encoded(row))
        say(f"{model} {entry}: {row.get('refused') or said(row)}")
    return absent


def said(row: Row) -> str:
    """A result on one line."""
    return (
        f"{100 * row['attributes']['value']:.2f} %, Frechet {row['frechet_renders']['value']:.3f} to renders, "
        f"diversity {row['diversity']['value']:.3f}"
    )
