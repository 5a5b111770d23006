"""Trains the students of the distillation benchmark, one after the other, and keeps each by what it was taught."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.distill import Distill
from compress.progress import Progress
from compress.prompts import read_prompts
from compress.store import Store
from recipes.benchmarks.caching.bench import GUIDANCE, REFERENCE, ROOT, SIDE, sampled
from recipes.benchmarks.caching.presets import SAMPLERS, Run
from recipes.benchmarks.caching.results import key

BUILD = ROOT / "build" / "distillation"
TEACHER_STEPS = 20
PROMPTS = 256
CHAIN: Mapping[str, Mapping[str, Any]] = {
    "guidance": {"objective": "guidance", "updates": 500, "samples": 256},
    "4 steps": {"objective": "segment", "steps": 4, "updates": 600, "samples": 512},
    "2 steps": {"objective": "segment", "steps": 2, "updates": 400, "samples": 512},
    "1 step": {"objective": "segment", "steps": 1, "updates": 400, "samples": 512},
}
"""Student -> fields of `distill`; each is taught by the one before, the first by the model at `TEACHER_STEPS` steps."""


def teacher(model: LatentDiffusion, name: str) -> LatentDiffusion:
    """A copy of a reference model with the guided sampler that the first student imitates."""
    run = Run(name, next(iter(SAMPLERS[name])), TEACHER_STEPS)
    return sampled(model.clone(), run, TEACHER_STEPS)


def lessons(student: str) -> list[Mapping[str, Any]]:
    """The fields of all passes that lead to a student."""
    names = list(CHAIN)
    return [CHAIN[name] for name in names[: names.index(student) + 1]]


def folder_of(build: Path, model: LatentDiffusion, name: str, student: str) -> Path:
    """Where a student is kept, by content: the model, its sampler, and all lessons.

    Args:
        build: of the benchmark.
        model: the reference model, without a plan.
        name: of that model.
        student: of `CHAIN`.
    """
    sampler = next(iter(SAMPLERS[name]))
    asked = {
        "model": model.hash(),
        "sampler": [sampler, SAMPLERS[name][sampler], TEACHER_STEPS, GUIDANCE],
        "lessons": [dict(fields) for fields in lessons(student)],
        "prompts": [prompt.text for prompt in read_prompts(REFERENCE / "prompts" / "calibration.jsonl", PROMPTS)],
    }
    return build / "students" / name / f"{student.replace(' ', '-')}-{key(asked)}"


def learned(build: Path, model: LatentDiffusion, name: str, student: str, progress: Progress) -> LatentDiffusion:
    """A student, loaded where it is kept, else trained by the one before; a training that is killed goes on.

    Args:
        build: of the benchmark.
        model: the reference model, without a plan.
        name: of that model.
        student: of `CHAIN`.
        progress: receives (what, done, in all).
    """
    folder = folder_of(build, model, name, student)
    if folder.exists():
        return load(folder)
    names = list(CHAIN)
    at = names.index(student)
    found = learned(build, model, name, names[at - 1], progress) if at else teacher(model, name)
    texts = [prompt.text for prompt in read_prompts(REFERENCE / "prompts" / "calibration.jsonl", PROMPTS)]
    context = PassContext(texts, 0, SIDE, SIDE, progress=progress, store=Store(build / "store"))
    step = Distill(**CHAIN[student])
    edits = step.plan(found, [])
    step.apply(found, edits, context)
    step.check(found, edits)
    making = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(making, ignore_errors=True)
    found.save(making)
    making.rename(folder)
    return found


class _Said:
    """Prints progress twice a minute."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self._last >= 30.0 or done == total:
            self._last = time.monotonic()
            print(f"{time.strftime('%H:%M:%S')} {what}: {done} of {total}", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """Train what is not trained yet."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.distillation.students", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--only", nargs="+", choices=list(CHAIN), default=list(CHAIN))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--build", type=Path, default=BUILD, help="what is kept on the way")
    told = parser.parse_args(words)
    torch.set_num_threads(told.threads)
    for name in told.models:
        model = load(REFERENCE / name)
        for student in told.only:
            learned(told.build, model, name, student, _Said())
            print(f"{name} {student}: {folder_of(told.build, model, name, student)}", flush=True)


if __name__ == "__main__":
    main()
